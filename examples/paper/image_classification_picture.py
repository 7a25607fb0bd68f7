"""The picture of the image classification: test accuracy by model and variant."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from experiment import Record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paired_dots import bare, dots, note
from palette import BY_VARIANT, INK, MUTED
from scattered_digits import training_and_test_digits

NAMES = {
    "plain": "plain",
    "patched": "first convolution patched",
    "scrambled": "patched, coordinates scrambled",
}


def draw(record: Record, path: Path) -> None:
    """Draw the record.

    Args:
        record: Of ``image_classification.py``.
        path: The PNG file to write.
    """
    settings = list(dict.fromkeys(run.setting for run in record.runs))
    figure = Figure(figsize=(13, 4.6), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    gains = ", ".join(f"{_gain(record, s):+.2f} ({_model(s)})" for s in settings)
    figure.suptitle(
        f"Telling digits apart needs no coordinates. Points of test accuracy: {gains}",
        size=14,
        weight="bold",
        color=INK,
        x=0.01,
        ha="left",
    )
    samples, chart = figure.subfigures(2, 1, height_ratios=[1, 2.6])
    digits = training_and_test_digits()[1]
    for axes, image in zip(samples.subplots(1, 16), digits.images, strict=False):
        axes.imshow(image[0], cmap="gray_r", interpolation="bilinear")
        axes.set_axis_off()
    panels = chart.subplots(1, len(settings), squeeze=False)[0]
    for column, (axes, setting) in enumerate(zip(panels, settings, strict=True)):
        _draw_accuracies(axes, record, setting, with_names=column == 0)
    run = record.of(settings[0], "plain")[0]
    chart.supxlabel(
        f"test accuracy in %, one dot a seed, bar: their mean. timm's models from scratch, "
        f"{run.steps} steps, 1,347 training and 450 test digits of 32 × 32 pixels",
        color=MUTED,
        size=10,
    )
    figure.savefig(path)


def _model(setting: str) -> str:
    return setting.partition(",")[0].replace("resnet", "ResNet-")


def _gain(record: Record, setting: str) -> float:
    """By how many points of accuracy the patched model is better than the plain one, on average."""
    return 100 * (
        record.mean(setting, "patched", "accuracy") - record.mean(setting, "plain", "accuracy")
    )


def _draw_accuracies(axes: Any, record: Record, setting: str, *, with_names: bool) -> None:
    """One row a variant, a dot a seed."""
    for row, variant in enumerate(NAMES):
        colour = BY_VARIANT[variant]
        values = [100 * run.metrics["accuracy"] for run in record.of(setting, variant)]
        dots(axes, -row, values, colour)
        spread = 100 * record.spread(setting, variant, "accuracy")
        note(axes, -row, f"{mean(values):.2f} ± {spread:.2f} %", colour, outside=True)
    names = list(NAMES.values()) if with_names else [""] * len(NAMES)
    axes.set_yticks([-row for row in range(len(NAMES))], names)
    axes.set_ylim(0.6 - len(NAMES), 0.6)
    axes.set_title(_model(setting), size=12, color=INK, weight="bold", loc="left")
    bare(axes)
