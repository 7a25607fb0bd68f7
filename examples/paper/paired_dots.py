"""Drawing shared by the pictures of the paper's experiments that compare variants seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

# Okabe and Ito's colours, which people with any colour vision can tell apart.
VERMILION, BLUE, GREEN, PURPLE, ORANGE = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"
VIOLET = "#6A3D9A"  # Not theirs, but far from all of these.
MUTED, INK = "#6B7280", "#1F2933"


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


def bare(axes: Any) -> None:
    """No frame but the lower line; light vertical grid."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color="#E5E7EB", lw=0.8)
    axes.set_axisbelow(True)
