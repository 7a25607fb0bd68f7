"""The picture of a ranking: a bar for each site or stage, along the depth of the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from coordconv_patch.files.picture_file import check_picture, write_figure
from coordconv_patch.ranking.gains import Gain

__all__ = ["Bar", "draw_ranking"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_WORTHWHILE = "#0072B2"
_OTHER = "#9CC4DF"
_SCRAMBLED = "#CC79A7"
_INK = "#1F2933"
_MUTED = "#6B7280"


class Bar(NamedTuple):
    """One row of a ranking.

    Attributes:
        name: Of the site or stage.
        input_size: Spatial size of what it sees, such as ``(H, W)``.
        gain: What coordinates gained there.
        worthwhile: Whether its whole interval lies above 0.
        finished: Whether it had long runs; drawn as an outline if not.
        scrambled: What scrambled coordinates gained there; ``None`` if that was not measured.
    """

    name: str
    input_size: tuple[int, ...]
    gain: Gain
    worthwhile: bool
    finished: bool
    scrambled: Gain | None


def draw_ranking(bars: Sequence[Bar], path: str | os.PathLike[str]) -> None:
    """Draw gains, the first stage to run on the left; the file's kind is that of its ending.

    Raises:
        ArgumentError: See :func:`.picture_file.check_picture`; also if the file cannot be written.
    """
    path = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(6.0, 2.0 + 0.75 * len(bars)), 4.8),
        dpi=130,
        facecolor="white",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for place, bar in enumerate(bars):
        _draw_bar(axes, place, bar)
    axes.axhline(0, color=_MUTED, lw=1)
    _name_bars(axes, bars)
    axes.set_title(_headline(bars), loc="left", weight="bold", size=11, color=_INK)
    axes.set_ylabel("taken off the held-out loss", color=_MUTED)
    if not all(bar.finished for bar in bars):
        note = "outlines: after the short first round, no further"
        axes.text(1, 1.0, note, transform=axes.transAxes, ha="right", size=9, color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED)
    write_figure(figure, path)


def _headline(bars: Sequence[Bar]) -> str:
    helpful = sorted((bar for bar in bars if bar.worthwhile), key=lambda bar: -bar.gain.value)
    if not helpful:
        return "Coordinates help nowhere: no long run's interval lies above 0"
    others = f" and {len(helpful) - 1} more" if len(helpful) > 1 else ""
    return f"Coordinates help at {helpful[0].name}{others}"


def _draw_bar(axes: Any, place: int, bar: Bar) -> None:
    gain = bar.gain
    color = _WORTHWHILE if bar.worthwhile else _OTHER
    face = color if bar.finished else "white"
    axes.bar(place, gain.value, 0.7, facecolor=face, edgecolor=color, lw=1.2)
    axes.plot([place, place], [gain.low, gain.high], color=_INK, lw=1.2)
    if bar.scrambled is None:
        return
    axes.plot(place, bar.scrambled.value, "D", color=_SCRAMBLED, ms=7, mec="white", zorder=3)
    axes.annotate(
        "scrambled",
        (place, bar.scrambled.value),
        xytext=(7, 0),
        textcoords="offset points",
        color=_SCRAMBLED,
        size=9,
        va="center",
    )


def _name_bars(axes: Any, bars: Sequence[Bar]) -> None:
    labels = [f"{bar.name}\n" + "\u00d7".join(map(str, bar.input_size)) for bar in bars]
    turned = max(map(len, labels)) > 16
    axes.set_xticks(
        range(len(bars)),
        labels,
        size=9,
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
    )
