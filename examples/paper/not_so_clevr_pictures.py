"""What the pictures of the supervised experiments share: colours, curves, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from palette import GRID, INK, MUTED, ORANGE
from PIL import Image
from torch import Tensor

STACK_LINE = (ORANGE, "transposed convs")
"""Colour and name of the stack of transposed convolutions, whichever was chosen."""


def new_figure(width: float, height: float, title: str, subtitle: str) -> tuple[Figure, Any]:
    """A figure with its message on top, and the part below for everything else.

    Args:
        width: Inches; so is the height.
        height: See ``width``.
        title: The message, one line.
        subtitle: What was done, one or two lines.
    """
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    FigureCanvasAgg(figure)
    heading = 0.78 + 0.2 * subtitle.count("\n")
    header, body = figure.subfigures(2, 1, height_ratios=[heading, height - heading])
    header.text(0.01, 0.94, title, size=16, weight="bold", color=INK, va="top")
    header.text(0.01, 0.06, subtitle, size=10.5, color=MUTED, va="bottom", linespacing=1.4)
    return figure, body


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG of 256 colours, a third of the size.

    They are chosen for the smallest largest error, not the smallest mean one: a colour of few
    pixels, such as a thin line's, stays what it is.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def plain_axes(axes: Any) -> None:
    """Take off what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=10)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def curves(axes: Any, record: Record, setting: str, lines: Mapping[str, tuple[str, str]]) -> None:
    """Draw test scores over CPU seconds, on a logarithmic axis; one line a seed.

    Args:
        axes: Where.
        record: Of the runs.
        setting: Which of them.
        lines: By variant: colour, and the name that the legend shows.
    """
    for variant, (colour, name) in lines.items():
        for number, run in enumerate(record.of(setting, variant)):
            axes.plot(
                run.curves["CPU seconds"],
                run.curves["test"],
                color=colour,
                lw=1.8,
                alpha=0.9,
                marker="o",
                ms=3,
                label=name if number == 0 else None,
            )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low < tick < high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9.5, loc="upper left")
    axes.set_xlabel("CPU seconds of training", color=INK, size=10.5)
    plain_axes(axes)


def draw_splits(
    message: tuple[str, str],
    stacks: Mapping[str, str],
    upper: Callable[[Any, str, str], None],
    lower: Callable[[Any, str, str], None],
    *,
    ratio: float,
    path: Path,
) -> None:
    """Draw two things a split, one above the other, and write the picture.

    Args:
        message: Title and subtitle.
        stacks: By split, the variant of the transposed convolutions.
        upper: Draws the one, given its part of the figure, the split and that variant.
        lower: Likewise.
        ratio: Height of the upper part, in heights of the lower one.
        path: The PNG file.
    """
    figure, body = new_figure(13, 9, *message)
    parts = np.atleast_1d(body.subfigures(1, len(stacks)))
    for part, (split, stack) in zip(parts, stacks.items(), strict=True):
        above, below = part.subfigures(2, 1, height_ratios=[ratio, 1])
        upper(above, split, stack)
        lower(below, split, stack)
    save(figure, path)


def split_curves(
    axes: Any,
    record: Record,
    split: str,
    stack: str,
    lines: Mapping[str, tuple[str, str]],
    *,
    metric: str,
    form: str,
) -> None:
    """Draw a split's :func:`curves`, titled by what the patched net and the stack came to.

    Args:
        axes: Where.
        record: Of the runs.
        split: Which of them.
        stack: The variant of the transposed convolutions.
        lines: Of the other variants, see :func:`curves`.
        metric: The test score.
        form: Its format.
    """
    curves(axes, record, split, {**lines, stack: STACK_LINE})
    axes.set_ylim(-0.03, 1.09)
    axes.set_ylabel(metric, color=INK)
    final = ", ".join(
        f"{name} {record.mean(split, variant, metric):{form}}"
        for variant, name in (("patched", "patched"), (stack, STACK_LINE[1]))
    )
    title = f"{split.capitalize()} split: {final}"
    axes.set_title(title, loc="left", size=12, weight="bold", color=INK)


def stack_sizes(record: Record, stacks: Mapping[str, str]) -> str:
    """Parameters of the transposed convolutions, such as ``"103,585 and 409,921"``."""
    sizes = {record.of(split, stack)[0].parameters for split, stack in stacks.items()}
    return " and ".join(f"{size:,}" for size in sorted(sizes))


def image_rows(
    part: Any,
    rows: Mapping[str, tuple[str, Tensor]],
    titles: Sequence[str],
    corner: tuple[int, int],
    mark: Callable[[Any, int], None],
) -> None:
    """Draw rows of square images of values from 0 to 1, a row a net.

    Args:
        part: The part of the figure.
        rows: By the row's label: its colour, and images of shape ``(N, height, width)``.
        titles: Of the N columns.
        corner: Canvas pixel (x, y) at the upper left of every image.
        mark: Draws the truth, in canvas pixels, given the axes and the column's number.
    """
    left, top = corner
    grid = part.subplots(len(rows), len(titles), squeeze=False)
    for row, (label, (colour, images)) in enumerate(rows.items()):
        height, width = images.shape[1:]
        extent = (left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5)
        for column, axes in enumerate(grid[row]):
            axes.imshow(images[column].numpy(), cmap="viridis", vmin=0, vmax=1, extent=extent)
            mark(axes, column)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("#9CA3AF")
            if row == 0:
                axes.set_title(titles[column], size=10, color=INK)
        grid[row][0].set_ylabel(label, size=10.5, color=colour, weight="bold")
