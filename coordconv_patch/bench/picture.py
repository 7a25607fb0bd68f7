"""The picture of a benchmark: every variant's ratio to the plain model, with its interval."""

from __future__ import annotations

import math
import os
import textwrap
from typing import Any

from coordconv_patch.bench.report import NAIVE, PLAIN, PLAIN_AGAIN, BenchGroup, BenchReport
from coordconv_patch.files.picture_file import check_picture, write_figure

__all__ = ["draw_bench"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_PATCHED = "#0072B2"
_NAIVE = "#D55E00"
_PLAIN = "#9AA5B1"
_INK = "#1F2933"
_MUTED = "#6B7280"

_MOST_COLUMNS = 3


def draw_bench(
    report: BenchReport, path: str | os.PathLike[str], *, subject: str = "a model"
) -> None:
    """Draw a benchmark's ratios, one panel for each provider, batch size and thread number.

    The file is PNG, SVG or PDF by its ending; ``subject`` is the model's name, for the title.

    Raises:
        ArgumentError: See :func:`check_picture`; also if the file cannot be written.
        MissingPackageError: If matplotlib is not installed.
    """
    path = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(len(report.groups))))
    lines = math.ceil(len(report.groups) / columns)
    most = max(len(group.rows) for group in report.groups)
    size = (1.2 + 4.8 * columns, 1.2 + lines * (0.8 + 0.27 * most))
    figure = Figure(figsize=size, dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"What coordinates cost: {subject}, {report.sites} convolutions patched",
        x=0.01,
        ha="left",
        weight="bold",
        color=_INK,
    )
    panels: Any = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes in panels.flat[len(report.groups) :]:
        axes.set_axis_off()
    for axes, group in zip(panels.flat, report.groups, strict=False):
        _draw_group(axes, group)
    caption = (
        f"Ratio of medians to the plain model in the same run ({report.repeats} rounds), with 95 % "
        f"intervals; median time. {report.machine.lines()[0]}"
    )
    figure.supxlabel(
        "\n".join(textwrap.wrap(caption, 55 * columns)), x=0.01, ha="left", size=8.5, color=_MUTED
    )
    write_figure(figure, path)


def _draw_group(axes: Any, group: BenchGroup) -> None:
    axes.axvline(1.0, color=_PLAIN, lw=1)
    colours = {PLAIN: _PLAIN, PLAIN_AGAIN: _PLAIN, NAIVE: _NAIVE}
    for row in group.rows:
        ratio, colour = row.ratio, colours.get(row.name, _PATCHED)
        axes.plot([ratio.low, ratio.high], [row.name, row.name], color=colour, lw=2.5)
        axes.plot(ratio.value, row.name, "o", color=colour, ms=7, mec="white", mew=1)
        axes.annotate(
            f"{ratio.value:.2f}   {row.seconds * 1e3:.3g} ms",
            (1.02, row.name),
            xycoords=("axes fraction", "data"),
            va="center",
            size=8.5,
            color=_INK,
        )
    axes.invert_yaxis()
    axes.set_title(group.title.replace("ExecutionProvider", ""), loc="left", size=10, color=_INK)
    axes.grid(axis="y", color="#E4E7EB", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=_MUTED, left=False, labelbottom=True)
