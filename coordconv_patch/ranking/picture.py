"""The picture of a ranking: a bar for each site or stage, along the depth of the network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from coordconv_patch.bench.picture import check_picture
from coordconv_patch.errors import ArgumentError
from coordconv_patch.files.atomic import replacement
from coordconv_patch.ranking.ranking import Ranking

__all__ = ["draw_ranking"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_WORTHWHILE = "#0072B2"
_OTHER = "#9CC4DF"
_SCRAMBLED = "#CC79A7"
_INK = "#1F2933"
_MUTED = "#6B7280"


def draw_ranking(ranking: Ranking, path: str | os.PathLike[str]) -> None:
    """Draw the gains, the first stage to run on the left; the file's kind is that of its ending.

    Raises:
        ArgumentError: See :func:`coordconv_patch.bench.picture.check_picture`; also if the file
            cannot be written.
    """
    path = Path(path)
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = max(6.0, 2.0 + 0.75 * len(ranking.rows))
    figure = Figure(figsize=(width, 4.8), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_bars(axes, ranking)
    axes.set_title(_headline(ranking), loc="left", weight="bold", size=11, color=_INK)
    axes.set_ylabel("taken off the held-out loss", color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED)
    with replacement(path, ArgumentError) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))


def _headline(ranking: Ranking) -> str:
    helpful = [row.part.name for row in ranking.rows if row.worthwhile]
    if not helpful:
        return "Coordinates help nowhere: every interval reaches 0"
    others = f" and {len(helpful) - 1} more" if len(helpful) > 1 else ""
    return f"Coordinates help at {helpful[0]}{others}"


def _draw_bars(axes: Any, ranking: Ranking) -> None:
    rows = sorted(ranking.rows, key=lambda row: row.depth)
    for place, row in enumerate(rows):
        gain = row.gain
        axes.bar(place, gain.value, 0.7, color=_WORTHWHILE if row.worthwhile else _OTHER)
        axes.plot([place, place], [gain.low, gain.high], color=_INK, lw=1.2)
    best = ranking.rows[0]
    if ranking.scrambled is not None:
        place, gain = rows.index(best), ranking.scrambled
        axes.plot(place, gain.value, "D", color=_SCRAMBLED, ms=7, mec="white", zorder=3)
        axes.annotate(
            "scrambled",
            (place, gain.value),
            xytext=(7, 0),
            textcoords="offset points",
            color=_SCRAMBLED,
            size=9,
            va="center",
        )
    axes.axhline(0, color=_MUTED, lw=1)
    labels = [f"{row.part.name}\n{_size(row.part.input_size)}" for row in rows]
    turned = max(map(len, labels)) > 14
    axes.set_xticks(
        range(len(rows)),
        labels,
        size=9,
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
    )


def _size(lengths: tuple[int, ...]) -> str:
    return "\u00d7".join(map(str, lengths))
