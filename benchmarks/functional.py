"""What coordinates cost a convolution that is called as a function, eager and compiled.

One 3x3 convolution of 64 channels on 64 x 64, batch 1, by ``F.conv2d`` in a module's forward.
The floor is the same with a constant map added to the output.

    python benchmarks/functional.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from shared.processes import median_process
from shared.record import make_parser, open_record, ratios_of, timed
from shared.show import draw_ratios, print_ratios
from shared.variants import patched
from torch import Tensor, nn

NAME = "functional"
CHANNELS, SIZE = 64, 64
CALLS = 20
"""In one timed action: a single call is too short."""
PROCESSES = 5
"""How many processes a figure is the median of."""


class Functional(nn.Module):
    """A convolution without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class FunctionalAndMap(Functional):
    """What any map costs at least: its addition."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("map", torch.randn(1, CHANNELS, SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.map


def _measured(compiled: bool, options: argparse.Namespace, key: str) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x, plain = torch.randn(1, CHANNELS, SIZE, SIZE), Functional()
    kinds = {
        "plain": plain,
        "plain again": copy.deepcopy(plain),
        "all": patched(plain, "all", x),
        "floor": FunctionalAndMap(),
    }
    runs: dict[str, Callable[[], None]] = {}
    for kind, model in kinds.items():
        model.eval()
        runs[kind] = _calls(torch.compile(model, fullgraph=True) if compiled else model, x)
    return timed(runs, "plain", options, key)


def _calls(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                model(x)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", ())
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    record = open_record(options, NAME)
    count = 1 if options.quick else PROCESSES
    for compiled in () if options.show else (False, True):
        key = "compiled" if compiled else "eager"
        measure = partial(median_process, processes=count)
        record.measure(key, measure, _measured, compiled, options, key)
    ratios = {key: ratios_of(result) for key, result in record.results.items()}
    print_ratios(ratios)
    rows = {
        key: {kind: ratio for kind, ratio in row.items() if kind != "plain"}
        for key, row in ratios.items()
    }
    title = "Time of a functional convolution over the plain one's"
    draw_ratios({"F.conv2d, 3x3": rows} if rows else {}, title, options.picture)


if __name__ == "__main__":
    main()
