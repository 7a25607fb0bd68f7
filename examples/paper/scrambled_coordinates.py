"""The control for CoordConv: coordinate channels that say nothing about where a pixel is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.coordinate_map import coordinate_map

Model = TypeVar("Model", bound=nn.Module)


def scrambled(grid: Tensor) -> Tensor:
    """Coordinate channels ``(K, *size)`` with the pixels in a fixed random order.

    The order depends on the size alone, so it is the same at each call.
    """
    pixels = grid[0].numel()
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(pixels))
    return grid.flatten(1)[:, order.to(grid.device)].reshape(grid.shape)


def scramble_(model: Model) -> Model:
    """Let the coordinate convolutions of a patched model see scrambled channels, in place.

    It has every parameter of a patched model, and pixels that can be told apart, but no notion
    of left, right or near. This holds in torch, also for a deep copy of the model; files do
    not tell it, so it is not for saving or exporting.
    """
    for layer in coord_layers(model).values():
        assert isinstance(layer, CoordConvNd)
        layer.compute_branch = partial(_scrambled_branch, layer)  # type: ignore[method-assign]
    return model


def _scrambled_branch(
    layer: CoordConvNd,
    input_size: Sequence[int],
    output_padding: Sequence[int],
    weight: Tensor | None = None,
) -> Tensor:
    """As :meth:`CoordConvNd.compute_branch`."""
    weight = layer.coord_weight if weight is None else weight
    grid = layer.coords.grid(input_size, device=weight.device, dtype=weight.dtype)
    return coordinate_map(
        scrambled(grid).unsqueeze(0), weight, layer, layer.coord_padding, output_padding
    )
