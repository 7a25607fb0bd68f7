"""Coordinate regression: from a canvas with one bright pixel to the pixel's (x, y).

    python examples/paper/regression.py

A linear net of 1x1 and 3x3 convolutions with a maximum over the canvas at its end, as it is
and after ``ccp.patch(net, "first")``, against two convolutional nets with fully connected
layers. Leaves ``regression.json`` and ``regression.png``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiment import Record, parse_options
from matplotlib.collections import LineCollection
from not_so_clevr import CANVAS, SPLITS, Split, distances, one_hot
from not_so_clevr_experiment import Net, Supervised
from not_so_clevr_nets import linear_net, pooling_net, strided_net
from not_so_clevr_packing import pack_positions, unpack_positions
from not_so_clevr_pictures import (
    new_figure,
    plain_axes,
    save,
)
from not_so_clevr_training import Recipe, Task, outputs, print_times
from palette import BY_VARIANT, GREEN, INK, ORANGE
from torch import nn

TASK = Task(
    net_input=one_hot,
    loss=lambda found, centers: F.mse_loss(found, centers / CANVAS),
    score=lambda found, centers: distances(found * CANVAS, centers).mean().item(),
    score_name="error, px",
    higher_is_better=False,
)

LINEAR = Net(linear_net, Recipe(epochs=3, rate=0.01, batch=4, quick_epochs=1))

PLAIN_NETS = {
    "pooling": Net(pooling_net, Recipe(epochs=8, rate=0.003, quick_epochs=0.5)),
    "strided": Net(strided_net, Recipe(epochs=8, rate=0.003, quick_epochs=0.5)),
}
"""The authors' plain nets for the uniform and for the quadrant split; both are run on both."""

PANELS = {
    "patched": (BY_VARIANT["patched"], "linear, patched"),
    "scrambled": (BY_VARIANT["scrambled"], "linear, scrambled coordinates"),
    "pooling": (ORANGE, "convs and max-pools, plain"),
    "strided": (GREEN, "strided convs, plain"),
}


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment, or what its record lacks, and draw it."""
    options = parse_options(__doc__, arguments)
    record = Record("regression", options)
    experiment = Supervised(record, options, TASK, {"found": found_positions})
    others = dict.fromkeys(experiment.splits, PLAIN_NETS)
    experiment.compare(LINEAR, others, control_splits=experiment.splits)
    record.print_table()
    for net in PLAIN_NETS:
        print_times(record, dict.fromkeys(experiment.splits, net), TASK)
    draw(record, options.out / "regression.png")
    return record


def found_positions(net: nn.Module, centers: Split) -> str:
    """The net's answers on the test centres, packed."""
    return pack_positions(outputs(net, centers.test, TASK) * CANVAS)


EXACT = 0.01
"""Pixels: an error below counts as none."""


def draw(record: Record, path: Path) -> None:
    """Draw where the nets of the first seed say that the held-out pixels are."""
    splits = [split for split in SPLITS if record.of(split, "patched")]
    figure, body = new_figure(15, 1.2 + 4.2 * len(splits), *_message(record, splits))
    grid = body.subplots(len(splits), len(PANELS), squeeze=False, sharex=True, sharey=True)
    for row, split in zip(grid, splits, strict=True):
        for axes, (variant, (colour, name)) in zip(row, PANELS.items(), strict=True):
            if not record.of(split, variant):  # the experiment was interrupted
                axes.set_axis_off()
                continue
            _draw_answers(axes, record, split, variant, colour)
            errors = [run.metrics["test error, px"] for run in record.of(split, variant)]
            digits = ", ".join(f"{e:.2g}" if e > 0.001 else f"{e:.6f}" for e in errors)
            unit = "px by seed" if len(errors) > 1 else "px"
            title = f"{name}\n{digits} {unit}"
            axes.set_title(title, loc="left", size=11, weight="bold", color=colour)
        row[0].set_ylabel(f"{split} split\ny, pixels", size=11, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("x, pixels", color=INK)
    save(figure, path)


def _message(record: Record, splits: list[str]) -> tuple[str, str]:
    """Title and subtitle, made from what was measured."""
    runs = [run for split in splits for run in record.of(split, "patched")]
    exact = sum(run.metrics["test error, px"] < EXACT for run in runs)
    numbers = {
        variant: record.of("uniform", variant)[0].parameters for variant in ("patched", *PLAIN_NETS)
    }
    title = (
        f"Where is the bright pixel? Patched, a linear net says it to {EXACT} px "
        f"in {exact} of {len(runs)} runs"
    )
    subtitle = (
        "A dot is the answer to a held-out pixel, a line leads there from the truth; first seed. "
        "Errors: means over all held-out pixels.\n"
        f"Parameters: patched linear net {numbers['patched']:,}, convolutions with max-pools "
        f"{numbers['pooling']:,}, strided convolutions {numbers['strided']:,}."
    )
    return title, subtitle


def _draw_answers(axes: Any, record: Record, split: str, variant: str, colour: str) -> None:
    true = SPLITS[split]().test.float()
    found = unpack_positions(record.of(split, variant)[0].extra["found"])
    axes.add_collection(
        LineCollection(torch.stack((true, found), 1).numpy(), colors="#9CA3AF", lw=0.5, alpha=0.6)
    )
    axes.scatter(*found.T.numpy(), s=5, color=colour, lw=0, zorder=2)
    axes.set_xlim(-2, CANVAS + 2)
    axes.set_ylim(CANVAS + 2, -2)
    axes.set_aspect("equal")
    plain_axes(axes)


if __name__ == "__main__":
    main()
