"""The concatenating CoordConv, written anew: what the layers of the package must equal.

Nothing here imports the package. Coordinates come from loops over pixel indices,
padding from ``F.pad`` on the concatenated input, the convolution from torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CONVS = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


def position(index: float, length: float, align_corners: bool = True) -> float:
    """Where pixel ``index`` of ``length`` lies between -1 and 1."""
    if align_corners:
        return -1.0 + 2.0 * index / (length - 1) if length > 1 else 0.0
    return -1.0 + 2.0 * (index + 0.5) / length


def paper_grid(size: Sequence[int], *, align_corners: bool = True, **convention: Any) -> Tensor:
    """Coordinate channels ``(K, *size)`` in float64, pixel by pixel; see :func:`channels_at`."""
    columns = []
    for pixel in np.ndindex(*size):
        # x belongs to the last dimension, so the reversed pixel index reads (x, y, z).
        units = [
            position(index, length, align_corners)
            for index, length in zip(pixel[::-1], tuple(size)[::-1], strict=True)
        ]
        columns.append(channels_at(units, **convention))
    return _grid(columns, size)


def placed_grid(
    theta: Tensor, size: Sequence[int], *, align_corners: bool = True, **convention: Any
) -> Tensor:
    """The same of an input that is a part of a larger picture.

    Args:
        theta: Shape (d, d + 1), from positions in the input to positions in the picture.
        size: Spatial size of the input.
        align_corners: The centring.
        **convention: See :func:`channels_at`.
    """
    place = theta.double().numpy()
    lengths = np.array(size[::-1], dtype=np.float64)
    columns = []
    for pixel in np.ndindex(*size):
        inside = (2 * np.array(pixel[::-1]) + 1) / lengths - 1
        whole = place @ np.append(inside, 1.0)
        units = []
        for axis, unit in enumerate(whole):
            full = 1 / math.sqrt(sum((place[axis, :-1] / lengths) ** 2))
            if align_corners:
                unit = unit * full / (full - 1) if full > 1 else 0.0
            units.append(float(unit))
        columns.append(channels_at(units, **convention))
    return _grid(columns, size)


def channels_at(
    units: Sequence[float],
    *,
    order: str = "xy",
    value_range: tuple[float, float] = (-1.0, 1.0),
    radius: bool = False,
    radius_center: float | None = None,
    fourier: int = 0,
) -> list[float]:
    """The channels of a pixel at a position (x, y, z) between -1 and 1."""
    low, high = value_range
    center = (low + high) / 2 if radius_center is None else radius_center
    units = list(units)
    if order == "yx":
        units.reverse()
    values = [low + (unit + 1) / 2 * (high - low) for unit in units]
    column = list(values)
    if radius:
        column.append(math.sqrt(sum((value - center) ** 2 for value in values)))
    for octave in range(fourier):
        for unit in units:
            column.append(math.sin(2.0**octave * math.pi * unit))
            column.append(math.cos(2.0**octave * math.pi * unit))
    return column


def _grid(columns: list[list[float]], size: Sequence[int]) -> Tensor:
    grid = np.array(columns, dtype=np.float64).T.reshape(-1, *size)
    return torch.from_numpy(np.ascontiguousarray(grid))


def released_reference_grid(height: int, width: int, *, radius: bool = False) -> np.ndarray:
    """uber-research/CoordConv as released, AddCoords with x_dim = H and y_dim = W."""
    x_dim, y_dim = height, width
    xx_channel = np.ones((x_dim, 1)) @ np.arange(y_dim)[None, :]
    yy_channel = np.arange(x_dim)[:, None] @ np.ones((1, y_dim))
    xx_channel = xx_channel / (x_dim - 1) * 2 - 1
    yy_channel = yy_channel / (y_dim - 1) * 2 - 1
    channels = [xx_channel, yy_channel]
    if radius:
        channels.append(np.sqrt(np.square(xx_channel) + np.square(yy_channel)))
    return np.stack(channels)


def mkocabas_grid(height: int, width: int, *, radius: bool = False) -> np.ndarray:
    """mkocabas/CoordConv-pytorch: rows first, and r from 0.5."""
    first = np.repeat((np.arange(height) / (height - 1) * 2 - 1)[:, None], width, axis=1)
    second = np.repeat((np.arange(width) / (width - 1) * 2 - 1)[None, :], height, axis=0)
    channels = [first, second]
    if radius:
        channels.append(np.sqrt((first - 0.5) ** 2 + (second - 0.5) ** 2))
    return np.stack(channels)


def solo_grid(height: int, width: int) -> np.ndarray:
    """SOLO: meshgrid of linspace(-1, 1), x first."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([x, y])


def paddledetection_grid(height: int, width: int) -> np.ndarray:
    """PaddleDetection's CoordConv: arange(n) / (n - 1) * 2 - 1, x first."""
    x = np.arange(width) / (width - 1) * 2.0 - 1.0
    y = np.arange(height) / (height - 1) * 2.0 - 1.0
    return np.stack([np.tile(x, (height, 1)), np.tile(y[:, None], (1, width))])


def tensorflow_same(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Pixels that TensorFlow's SAME padding adds before and after each dimension."""
    amounts = []
    for length, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        reach = (k - 1) * d + 1
        total = max((math.ceil(length / s) - 1) * s + reach - length, 0)
        amounts.append((math.floor(total / 2), math.ceil(total / 2)))
    return amounts


def interleave(x: Tensor, grid: Tensor, groups: int) -> Tensor:
    """The input with the coordinates appended to every group's channels."""
    coords = grid.to(x).unsqueeze(0).expand(len(x), *grid.shape)
    pieces = []
    for part in x.chunk(groups, dim=1):
        pieces += [part, coords]
    return torch.cat(pieces, dim=1)


def joined_weight(weight: Tensor, coord_weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight of the concatenating form, group by group."""
    if not transposed:  # every output channel reads its group's channels, then the coordinates
        return torch.cat([weight, coord_weight], dim=1)
    per_group = weight.shape[1]
    rows = []
    for group, part in enumerate(weight.chunk(groups, dim=0)):
        rows += [part, coord_weight[:, group * per_group : (group + 1) * per_group]]
    return torch.cat(rows, dim=0)


def concatenating_conv(
    x: Tensor,
    grid: Tensor,
    weight: Tensor,
    coord_weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: str | Sequence[int] | Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Sequence[int] = (),
) -> Tensor:
    """CoordConv as published: concatenate, pad, convolve; unbatched inputs too.

    ``padding`` may also be explicit ``(before, after)`` pairs per dimension.
    """
    ndim = len(stride)
    if x.dim() == ndim + 1:
        return concatenating_conv(
            x.unsqueeze(0),
            grid,
            weight,
            coord_weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            transposed=transposed,
            output_padding=output_padding,
        ).squeeze(0)
    joined = interleave(x, grid, groups)
    kernel = joined_weight(weight, coord_weight, groups, transposed)
    if transposed:
        return CONVS[ndim, True](
            joined, kernel, bias, stride, padding, output_padding, groups, dilation
        )
    if padding == "valid":
        pairs = [(0, 0)] * ndim
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [p if isinstance(p, tuple) else (p, p) for p in padding]
    flat = [amount for pair in reversed(pairs) for amount in pair]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    joined = F.pad(joined, flat, mode=mode)
    return CONVS[ndim, False](joined, kernel, bias, stride, 0, dilation, groups)
