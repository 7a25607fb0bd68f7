"""A model whose places are one more input: for an exporter, and for the check of its file."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import ExportError
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.patching.places import places
from coordconv_patch.running.inputs import tensors_in
from coordconv_patch.running.one_more_argument import OneMoreArgument, with_argument

__all__ = ["PLACES", "PlacedModel", "places_to_try", "whole_picture", "with_places"]

PLACES = "places"
"""Name of the input: the argument's, and the graph's."""


class PlacedModel(OneMoreArgument):
    """A patched model with one more argument, the places of the samples, shape (N, d, d + 1).

    Args:
        model: A patched model.

    Raises:
        ExportError: If its forward has an argument of this name already, or its coordinate layers
            have different numbers of dimensions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, PLACES)
        self.ndim = _ndim_of(model)

    def given(self, value: Any) -> AbstractContextManager[Any]:
        return places(self.__dict__["_model"], value)


def _ndim_of(model: nn.Module) -> int:
    by_ndim = {
        layer.coord_geometry.ndim: name for name, layer in require_coord_layers(model).items()
    }
    if len(by_ndim) > 1:
        raise ExportError(
            "places=True, but coordinate layers have different numbers of dimensions: "
            + ", ".join(f"{name} has {ndim}" for ndim, name in sorted(by_ndim.items()))
        )
    return next(iter(by_ndim))


def with_places(example_inputs: Any, theta: Tensor) -> Any:
    """Inputs of a model as those of the placed one."""
    return with_argument(example_inputs, PLACES, theta)


def places_to_try(ndim: int, samples: int, like: Any) -> Tensor:
    """Different places for samples: mirrored and turned crops, some beyond the picture.

    Args:
        ndim: Number of dimensions d.
        samples: N.
        like: The inputs that they go with: their device is taken.

    Returns:
        Shape (N, d, d + 1), float32.
    """
    theta = torch.zeros(samples, ndim, ndim + 1)
    for at in range(samples):
        scale = (0.5, -0.75, 1.25)[at % 3]
        theta[at, :, :-1] = torch.eye(ndim) * scale
        theta[at, :, -1] = torch.tensor([0.375, -0.5, 0.25][:ndim])
        if ndim > 1:
            turn = math.radians(30.0 * at)
            theta[at, 0, 0], theta[at, 0, 1] = scale * math.cos(turn), -scale * math.sin(turn)
            theta[at, 1, 0], theta[at, 1, 1] = scale * math.sin(turn), scale * math.cos(turn)
    return theta.to(tensors_in(like)[0].device)


def whole_picture(ndim: int, like: Any) -> Tensor:
    """The place of a sample that is a whole picture, for all samples; shape (1, d, d + 1)."""
    return torch.eye(ndim, ndim + 1).unsqueeze(0).to(tensors_in(like)[0].device)
