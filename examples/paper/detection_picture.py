"""The picture of the detection experiment: boxes on test pictures, and the ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import Record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from paired_dots import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, bare, dots
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


def draw(record: Record, main: str, test: Scenes, sources: Mapping[str, str], path: Path) -> None:
    """Draw the record.

    Args:
        record: Of ``detection.py``.
        main: Name of the setting whose boxes are shown.
        test: The test pictures of that setting.
        sources: By setting, what the ablation calls it.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(13, 10.5), dpi=95, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_message(record, main), size=15, weight="bold", color=INK, x=0.01, ha="left")
    pictures, charts = figure.subfigures(2, 1, height_ratios=[1, 2])
    _draw_boxes(pictures, record, main, test)
    left, right = charts.subplots(1, 2, width_ratios=[1, 1])
    _draw_gains(left, record, sources, BEST_BOXES, "all boxes: released measure")
    _draw_parts(right, record, sources)
    figure.savefig(path)


def _message(record: Record, main: str) -> str:
    """What the patch changes in the main setting, seed by seed, and with whole digits."""
    plain, patched = (record.mean(main, variant, BEST_BOXES) for variant in ("plain", "patched"))
    seeds = ", ".join(f"{gain:+.1f}" for gain in gains(record, main, "patched", BEST_BOXES))
    whole = ", ".join(
        f"{gain:+.1f}" for gain in gains(record, "whole digits", "patched", BEST_BOXES)
    )
    return (
        f"Coordinates at the authors' three sites: test IOU {plain:.3f} to {patched:.3f} "
        f"(by seed {seeds} %);\nwith digits that no edge cuts off: by seed {whole} %"
    )


def _draw_boxes(part: Any, record: Record, main: str, test: Scenes) -> None:
    plain, patched = (
        record.of(main, variant)[0].extra["boxes"] for variant in ("plain", "patched")
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


def _draw_gains(
    axes: Any, record: Record, sources: Mapping[str, str], metric: str, title: str
) -> None:
    """One row a setting and variant: the gain over the plain model, a dot a seed."""
    rows = [
        (setting, variant)
        for setting in sources
        for variant in dict.fromkeys(r.variant for r in record.runs if r.setting == setting)
        if variant != "plain"
    ]
    names = []
    for row, (setting, variant) in enumerate(rows):
        colour = PURPLE if variant == "scrambled" else GREEN if ":" in variant else BLUE
        dots(axes, -row, gains(record, setting, variant, metric), colour)
        plain, mean = (record.mean(setting, v, metric) for v in ("plain", variant))
        axes.annotate(
            f"{plain:.3f} → {mean:.3f}",
            (1.0, -row),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=colour,
        )
        extra = {"patched": ""}.get(variant, f", {variant.removeprefix('patched: ')}")
        names.append(f"{sources[setting]}{extra}")
    axes.set_yticks([-row for row in range(len(rows))], names)
    axes.set_ylim(0.6 - len(rows), 0.6)
    axes.axvline(0, color=INK, lw=1)
    bare(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.35 * (high - low))
    axes.set_title(title, size=12, color=INK, weight="bold", loc="left")
    axes.set_xlabel("gain over the plain model in %, one dot a seed", color=MUTED)


def _draw_parts(axes: Any, record: Record, sources: Mapping[str, str]) -> None:
    """The gain in IOU of the digits that are cut off and of those that are not."""
    settings = [name for name in sources if record.of(name, "patched")]
    for row, setting in enumerate(settings):
        for metric, colour, shift, marker in (
            (CUT_OFF, BLUE, 0.17, "o"),
            (UNCUT, VERMILION, -0.17, "s"),
        ):
            values = gains(record, setting, "patched", metric)
            if values:
                dots(axes, shift - row, values, colour, marker=marker, reach=0.15)
    axes.set_yticks([-row for row in range(len(settings))], [sources[s] for s in settings])
    axes.set_ylim(0.6 - len(settings), 0.6)
    axes.axvline(0, color=INK, lw=1)
    bare(axes)
    axes.set_title("IOU of digits, by kind", size=12, color=INK, weight="bold", loc="left")
    axes.set_xlabel("gain over the plain model in %, one dot a seed", color=MUTED)
    handles = [
        Line2D([], [], color=BLUE, marker="o", ls=""),
        Line2D([], [], color=VERMILION, marker="s", ls=""),
    ]
    axes.legend(
        handles, ["digits cut off at the edge", "whole digits"], loc="upper center",
        bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False,
    )  # fmt: skip
