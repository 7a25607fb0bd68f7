"""What the experiments share: their options, and the record that each of them leaves.

Every script takes the same four options::

    --seeds N    run seeds 0 to N - 1; without it 3, and 1 with --quick
    --budget F   multiply every length of training by F; 1 is the recorded run
    --quick      a run of seconds: it shows the mechanism, not the figures
    --out DIR    where the record and the pictures go: results/, and with another budget or
                 --quick tries/

A record is kept run by run, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
TRIES = Path(__file__).parent / "tries"
"""Where runs of other lengths go, unless told otherwise; git does not keep it."""

_PACKAGES = (
    *("coordconv-patch", "torch", "torchvision", "timm", "numpy"),
    *("scikit-learn", "stable-baselines3", "ale-py"),
)


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        seeds: The seeds to run.
        budget: Factor on every length of training.
        quick: Whether only the mechanism is to be shown.
        out: Folder of the record and the pictures.
        scripts: Name of the folder that the script lies in.
    """

    seeds: tuple[int, ...]
    budget: float
    quick: bool
    out: Path
    scripts: str = "paper"

    def length(self, full: int, quick: int) -> int:
        """A number of steps or epochs: ``full`` times the budget, or ``quick``."""
        return quick if self.quick else max(1, round(full * self.budget))


def parse_options(
    description: str | None, arguments: Sequence[str] | None = None, results: Path = RESULTS
) -> Options:
    """Read the options that every experiment has; one thread, so that times are CPU times.

    Args:
        description: The script's docstring; its first line is shown by ``--help``.
        arguments: The command line's; ``None``: those of this process.
        results: Where the recorded runs go unless told otherwise; tries go beside it.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="how many: 0 to N - 1 (3; with --quick 1)")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on training lengths")
    parser.add_argument("--quick", action="store_true", help="a run of seconds")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results ({results.name}/, of tries {TRIES.name}/)"
    )
    given = parser.parse_args(arguments)
    seeds = given.seeds if given.seeds is not None else 1 if given.quick else 3
    if seeds < 1:
        parser.error(f"--seeds {seeds}: write a number of 1 or more")
    if not (given.budget > 0 and math.isfinite(given.budget)):
        parser.error(f"--budget {given.budget}: write a positive factor")
    is_try = given.quick or given.budget != 1
    out = given.out or (results.with_name(TRIES.name) if is_try else results)
    torch.set_num_threads(1)
    return Options(tuple(range(seeds)), given.budget, given.quick, out, results.parent.name)


class Stopwatch:
    """Seconds of CPU time (of this process) that passed inside its ``with`` blocks.

    CPU time, not time on the clock: what else the machine does must not count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.process_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds += time.process_time() - self._started


@dataclass(frozen=True)
class Run:
    """One training run and what it led to.

    Attributes:
        parameters: Trainable parameters of the model.
        steps: Optimizer steps.
        cpu_seconds: CPU time of the training alone, evaluation left out.
        metrics: Final figures by name.
        curves: Figures over the training by name, ``"step"`` among them.
        extra: What a picture needs and no table shows; JSON-ready.
        setting: The task's variant, such as the split; filled in by the record.
        variant: The model's, such as ``"plain"`` or ``"patched"``; likewise.
        seed: Likewise.
    """

    parameters: int
    steps: int
    cpu_seconds: float
    metrics: dict[str, float]
    curves: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    setting: str = ""
    variant: str = ""
    seed: int = 0


class Record:
    """The runs of one experiment, in ``NAME.json``; a run that it has is not run again.

    Args:
        name: Of the experiment, and of its file.
        options: Where it is, and of what lengths its runs are.

    Raises:
        SystemExit: If the file holds runs of another budget, or only one of the two is quick;
            they would be lost.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        self.path = options.out / f"{name}.json"
        self.runs: list[Run] = []
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            if (stored["budget"], stored["quick"]) != (options.budget, options.quick):
                raise SystemExit(
                    f"{self.path} holds runs of other lengths ({stored['command']}); "
                    "remove it, or give another folder with --out"
                )
            self.runs = [Run(**run) for run in stored["runs"]]

    def run(self, setting: str, variant: str, seed: int, train: Callable[[], Run]) -> Run:
        """The run of this setting, variant and seed: the one kept, or a new one."""
        for run in self.runs:
            if (run.setting, run.variant, run.seed) == (setting, variant, seed):
                return run
        torch.manual_seed(seed)
        trained = train()
        names = {"setting": setting, "variant": variant, "seed": seed}
        run = Run(**(asdict(trained) | names))
        self.runs.append(run)
        self.save()
        return run

    def of(self, setting: str, variant: str) -> list[Run]:
        """The runs of one setting and variant, by seed."""
        chosen = [run for run in self.runs if (run.setting, run.variant) == (setting, variant)]
        return sorted(chosen, key=lambda run: run.seed)

    def mean(self, setting: str, variant: str, metric: str) -> float:
        """Mean of a metric over the seeds."""
        return statistics.mean(run.metrics[metric] for run in self.of(setting, variant))

    def spread(self, setting: str, variant: str, metric: str) -> float:
        """Standard deviation of a metric over the seeds; 0 for a single one."""
        values = [run.metrics[metric] for run in self.of(setting, variant)]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def save(self) -> None:
        """Write the record, whole or not at all."""
        content = {
            "experiment": self.name,
            "command": self._command(),
            "budget": self.options.budget,
            "quick": self.options.quick,
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "versions": _versions(),
            "runs": [asdict(run) for run in self.runs],
        }
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.path)

    def _command(self) -> str:
        script = f"examples/{self.options.scripts}/{self.name}.py"
        command = f"python {script} --seeds {len(self.options.seeds)}"
        if self.options.budget != 1:
            command += f" --budget {self.options.budget:g}"
        return command + (" --quick" if self.options.quick else "")

    def print_table(self) -> None:
        """Print mean and spread over the seeds, a row a setting and variant."""
        metrics = list(dict.fromkeys(name for run in self.runs for name in run.metrics))
        table = Table(title=self.name, title_justify="left")
        for heading in ("setting", "variant", "seeds", "parameters", "CPU s", *metrics):
            table.add_column(
                heading, justify="left" if heading in ("setting", "variant") else "right"
            )
        for setting, variant in dict.fromkeys((run.setting, run.variant) for run in self.runs):
            runs = self.of(setting, variant)
            table.add_row(
                setting,
                variant,
                str(len(runs)),
                f"{runs[0].parameters:,}",
                f"{statistics.mean(run.cpu_seconds for run in runs):.1f}",
                *(self._cell(setting, variant, metric) for metric in metrics),
            )
        Console().print(table)

    def _cell(self, setting: str, variant: str, metric: str) -> str:
        if any(metric not in run.metrics for run in self.of(setting, variant)):
            return ""
        mean, spread = (f(setting, variant, metric) for f in (self.mean, self.spread))
        return f"{mean:.4g} ± {spread:.2g}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        if package.replace("-", "_") in _imported():
            found[package] = importlib.metadata.version(package)
    return found


def _imported() -> set[str]:
    distributions = {"sklearn": "scikit_learn"}
    return {distributions.get(name, name) for name in sys.modules if "." not in name}


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
