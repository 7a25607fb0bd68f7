"""The variants of a net that are compared: plain, patched, and a control.

The control, ``"scrambled"``, is patched with coordinate channels that say nothing about where a
pixel is. What it gains is not owed to coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

import coordconv_patch as ccp

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ScrambledCoordinates(ccp.Coordinates):
    """The same coordinate channels, with the pixels in a fixed random order.

    A net patched with these has every parameter of a patched one, and pixels that can be told
    apart, but no notion of left, right or near. The order depends on the size alone, so it
    is the same at each call.
    """

    def grid(
        self,
        size: Sequence[int | torch.SymInt | Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The scrambled channels ``(K, *size)``."""
        true = super().grid(size, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(true[0].numel())
        order = torch.randperm(true[0].numel(), generator=generator).to(true.device)
        return true.flatten(1)[:, order].reshape(true.shape)


def as_variant(model: Model, variant: str, where: str = "all") -> Model:
    """The model itself (``"plain"``), or a patched copy (``"patched"``, ``"scrambled"``)."""
    if variant == "plain":
        return model
    coords = ScrambledCoordinates() if variant == "scrambled" else None
    return cast(Model, ccp.patch(model, where, coords=coords))


def coordinate_size(model: nn.Module) -> float:
    """Mean absolute coordinate weight; 0 if there is none, or none has moved."""
    weights = [
        parameter.detach().flatten()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "coord_weight"
    ]
    return torch.cat(weights).abs().mean().item() if weights else 0.0
