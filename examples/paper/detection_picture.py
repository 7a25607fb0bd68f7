"""The picture of the detection experiment: boxes on test pictures, and the ablation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from experiment import Record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from paired_dots import bare, dots, note
from palette import BLUE, BY_VARIANT, GREEN, INK, MUTED, VERMILION
from scattered_digits import Scenes

BEST_BOXES, DIGITS = "IOU of best boxes", "IOU of digits"
CUT_OFF, UNCUT = "IOU of cut-off digits", "IOU of uncut digits"


def gains(record: Record, setting: str, variant: str, metric: str) -> list[float]:
    """By how many per cent a variant is better than the plain model of the same seed."""
    plain = {run.seed: run.metrics for run in record.of(setting, "plain")}
    return [
        100 * (run.metrics[metric] / plain[run.seed][metric] - 1)
        for run in record.of(setting, variant)
        if metric in run.metrics
    ]


@dataclass(frozen=True)
class Story:
    """Which settings the picture is about.

    Attributes:
        settings: All of them, in order.
        main: The one whose boxes are shown, beside those of ``absolute``, on the same pictures.
        relative: Whose moves start from anchors.
        absolute: The same, but for moves that say where on the canvas a box is.
    """

    settings: tuple[str, ...]
    main: str
    relative: str
    absolute: str


def draw(record: Record, story: Story, test: Scenes, path: Path) -> None:
    """Draw the record.

    Args:
        record: Of ``detection.py``.
        story: Which settings are shown beside each other.
        test: The pictures of these two.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(14, 12.5), dpi=85, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_message(record, story), size=15, weight="bold", color=INK, x=0.01, ha="left")
    pictures, charts = figure.subfigures(2, 1, height_ratios=[1, 3.6])
    for part, setting in zip(pictures.subfigures(1, 2), (story.main, story.absolute), strict=True):
        part.suptitle(setting, size=12, color=INK, weight="bold")
        _draw_boxes(part, record, setting, test)
    _draw_legend(pictures)
    left, right = charts.subfigures(1, 2, width_ratios=[1.1, 1])
    settings = [name for name in story.settings if name != story.absolute]
    _draw_gains(left.subplots(), record, settings, BEST_BOXES, "all boxes: released measure")
    above, below = right.subplots(2, 1, height_ratios=[1, 1.6])
    _draw_mechanism(above, record, story)
    _draw_parts(below, record, settings)
    figure.savefig(path)


def _message(record: Record, story: Story) -> str:
    """What the patch changes in the main setting, seed by seed, and where moves are absolute."""
    seeds = ", ".join(f"{gain:+.1f}" for gain in gains(record, story.main, "patched", BEST_BOXES))
    plain, patched, scrambled = (
        record.mean(story.absolute, variant, BEST_BOXES)
        for variant in ("plain", "patched", "scrambled")
    )
    return (
        f"Coordinates at the authors' three sites: {seeds} % of test IOU, seed by seed.\n"
        "Their boxes move from anchors; boxes that must say where on the canvas they are need "
        f"coordinates:\nIOU {plain:.2f} to {patched:.2f} (scrambled: {scrambled:.2f})"
    )


def _draw_boxes(part: Any, record: Record, setting: str, test: Scenes) -> None:
    plain, patched = (
        record.of(setting, variant)[0].extra["boxes"] for variant in ("plain", "patched")
    )
    canvas = test.images.shape[-1]
    for index, axes in enumerate(part.subplots(1, len(plain))):
        axes.imshow(test.images[index, 0], cmap="gray", extent=(0, canvas, canvas, 0))
        truth = test.boxes[index][test.visible[index]].tolist()
        count = len(truth)
        _frames(axes, truth, "white", 3.5, "-")
        _frames(axes, plain[index][:count], VERMILION, 1.8, "-")
        _frames(axes, patched[index][:count], "#56B4E9", 1.8, (0, (3, 1.5)))
        axes.set_xlim(-2, canvas + 2)
        axes.set_ylim(canvas + 2, -2)
        axes.set_axis_off()


def _draw_legend(part: Any) -> None:
    lines = [("white", "-", "digit"), (VERMILION, "-", "plain"), ("#56B4E9", "--", "patched")]
    handles = [Line2D([], [], color=colour, ls=style, lw=3) for colour, style, _ in lines]
    names = [
        "the digits' boxes (cut off at the edge)",
        "plain: as many best boxes as digits",
        "patched",
    ]
    part.legend(
        handles, names, loc="outside lower center", ncols=3, fontsize=11, facecolor="#4B5563",
        labelcolor="white",
    )  # fmt: skip


def _frames(
    axes: Any, boxes: Sequence[Sequence[float]], colour: str, width: float, style: Any
) -> None:
    for x0, y0, x1, y1 in boxes:
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=width, ls=style)
        )


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 30)


def _variants(record: Record, setting: str) -> list[str]:
    return list(dict.fromkeys(run.variant for run in record.runs if run.setting == setting))


def _colour(variant: str) -> str:
    return BY_VARIANT.get(variant, GREEN)  # of those patched at one site


def _draw_mechanism(axes: Any, record: Record, story: Story) -> None:
    """The IOU of each variant, a dot a seed, for moves from anchors and for absolute ones."""
    rows = [
        (setting, words, variant)
        for setting, words in ((story.relative, "from anchors"), (story.absolute, "absolute"))
        for variant in _variants(record, setting)
    ]
    for row, (setting, _, variant) in enumerate(rows):
        values = [run.metrics[BEST_BOXES] for run in record.of(setting, variant)]
        colour = _colour(variant)
        dots(axes, -row, values, colour)
        note(axes, -row, f"{mean(values):.3f}", colour)
    names = [f"{words}, {variant.removeprefix('patched: ')}" for _, words, variant in rows]
    axes.set_yticks([-row for row in range(len(rows))], names)
    axes.set_ylim(0.6 - len(rows), 0.6)
    bare(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.3 * (high - low))
    axes.set_title(
        "from anchors, or absolute",
        size=12,
        color=INK,
        weight="bold",
        loc="left",
    )
    axes.set_xlabel("IOU of best boxes, one dot a seed", color=MUTED)


def _draw_gains(
    axes: Any, record: Record, settings: Sequence[str], metric: str, title: str
) -> None:
    """One row a setting and variant: the gain over the plain model, a dot a seed."""
    rows = [
        (setting, variant)
        for setting in settings
        for variant in _variants(record, setting)
        if variant != "plain"
    ]
    names = []
    for row, (setting, variant) in enumerate(rows):
        colour = _colour(variant)
        dots(axes, -row, gains(record, setting, variant, metric), colour)
        plain, changed = (record.mean(setting, v, metric) for v in ("plain", variant))
        axes.annotate(
            f"{plain:.3f} → {changed:.3f}",
            (1.0, -row),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=colour,
        )
        extra = {"patched": ""}.get(variant, f", {variant.removeprefix('patched: ')}")
        names.append(_wrapped(f"{setting}{extra}"))
    axes.set_yticks([-row for row in range(len(rows))], names)
    axes.set_ylim(0.6 - len(rows), 0.6)
    axes.axvline(0, color=INK, lw=1)
    bare(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.45 * (high - low))
    axes.set_title(title, size=12, color=INK, weight="bold", loc="left")
    axes.set_xlabel("gain over the plain model in %, one dot a seed", color=MUTED)


def _draw_parts(axes: Any, record: Record, settings: Sequence[str]) -> None:
    """The gain in IOU of the digits that are cut off and of those that are not."""
    for row, setting in enumerate(settings):
        for metric, colour, shift, marker in (
            (CUT_OFF, BLUE, 0.17, "o"),
            (UNCUT, VERMILION, -0.17, "s"),
        ):
            values = gains(record, setting, "patched", metric)
            if values:
                dots(axes, shift - row, values, colour, marker=marker, reach=0.15)
    axes.set_yticks([-row for row in range(len(settings))], [_wrapped(name) for name in settings])
    axes.set_ylim(0.6 - len(settings), 0.6)
    axes.axvline(0, color=INK, lw=1)
    bare(axes)
    axes.set_title("IOU of digits, by kind", size=12, color=INK, weight="bold", loc="left")
    axes.set_xlabel("gain in %, one dot a seed", color=MUTED)
    handles = [
        Line2D([], [], color=BLUE, marker="o", ls=""),
        Line2D([], [], color=VERMILION, marker="s", ls=""),
    ]
    axes.legend(
        handles, ["digits cut off at the edge", "whole digits"], loc="upper center",
        bbox_to_anchor=(0.4, -0.1), ncols=2, frameon=False,
    )  # fmt: skip
