"""A small model, batches with something to learn from position, and plain training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from concat_model import concatenating
from torch import Tensor, nn

import coordconv_patch as ccp

Batch = tuple[Tensor, Tensor]
STARTS = {"zero": 0.0, "trained": 0.2}
"""Standard deviation of the coordinate weights at the start, in output units per coordinate."""


class Net(nn.Module):
    """A strided and a grouped convolution, batch norms, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 2)

    def features(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` to features ``(N, 8, H / 2, W / 2)``."""
        x = self.norm1(self.conv1(x)).relu()
        return self.norm2(self.conv2(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.features(x).mean((2, 3))).relu())


def fill_coords_(model: nn.Module, scale: float) -> nn.Module:
    """Coordinate weights as after some training; ``scale`` is their standard deviation."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def patched_net(scale: float) -> nn.Module:
    """The small model patched everywhere; the same numbers at every call."""
    torch.manual_seed(0)
    return fill_coords_(ccp.patch(Net(), "all"), scale)


def batches(count: int = 3, size: int = 4) -> list[Batch]:
    """Pairs of images ``(size, 3, 10, 14)`` and targets ``(size, 2)``: where a bright spot is."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        images = torch.randn(size, 3, 10, 14, generator=generator) * 0.1
        rows = torch.randint(10, (size,), generator=generator)
        columns = torch.randint(14, (size,), generator=generator)
        images[torch.arange(size), :, rows, columns] += 3.0
        made.append((images, torch.stack((columns / 13, rows / 9), dim=1) * 2 - 1))
    return made


def loss_of(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    images, targets = batch
    return F.mse_loss(model(images), targets)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose steps are proportional to the gradients, so that their errors show."""
    return torch.optim.SGD(ccp.param_groups(model, lr=0.05, coord_lr=0.5), momentum=0.9)


def train(
    model: nn.Module,
    data: Iterable[Batch] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Plain training steps, in place; the model itself comes back."""
    optimizer = optimizer or sgd(model)
    for batch in data or batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model


def train_concatenating(patched: nn.Module, data: Iterable[Batch] | None = None) -> nn.Module:
    """The same steps on the paper's form of a patched model: an independent reference.

    Returns:
        A new model, whose parameters have the same names and shapes.
    """
    model = concatenating(patched)
    named = dict(model.named_parameters())
    coords = [p for name, p in named.items() if name.endswith("coord_weight")]
    base = [p for name, p in named.items() if not name.endswith("coord_weight")]
    groups = [{"params": base, "lr": 0.05}, {"params": coords, "lr": 0.5}]
    return train(model, data, torch.optim.SGD(groups, momentum=0.9))


def assert_same_state(
    left: nn.Module | dict[str, Tensor],
    right: nn.Module | dict[str, Tensor],
    *,
    tolerance: float = 1e-5,
) -> None:
    """The same names and the same values, to a tolerance relative to each tensor's largest."""
    left = left.state_dict() if isinstance(left, nn.Module) else left
    right = right.state_dict() if isinstance(right, nn.Module) else right
    assert set(left) == set(right)
    for name, value in left.items():
        value = value.detach()
        scale = float(value.abs().max()) + 1e-3
        torch.testing.assert_close(
            right[name].detach(),
            value,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_coordinates_trained(after: nn.Module, before: nn.Module) -> None:
    """Every coordinate weight moved: a comparison of models that stand still says nothing."""
    earlier = before.state_dict()
    moved = [
        float((value - earlier[name]).abs().max())
        for name, value in after.state_dict().items()
        if name.endswith("coord_weight")
    ]
    assert moved
    assert min(moved) > 1e-3


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
