"""The influence of each site's coordinates as bars, along the depth of the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coordconv_patch.files.picture_file import check_picture, write_figure

__all__ = ["draw_influence"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_STRONGEST, _OTHERS = "#0072B2", "#9CC4DF"
_WORSE, _BETTER = "#D55E00", "#009E73"
_INK, _MUTED = "#1F2933", "#6B7280"

_ROW = 0.24
"""Height of a site's bar, in inches."""


@dataclass(frozen=True)
class Bars:
    """What is drawn of some sites, in order.

    Attributes:
        sites: Their names.
        shares: The coordinates' share of each one's variance, 0 to 1.
        rises: By how much the loss rises without them; ``None``: there is no loss.
        errors: Standard errors of these; 0 where unknown.
        caption: Below the picture.
    """

    sites: Sequence[str]
    shares: Sequence[float]
    rises: Sequence[float] | None
    errors: Sequence[float]
    caption: str


def draw_influence(bars: Bars, path: str | os.PathLike[str]) -> None:
    """Draw the shares, and the losses if there are any; the first site is at the top.

    Args:
        bars: What to draw.
        path: A .png, .svg or .pdf file.

    Raises:
        ArgumentError: If it cannot be written, or matplotlib is not installed.
    """
    path = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_loss = bars.rises is not None
    size = (11 if has_loss else 6.5, 1.6 + _ROW * max(4, len(bars.sites)))
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 1 + has_loss, squeeze=False, sharey=True)[0]
    _draw_shares(panels[0], bars.sites, bars.shares)
    if bars.rises is not None:
        _draw_rises(panels[1], bars.sites, bars.rises, bars.errors)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_MUTED)
        axes.xaxis.label.set_color(_MUTED)
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(range(len(bars.sites)), bars.sites)
    panels[0].tick_params(axis="y", labelsize=8.5, colors=_INK)
    panels[0].invert_yaxis()  # the axis is shared
    figure.supxlabel(bars.caption, x=0.01, ha="left", size=8.5, color=_MUTED)
    write_figure(figure, path)


def _draw_shares(axes: Any, sites: Sequence[str], shares: Sequence[float]) -> None:
    largest = max(shares)
    colours = [_STRONGEST if share == largest > 0 else _OTHERS for share in shares]
    axes.barh(range(len(shares)), [100 * share for share in shares], color=colours)
    axes.set_xlabel("% of the output's variance")
    title = "No site uses its coordinates"
    if largest > 0:
        title = f"Coordinates' share: most at {sites[shares.index(largest)]}, {largest:.0%}"
    _title(axes, title)


def _draw_rises(
    axes: Any, sites: Sequence[str], rises: Sequence[float], errors: Sequence[float]
) -> None:
    colours = [_WORSE if rise > 0 else _BETTER for rise in rises]
    axes.barh(range(len(rises)), rises, xerr=errors, color=colours, ecolor=_MUTED, capsize=2)
    axes.axvline(0, color=_MUTED, lw=0.8)
    axes.set_xlabel("rise of the loss without them (line: ± standard error)")
    largest = max(rises)
    title = "No loss rises without coordinates"
    if largest > 0:
        title = f"Missed most at {sites[rises.index(largest)]}: {largest:+.3g}"
    _title(axes, title)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", size=10.5, weight="bold", color=_INK)
