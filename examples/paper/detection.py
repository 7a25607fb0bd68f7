"""Detection of scattered digits: when do coordinates help a detector?

    python examples/paper/detection.py --seeds 3

The detector of the authors' released code, a region proposal network, with and without
coordinates at the three convolutions where that code has them; then with differences in setting,
and torchvision's Faster R-CNN. As in the released code, digits are scattered on a field of 120
pixels a side of which pictures of 64 are cut out (its file is named
``field_of_mnist_cropped_64x64_5objs``): many digits are cut off, and three in ten cannot be seen
at all. Unless told to clip, that code has the detector learn the whole boxes of all of them. Where
a setting does not say otherwise, only digits that can be seen are to be found, and their boxes are
cut off at the edge of the picture.

One setting is not theirs: moves that say where a box is on the canvas, not where it is from its
anchor. Moves from an anchor are the same wherever a digit lies, so a convolution needs no
coordinates to give them; here it does.

Two measures, on 1,000 test pictures of digits that training never shows:

- ``IOU of best boxes``, the released code's: non-maximum suppression at 0.8 leaves the 10
  best-scoring boxes; the IOU of each with the digit that it fits best, averaged;
- ``IOU of digits``: suppression at 0.5 leaves 5; they are matched one to one with the digits, and
  a digit that gets none counts 0. Also given for the digits alone that are cut off, or whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import torch
from detection_metrics import digit_ious, iou_of_best_boxes, touches_edge
from detection_picture import BEST_BOXES, CUT_OFF, DIGITS, UNCUT, Story, draw
from digit_faster_rcnn import RCNN_SITES, detect, faster_rcnn_loss, make_faster_rcnn
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from region_proposals import (
    PAPER_SITES,
    Padding,
    Proposals,
    RegionProposals,
    Sampling,
    candidates,
    loss,
    suppress,
)
from scattered_digits import Layout, Scenes, scatter, training_and_test_digits
from torch import Tensor, nn
from tqdm import tqdm
from variants import PATCHED, PLAIN, SCRAMBLED, as_variant, largest_coordinate_weights

ONE_SITE = {
    "patched: input only": PAPER_SITES[:1],
    "patched: RPN only": PAPER_SITES[1:2],
    "patched: box regression only": PAPER_SITES[2:],
}
MARGIN = 28
"""Pixels of the field beyond the canvas, as in the released code: (120 - 64) / 2."""
LEARNING_RATE = 1e-3
SHOWN = 4
"""Test pictures whose boxes are kept for the picture."""

Targets = Literal["cut", "seen", "all"]
"""What a detector learns to find where digits lie partly or wholly beyond the canvas: what can be
seen of them; the whole box of each that can be seen; the whole box of every one (the released
code)."""


@dataclass(frozen=True)
class Setting:
    """One detector on one kind of pictures.

    Attributes:
        margin: Pixels of the digits' field beyond the canvas; 0: every digit is whole.
        padding: Of the region proposal network.
        sampling: Of the boxes that it learns from.
        targets: What it learns to find.
        absolute: Whether it says where on the canvas a box is, and not where from an anchor.
        widths: Of the region proposal network; half the released code's, unless given, so that a
            run takes seconds.
        batch_size: Pictures per step; 1 in the released code.
        length: Factor on the steps.
        faster_rcnn: Whether it is torchvision's Faster R-CNN instead.
        variants: What is compared.
    """

    margin: int = MARGIN
    padding: Padding = "released"
    sampling: Sampling = field(default_factory=Sampling)
    targets: Targets = "cut"
    absolute: bool = False
    widths: tuple[int, int] = (16, 32)
    batch_size: int = 8
    length: float = 1
    faster_rcnn: bool = False
    variants: tuple[str, ...] = (PLAIN, PATCHED)


SEEN, WHOLE, BY_ANCHORS = "seen digits, cut off", "whole digits", "sampled by anchors"
UNCUT_BOXES, RELEASED = "seen digits, boxes not cut off", "all digits, as released"
ABSOLUTE = "absolute boxes"
ALL = (PLAIN, PATCHED, SCRAMBLED)
_UNCUT = Sampling(within=Layout().canvas)
SETTINGS = {
    RELEASED: Setting(sampling=_UNCUT, targets="all", variants=ALL),
    "as released, full widths, batch of 1": Setting(
        sampling=_UNCUT, targets="all", widths=(32, 64), batch_size=1, length=10
    ),
    UNCUT_BOXES: Setting(sampling=_UNCUT, targets="seen", variants=ALL),
    f"{UNCUT_BOXES}, 3 times as long": Setting(sampling=_UNCUT, targets="seen", length=3),
    SEEN: Setting(variants=ALL),
    WHOLE: Setting(margin=0),
    "zero padding everywhere": Setting(padding="zeros"),
    "Faster R-CNN": Setting(length=0.75, faster_rcnn=True),
    "Faster R-CNN, whole digits": Setting(margin=0, length=0.75, faster_rcnn=True),
    BY_ANCHORS: Setting(sampling=Sampling(by="anchors")),
    "no padding at all": Setting(padding="none"),
    "trained 3 times as long": Setting(length=3),
    ABSOLUTE: Setting(sampling=Sampling(by="anchors"), absolute=True, variants=ALL),
}


@cache
def pictures(margin: int, quick: bool) -> tuple[Scenes, Scenes]:
    """Training and test pictures; the same for every seed, as a stored data set would be."""
    training, test = training_and_test_digits()
    generator = torch.Generator().manual_seed(margin)
    counts = (400, 100) if quick else (9000, 1000)
    layout = Layout(margin=margin)
    return tuple(
        scatter(digits, count, layout, generator)
        for digits, count in zip((training, test), counts, strict=True)
    )


def make_model(setting: Setting, variant: str) -> nn.Module:
    """The plain detector, or the same patched."""
    model: nn.Module
    if setting.faster_rcnn:
        model, sites = make_faster_rcnn(), RCNN_SITES
    else:
        model = RegionProposals(
            setting.padding,
            setting.widths,
            cut=setting.targets == "cut",
            absolute=setting.absolute,
        )
        sites = PAPER_SITES
    return as_variant(model, variant, list(ONE_SITE.get(variant, sites)))


def truth_of(scenes: Scenes, targets: Targets) -> tuple[Tensor, Tensor]:
    """The boxes to be found, shape ``(N, D, 4)``, and which of them count, ``(N, D)``."""
    if targets == "cut":
        return scenes.boxes, scenes.visible
    counted = torch.ones_like(scenes.visible) if targets == "all" else scenes.visible
    return scenes.whole, counted


def make_loss(setting: Setting) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    """The loss of a model on pictures, their boxes, and which of these are visible."""
    if setting.faster_rcnn:
        return faster_rcnn_loss
    return lambda model, *batch: loss(model, *batch, setting.sampling)


def train(setting: Setting, variant: str, options: Options, seed: int, name: str) -> Run:
    """Train and measure one detector."""
    training, test = pictures(setting.margin, options.quick)
    boxes, counted = truth_of(training, setting.targets)
    model, compute_loss = make_model(setting, variant), make_loss(setting)
    steps = round(setting.length * options.length(300, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    # Sampling draws from torch's own generator, which patching has not touched.
    torch.manual_seed(1000 + seed)
    watch, losses = Stopwatch(), []
    for _ in tqdm(range(steps), desc=name, leave=False, disable=None):
        chosen = torch.randint(len(training), (setting.batch_size,))
        batch = (training.images[chosen], boxes[chosen], counted[chosen])
        with watch:
            value = compute_loss(model, *batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        losses.append(value.item())
    found = detect(model, test.images) if setting.faster_rcnn else candidates(model, test.images)
    best = suppress(found, most=test.boxes.shape[1], threshold=0.5)
    return Run(
        parameters=count_parameters(model),
        steps=steps,
        cpu_seconds=watch.seconds,
        metrics=measure(found, best, test, setting.targets),
        curves={
            "step": [float(step) for step in range(0, steps, 10)],
            "loss": [sum(part) / len(part) for part in _parts(losses, 10)],
        },
        extra={
            "largest coordinate weights": largest_coordinate_weights(model),
            "boxes": [one.boxes.tolist() for one in best[:SHOWN]],
        },
    )


def measure(
    found: list[Proposals], best: list[Proposals], test: Scenes, targets: Targets
) -> dict[str, float]:
    """The measures, see the script's docstring; a digit that cannot be seen is not looked for."""
    true, _ = truth_of(test, targets)
    truth = [boxes[seen] for boxes, seen in zip(true, test.visible, strict=True)]
    kept = suppress(found, most=10, threshold=0.8)
    pairs = zip(best, truth, strict=True)
    ious = torch.cat([digit_ious(one.boxes, digits) for one, digits in pairs])
    cut_off = touches_edge(torch.cat(truth), test.images.shape[-1])
    metrics = {
        BEST_BOXES: iou_of_best_boxes([one.boxes for one in kept], truth),
        DIGITS: float(ious.mean()),
        UNCUT: float(ious[~cut_off].mean()),
    }
    return metrics | ({CUT_OFF: float(ious[cut_off].mean())} if cut_off.any() else {})


def _parts(values: list[float], size: int) -> list[list[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("detection", options)
    compared = [(name, variant) for name in SETTINGS for variant in SETTINGS[name].variants]
    compared += [(name, variant) for name in (SEEN, ABSOLUTE) for variant in ONE_SITE]
    for name, variant in compared:
        for seed in options.seeds:
            one = partial(train, SETTINGS[name], variant, options, seed)
            record.run(name, variant, seed, partial(one, f"{name}, {variant}, {seed}"))
    record.print_table()
    _, test = pictures(MARGIN, options.quick)
    story = Story(tuple(SETTINGS), main=RELEASED, relative=BY_ANCHORS, absolute=ABSOLUTE)
    draw(record, story, test, options.out / "detection.png")
    return record


if __name__ == "__main__":
    main()
