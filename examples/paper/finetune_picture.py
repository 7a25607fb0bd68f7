"""The picture of the fine-tuning experiment: what each branch gains, setting by setting."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from branches import (
    ALL,
    ALL_SCRAMBLED,
    FIRST,
    IMAGENET,
    KEPT_ON,
    NARROW,
    NARROW_PADDED,
    NETS,
    NEW_PLACES,
    PRETRAINING,
    SCRAMBLED,
    SCRATCH,
    WIDE,
    WIDE_PADDED,
)
from experiment import Record, Run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paired_dots import bare, dots, note
from palette import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, VERMILION, VIOLET

COLOURS = {
    KEPT_ON: VERMILION,
    FIRST: BLUE,
    ALL: GREEN,
    SCRAMBLED: PURPLE,
    ALL_SCRAMBLED: VIOLET,
    SCRATCH: ORANGE,
}
TITLES = {
    NARROW: "sees 15 × 15 px\nunpadded",
    NEW_PLACES: "15 × 15 px, unpadded\ntested at new places",
    NARROW_PADDED: "sees 15 × 15 px\nzero-padded",
    WIDE: "sees 31 × 31 px\nunpadded",
    WIDE_PADDED: "sees 31 × 31 px\nzero-padded",
    IMAGENET: "EfficientNet-Lite0\nImageNet weights",
}


def draw(record: Record, path: Path) -> None:
    """Draw the record.

    Args:
        record: Of ``finetune.py``.
        path: The PNG file to write.
    """
    settings = [setting for setting in TITLES if record.of(setting, SCRATCH)]
    figure = Figure(figsize=(18, 8.4), dpi=85, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_message(record), size=14, weight="bold", color=INK, x=0.01, ha="left")
    grid: Any = figure.subplots(2, len(settings), squeeze=False, height_ratios=[1.25, 1])
    for column, setting in enumerate(settings):
        curves, finals = grid[:, column]
        _draw_curves(curves, record, setting)
        _draw_finals(finals, record, setting, with_names=column == 0)
        if setting in NETS:
            curves.set_ylim(0, 0.95)
    grid[0, 0].set_ylabel("find a digit: IOU with its box, held out", color=INK)
    figure.savefig(path)


def _message(record: Record) -> str:
    """What the patch does to three of the nets, and what scrambled coordinates do."""
    parts = []
    for setting, net, patched, scrambled, form in (
        (NARROW, "A net that sees 15 px: IOU", FIRST, SCRAMBLED, ".2f"),
        (NEW_PLACES, "tested at places new to it:", FIRST, SCRAMBLED, ".2f"),
        (IMAGENET, "EfficientNet-Lite0, all patched: error in px", ALL, ALL_SCRAMBLED, ".1f"),
    ):
        if runs := record.of(setting, scrambled):
            before, after, control = (
                f"{record.mean(setting, variant, _metric(runs[0])):{form}}"
                for variant in (KEPT_ON, patched, scrambled)
            )
            parts.append(f"{net} {before} to {after} (scrambled: {control})")
    return "Patched after training, against the plain net kept on. " + ";\n".join(parts)


def _draw_curves(axes: Any, record: Record, setting: str) -> None:
    """Mean over the seeds: the pretraining, and the branches that go on from its end."""
    before = record.of(setting, PRETRAINING)
    start = before[0].steps
    metric = _metric(before[0])
    _curve(axes, before, 0, MUTED)
    axes.axvline(start, color=MUTED, lw=1, ls=(0, (2, 2)))
    for variant, colour in COLOURS.items():
        _curve(axes, record.of(setting, variant), start, colour)
    axes.set_title(TITLES[setting], size=12, color=INK, weight="bold")
    bare(axes)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_xlabel("steps; dashed: patched", color=MUTED)
    if setting == IMAGENET:
        axes.set_ylabel(f"find a cup: {metric}, held out", color=INK)
        axes.set_ylim(0, 1.05 * before[0].curves[metric][0])


def _curve(axes: Any, runs: list[Run], start: int, colour: str) -> None:
    steps = [start + step for step in runs[0].curves["step"]]
    metric = _metric(runs[0])
    means = [mean(values) for values in zip(*(run.curves[metric] for run in runs), strict=True)]
    axes.plot(steps, means, color=colour, lw=2)


def _draw_finals(axes: Any, record: Record, setting: str, *, with_names: bool) -> None:
    """Where each branch ended, a dot a seed."""
    for row, (variant, colour) in enumerate(COLOURS.items()):
        runs = record.of(setting, variant)
        metric = _metric(runs[0])
        values = [run.metrics[metric] for run in runs]
        dots(axes, -row, values, colour)
        figure = f"{mean(values):.2f}" if setting in NETS else f"{mean(values):.1f} px"
        note(axes, -row, figure, colour)
    bare(axes)
    names = list(COLOURS) if with_names else [""] * len(COLOURS)
    axes.set_yticks([-row for row in range(len(COLOURS))], names)
    for label, colour in zip(axes.get_yticklabels(), COLOURS.values(), strict=True):
        label.set_color(colour)
        label.set_weight("bold")
    axes.set_ylim(0.6 - len(COLOURS), 0.6)
    # A net from scratch may end so far off that the others could not be told apart.
    shown = [
        value
        for variant in COLOURS
        if setting in NETS or variant != SCRATCH
        for value in (run.metrics[metric] for run in record.of(setting, variant))
    ]
    reach = max(shown) - min(shown)
    axes.set_xlim(min(shown) - 0.1 * reach, max(shown) + 0.45 * reach)
    axes.set_xlabel(
        "IOU at the end, higher is better" if setting in NETS else "px at the end, lower is better",
        color=MUTED,
    )


def _metric(run: Run) -> str:
    (name,) = run.metrics
    return name
