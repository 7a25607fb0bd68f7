"""Drawing shared by the pictures of the paper's experiments that compare variants seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from palette import GRID, INK, MUTED


def dots(
    axes: Any,
    row: float,
    values: Sequence[float],
    colour: str,
    *,
    marker: str = "o",
    reach: float = 0.32,
) -> None:
    """One dot a seed and a bar at their mean.

    Args:
        axes: Where; values run along x.
        row: Position along y.
        values: One a seed.
        colour: Of the dots and the bar.
        marker: Shape of the dots.
        reach: Half the bar's length, in rows.
    """
    axes.plot(values, [row] * len(values), marker, color=colour, alpha=0.55, ms=7, mew=0)
    axes.plot([mean(values)] * 2, [row - reach, row + reach], color=colour, lw=3)


def note(axes: Any, row: float, text: str, colour: str, *, outside: bool = False) -> None:
    """Write a row's figure at the right edge of the axes, inside of it or beside it.

    Args:
        axes: Where.
        row: Position along y.
        text: What is written.
        colour: Of the text.
        outside: Whether it stands beside the axes.
    """
    axes.annotate(
        text,
        (1.01 if outside else 1.0, row),
        xycoords=("axes fraction", "data"),
        ha="left" if outside else "right",
        va="center",
        color=colour,
        weight="bold",
    )


def bare(axes: Any) -> None:
    """No frame but the lower line; light vertical grid."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
