"""The coordinate channels of samples that are parts of larger pictures, each at a place of its own.

With (x, y) a position in the network's input, -1 and 1 at its outer pixel edges, the position in
the whole picture is ``P = theta @ (x, y, 1)``. A feature map that is n_j pixels long along axis j
stands for the same part of the picture, whose length along axis k is, in the map's pixels::

    N_k = (sum over j of (theta[k, j] / n_j)^2)^(-1/2)

which is n / |scale| for a crop, and right for rotations too. In those pixels P_k lies at index
``(P_k N_k + N_k - 1) / 2``, and a convention says what channels have there. Channels that are
affine in the position are affine in (x, y): one value at the input's centre and one slope an axis
tell all, so nothing of a picture's size is computed but their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.given import Given
from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.channels.scrambled_positions import scrambled_positions
from coordconv_patch.errors import PatchError
from coordconv_patch.layers.capture import is_capturing
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.dtype_limits import fitted
from coordconv_patch.layers.places import Placed
from coordconv_patch.running.torch_versions import at_least_float32

__all__ = ["GridTarget", "check_one_place_a_sample", "placed_grid"]


class GridTarget(NamedTuple):
    """What coordinate channels are wanted for.

    Attributes:
        device: Where they are wanted.
        dtype: Their dtype.
        convolved: The dtype that they are convolved in, which autocast may have chosen.
        site: The layer, for messages.
    """

    device: torch.device
    dtype: torch.dtype
    convolved: torch.dtype
    site: str


def placed_grid(
    coords: Coordinates,
    placed: Placed,
    size: Sequence[int],
    target: GridTarget,
) -> Tensor:
    """The coordinate channels of each sample; others get the same tensor, so only read it.

    Args:
        coords: The convention.
        placed: The places, rows and columns in the order x, y, z.
        size: Spatial size of a layer's input, d lengths in pixels; may be symbolic.
        target: What the channels are wanted for.

    Returns:
        Shape ``(N, K, *size)``.

    Raises:
        CoordinatesError: If a coordinate is too large for the dtype that it is convolved in.
    """
    lengths = tuple(size)
    if placed.memo is None or not all(type(length) is int for length in lengths):
        return _computed(coords, placed, lengths, target)
    return placed.memo.get(
        (coords, lengths, target.device, target.dtype, target.convolved),
        lambda: _computed(coords, placed, lengths, target),
        wants_gradients=any(each.requires_grad for each in (placed.theta, *placed.maps.values())),
    )


def _computed(
    coords: Coordinates,
    placed: Placed,
    size: Sequence[int],
    target: GridTarget,
) -> Tensor:
    device, dtype = target.device, target.dtype
    computed = at_least_float32(dtype)
    # The few numbers of a place are worked out in float64; not every device and runtime has it.
    wide = computed if is_capturing() or device.type == "mps" else torch.float64
    # Rows and columns from here on in the order of a tensor's dimensions: z, y, x.
    linear, shift = _by_dimension(placed.theta, device, wide)
    lengths = torch.stack([linear[:, :, dim] / size[dim] for dim in range(len(size))], dim=-1)
    lengths = lengths.square().sum(-1).rsqrt()
    lines = [_line(dim, size, device, wide) for dim in range(len(size))]
    channels: list[Tensor] = []
    for block in coords.blocks(len(size)):
        if isinstance(block, Given):
            channels += [map.to(device) for map in block.resized(placed.maps, size)]
        elif block.is_affine and coords.scrambled is None:
            channels += _affine_channels(block, linear, shift, lengths, lines, computed)
        else:
            pixels = _every_pixel(linear, shift, lengths, lines)
            if coords.scrambled is not None:
                pixels = scrambled_positions(pixels, coords.scrambled)
            channels += block.values(pixels)
    channels = fitted(channels, target.convolved, target.site)
    shape: Any = (_samples(placed), *size)
    # Not stacked, which is a view in the end; see grid_for.
    grid = torch.cat([channel.to(dtype).expand(shape).unsqueeze(1) for channel in channels], dim=1)
    if placed.picture is None:
        return grid
    inside = _inside(*_by_dimension(placed.picture, device, wide), lines)
    return grid * inside.unsqueeze(1).to(dtype)


def _samples(placed: Placed) -> int:
    """N; symbolic where a graph is captured, so nothing may turn it into a number."""
    samples = placed.theta.shape[0]
    for given in placed.maps.values():
        samples = given.shape[0] if given.shape[0] != 1 else samples
    return samples


def _by_dimension(theta: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The linear part and the shift of places, in the order of a tensor's dimensions."""
    place = theta.to(device, dtype)
    return place[:, :, :-1].flip(1, 2), place[:, :, -1].flip(1)


def _inside(linear: Tensor, shift: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """Which pixels have their centre in the picture, shape (N, *size)."""
    # The same pixel of the same picture is at 1 + a rounding error in one batch, and at 1 - one in
    # another; in float32 too, pixels are further apart than this.
    edge = 1 + 1e-5
    masks = [position.abs() <= edge for position in _positions(linear, shift, lines)]
    return torch.stack(masks).all(0)


def _affine_channels(
    block: ChannelBlock,
    linear: Tensor,
    shift: Tensor,
    lengths: Tensor,
    lines: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Channels by their values at the input's centre and one step along each axis."""
    points = torch.cat((shift[:, :, None], shift[:, :, None] + linear), dim=-1)
    values = block.values(_pixels(points.unbind(1), lengths[:, :, None]))
    channels = []
    for value in values:
        centre, steps = value[:, :1], value[:, 1:] - value[:, :1]
        channel: Any = _column(centre[:, 0], len(lines)).to(dtype)
        for dim, line in enumerate(lines):
            channel = channel + (_column(steps[:, dim], len(lines)) * line).to(dtype)
        channels.append(channel)
    return channels


def _every_pixel(
    linear: Tensor, shift: Tensor, lengths: Tensor, lines: Sequence[Tensor]
) -> tuple[AxisPixels, ...]:
    """Where every pixel of the input lies in its whole picture, by axis."""
    positions = _positions(linear, shift, lines)
    return _pixels(positions, lengths[(..., *(None,) * len(lines))])


def _positions(linear: Tensor, shift: Tensor, lines: Sequence[Tensor]) -> list[Tensor]:
    """Where every pixel lies, axis by axis, -1 and 1 at the edges of the whole picture."""
    ndim = len(lines)
    positions = []
    for axis in range(ndim):
        position: Any = _column(shift[:, axis], ndim)
        for dim, line in enumerate(lines):
            position = position + _column(linear[:, axis, dim], ndim) * line
        positions.append(position)
    return positions


def _pixels(positions: Sequence[Tensor], lengths: Tensor) -> tuple[AxisPixels, ...]:
    """Positions from -1 to 1 as pixels of whole pictures, by axis."""
    return tuple(
        AxisPixels((position * length + length - 1) / 2, length)
        for position, length in zip(positions, lengths.unbind(1), strict=True)
    )


def _column(values: Tensor, ndim: int) -> Tensor:
    """One value a sample, shape (N,), beside ``ndim`` spatial dimensions."""
    return values.reshape(-1, *(1,) * ndim)


def _line(dim: int, size: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Where the pixels of the input lie along one axis, -1 and 1 at its edges."""
    length = size[dim]
    line = (2 * torch.arange(length, device=device, dtype=dtype) + 1 - length) / length
    return line.reshape([-1 if at == dim else 1 for at in range(len(size))])


def check_one_place_a_sample(placed: Placed, input: Tensor, ndim: int, site: str) -> None:
    """Check that places, and maps beside them, fit a layer's input.

    Raises:
        PatchError: If there is not one for each sample, or one for all, or they have no values.
    """
    samples = input.shape[0] if input.dim() == ndim + 2 else 1
    for name, tensor in (("places", placed.theta), *placed.maps.items()):
        if tensor.is_meta and not input.is_meta:
            raise PatchError(
                f"{site} has {name} on the meta device, where tensors have no values: give a "
                "tensor on the CPU or on the model's device"
            )
        if tensor.shape[0] != 1 and tensor.shape[0] != samples:
            raise PatchError(
                f"{site} gets {samples} samples, and there are {name} for {tensor.shape[0]}: give "
                "one for each sample of the batch that this layer sees, or one for all"
            )
