"""Two tasks of finding one thing in a picture: a digit by a small net, a cup by a pretrained one.

Each :class:`Task` makes its plain model, gives a loss on the next training pictures, and measures a
model on held-out ones. All pictures are made once and kept.
"""

from __future__ import annotations

from typing import Protocol

import timm
import torch
import torch.nn.functional as F
from localiser import Localiser
from scattered_digits import Layout, Scenes, scatter, training_and_test_digits
from torch import Tensor, nn
from torchvision.ops import box_iou

from coordconv_patch.demo.backbone import MODEL_NAME, load_pretrained
from coordconv_patch.demo.task import CupTask, Pictures, to_pixels, to_unit


class Task(Protocol):
    """What :mod:`finetune` needs of a task.

    Attributes:
        metric: Name of the figure that :meth:`measure` gives.
        batch_size: Pictures per step.
        learning_rate: Highest one of an optimizer's schedule.
    """

    metric: str
    batch_size: int
    learning_rate: float

    def plain(self) -> nn.Module:
        """The model before its training on the task, pretrained on another if it is at all."""

    def fresh(self) -> nn.Module:
        """The same with random weights."""

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """On the training pictures with the indices ``chosen``, shape ``(N,)``."""

    def measure(self, model: nn.Module) -> float:
        """The metric on the held-out pictures; the model is left in training mode."""

    def answers(self, model: nn.Module, count: int) -> list[list[float]]:
        """What the model says of the first held-out pictures, in pixels, for a picture."""

    def __len__(self) -> int: ...


class DigitTask:
    """One digit anywhere on a canvas: its box, measured by the mean IOU with the true one.

    Args:
        padded: Whether the net's convolutions pad with zeros.
        strides: Of the net's convolutions.
        pictures: Number of training pictures.
        held_out: Number of held-out pictures, of other digits.
        seed: Of the pictures.
        new_places: Whether held-out digits, and they alone, have their centres in the quadrant at
            the lower right (the paper's quadrant split). About a quarter of the training
            pictures is left out for it.
        batch_size: Pictures per step.
    """

    metric = "IOU"
    learning_rate = 2e-3
    layout = Layout(canvas=64, digits=1, sizes=(12.0, 18.0))

    def __init__(
        self,
        padded: bool,
        strides: tuple[int, ...],
        pictures: int,
        held_out: int,
        seed: int,
        *,
        new_places: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.padded, self.strides, self.batch_size = padded, strides, batch_size
        generator = torch.Generator().manual_seed(seed)
        training, test = training_and_test_digits()
        self.pictures = scatter(training, pictures, self.layout, generator)
        # A quarter of the digits lies in the quadrant.
        drawn = 4 * held_out if new_places else held_out
        self.held_out: Scenes = scatter(test, drawn, self.layout, generator)
        if new_places:
            self.pictures = self.pictures.of(~self._in_quadrant(self.pictures))
            self.held_out = self.held_out.of(self._in_quadrant(self.held_out))

    def _in_quadrant(self, scenes: Scenes) -> Tensor:
        """Whether each digit's centre lies in the quadrant at the lower right, shape ``(N,)``."""
        corners = scenes.boxes[:, 0].reshape(-1, 2, 2)
        return (corners.mean(1) > self.layout.canvas / 2).all(1)

    def __len__(self) -> int:
        return len(self.pictures)

    def plain(self) -> nn.Module:
        return Localiser(self.padded, self.strides)

    fresh = plain

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        true = self.pictures.boxes[chosen, 0] / self.layout.canvas
        return F.smooth_l1_loss(model(self.pictures.images[chosen]), true, beta=0.05)

    def measure(self, model: nn.Module) -> float:
        found = self.boxes(model, self.held_out.images)
        return float(box_iou(found, self.held_out.boxes[:, 0]).diagonal().mean())

    def answers(self, model: nn.Module, count: int) -> list[list[float]]:
        return self.boxes(model, self.held_out.images[:count]).tolist()

    @torch.no_grad()
    def boxes(self, model: nn.Module, images: Tensor) -> Tensor:
        """Boxes found in pictures ``(N, 1, S, S)``: x0, y0, x1, y1 in pixels, ``(N, 4)``."""
        model.eval()
        found = torch.cat([model(part) for part in images.split(250)]) * self.layout.canvas
        model.train()
        return found


class CupOfCoffee:
    """The demo's task: where on a photograph a cup was pasted, by an ImageNet-trained backbone.

    Measured by the median distance from the cup's centre in pixels, on photographs that
    training never shows.

    Args:
        pictures: Number of training pictures.
        held_out: Number of held-out pictures.
        seed: Of the pictures.
        size: Height and width of the pictures in pixels.
    """

    metric = "median error, px"
    batch_size = 16
    learning_rate = 1e-3

    def __init__(self, pictures: int, held_out: int, seed: int, size: int = 64) -> None:
        self.size = size
        cups = CupTask(size, held_out=held_out, backgrounds=min(pictures, 800), seed=seed)
        self.pictures: Pictures = cups.batch(pictures)
        self.held_out: Pictures = cups.held_out

    def __len__(self) -> int:
        return len(self.pictures)

    def plain(self) -> nn.Module:
        model = load_pretrained()
        model.reset_classifier(2)
        return model.train()

    def fresh(self) -> nn.Module:
        return timm.create_model(MODEL_NAME, num_classes=2)

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        true = to_unit(self.pictures.centers[chosen], self.size)
        return F.smooth_l1_loss(model(self.pictures.images[chosen]), true, beta=0.1)

    def measure(self, model: nn.Module) -> float:
        found = self.centres(model, self.held_out.images)
        return float((found - self.held_out.centers).norm(dim=1).median())

    def answers(self, model: nn.Module, count: int) -> list[list[float]]:
        return self.centres(model, self.held_out.images[:count]).tolist()

    @torch.no_grad()
    def centres(self, model: nn.Module, images: Tensor) -> Tensor:
        """Centres found in pictures ``(N, 3, S, S)``: x, y in pixels, shape ``(N, 2)``."""
        model.eval()
        found = torch.cat([model(part) for part in images.split(64)])
        model.train()
        return to_pixels(found, self.size)
