"""Tables and pictures of results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordconv_patch.bench.report import markdown_table
from coordconv_patch.runtime.timing import Ratio

__all__ = ["Line", "draw_lines", "draw_ratios", "print_ratios"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B7280")
_INK, _MUTED, _GRID = "#1F2933", "#6B7280", "#E4E7EB"

Line = Mapping[float, Ratio]
"""A ratio for each value on the horizontal axis."""


def print_ratios(results: Mapping[str, Mapping[str, Ratio]]) -> None:
    """Print a Markdown table: one row for each combination, one column for each variant."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    rows = [
        (what, *(f"{row[name].value:.3f}" if name in row else "" for name in names))
        for what, row in results.items()
    ]
    print("\n".join(markdown_table(("ratio of medians", *names), rows)))


def draw_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, Ratio]]], title: str, path: Path | None
) -> None:
    """Draw dots with 95 % intervals.

    Args:
        panels: For each panel's title, for each row's label, each variant's ratio.
        title: The picture's title.
        path: The file; ``None``: nothing is drawn.
    """
    if path is None or not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    most = max(len(rows) for rows in panels.values())
    figure = _figure(5.2 * columns, 1.1 + lines * (0.9 + 0.42 * most), title)
    axes_of: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in axes_of.flat[len(panels) :]:
        axes.set_axis_off()
    names = list(
        dict.fromkeys(name for rows in panels.values() for row in rows.values() for name in row)
    )
    colour_of = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    for axes, (panel, rows) in zip(axes_of.flat, panels.items(), strict=False):
        axes.axvline(1.0, color=_MUTED, lw=1)
        for place, row in enumerate(rows.values()):
            for index, (name, ratio) in enumerate(row.items()):
                height = place + (index + 0.5) / len(row) * 0.7 - 0.35
                axes.plot([ratio.low, ratio.high], [height] * 2, color=colour_of[name], lw=1.6)
                axes.plot(ratio.value, height, "o", color=colour_of[name], ms=4)
        axes.set_yticks(range(len(rows)), list(rows), size=9)
        axes.invert_yaxis()
        _plain(axes, panel)
    handles = [_handle(name, colour_of[name]) for name in names]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(2 + columns, len(names)),
        frameon=False,
    )
    figure.savefig(path)


def draw_lines(
    panels: Mapping[str, Mapping[str, Line]],
    title: str,
    path: Path | None,
    axis_labels: Sequence[str],
) -> None:
    """Draw ratios that depend on a number: one panel for each, one line for each variant.

    Args:
        panels: For each panel's title, for each variant, its ratios by the number.
        title: The picture's title.
        path: The file; ``None``: nothing is drawn.
        axis_labels: What each panel's number is.
    """
    if path is None or not panels:
        return
    figure = _figure(4.6 * len(panels), 3.8, title)
    for axes, (panel, variants), label in zip(
        figure.subplots(1, len(panels), squeeze=False).flat,
        panels.items(),
        axis_labels,
        strict=True,
    ):
        axes.axhline(1.0, color=_MUTED, lw=1)
        for (name, points), colour in zip(variants.items(), _COLOURS, strict=False):
            places = sorted(points)
            low, high = ([getattr(points[x], end) for x in places] for end in ("low", "high"))
            axes.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
            values = [points[x].value for x in places]
            axes.plot(places, values, "-o", color=colour, ms=4, label=name)
        axes.set_xlabel(label, color=_MUTED)
        axes.set_xticks(sorted({x for points in variants.values() for x in points}))
        _plain(axes, panel)
    figure.axes[0].set_ylabel("ratio to plain", color=_MUTED)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def _figure(width: float, height: float, title: str) -> Any:
    # Imported here: tables need no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", color=_INK)
    return figure


def _handle(name: str, colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", color=colour, lw=1.6, ms=4, label=name)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", size=10, color=_INK)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=_MUTED)
