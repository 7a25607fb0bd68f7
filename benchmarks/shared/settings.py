"""Where and in which precision a model runs, and runs of it that end when the work is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.models import images

__all__ = ["Setting", "inference_run", "training_run"]


@dataclass(frozen=True)
class Setting:
    """Device, precision and memory layout.

    Attributes:
        device: The device.
        dtype: Of the model and its images.
        autocast: What autocast computes in; ``None``: no autocast.
        channels_last: Whether weights and images lie so.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    channels_last: bool = False

    @property
    def title(self) -> str:
        """What keys of results call it."""
        name = str(self.dtype).removeprefix("torch.")
        if self.autocast is not None:
            name = f"AMP {str(self.autocast).removeprefix('torch.')}"
        return f"{name}, channels_last" if self.channels_last else name

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout, as torch takes it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def put(self, model: nn.Module) -> nn.Module:
        """Bring a model here, in place."""
        return model.to(self.device, self.dtype, memory_format=self.memory_format)

    def images(self, batch: int, size: int) -> Tensor:
        """Random images (N, 3, H, W) here."""
        shown = images(batch, size).to(self.device, self.dtype)
        return shown.contiguous(memory_format=self.memory_format)

    def computing(self) -> AbstractContextManager[Any]:
        """The context that the model runs in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def wait(self) -> None:
        """Return when the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def training_run(model: nn.Module, setting: Setting, batch: int, size: int) -> Callable[[], None]:
    """One SGD step on random data; brings the model to the setting."""
    model = setting.put(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    shown = setting.images(batch, size)
    with torch.no_grad(), setting.computing():
        classes = model(shown).shape[1]
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(0))
    labels = labels.to(setting.device)

    def step() -> None:
        optimizer.zero_grad()
        with setting.computing():
            loss = nn.functional.cross_entropy(model(shown), labels)
        loss.backward()
        optimizer.step()
        setting.wait()

    return step


def inference_run(model: nn.Module, setting: Setting, shown: Tensor) -> Callable[[], None]:
    """One forward pass of a model that evaluates at the setting."""

    def run() -> None:
        with torch.no_grad(), setting.computing():
            model(shown)
        setting.wait()

    return run
