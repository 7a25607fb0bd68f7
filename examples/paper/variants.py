"""The variants of a net that are compared: plain, patched, and a control.

The control, ``"scrambled"``, is patched with coordinate channels that say nothing about where a
pixel is. What it gains is not owed to coordinates. (In the runs that are recorded, torch.randperm
permuted the places; :func:`coordconv_patch.scrambled`, which came later, permutes them otherwise.)
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

import coordconv_patch as ccp

PLAIN, PATCHED, SCRAMBLED = "plain", "patched", "scrambled"

Model = TypeVar("Model", bound=nn.Module)


def as_variant(model: Model, variant: str, where: str | list[str] = "all") -> Model:
    """The model itself if ``"plain"``, else a patched copy, its coordinates true or scrambled."""
    if variant == PLAIN:
        return model
    coords = ccp.scrambled() if variant == SCRAMBLED else None
    return cast(Model, ccp.patch(model, where, coords=coords))


def coordinate_weights(model: nn.Module) -> list[Tensor]:
    """The coordinate weights, of a plain model none."""
    named = model.named_parameters()
    return [weight.detach() for name, weight in named if name.endswith("coord_weight")]


def coordinate_size(model: nn.Module) -> float:
    """Mean absolute coordinate weight; 0 if there is none, or none has moved."""
    weights = [weight.flatten() for weight in coordinate_weights(model)]
    return torch.cat(weights).abs().mean().item() if weights else 0.0


def largest_coordinate_weights(model: nn.Module) -> list[float]:
    """Largest absolute coordinate weight of each patched convolution: 0 before training."""
    return [weight.abs().max().item() for weight in coordinate_weights(model)]
