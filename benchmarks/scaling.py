"""How the cost of coordinates grows: with the patched convolutions, the resolution, the batch.

ResNet-50 in ONNX Runtime's CPU provider, patched by this package and by a concatenating port
(with its coordinates in buffers), against the plain model in the same run.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.engines import onnxruntime_run
from shared.graphs import write_plainly, write_verified
from shared.models import MODELS, QUICK, images
from shared.ports import BufferCoords, ported
from shared.record import Record, make_parser, open_record, ratios_of, timed
from shared.show import Line, draw_lines, print_ratios
from shared.variants import patched, patched_names, seeded
from torch import nn
from tqdm.auto import tqdm

NAME = "scaling"
PLAIN, PATCHED, PORT = "plain", "patched", "port, buffer"
AXES = {
    "convolutions": "convolutions patched, evenly spread over the network",
    "size": "height and width of the image, px (every convolution patched)",
    "batch": "batch size (every convolution patched)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", ("resnet50",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 13, 27, 53])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 160, 224, 320])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.threads = [QUICK], 1
        options.counts, options.sizes, options.batches = [1, 3], [32], [1]
    record = open_record(options, NAME)
    for name in [] if options.show else options.models:
        measure(name, options, record)
    print_ratios({key: ratios_of(result) for key, result in record.results.items()})
    panels: dict[str, dict[str, Line]] = {}
    for axis in AXES:
        variants: dict[str, dict[float, Any]] = {PATCHED: {}, PORT: {}}
        for key, result in record.results.items():
            _, what, number = key.split(", ")
            if what == axis:
                for variant, points in variants.items():
                    points[float(number)] = ratios_of(result)[variant]
        panels[axis] = variants
    draw_lines(panels, "How the cost grows", options.picture, list(AXES.values()))


def measure(name: str, options: argparse.Namespace, record: Record) -> None:
    """Measure one model along the three axes."""
    model = MODELS[name]
    plain = seeded(model.make)
    example = images(2, model.size)
    sites = patched_names(patched(plain, "all", example))
    settings: list[tuple[str, int, list[str], int, int]] = []
    for count in options.counts:
        chosen = [sites[index * len(sites) // count] for index in range(min(count, len(sites)))]
        settings.append(("convolutions", len(chosen), chosen, model.size, 1))
    settings += [("size", size, sites, size, 1) for size in options.sizes]
    settings += [("batch", batch, sites, model.size, batch) for batch in options.batches]
    for axis, number, chosen, size, batch in tqdm(settings, desc=model.title, disable=None):
        key = f"{name}, {axis}, {number}"
        record.measure(key, _measure, plain, chosen, size, batch, options, key)


def _measure(
    plain: nn.Module,
    chosen: list[str],
    size: int,
    batch: int,
    options: argparse.Namespace,
    key: str,
) -> Mapping[str, Any]:
    example = images(2, size)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in (PLAIN, PATCHED, PORT)}
        write_plainly(plain, example, files[PLAIN])
        write_verified(patched(plain, chosen, example), example, files[PATCHED])
        write_plainly(ported(plain, chosen, BufferCoords, example), example, files[PORT])
        shown = images(batch, size)
        runs = {name: onnxruntime_run(path, shown, options.threads) for name, path in files.items()}
        return timed(runs, PLAIN, options, key)


if __name__ == "__main__":
    main()
