"""Coordinate maps as torch.compile computes them quickest, for inference of an image on the CPU.

A compiled graph computes a coordinate map at every call: it cannot tell whether one that was
kept is still that of the weight. As a convolution of the coordinate channels the map costs some
15 to 20 % of a 3x3 convolution with 64 channels on 64 x 64 pixels, and 4 to 7 % as it is computed
here.

A channel that depends on one axis alone is constant along the other. With X[v, j] the value of x
that tap v sees at output column j (0 beyond the picture), and M[u, i] = 1 where tap u sees a row
of the picture at output row i, 0 where it sees padding, the part of x in the map is::

    map_x[c, i, j] = sum over u, v of W_x[c, u, v] X[v, j] M[u, i]
                   = sum over u of P[c, u, j] M[u, i]
    P[c, u, j]     = sum over v of W_x[c, u, v] X[v, j]

P is a line for each channel and tap, and M is 1 where a tap never sees padding. So it is for y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import Convolution, Padding, pad_amounts, pad_modes
from coordconv_patch.running.torch_versions import is_exporting

__all__ = ["map_by_lines", "suits_lines"]


def suits_lines(
    input: Tensor, weight: Tensor, coords: Coordinates, convolution: Convolution, rule: Padding
) -> bool:
    """Whether :func:`map_by_lines` gives the coordinate map, and quicker than a convolution.

    Measured for single images on CPUs, in inference. Training needs a backward pass, which is
    quick for convolutions; and what a map costs is shared by the images of a batch, which
    is added to in the memory order that a convolution leaves. In half precision the sums would
    round otherwise than a convolution does.

    Args:
        input: The convolution's input, ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: The coordinate weight.
        coords: The convention.
        convolution: The convolution, or its geometry.
        rule: How it pads.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not is_exporting()
        and not torch.is_grad_enabled()
        and weight.dim() == 4
        and weight.shape[2] * weight.shape[3] > 1
        and (input.dim() == 3 or input.shape[0] == 1)
        and weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and coords.is_separable(2)
        and not convolution.transposed
        and pad_modes(rule, convolution) == ("zeros", "zeros")
    )


def map_by_lines(
    input_size: Sequence[int],
    weight: Tensor,
    coords: Coordinates,
    convolution: Convolution,
    rule: Padding,
) -> Tensor:
    """The coordinate map of a 2-d convolution that pads with zeros, without convolving.

    Args:
        input_size: ``(H, W)`` of the input, in pixels.
        weight: The coordinate weight, shape ``(C_out, K, kH, kW)``.
        coords: A convention whose channels each depend on one axis.
        convolution: The convolution, or its geometry.
        rule: How it pads.

    Returns:
        Shape ``(1, C_out, *output_size)``.
    """
    size = tuple(input_size)
    stride, dilation = convolution.stride, convolution.dilation
    amounts = pad_amounts(rule, size, convolution)
    # Few objects and functions: at every call the compiled code checks each that it was made from.
    steps = list(zip(convolution.kernel_size, stride, dilation, amounts, strict=True))
    indices = [
        _seen_by_taps(length, *step, weight.device)
        for length, step in zip(size, steps, strict=True)
    ]
    are_inside = [
        (index >= 0) & (index < length) for index, length in zip(indices, size, strict=True)
    ]
    factors = [_stored(inside.to(weight.dtype)) for inside in are_inside]
    lines = coords.lines(size, weight.device, weight.dtype, indices)
    total: Any = 0
    for channel, (own, line) in enumerate(lines):
        other = 1 - own
        seen = _stored(torch.where(are_inside[own], line, 0.0))
        # Both axes in one memory order, lines last, so that either is computed by vectors.
        by_taps = weight[:, channel] if own == 1 else weight[:, channel].transpose(1, 2)
        part = _stored((by_taps.unsqueeze(-1) * seen).sum(2))
        taps, _, spacing, (before, after) = steps[other]
        clear: Any = 0
        for tap in range(taps):
            if before <= tap * spacing <= spacing * (taps - 1) - after:
                clear = clear + part[:, tap]
            else:
                factor = factors[other][tap]
                factor = factor.unsqueeze(-1) if other == 0 else factor
                total = total + part[:, tap].unsqueeze(other + 1) * factor
        if isinstance(clear, Tensor):
            total = total + (clear).unsqueeze(other + 1)
    # Flat, the loop that adds it to the convolution's output can turn one memory order into
    # the other by blocks.
    return _stored(total.flatten(1)).view(total.shape).unsqueeze(0)


def _seen_by_taps(
    length: Any,
    taps: int,
    stride: int,
    dilation: int,
    amounts: tuple[Any, Any],
    device: torch.device,
) -> Tensor:
    """The pixel that each tap of an axis sees, shape ``(taps, output length)``."""
    before, after = amounts
    steps = (length + before + after - dilation * (taps - 1) - 1) // stride + 1
    starts = torch.arange(steps, device=device) * stride - before
    return starts + dilation * torch.arange(taps, device=device)[:, None]


def _stored(values: Tensor) -> Tensor:
    """The same, which the compiler computes once and stores, as it does where strides are given.

    It would repeat the sums at every pixel otherwise, inside of the loop that adds the map.
    """
    strides: list[Any] = [1]
    for dim in range(values.dim() - 1, 0, -1):
        strides.insert(0, strides[0] * values.shape[dim])
    return values.as_strided(values.shape, strides)
