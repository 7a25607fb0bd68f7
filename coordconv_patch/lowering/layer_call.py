"""What one call of a coordinate layer computes."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordinate_map import coordinate_map, grid_for, pad_grid
from coordconv_patch.layers.geometry import DECLARED, Call

__all__ = ["convolve_padded", "grid_of", "map_of", "padded_grid_of"]


def grid_of(layer: CoordLayer, call: Call) -> Tensor:
    """The coordinate channels, shape (1, K, *input_size)."""
    return grid_for(layer.coord_weight.detach(), layer.coords, call.input_size)


def padded_grid_of(layer: CoordLayer, call: Call) -> Tensor:
    """The coordinate channels, padded unless the convolution function does that."""
    grid = grid_of(layer, call)
    if layer.coord_geometry.transposed:
        return grid
    padded, _ = pad_grid(grid, layer.coord_geometry, layer.coord_padding)
    return padded


def map_of(layer: CoordLayer, call: Call, weight: Tensor | None = None) -> Tensor:
    """The coordinate map, shape (1, C_out, *output_size).

    Args:
        layer: The layer.
        call: The call.
        weight: The coordinate weight; ``None``: the layer's.
    """
    output_padding = layer.output_padding_of(call.input_size, call.output_size)
    return layer.compute_branch(call.input_size, output_padding, weight)


def convolve_padded(layer: CoordLayer, call: Call, grid: Tensor) -> Tensor:
    """The map of coordinate channels that :func:`padded_grid_of` gave, expanded perhaps.

    Args:
        layer: The layer.
        call: The call.
        grid: Shape (N, K, ...).

    Returns:
        Shape (N, C_out, *output_size).
    """
    geometry = layer.coord_geometry
    is_padded = layer.coord_padding.rule != "declared" or geometry.padding_mode != "zeros"
    if is_padded and not geometry.transposed:
        padding = (0,) * geometry.ndim
        geometry = dataclasses.replace(geometry, padding=padding, padding_mode="zeros")
    output_padding = layer.output_padding_of(call.input_size, call.output_size)
    return coordinate_map(grid, layer.coord_weight, geometry, DECLARED, output_padding)
