"""The variants of a net that are compared: plain, patched, and a control.

The control, ``"scrambled"``, is patched with coordinate channels that say nothing about where a
pixel is. What it gains is not owed to coordinates.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from scrambled_coordinates import ScrambledCoordinates
from torch import nn

import coordconv_patch as ccp

Model = TypeVar("Model", bound=nn.Module)


def as_variant(model: Model, variant: str, where: str | list[str] = "all") -> Model:
    """The model itself if ``"plain"``, else a patched copy, its coordinates true or scrambled."""
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
