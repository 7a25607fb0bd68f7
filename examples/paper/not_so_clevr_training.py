"""Training and scoring of the supervised experiments: one loop for every net and task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from experiment import Options, Record, Run, Stopwatch, count_parameters
from not_so_clevr import Split
from torch import Tensor, nn
from tqdm import tqdm
from training_times import times_sooner
from variants import largest_coordinate_weights

SCORED = 128
"""Centres of each half that a point of a curve is measured on; final figures take all."""
QUICK_SCORED, QUICK_POINTS = 32, 3
"""Such centres, also of the final figures, and points of the curves when only the mechanism is to
be shown."""


@dataclass(frozen=True)
class Task:
    """What a net is given, and how its answers count; all by the centres, shape ``(N, 2)``.

    Attributes:
        net_input: From centres to the net's input.
        loss: From the net's output and the centres to the training loss.
        score: From the same two to the figure that the experiment is about.
        score_name: Its name in the record.
        higher_is_better: Whether a high score is a good one.
    """

    net_input: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Recipe:
    """How a net is trained: AdamW (beta2 .99, as in the paper) and one cycle of the rate.

    Attributes:
        epochs: Passes over the training centres; a fraction ends within one.
        rate: The highest learning rate: reached after a tenth, then a cosine down to 0.
        decay: Decoupled weight decay, of the coordinate weights as well.
        batch: Centres a step.
        points: Points of the curves.
        quick_epochs: Passes when only the mechanism is to be shown.
        quick_batch: Centres a step then.
    """

    epochs: float
    rate: float
    decay: float = 0.0
    batch: int = 8
    points: int = 10
    quick_epochs: float = 0.2
    quick_batch: int = 4

    def passes(self, options: Options) -> float:
        """Passes over the training centres under these options."""
        return self.quick_epochs if options.quick else self.epochs * options.budget

    def batch_size(self, options: Options) -> int:
        """Centres a step under these options."""
        return self.quick_batch if options.quick else self.batch

    def curve_points(self, options: Options) -> int:
        """Points of the curves under these options."""
        return QUICK_POINTS if options.quick else self.points


def fit(
    model: nn.Module, split: Split, task: Task, recipe: Recipe, options: Options, label: str
) -> Run:
    """Train a net, in place, and score it.

    Args:
        model: The net.
        split: Centres to train and to test on.
        task: What it is to learn.
        recipe: How.
        options: Their budget multiplies the epochs; ``--quick`` cuts training and scoring short.
        label: Shown beside the progress bar.

    Returns:
        A run with the metrics ``train NAME`` and ``test NAME``, and curves of both.
    """
    model.to(memory_format=torch.channels_last)  # 1x1 convolutions are matrix products then
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.decay
    )
    steps = steps_of(recipe, len(split.train), options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    scored = QUICK_SCORED if options.quick else SCORED
    some = {"train": _sample(split.train, scored), "test": _sample(split.test, scored)}
    points = recipe.curve_points(options)
    measured_at = {math.ceil(steps * (n + 1) / points) for n in range(points)}
    curves: dict[str, list[float]] = {name: [] for name in ("step", "CPU seconds", "loss", *(some))}
    stopwatch, losses = Stopwatch(), []
    batches = _batches(split.train, recipe.batch_size(options), steps)
    for step, centers in enumerate(tqdm(batches, label, steps, leave=False, disable=None), 1):
        with stopwatch:
            loss = task.loss(model(task.net_input(centers)), centers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if step in measured_at:
            curves["step"].append(step)
            curves["CPU seconds"].append(round(stopwatch.seconds, 2))
            curves["loss"].append(_rounded(sum(losses) / len(losses)))
            losses.clear()
            for name, centers in some.items():
                curves[name].append(_rounded(score(model, centers, task)))
    everything = some if options.quick else {"train": split.train, "test": split.test}
    metrics = {
        f"{name} {task.score_name}": score(model, centers, task)
        for name, centers in everything.items()
    }
    metrics["coordinate weights"] = max(largest_coordinate_weights(model), default=0.0)
    return Run(count_parameters(model), steps, round(stopwatch.seconds, 2), metrics, curves)


def steps_of(recipe: Recipe, count: int, options: Options) -> int:
    """Optimizer steps for ``count`` training centres under the options' budget."""
    return max(1, round(recipe.passes(options) * math.ceil(count / recipe.batch_size(options))))


def outputs(model: nn.Module, centers: Tensor, task: Task) -> Tensor:
    """What the net answers, in evaluation mode, one row a centre."""
    model.eval()
    with torch.no_grad():
        # Few at a time: a batch of the tiled net's activations has to fit into the cache.
        answers = [model(task.net_input(some)) for some in centers.split(16)]
    return torch.cat(answers)


def score(model: nn.Module, centers: Tensor, task: Task) -> float:
    """The task's score on these centres; the net is left in the mode that it was in."""
    was_training = model.training
    result = task.score(outputs(model, centers, task), centers)
    model.train(was_training)
    return result


def print_times(record: Record, plain: Mapping[str, str], task: Task) -> None:
    """Print how soon the patched net reached the plain one's best test score, split by split.

    Args:
        record: Has runs of ``"patched"`` and of ``plain``.
        plain: The plain net's variant, by split.
        task: Says which scores are good.
    """
    for split, variant in plain.items():
        pairs = zip(record.of(split, "patched"), record.of(split, variant), strict=True)
        for patched, other in pairs:
            print(f"{split}, seed {other.seed}: {_sooner(patched, other, task)}")


def _sooner(patched: Run, plain: Run, task: Task) -> str:
    try:
        times = times_sooner(patched.curves, plain.curves, higher_is_better=task.higher_is_better)
    except ValueError as nothing:
        return str(nothing)
    if times is None:
        return f"patched, {plain.variant}'s best test score never came"
    return f"patched, {plain.variant}'s best test score came {times:.2g} times sooner"


def _sample(centers: Tensor, count: int) -> Tensor:
    """The same few centres every time, whatever the seed of the run."""
    chosen = torch.randperm(len(centers), generator=torch.Generator().manual_seed(0))[:count]
    return centers[chosen]


def _batches(centers: Tensor, size: int, steps: int) -> Iterator[Tensor]:
    """Batches of centres, in a new order every epoch, until ``steps`` are through."""
    done = 0
    while True:
        for chosen in torch.randperm(len(centers)).split(size):
            if done == steps:
                return
            done += 1
            yield centers[chosen]


def _rounded(value: float) -> float:
    """Six digits: enough for a curve."""
    return float(f"{value:.6g}")
