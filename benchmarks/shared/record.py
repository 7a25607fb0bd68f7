"""Results as JSON: where they were measured, how, and what came out; resumable."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from coordconv_patch.bench.machine import describe_machine
from coordconv_patch.runtime.timing import Ratio, alternate, median, ratio_of_medians

__all__ = [
    "RESULTS",
    "Record",
    "make_parser",
    "median_session",
    "open_record",
    "ratios_of",
    "timed",
    "timed_in_sessions",
]

RESULTS = Path(__file__).parents[1] / "results"
_PACKAGES = ("timm", "torchvision", "ultralytics", "openvino")
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 40


class Record:
    """A file of results; every result is written as soon as it is there.

    A record is of one machine with one set of versions: what was measured elsewhere cannot
    stand beside it.

    Args:
        path: The JSON file; ``None``: nothing is kept.
        command: The command that measures it.
        fresh: Start anew, whatever the file has.
    """

    def __init__(self, path: Path | None, command: str, *, fresh: bool = False) -> None:
        self.path = path
        self.machine = describe_machine(_PACKAGES).to_dict()
        self.commands = [command]
        self.results: dict[str, Any] = {}
        if path is None or fresh or not path.is_file():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("machine") != self.machine:
            raise SystemExit(
                f"{path} was measured on another machine or with other versions: write --fresh "
                "to measure anew, or another --out"
            )
        self.commands = list(dict.fromkeys([*found["commands"], command]))
        self.results = found["results"]

    def measure(self, key: str, what: Callable[..., Any], *arguments: Any) -> None:
        """Measure one combination, ``what(*arguments)``, unless it is there; write it down."""
        if key in self.results:
            tqdm.write(f"{key}: there already", file=sys.stderr)
            return
        self.results[key] = what(*arguments)
        if self.path is None:
            return
        content = {"commands": self.commands, "machine": self.machine, "results": self.results}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def make_parser(description: str, models: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options that all benchmarks have.

    Args:
        description: The script's docstring.
        models: Names of the models that are measured without ``--models``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(models), metavar="NAME")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="time for each combination, about"
    )
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/")
    parser.add_argument("--picture", type=Path, help="PNG file; default: beside the JSON file")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--show", action="store_true", help="measure nothing: print and draw what is there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network, two rounds; kept only with --out"
    )
    return parser


def open_record(options: argparse.Namespace, script: str) -> Record:
    """The record of a script, by its options; sets the default of ``--picture``.

    Args:
        options: As parsed by :func:`make_parser`'s parser.
        script: The script's name without ``.py``.
    """
    path: Path | None = options.out or (None if options.quick else RESULTS / f"{script}.json")
    if options.picture is None and path is not None:
        options.picture = path.with_suffix(".png")
    if options.show:
        record = Record(None, "")
        if path is None or not path.is_file():
            raise SystemExit(f"there is no record {path} to show")
        record.results = json.loads(path.read_text(encoding="utf-8"))["results"]
        return record
    # Of a path of this machine the name is enough.
    arguments = [
        Path(argument).name if Path(argument).is_absolute() else argument
        for argument in sys.argv[1:]
        if argument != "--fresh"
    ]
    command = shlex.join(["python", f"benchmarks/{script}.py", *arguments])
    return Record(path, command, fresh=options.fresh)


def timed(
    runs: Mapping[str, Callable[[], Any]],
    base: str,
    options: argparse.Namespace,
    title: str,
    sizes: Mapping[str, int] | None = None,
    *,
    parts: int = 1,
) -> dict[str, Any]:
    """Time actions in turns for about ``--seconds``, and compare each with one of them.

    Args:
        runs: The actions by name.
        base: The name of the one that the others are compared with.
        options: ``seconds`` and ``quick``.
        title: What the progress bar says.
        sizes: Bytes of each action's file, to be kept beside its times.
        parts: How many calls share ``--seconds``.

    Returns:
        ``{"rounds": R, "variants": {name: {"seconds", "ratio", "ratio_95", "file_size"}}}``.
    """
    trial = alternate(runs, repeats=1, warm_up=1, description=f"{title}, warming up")
    one_round = sum(times[0] for times in trial.values())
    rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(options.seconds / parts / one_round)))
    seconds = alternate(runs, repeats=2 if options.quick else rounds, warm_up=0, description=title)
    variants: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratio = ratio_of_medians(times, seconds[base])
        variants[name] = {
            "seconds": median(times),
            "ratio": ratio.value,
            "ratio_95": [ratio.low, ratio.high],
        }
        if sizes and name in sizes:
            variants[name]["file_size"] = sizes[name]
    return {"rounds": len(seconds[base]), "variants": variants}


def timed_in_sessions(
    load: Callable[[str], Callable[[], Any]],
    names: Sequence[str],
    base: str,
    options: argparse.Namespace,
    title: str,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Load files anew and time them, several times; the rest as :func:`timed`.

    Args:
        load: Loads the file of a name, and returns what runs it once.
        names: The files' names, in the order that the result has.
        base: As :func:`timed`; so for the others.
        options: ``sessions``, and ``seconds``, which they share.
        title: See ``base``.
        sizes: See ``base``.

    Returns:
        As :func:`median_session`.
    """
    found = []
    for number in range(options.sessions):
        # Loaded first, a file took up to 5 percent longer than loaded last: the order changes too.
        order = random.Random(number).sample(names, len(names))
        runs = {name: load(name) for name in order}
        found.append(timed(runs, base, options, title, sizes, parts=options.sessions))
    result = median_session(found)
    return {**result, "variants": {name: result["variants"][name] for name in names}}


def median_session(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results of :func:`timed`, as one.

    Where a runtime finds its memory decides about percents, and no repetition within a session
    or a process helps.

    Args:
        found: Of the same actions, each made anew.

    Returns:
        As :func:`timed` does; of each variant the session whose ratio is the median (of an even
        number the larger of the middle two), and ``"ratio_by_session"``.
    """
    variants: dict[str, dict[str, Any]] = {}
    for name in found[0]["variants"]:
        sessions = [result["variants"][name] for result in found]
        ratios = [session["ratio"] for session in sessions]
        middle = sorted(sessions, key=lambda session: float(session["ratio"]))[len(sessions) // 2]
        variants[name] = {**middle, "ratio_by_session": ratios}
    return {"rounds": sum(result["rounds"] for result in found), "variants": variants}


def ratios_of(result: Mapping[str, Any]) -> dict[str, Ratio]:
    """The ratios in what :func:`timed` returned, by variant."""
    return {
        name: Ratio(variant["ratio"], *variant["ratio_95"])
        for name, variant in result["variants"].items()
    }
