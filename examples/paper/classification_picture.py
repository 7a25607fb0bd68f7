"""The picture of the classification experiment: test accuracy by variant."""

from __future__ import annotations

from pathlib import Path

from experiment import Record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paired_dots import BLUE, INK, MUTED, PURPLE, VERMILION, bare, dots
from scattered_digits import training_and_test_digits

NAMES = {
    "plain": ("plain", VERMILION),
    "patched": ("first convolution patched", BLUE),
    "scrambled": ("patched, coordinates scrambled", PURPLE),
}


def draw(record: Record, path: Path) -> None:
    """Draw the record.

    Args:
        record: Of ``image_classification.py``.
        path: The PNG file to write.
    """
    (setting,) = {run.setting for run in record.runs}
    plain, patched = (
        {run.seed: 100 * run.metrics["accuracy"] for run in record.of(setting, variant)}
        for variant in ("plain", "patched")
    )
    gains = [patched[seed] - plain[seed] for seed in plain]
    gain = sum(gains) / len(gains)
    figure = Figure(figsize=(9, 4.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Telling digits apart needs no coordinates: {gain:+.2f} points of test accuracy",
        size=14,
        weight="bold",
        color=INK,
        x=0.02,
        ha="left",
    )
    samples, chart = figure.subfigures(2, 1, height_ratios=[1, 2.6])
    digits = training_and_test_digits()[1]
    for axes, image in zip(samples.subplots(1, 12), digits.images, strict=False):
        axes.imshow(image[0], cmap="gray_r", interpolation="bilinear")
        axes.set_axis_off()
    axes = chart.subplots()
    for row, (variant, (_, colour)) in enumerate(NAMES.items()):
        values = [100 * run.metrics["accuracy"] for run in record.of(setting, variant)]
        dots(axes, -row, values, colour)
        mean, spread = (100 * f(setting, variant, "accuracy") for f in (record.mean, record.spread))
        axes.annotate(
            f"{mean:.2f} ± {spread:.2f} %",
            (1.01, -row),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            weight="bold",
        )
    axes.set_yticks([-row for row in range(len(NAMES))], [name for name, _ in NAMES.values()])
    axes.set_ylim(0.6 - len(NAMES), 0.6)
    bare(axes)
    run = record.of(setting, "plain")[0]
    axes.set_xlabel(
        f"test accuracy in %, one dot a seed, bar: their mean. timm's {setting.split(',')[0]}, "
        f"{run.steps} steps,\n1,347 training and 450 test digits of 32 × 32 pixels",
        color=MUTED,
    )
    figure.savefig(path)
