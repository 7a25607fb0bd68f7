"""Coordinate maps as torch.compile computes them quickest, for inference of an image on the CPU.

A compiled graph computes a coordinate map at every call: it cannot tell whether one that was
kept is still that of the weight.

A channel that depends on one axis alone is constant along the other. With X[v, j] the value of x
that tap v sees at output column j (0 beyond the picture), and M[u, i] = 1 where tap u sees a row
of the picture at output row i, 0 where it sees padding, the part of x in the map is::

    map_x[c, i, j] = sum over u, v of W_x[c, u, v] X[v, j] M[u, i]
                   = sum over u of P[c, u, j] M[u, i]
    P[c, u, j]     = sum over v of W_x[c, u, v] X[v, j]

P is a line for each channel and tap, and M is 1 where a tap never sees padding. So it is for y.

Before it runs, compiled code checks every object that it was made from, and a convolution has just
emptied the processor's caches: where torch.compile traced these functions, the checks took longer
than the map. So it is one operator to torch.compile, which traces what is in it later, and all that
the map is made from is one string.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from coordconv_patch.channels.registry import OWN_KINDS
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import ConvGeometry, Padding, pad_amounts, pad_modes
from coordconv_patch.running.composite_operator import composite_operator
from coordconv_patch.running.torch_versions import TELLS_EXPORTS, is_exporting
from coordconv_patch.version import __version__

__all__ = ["compiled_map", "made_from", "map_by_lines", "suits_lines"]


@functools.lru_cache(maxsize=1024)
def made_from(coords: Coordinates, geometry: ConvGeometry, rule: Padding) -> str:
    """What a coordinate map is made from besides its weight, where lines can give it.

    Args:
        coords: The convention.
        geometry: The convolution's.
        rule: How it pads.

    Returns:
        JSON; empty if the map has to be convolved.
    """
    blocks = coords.blocks(geometry.ndim)
    if (
        not TELLS_EXPORTS  # may go with torch 2.6
        or geometry.ndim != 2
        or geometry.transposed
        or geometry.kernel_size == (1, 1)
        or pad_modes(rule, geometry) != ("zeros", "zeros")
        or not coords.is_separable(2)
        or any(block.kind not in OWN_KINDS for block in blocks)
    ):
        return ""
    made = json.dumps([_FORMULA, coords.to_dict(), geometry.to_dict(), asdict(rule)])
    return made if _read(made) == (coords, geometry, rule) else ""


_FORMULA = f"{__version__}, 1"
"""Torch keeps compiled code on the disk, by what dynamo wrote down: the operator and its arguments.

So what else decides what the operator computes has to be in them: this package's version, and a
number that goes up with the formula (a block of somebody's own may change at any time).
"""


@functools.lru_cache(maxsize=1024)
def _read(made: str) -> tuple[Coordinates, ConvGeometry, Padding]:
    _, coords, geometry, rule = json.loads(made)
    return Coordinates.from_dict(coords), ConvGeometry.from_dict(geometry), Padding.from_dict(rule)


def suits_lines(input: Tensor, weight: Tensor) -> bool:
    """Whether :func:`map_by_lines` is quicker than a convolution.

    Measured for single images on CPUs, in inference. Training needs a backward pass, which is
    quick for convolutions; and what a map costs is shared by the images of a batch, which
    is added to in the memory order that a convolution leaves. In half precision the sums would
    round otherwise than a convolution does.

    Args:
        input: The convolution's input, ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: The coordinate weight.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not is_exporting()
        and not torch.is_grad_enabled()
        and (input.dim() == 3 or input.shape[0] == 1)
        and weight.device.type == "cpu"
        and weight.dtype is torch.float32
    )


@composite_operator("compiled_map(Tensor weight, SymInt[] size, str made) -> Tensor")
def compiled_map(weight: Tensor, size: Sequence[int], made: str) -> Tensor:
    """The coordinate map as compiled inference computes it, see :func:`suits_lines`.

    Args:
        weight: The coordinate weight, shape ``(C_out, K, kH, kW)``.
        size: ``(H, W)`` of the convolution's input, in pixels.
        made: What it is made from, see :func:`made_from`.

    Returns:
        Shape ``(1, C_out, *output_size)``.
    """
    return map_by_lines(size, weight, *_read(made))


def map_by_lines(
    input_size: Sequence[int],
    weight: Tensor,
    coords: Coordinates,
    geometry: ConvGeometry,
    rule: Padding,
) -> Tensor:
    """The coordinate map of a 2-d convolution that pads with zeros, without convolving.

    Args:
        input_size: ``(H, W)`` of the input, in pixels.
        weight: The coordinate weight, shape ``(C_out, K, kH, kW)``.
        coords: A convention whose channels each depend on one axis.
        geometry: The convolution's.
        rule: How it pads.

    Returns:
        Shape ``(1, C_out, *output_size)``.
    """
    size = tuple(input_size)
    amounts = pad_amounts(rule, size, geometry)
    taps_of_axes = (geometry.kernel_size, geometry.stride, geometry.dilation, amounts)
    steps = list(zip(*taps_of_axes, strict=True))
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
            total = total + clear.unsqueeze(other + 1)
    columns = total.shape[-1]
    if type(columns) is int and columns % _LANES == 0:
        # Flat, it is summed in the loop that adds it to the convolution's output, which can turn
        # one memory order into the other by blocks; but a vector may not reach into the next row.
        return _stored(total.flatten(1)).view(total.shape).unsqueeze(0)
    return _stored(total).unsqueeze(0)


_LANES = 16
"""Most numbers in a vector of a CPU."""


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
