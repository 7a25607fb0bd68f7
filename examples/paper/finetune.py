"""Pretrain, patch, fine-tune: what coordinates add to a model that has been trained without them.

    python examples/paper/finetune.py --seeds 3

A plain model is trained on a task of finding one thing in a picture. Then six branches get the
same number of further steps on the same pictures: the plain model kept on; patched at its first
convolution; at all of them; either with scrambled coordinates; and a patched one from scratch.

Settings: small nets whose convolutions pad with zeros, or do not, and see a narrow or a wide part
of the picture; and an EfficientNet-Lite0 with ImageNet weights. Zero padding marks the border, and
so does the end of the picture where there is none, for whoever sees that far: the settings differ
in how much of its place a plain model can know already. Scrambled coordinates tell places apart as
well as true ones do, where training has shown them; so one setting is tested at places that it has
not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from branches import (
    ALL,
    ALL_SCRAMBLED,
    FIRST,
    IMAGENET,
    KEPT_ON,
    NETS,
    NEW_PLACES,
    PRETRAINING,
    SCRAMBLED,
    SCRATCH,
)
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from finetune_picture import draw
from localisation import CupOfCoffee, DigitTask, Task
from torch import nn
from tqdm import tqdm
from variants import as_variant, coordinate_weights, largest_coordinate_weights

import coordconv_patch as ccp

SHOWN = 3
"""Held-out pictures whose answers are kept for the picture."""
COORD_LEARNING_RATE = 10
"""Of the coordinate weights, in learning rates of the others: they start at zero."""


def make_task(setting: str, options: Options, seed: int) -> Task:
    """The task of a setting, with its pictures."""
    if setting == IMAGENET:
        pictures, held_out = (64, 16) if options.quick else (960, 192)
        return CupOfCoffee(pictures, held_out, seed, size=32 if options.quick else 64)
    net = NETS[setting]
    pictures, held_out, batch_size = (600, 200, 16) if options.quick else (4000, 500, 32)
    return DigitTask(
        net.padded,
        net.strides,
        pictures,
        held_out,
        seed,
        new_places=net.new_places,
        batch_size=batch_size,
    )


def lengths(setting: str, options: Options) -> tuple[int, int]:
    """Steps of the pretraining and of each branch."""
    if setting == IMAGENET:
        return options.length(60, 2), options.length(40, 2)
    return options.length(500, 80), options.length(250, 80)


def train(model: nn.Module, task: Task, steps: int, seed: int, name: str) -> Run:
    """Train a model in place, plain or patched.

    Args:
        model: The model.
        task: Its pictures and loss.
        steps: Optimizer steps.
        seed: Of the order of the pictures.
        name: Shown beside the progress bar.
    """
    groups: list = [{"params": list(model.parameters()), "lr": task.learning_rate}]
    if coordinate_weights(model):
        coord_lr = COORD_LEARNING_RATE * task.learning_rate
        groups = ccp.param_groups(model, lr=task.learning_rate, coord_lr=coord_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(seed)
    measured = sorted({round(steps * part / 5) for part in range(6)})
    curve, watch = [task.measure(model)], Stopwatch()
    for step in tqdm(range(1, steps + 1), desc=name, leave=False, disable=None):
        chosen = torch.randint(len(task), (task.batch_size,), generator=generator)
        with watch:
            loss = task.loss(model, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if step in measured:
            curve.append(task.measure(model))
    return Run(
        parameters=count_parameters(model),
        steps=steps,
        cpu_seconds=watch.seconds,
        metrics={task.metric: curve[-1]},
        curves={"step": [float(step) for step in measured], task.metric: curve},
        extra={
            "largest coordinate weights": largest_coordinate_weights(model),
            "answers": task.answers(model, SHOWN),
        },
    )


def run_seed(record: Record, setting: str, seed: int) -> None:
    """Every branch of one setting and seed; a branch that the record has is left out."""
    options = record.options
    pretraining, steps = lengths(setting, options)

    @cache
    def task() -> Task:
        return make_task(setting, options, seed)

    @cache
    def pretrained() -> tuple[nn.Module, Run]:
        torch.manual_seed(seed)
        model = task().plain()
        return model, train(model, task(), pretraining, seed, f"{setting}, {PRETRAINING}, {seed}")

    branches: dict[str, Callable[[], nn.Module]] = {
        KEPT_ON: lambda: copy.deepcopy(pretrained()[0]),
        FIRST: lambda: as_variant(pretrained()[0], "patched", "first"),
        ALL: lambda: as_variant(pretrained()[0], "patched", "all"),
        SCRAMBLED: lambda: as_variant(pretrained()[0], "scrambled", "first"),
        ALL_SCRAMBLED: lambda: as_variant(pretrained()[0], "scrambled", "all"),
        SCRATCH: lambda: as_variant(task().fresh(), "patched", "first"),
    }
    record.run(setting, PRETRAINING, seed, lambda: pretrained()[1])
    for variant, make in branches.items():
        name = f"{setting}, {variant}, {seed}"
        record.run(setting, variant, seed, partial(_branch, make, task, steps, 1000 + seed, name))


def _branch(
    make: Callable[[], nn.Module], task: Callable[[], Task], steps: int, seed: int, name: str
) -> Run:
    return train(make(), task(), steps, seed, name)


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("finetune", options)
    settings = [NEW_PLACES, IMAGENET] if options.quick else [*NETS, IMAGENET]
    for seed in options.seeds:
        for setting in settings:
            run_seed(record, setting, seed)
    record.print_table()
    draw(record, options.out / "finetune.png")
    return record


if __name__ == "__main__":
    main()
