"""The coordinate map: what the branch adds to a convolution's output, for one input size.

It does not depend on the image: coordinate channels, padded as the convolution pads its input,
convolved with the coordinate weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coordconv_patch.layers.capture import is_capturing
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import (
    CONV_FUNCTIONS,
    Convolution,
    Padding,
    pad_amounts,
    pad_by_axis,
    pad_modes,
)
from coordconv_patch.running.torch_versions import (
    annotate_nodes,
    annotations_are_kept,
    is_exporting,
)

__all__ = ["CONVENTION_KEY", "coordinate_map", "grid_for", "pad_grid"]

CONVENTION_KEY = "coordconv_patch"
"""Under this key of ``meta["custom"]`` the nodes of an exported grid tell their convention."""


def grid_for(coord_weight: Tensor, coords: Coordinates, input_size: Sequence[int]) -> Tensor:
    """Coordinate channels on a weight's device and in its dtype, shape ``(1, K, *input_size)``.

    In a program of torch.export their nodes carry the convention, and a saved program
    keeps that: :func:`coordconv_patch.from_exported` makes a layer of them again.
    """
    device, dtype = coord_weight.device, coord_weight.dtype
    # The flag is one for the whole process, and the annotations are too.
    if not (annotations_are_kept() and is_capturing()):
        grid = coords.shared_grid(input_size, device=device, dtype=dtype)
        if torch.compiler.is_dynamo_compiling() and not is_exporting():
            # Inductor cannot order the strides of a view that a backward pass keeps, where sizes
            # are symbolic, so this is none.
            return torch.cat([channel[None, None] for channel in grid], dim=1)
        return grid.unsqueeze(0)
    with annotate_nodes({CONVENTION_KEY: coords.to_dict()}):
        return coords.shared_grid(input_size, device=device, dtype=dtype).unsqueeze(0)


def pad_grid(
    grid: Tensor, convolution: Convolution, rule: Padding
) -> tuple[Tensor, str | Sequence[int]]:
    """Pad coordinate channels as a convolution pads its input.

    Args:
        grid: Coordinate channels, shape ``(N or 1, K, *input_size)``.
        convolution: The convolution, or its geometry; not a transposed one.
        rule: How it pads, which its attributes may not tell.

    Returns:
        The grid and the padding that is left for the convolution function to do.
    """
    if rule.rule == "declared" and convolution.padding_mode == "zeros":
        return grid, convolution.padding
    amounts = pad_amounts(rule, grid.shape[2:], convolution)
    return pad_by_axis(grid, amounts, pad_modes(rule, convolution)), (0,) * len(amounts)


def coordinate_map(
    grid: Tensor,
    coord_weight: Tensor,
    convolution: Convolution,
    rule: Padding,
    output_padding: Sequence[int] = (),
) -> Tensor:
    """The branch: the coordinate channels convolved with the coordinate weight.

    Args:
        grid: Coordinate channels, shape ``(N or 1, K, *input_size)``.
        coord_weight: Shape ``(C_out, K, *kernel_size)``; ``(K, C_out, *kernel_size)``
            if transposed.
        convolution: The convolution, or its geometry.
        rule: How it pads, which its attributes may not tell.
        output_padding: Of a transposed convolution, in pixels per dimension.

    Returns:
        Tensor of shape ``(N or 1, C_out, *output_size)``.
    """
    stride, dilation = convolution.stride, convolution.dilation
    convolve = CONV_FUNCTIONS[len(stride), convolution.transposed]
    if convolution.transposed:
        padding: str | Sequence[int] = convolution.padding
        return convolve(
            grid, coord_weight, None, stride, padding, tuple(output_padding), 1, dilation
        )
    grid, padding = pad_grid(grid, convolution, rule)
    return convolve(grid, coord_weight, None, stride, padding, dilation)
