"""Which convolutions of a model are patched, and the model with coordinates there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers

__all__ = ["SELECTIONS", "patched", "patched_names", "seeded"]

SELECTIONS: dict[str, Any] = {
    "first": "first",
    "k>1": lambda site: max(site.kernel_size) > 1,
    "all": "all",
}
"""By name what ``where=`` takes."""


def seeded(make: Any) -> nn.Module:
    """The model in evaluation mode, with the same random weights every time."""
    torch.manual_seed(0)
    return make().eval()


def patched(model: nn.Module, where: Any, example: Tensor) -> nn.Module:
    """A patched copy whose coordinate weights are not zero."""
    made = ccp.patch(copy.deepcopy(model), where, example_inputs=example)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ccp.coord_parameters(made):
            weight.normal_(std=1e-3, generator=generator)
    return made


def patched_names(model: nn.Module) -> list[str]:
    """Names of the patched convolutions, in the order of the module tree."""
    return list(coord_layers(model))
