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
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 13, 27, 53])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 224, 320])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.threads = [QUICK], 1
        options.counts, options.sizes, options.batches = [3], [32], [1]
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
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(plain, Path(folder))
        for axis, number, chosen, size, batch in tqdm(settings, desc=model.title, disable=None):
            key = f"{name}, {axis}, {number}"
            record.measure(key, _measure, files, chosen, size, batch, options, key)


class _Files:
    """The ONNX files of a model, each written when it is first asked for."""

    def __init__(self, plain: nn.Module, folder: Path) -> None:
        self._plain = plain
        self._folder = folder
        self._written: dict[tuple[str, int, int], Path] = {}

    def of(self, variant: str, chosen: Sequence[str], size: int) -> Path:
        """The file of a variant with the chosen convolutions at one image size."""
        key = (variant, 0 if variant == PLAIN else len(chosen), size)
        if key not in self._written:
            path = self._folder / f"{len(self._written)}.onnx"
            example = images(2, size)
            if variant == PATCHED:
                write_verified(patched(self._plain, list(chosen), example), example, path)
            elif variant == PORT:
                port = ported(self._plain, chosen, BufferCoords, example)
                write_plainly(port, example, path)
            else:
                write_plainly(self._plain, example, path)
            self._written[key] = path
        return self._written[key]


def _measure(
    files: _Files,
    chosen: Sequence[str],
    size: int,
    batch: int,
    options: argparse.Namespace,
    key: str,
) -> Mapping[str, Any]:
    shown = images(batch, size)
    runs = {
        name: onnxruntime_run(files.of(name, chosen, size), shown, options.threads)
        for name in (PLAIN, PATCHED, PORT)
    }
    return timed(runs, PLAIN, options, key)


if __name__ == "__main__":
    main()
