"""The tasks that the ranking is tested on: small nets, and one with ImageNet weights.

A :class:`Task` gives a plain model, batches and their loss, and says how models are trained on
it. Pictures are drawn as they are needed; those to test with are of digits, or on photographs,
that training never shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from region_proposals import RegionProposals, Sampling
from region_proposals import loss as proposal_loss
from scattered_digits import Layout, Scenes, scatter, training_and_test_digits
from torch import Tensor, nn

from coordconv_patch.demo.backbone import load_pretrained
from coordconv_patch.demo.task import CupTask, Pictures, to_unit
from coordconv_patch.ranking.parts import By

Batch = Any
Draw = Callable[[int, bool, int], list[Batch]]
"""How many batches, whether of test pictures, and a seed; to batches."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: As the record has it.
        model: A plain model, its weights drawn from torch's generator where it is not pretrained.
        draw: Batches.
        loss: Of a model on a batch.
        pretraining: Steps that the plain model is trained before anything is ranked.
        steps: Steps of the training that a ranking is to foresee.
        lr: Highest learning rate of both; ten times it for coordinates.
        warm_up: What of the model is trained before that; ``None``: all.
        trained: What of it is trained later on; ``None``: all.
        where: The convolutions that are ranked.
        by: Whether each is, or their stages.
    """

    name: str
    model: Callable[[], nn.Module]
    draw: Draw
    loss: Callable[[nn.Module, Batch], Tensor]
    pretraining: int = 500
    steps: int = 160
    lr: float = 2e-3
    warm_up: str | None = None
    trained: str | None = None
    where: str = "all"
    by: By = "site"


class Net(nn.Module):
    """Four 3x3 convolutions, then an average over all places, or all of them side by side.

    Args:
        padded: Whether the convolutions pad with zeros.
        pooled: Whether the places are averaged before the two linear layers.
        outputs: Numbers in an answer.
        canvas: Height and width of the pictures, in pixels.
    """

    def __init__(self, padded: bool, pooled: bool, outputs: int, canvas: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for stride, width in ((2, 8), (1, 12), (1, 12), (1, 16)):
            conv = nn.Conv2d(before, width, 3, stride, padding=int(padded))
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers)
        self.pooled = pooled
        places = self.features(torch.zeros(2, 1, canvas, canvas)).shape[-1] ** 2
        flat = before if pooled else before * places
        self.head = nn.Sequential(nn.Linear(flat, 32), nn.ReLU(), nn.Linear(32, outputs))

    def forward(self, images: Tensor) -> Tensor:
        """From ``(N, 1, S, S)`` to answers ``(N, outputs)``."""
        features = self.features(images)
        return self.head(features.mean((2, 3)) if self.pooled else features.flatten(1))


ONE_DIGIT = Layout(canvas=48, digits=1, sizes=(9.0, 13.0))
DETECTION = Layout(canvas=64, digits=5, sizes=(15.0, 25.0))


def digit_batches(layout: Layout, size: int) -> Draw:
    """Batches of ``size`` pictures with scattered digits."""

    def draw(count: int, test: bool, seed: int) -> list[Scenes]:
        digits = training_and_test_digits()[int(test)]
        generator = torch.Generator().manual_seed(seed)
        scenes = scatter(digits, count * size, layout, generator)
        return [scenes.of(part) for part in torch.arange(count * size).split(size)]

    return draw


def centre_loss(model: nn.Module, scenes: Scenes) -> Tensor:
    """Where the digit is: its centre in half canvases from the middle."""
    corners = scenes.boxes[:, 0].reshape(-1, 2, 2).mean(1)
    return F.smooth_l1_loss(model(scenes.images), corners / 24 - 1, beta=0.1)


def size_loss(model: nn.Module, scenes: Scenes) -> Tensor:
    """How large the digit is, in canvases: the answer is the same wherever it lies."""
    box = scenes.boxes[:, 0]
    return F.smooth_l1_loss(model(scenes.images), (box[:, 2:] - box[:, :2]) / 11 - 1, beta=0.1)


def class_loss(model: nn.Module, scenes: Scenes) -> Tensor:
    """Which digit it is."""
    return F.cross_entropy(model(scenes.images), scenes.labels[:, 0])


def detection_loss(model: Any, scenes: Scenes) -> Tensor:
    """Scores and boxes of a region proposal network that learns from its anchors."""
    truth = (scenes.images, scenes.boxes, scenes.visible)
    return proposal_loss(model, *truth, Sampling(by="anchors"))


def linear_net() -> nn.Module:
    """The paper's regression net: no activation, and the maximum over the canvas at the end."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 8, 1) for channels in (1, 8, 8)]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())


def pixel_batches(count: int, test: bool, seed: int) -> list[tuple[Tensor, Tensor]]:
    """One bright pixel on a canvas of 32; a fixed quarter of the places is to test with."""
    places = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    places = places[:256] if test else places[256:]
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        chosen = places[torch.randint(len(places), (16,), generator=generator)]
        images = F.one_hot(chosen, 1024).float().reshape(-1, 1, 32, 32)
        batches.append((images, torch.stack([chosen % 32, chosen // 32], 1) / 32))
    return batches


def pixel_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Where the bright pixel is, in canvases."""
    return F.mse_loss(model(batch[0]), batch[1])


@cache
def cup_pictures(size: int, test: bool) -> Pictures:
    """Pictures with a cup in them, on photographs to train with or to test with."""
    task = CupTask(size, held_out=256, backgrounds=400, seed=0)
    return task.held_out if test else task.batch(1200)


def cup_batches(size: int) -> Draw:
    """Batches of 6 pictures of ``size`` pixels a side."""

    def draw(count: int, test: bool, seed: int) -> list[tuple[Tensor, Tensor]]:
        pictures = cup_pictures(size, test)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pictures), generator=generator)
        order = order.repeat(-(-6 * count // len(pictures)))[: 6 * count]
        centres = to_unit(pictures.centers, size)
        return [(pictures.images[part], centres[part]) for part in order.split(6)]

    return draw


def cup_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Where the cup is, -1 to 1."""
    return F.smooth_l1_loss(model(batch[0]), batch[1], beta=0.1)


def efficientnet() -> nn.Module:
    """With ImageNet weights and a new head for two numbers; batch norms stay as they are."""
    model = load_pretrained()
    model.reset_classifier(2)  # type: ignore[operator]
    return model.eval()


def _digit_task(name: str, *, padded: bool, pooled: bool = True, **options: Any) -> Task:
    loss, outputs = options.pop("loss", centre_loss), options.pop("outputs", 2)
    net = lambda: Net(padded, pooled, outputs)  # noqa: E731
    return Task(name, net, digit_batches(ONE_DIGIT, 16), loss, **options)


def _cup_task(size: int, trained: str | None) -> Task:
    name = f"EfficientNet-Lite0, cup at {size} px, backbone {'frozen' if trained else 'trained'}"
    return Task(
        *(name, efficientnet, cup_batches(size), cup_loss),
        pretraining=25,
        steps=30,
        lr=1e-3,
        warm_up="classifier",
        trained=trained,
        where=r"re:conv_stem|conv_head|blocks\.[135]\..*",
        by="stage",
    )


def _detector(name: str, *, absolute: bool) -> Task:
    def net() -> nn.Module:
        return RegionProposals("zeros", (8, 16), 16, absolute=absolute)

    return Task(name, net, digit_batches(DETECTION, 8), detection_loss, steps=160)


TASKS = {
    task.name: task
    for task in (
        _digit_task("localiser, unpadded", padded=False),
        _digit_task("localiser, zero-padded", padded=True),
        _digit_task("localiser, without pooling", padded=True, pooled=False),
        Task(
            *("regression of the paper", linear_net, pixel_batches, pixel_loss),
            pretraining=0,
            steps=80,
            lr=5e-3,
        ),
        _detector("detector without anchors", absolute=True),
        _detector("detector with anchors", absolute=False),
        _digit_task("classification", padded=True, loss=class_loss, outputs=10),
        _digit_task("size of a digit", padded=True, loss=size_loss, outputs=2),
        _cup_task(64, "classifier"),
        _cup_task(64, None),
        _cup_task(96, "classifier"),
        _cup_task(96, None),
    )
}
