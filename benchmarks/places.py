"""What places cost in exported files, in ONNX Runtime's CPU provider.

Each model is exported with its first and with all convolutions patched, with ``places=True`` and
without, and timed beside the plain model. "plain again" is the plain file in a second session, and
shows this machine's noise. Each file is given the place of another crop for each image. All files
are loaded and timed several times; ratios are medians of these sessions.

    python benchmarks/places.py
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from shared.graphs import write_plainly, write_verified
from shared.models import MODELS, QUICK, BenchModel, images
from shared.record import make_parser, open_record, ratios_of, timed_in_sessions
from shared.show import draw_ratios, print_ratios
from shared.variants import SELECTIONS, patched, seeded
from torch import Tensor

from coordconv_patch.runtime.providers import CPU, make_session

NAME = "places"
PLAIN = "plain"
PLACES = ", places"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", ("resnet50", "mobilenetv3"))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=["first", "all"])
    parser.add_argument("--sessions", type=int, default=5, help="that --seconds are divided by")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.batch, options.sessions = [QUICK], [2], 1
    record = open_record(options, NAME)
    for name in [] if options.show else options.models:
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Path] = {}
            for batch in options.batch:
                for threads in options.threads:
                    key = f"{name}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
                    if key not in record.results:
                        files = files or _write_files(MODELS[name], Path(folder), options)
                    record.measure(key, _measure, files, MODELS[name], batch, threads, key, options)
    ratios = {key: ratios_of(result) for key, result in record.results.items()}
    print_ratios(ratios)
    draw_ratios({"": ratios}, "Time of exported files over the plain model's", options.picture)


def _write_files(model: BenchModel, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The plain file and, of each selection, that without and that with the input ``places``."""
    plain = seeded(model.make)
    example = images(2, model.size)
    files = {PLAIN: folder / "plain.onnx"}
    write_plainly(plain, example, files[PLAIN])
    for selection in options.selections:
        made = patched(plain, SELECTIONS[selection], example)
        for name, places in ((selection, False), (selection + PLACES, True)):
            files[name] = folder / f"{len(files)}.onnx"
            write_verified(made, example, files[name], places=places)
    return files


def crops(batch: int) -> Tensor:
    """The place of another random crop for each image, (N, 2, 3)."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.2 + 0.6 * torch.rand(batch, 2, generator=generator)
    offset = (1 - scale) * (2 * torch.rand(batch, 2, generator=generator) - 1)
    return torch.cat((torch.diag_embed(scale), offset.unsqueeze(2)), dim=2)


def _measure(
    files: dict[str, Path],
    model: BenchModel,
    batch: int,
    threads: int,
    key: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    given = {"places": crops(batch).numpy()}
    shown = images(batch, model.size).numpy()
    files = {**files, "plain again": files[PLAIN]}
    sizes = {name: path.stat().st_size for name, path in files.items()}

    def load(name: str) -> Callable[[], Any]:
        session = make_session(files[name], [CPU], threads=threads, rests_between_runs=True)
        feeds = {session.get_inputs()[0].name: shown}
        return functools.partial(
            session.run, None, feeds | given if name.endswith(PLACES) else feeds
        )

    return timed_in_sessions(load, list(files), PLAIN, options, key, sizes)


if __name__ == "__main__":
    main()
