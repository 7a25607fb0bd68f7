"""Image classification: do coordinates at the first convolution of a ResNet help, or do harm?

    python examples/paper/image_classification.py --seeds 3

timm's ResNet-18 and ResNet-50 learn to tell scikit-learn's handwritten digits apart, enlarged to
32 x 32 pixels; plain, patched at the first convolution, and patched with scrambled coordinates. All
of a seed start from the same weights and see the same pictures in the same order: patching changes
no output, so what differs in the end is what the coordinates have done.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import timm
import torch
import torch.nn.functional as F
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from image_classification_picture import draw
from scattered_digits import Digits, training_and_test_digits
from torch import Tensor, nn
from tqdm import tqdm
from variants import PATCHED, PLAIN, SCRAMBLED, as_variant, largest_coordinate_weights

MODELS = ("resnet18", "resnet50")
ACCURACY = "accuracy"
BATCH_SIZE = 32
LEARNING_RATE = 1e-3


def enlarged(digits: Digits, size: int) -> Tensor:
    """The digits at ``size`` x ``size`` pixels, values -1 to 1, shape ``(N, 1, size, size)``."""
    return 2 * F.interpolate(digits.images, (size, size), mode="bilinear") - 1


def setting_of(name: str) -> str:
    """What the record calls the runs of one of the :data:`MODELS`."""
    return f"{name}, digits"


def make_model(name: str, variant: str) -> nn.Module:
    """One of timm's models for ten classes, plain or patched."""
    return as_variant(timm.create_model(name, in_chans=1, num_classes=10), variant, "first")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Part of the images ``(N, 1, H, W)`` that get their label ``(N,)``; training mode stays on."""
    model.eval()
    answers = torch.cat([model(part).argmax(1) for part in images.split(225)])
    model.train()
    return float((answers == labels).float().mean())


def train(name: str, variant: str, options: Options, seed: int) -> Run:
    """Train and measure one model."""
    size = 16 if options.quick else 32
    training, test = training_and_test_digits()
    if options.quick:
        test = test.of(torch.arange(90))
    images, test_images = enlarged(training, size), enlarged(test, size)
    model = make_model(name, variant).train()
    steps = 3 * options.length(30, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    measured, curve, watch = [], [], Stopwatch()
    shown = f"{setting_of(name)}, {variant}, {seed}"
    for step in tqdm(range(1, steps + 1), desc=shown, leave=False, disable=None):
        chosen = torch.randint(len(training), (BATCH_SIZE,), generator=generator)
        with watch:
            loss = F.cross_entropy(model(images[chosen]), training.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if step % (steps // 3) == 0:
            measured.append(step)
            curve.append(accuracy(model, test_images, test.labels))
    return Run(
        parameters=count_parameters(model),
        steps=steps,
        cpu_seconds=watch.seconds,
        metrics={ACCURACY: curve[-1]},
        curves={"step": [float(step) for step in measured], ACCURACY: curve},
        extra={"largest coordinate weights": largest_coordinate_weights(model)},
    )


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("image_classification", options)
    for name, seed in product(MODELS, options.seeds):
        for variant in (PLAIN, PATCHED, SCRAMBLED):
            one = partial(train, name, variant, options, seed)
            record.run(setting_of(name), variant, seed, one)
    record.print_table()
    draw(record, options.out / "image_classification.png")
    return record


if __name__ == "__main__":
    main()
