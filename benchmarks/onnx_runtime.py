"""What coordinates cost in exported files: ONNX Runtime's CPU provider, and OpenVINO.

Each model is timed with its first, every larger than 1x1, and all convolutions patched (by
``export_onnx``: with its defaults, and for OpenVINO with ``lowering="branch"``), beside the
plain model and concatenating ports, all exported for any batch size. "plain" is what
``torch.onnx.export`` makes of the plain model; "plain again" is the same file in a second
session, and shows this machine's noise. All files are loaded and timed several times; ratios are
medians of these sessions. The floor is explained in shared/floor.py.

    python benchmarks/onnx_runtime.py
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from shared.engines import ENGINES, LOWERINGS
from shared.floor import write_floor
from shared.graphs import write_plainly, write_verified
from shared.models import MODELS, QUICK, BenchModel, images
from shared.ports import BufferCoords, RuntimeCoords, ported
from shared.record import make_parser, open_record, ratios_of, timed_in_sessions
from shared.show import draw_ratios, print_ratios
from shared.variants import SELECTIONS, patched, patched_names, seeded
from tqdm.auto import tqdm

NAME = "onnx_runtime"
PLAIN = "plain"


DRAWN = ("first", "k>1", "all", "all, floor", "all, port, buffer")
"""What the picture shows; the table has everything."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", tuple(name for name in MODELS if name != QUICK))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--sessions", type=int, default=3, help="that --seconds are divided by")
    options = parser.parse_args(arguments)
    if options.quick:
        options.selections, options.sessions = ["all"], 1
        options.models, options.batch, options.threads = [QUICK], [2], [1]
    record = open_record(options, NAME)
    for name in [] if options.show else options.models:
        combinations = _combinations(name, options)
        missing = {key: what for key, what in combinations.items() if key not in record.results}
        if not missing:
            tqdm.write(f"{name}: there already")
            continue
        with tempfile.TemporaryDirectory() as folder:
            lowerings = {LOWERINGS[engine] for engine, _, _ in missing.values()}
            files = write_files(MODELS[name], Path(folder), options.selections, lowerings)
            for key, (engine, batch, threads) in missing.items():
                chosen = {
                    variant: path
                    for (variant, lowering), path in files.items()
                    if lowering in (None, LOWERINGS[engine])
                }
                record.measure(
                    key, _measure, chosen, MODELS[name], engine, batch, threads, key, options
                )
    print_ratios({key: ratios_of(result) for key, result in record.results.items()})
    panels: dict[str, dict[str, Any]] = {}
    for key, result in record.results.items():
        name, engine, rest = key.split(", ", 2)
        ratios = {name: ratio for name, ratio in ratios_of(result).items() if name in DRAWN}
        panels.setdefault(f"{MODELS[name].title}, {engine}", {})[rest] = ratios
    draw_ratios(panels, "Time of exported files over the plain model's", options.picture)


def _combinations(name: str, options: argparse.Namespace) -> dict[str, tuple[str, int, int]]:
    """By key: engine, batch and threads. OpenVINO runs with the most threads only."""
    found = {}
    for engine in options.engines:
        numbers = options.threads if engine == "onnxruntime" else [max(options.threads)]
        for batch, threads in product(options.batch, numbers):
            key = f"{name}, {engine}, batch {batch}, threads {threads}"
            found[key] = (engine, batch, threads)
    return found


def write_files(
    model: BenchModel, folder: Path, selections: Sequence[str], lowerings: Collection[str]
) -> dict[tuple[str, str | None], Path]:
    """Export every variant, the plain model first; by name, and lowering if it is patched."""
    plain = seeded(model.make)
    example = images(2, model.size)
    write = functools.partial
    makers: dict[tuple[str, str | None], Callable[[Path], None]] = {
        (PLAIN, None): write(write_plainly, plain, example),
        ("plain, by export_onnx", None): write(write_verified, plain, example),
    }
    for selection in selections:
        made = patched(plain, SELECTIONS[selection], example)
        names = patched_names(made)
        for lowering in sorted(lowerings):
            makers[selection, lowering] = write(write_verified, made, example, lowering=lowering)
        port = ported(plain, names, BufferCoords, example)
        makers[f"{selection}, port, buffer", None] = write(write_plainly, port, example)
    # Its cost beside the other port's does not depend on which convolutions have it.
    port = ported(plain, names, RuntimeCoords, example)
    makers[f"{selection}, port, run time", None] = write(write_plainly, port, example)
    files: dict[tuple[str, str | None], Path] = {}
    progress = tqdm(makers.items(), disable=None, leave=False)
    for number, (variant, make) in enumerate(progress):
        progress.set_description(f"{model.title}: exporting {variant[0]}")
        files[variant] = folder / f"{number}.onnx"
        make(files[variant])
    return files


def _measure(
    files: dict[str, Path],
    model: BenchModel,
    engine: str,
    batch: int,
    threads: int,
    key: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    shown = images(batch, model.size)
    files = {**files, "plain again": files[PLAIN]}
    if engine == "onnxruntime":
        for selection in options.selections:
            number = list(SELECTIONS).index(selection)
            path = files[PLAIN].with_name(f"floor-{number}-batch-{batch}.optimised")
            if not path.exists():
                write_floor(files[PLAIN], path, shown, selection)
            files[f"{selection}, floor"] = path
    sizes = {name: path.stat().st_size for name, path in files.items() if path.suffix == ".onnx"}

    def load(name: str) -> Callable[[], Any]:
        return ENGINES[engine](files[name], shown, threads)

    return timed_in_sessions(load, list(files), PLAIN, options, key, sizes)


if __name__ == "__main__":
    main()
