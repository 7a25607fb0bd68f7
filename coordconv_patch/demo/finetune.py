"""Fine-tune two models side by side: one patched, one not, and nothing else different.

Both start from the same weights and see the same pictures in the same order, with
the same optimizer and schedule, in two phases as is usual for pretrained models:

1. the backbone is frozen; the new head is trained, and the coordinate weights
   where there are any;
2. the last stages are trained too.

Phase 1 shows what the pretrained features lack. In phase 2 the control can learn
to read positions off the zero padding, which marks the border of every feature
map (Islam et al. 2020, "How much position information do convolutional neural
networks encode?"). Batch norm statistics stay as ImageNet left them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordconv_patch.demo.task import CupTask, Pictures, to_pixels, to_unit
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.training import coord_parameters, param_groups

__all__ = [
    "Curve",
    "Errors",
    "FineTuned",
    "Phase",
    "Settings",
    "distances",
    "fine_tune",
    "predict",
    "unfreeze_",
]


@dataclass(frozen=True)
class Phase:
    """A part of the fine-tuning.

    Attributes:
        title: What is trained, in words.
        trained: Names of the modules whose weights are trained; coordinate weights always are.
        learning_rate: Highest learning rate of the model's own weights.
        coord_learning_rate: Highest learning rate of the coordinate weights.
    """

    title: str
    trained: tuple[str, ...]
    steps: int
    learning_rate: float
    coord_learning_rate: float


@dataclass(frozen=True)
class Settings:
    """How to fine-tune: the phases have their own optimizers and schedules.

    Attributes:
        measure_every: Steps between two measurements on the held-out pictures.
        weight_decay: Of the model's own weights; the coordinate weights have none.
    """

    phases: tuple[Phase, ...]
    batch_size: int
    measure_every: int
    weight_decay: float = 1e-2

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(phase.steps for phase in self.phases)


@dataclass(frozen=True)
class Errors:
    """Distances between predicted and true positions, in pixels."""

    median: float
    mean: float
    percentile_90: float

    @classmethod
    def of(cls, distances: Tensor) -> Errors:
        """Summarise distances of shape ``(N,)``."""
        median, percentile_90 = (float(distances.quantile(part)) for part in (0.5, 0.9))
        return cls(median, float(distances.mean()), percentile_90)


@dataclass
class Curve:
    """How one model learned.

    Attributes:
        steps: Steps after which the model was measured on the held-out pictures.
        median_errors: Median distance then, in pixels.
        batch_errors: Mean distance on each training batch, in pixels, before its step.
        phase_errors: Held-out errors at the end of each phase.
        trained_parameters: Numbers that the optimizer changes in each phase.
        seconds: Time spent in training steps, without measurements.
    """

    steps: list[int] = field(default_factory=list)
    median_errors: list[float] = field(default_factory=list)
    batch_errors: list[float] = field(default_factory=list)
    phase_errors: list[Errors] = field(default_factory=list)
    trained_parameters: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class FineTuned:
    """What came of fine-tuning one model.

    Attributes:
        curve: How it learned.
        before: Where it saw the cup in the held-out pictures before the first step, as of
            :func:`predict`.
        after: Where it sees the cup after the last step.
    """

    curve: Curve
    before: Tensor
    after: Tensor


def unfreeze_(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Let only the named modules and the coordinate weights require gradients, in place."""
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    for weight in coord_parameters(model) if coord_layers(model) else ():
        weight.requires_grad_(True)
    return model


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Where the model sees the cup in images ``(N, 3, S, S)``: x, y in pixels, ``(N, 2)``."""
    answers = [model(part) for part in torch.split(images, batch_size)]
    return to_pixels(torch.cat(answers), images.shape[-1])


def distances(answers: Tensor, pictures: Pictures) -> Tensor:
    """Euclidean distance of each answer ``(N, 2)`` from the true centre, in pixels, ``(N,)``."""
    return (answers - pictures.centers).norm(dim=1)


def fine_tune(
    models: dict[str, nn.Module],
    task: CupTask,
    settings: Settings,
    *,
    on_step: Callable[[int, dict[str, Curve]], None],
) -> dict[str, FineTuned]:
    """Train every model on the same batches, in place; each step is made with all of them.

    The models, by name, are in evaluation mode, which they keep. ``on_step`` is told the number of
    steps made and the curves so far, by the models' names.
    """
    runs = [_Run(model, task) for model in models.values()]
    curves = {name: run.curve for name, run in zip(models, runs, strict=True)}
    before = [run.measure(0) for run in runs]
    step = 0
    for phase in settings.phases:
        for run in runs:
            run.begin(phase, settings.weight_decay)
        end = step + phase.steps
        while step < end:
            step += 1
            pictures = task.batch(settings.batch_size)
            for run in runs:
                run.step(pictures)
                if step % settings.measure_every == 0 or step == end:
                    run.measure(step)
            on_step(step, curves)
        for run in runs:
            run.curve.phase_errors.append(Errors.of(distances(run.answers, task.held_out)))
    return {
        name: FineTuned(run.curve, first, run.answers)
        for name, run, first in zip(models, runs, before, strict=True)
    }


class _Run:
    """One model, its curve, and the optimizer and schedule of the phase."""

    def __init__(self, model: nn.Module, task: CupTask) -> None:
        self.model = model
        self.task = task
        self.curve = Curve()
        self.answers: Tensor

    def begin(self, phase: Phase, weight_decay: float) -> None:
        unfreeze_(self.model, phase.trained)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.curve.trained_parameters.append(sum(weight.numel() for weight in trained))
        groups: list[dict[str, Any]] = [{"params": trained, "lr": phase.learning_rate}]
        if coord_layers(self.model):
            groups = param_groups(
                self.model, lr=phase.learning_rate, coord_lr=phase.coord_learning_rate
            )
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
        rates = [group["lr"] for group in groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rates, total_steps=phase.steps, pct_start=0.2
        )

    def step(self, pictures: Pictures) -> None:
        started = time.perf_counter()
        answers = self.model(pictures.images)
        loss = F.smooth_l1_loss(answers, to_unit(pictures.centers, self.task.size), beta=0.1)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.curve.seconds += time.perf_counter() - started
        in_pixels = to_pixels(answers.detach(), self.task.size)
        self.curve.batch_errors.append(float(distances(in_pixels, pictures).mean()))

    def measure(self, step: int) -> Tensor:
        """Where the model sees the cup in the held-out pictures; kept as ``answers``, too."""
        held_out = self.task.held_out
        self.answers = predict(self.model, held_out.images)
        self.curve.steps.append(step)
        self.curve.median_errors.append(Errors.of(distances(self.answers, held_out)).median)
        return self.answers
