"""What one call of a coordinate layer of either kind computes: a convolution's, or a branch's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coordconv_patch.layers.branch import (
    CoordBranch,
    CoordLayer,
    coordinate_map,
    grid_for,
    pad_grid,
)
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import Call, ConvGeometry

__all__ = ["convolve_padded", "geometry_of", "grid_of", "map_of", "padded_grid_of"]


def geometry_of(layer: CoordLayer) -> ConvGeometry:
    """The convolution's geometry."""
    if isinstance(layer, CoordBranch):
        return layer.geometry
    assert isinstance(layer, CoordConvNd)
    return ConvGeometry.of(layer)


def grid_of(layer: CoordLayer, call: Call) -> Tensor:
    """The coordinate channels, shape (1, K, *input_size)."""
    return grid_for(layer.coord_weight.detach(), layer.coords, call.input_size)


def padded_grid_of(layer: CoordLayer, call: Call) -> Tensor:
    """The coordinate channels, padded unless the convolution function does that."""
    grid, geometry = grid_of(layer, call), geometry_of(layer)
    if geometry.transposed:
        return grid
    padded, _ = pad_grid(
        grid,
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        padding_mode=geometry.padding_mode,
        rule=layer.coord_padding,
    )
    return padded


def map_of(layer: CoordLayer, call: Call, weight: Tensor | None = None) -> Tensor:
    """The coordinate map, shape (1, C_out, *output_size).

    Args:
        layer: The layer.
        call: The call.
        weight: The coordinate weight; ``None``: the layer's.
    """
    assert isinstance(layer, (CoordConvNd, CoordBranch))
    return layer.compute_branch(call.input_size, _output_padding(layer, call), weight)


def convolve_padded(layer: CoordLayer, call: Call, grid: Tensor) -> Tensor:
    """The map of coordinate channels that :func:`padded_grid_of` gave, expanded perhaps.

    Args:
        layer: The layer.
        call: The call.
        grid: Shape (N, K, ...).

    Returns:
        Shape (N, C_out, *output_size).
    """
    geometry = geometry_of(layer)
    is_padded = layer.coord_padding.rule != "declared" or geometry.padding_mode != "zeros"
    return coordinate_map(
        grid,
        layer.coord_weight,
        transposed=geometry.transposed,
        stride=geometry.stride,
        padding=(0,) * geometry.ndim if is_padded and not geometry.transposed else geometry.padding,
        dilation=geometry.dilation,
        output_padding=_output_padding(layer, call),
    )


def _output_padding(layer: CoordLayer, call: Call) -> Sequence[int]:
    if isinstance(layer, CoordConvNd):
        return layer.output_padding_of(call.input_size, call.output_size)
    return geometry_of(layer).output_padding
