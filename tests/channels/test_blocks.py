"""The values of every block, beside loops over pixels."""

from __future__ import annotations

import math
from typing import Any

import channels_reference as reference
import numpy as np
import pytest
import torch
from torch import Tensor

from coordconv_patch import (
    Axes,
    AxisPixels,
    ChannelBlock,
    Coordinates,
    CoordinatesError,
    Fourier,
    Radius,
    Window,
)

AXES = [
    Axes(),
    Axes("y"),
    Axes("yx", (0.0, 10.0)),
    Axes("y", (1.0, -1.0), "edges"),
    Axes("xy", (0.0, 1.0), "left edges"),
    Axes(centring="pixels"),
]
RADII = [
    Radius(),
    Radius(normalized=True),
    Radius(center=0.5, normalized=True, centring="edges"),
    Radius(center=(0.25, -3.0), axes="yx"),
    Radius(center=(0.25, -3.0), axes="yx", normalized=True, value_range=(0.0, 2.0)),
    Radius(axes="x", value_range=(0.0, 1.0), centring="left edges"),
]
FOURIERS = [
    Fourier(),
    Fourier("x", octaves=3),
    Fourier("y", period=2.0, centring="edges"),
    Fourier("xy", octaves=2, period=0.75, centring="left edges"),
]
BLOCKS: list[Any] = [*AXES, *RADII, *FOURIERS]
SIZES = [(5,), (1,), (4, 7), (1, 6), (6, 1), (1, 1), (3, 4, 5), (1, 2, 1)]


def channels_of(block: Any, ndim: int) -> list[reference.Channel]:
    """The channels that a block describes, written anew."""
    axes = block.axes or "xyz"[:ndim]
    if isinstance(block, Axes):
        return [reference.coordinate(axis, block.centring, block.value_range) for axis in axes]
    if isinstance(block, Radius):
        center = sum(block.value_range) / 2 if block.center is None else block.center
        return [
            reference.distance(
                axes,
                center if isinstance(center, tuple) else [center] * len(axes),
                normalized=block.normalized,
                centring=block.centring,
                value_range=block.value_range,
            )
        ]
    return [
        reference.wave(function, axis, 2**octave / block.period, block.centring)
        for octave in range(block.octaves)
        for axis in axes
        for function in (math.sin, math.cos)
    ]


def exists_for(block: Any, ndim: int) -> bool:
    return set(block.axes or "") <= set("xyz"[:ndim])


CASES = [
    pytest.param(block, size, id=f"{block} {size}")
    for block in BLOCKS
    for size in SIZES
    if exists_for(block, len(size))
]


@pytest.mark.parametrize(("block", "size"), CASES)
def test_values_are_those_of_the_pixel_by_pixel_reference(
    block: ChannelBlock, size: tuple[int, ...]
) -> None:
    coords = Coordinates(channels=(block,))
    expected = reference.grid(channels_of(block, len(size)), size)
    values = coords.grid(size, dtype=torch.float64).numpy()
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)
    assert len(coords.channel_names(len(size))) == coords.num_channels(len(size)) == len(expected)


@pytest.mark.parametrize(("block", "size"), CASES)
def test_a_window_has_the_values_of_the_whole_picture(
    block: ChannelBlock, size: tuple[int, ...]
) -> None:
    # A feature map of half the window's resolution: its pixels are two of the picture's.
    offset = tuple(range(1, len(size) + 1))
    window = Window(
        offset=offset,
        size=tuple(2 * length for length in size),
        image_size=tuple(2 * length + 5 for length in size),
    )
    coords = Coordinates(channels=(block,), window=window)
    expected = reference.grid(
        channels_of(block, len(size)),
        size,
        first=[first / 2 for first in offset],
        whole=[length + 2.5 for length in size],
    )
    values = coords.grid(size, dtype=torch.float64).numpy()
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_sample_may_lie_elsewhere(block: ChannelBlock) -> None:
    """Indices (N, H, W) beside lengths (N, 1, 1): every sample as if it were alone."""
    torch.manual_seed(0)
    index = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 9 - 2  # fractions, beyond the picture
    length = torch.tensor([[6.5, 4.0, 1.0], [3.0, 7.25, 1.5]], dtype=torch.float64)
    positions = [AxisPixels(index[k], length[k].reshape(3, 1, 1)) for k in range(2)]
    values = torch.stack([value.expand(3, 4, 5) for value in block.values(positions)])
    for sample, row, column in np.ndindex(3, 4, 5):
        pixel = tuple(index[:, sample, row, column].tolist())
        whole = tuple(length[:, sample].tolist())
        expected = [channel(pixel, whole) for channel in channels_of(block, 2)]
        np.testing.assert_allclose(values[:, sample, row, column], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_channel_depends_on_the_dimension_that_the_block_tells(
    block: ChannelBlock, ndim: int
) -> None:
    if not exists_for(block, ndim):
        with pytest.raises(CoordinatesError, match=f"inputs of {ndim} spatial dimensions"):
            block.names(ndim)
        return
    size = (4, 5, 6)[:ndim]
    grid = Coordinates(channels=(block,)).grid(size, dtype=torch.float64)
    dims = block.dims(ndim)
    assert len(dims) == len(grid)
    for channel, dim in zip(grid, dims, strict=True):
        varies = [
            not torch.equal(channel, channel.narrow(at, 0, 1).expand(size)) for at in range(ndim)
        ]
        assert dim is None or not any(varies[:dim] + varies[dim + 1 :])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_affine_blocks_have_no_second_difference(block: ChannelBlock) -> None:
    steps = torch.tensor([-3.0, 3.0, 9.0], dtype=torch.float64)
    positions = [AxisPixels(steps * scale, 6.5) for scale in (1.0, 0.75)]
    curved = [
        bool((value[0] + value[2] - 2 * value[1]).abs() > 1e-12)
        for value in block.values(positions)
    ]
    assert any(curved) is not block.is_affine


def test_the_normalized_radius_is_that_of_adaptive_wing_loss() -> None:
    """CoordConvTh of the released code: rr / max(rr), with rows named x."""
    height, width = 6, 9
    xx = np.repeat((np.arange(height) / (height - 1) * 2 - 1)[:, None], width, axis=1)
    yy = np.repeat((np.arange(width) / (width - 1) * 2 - 1)[None], height, axis=0)
    rr = np.sqrt(xx**2 + yy**2)
    coords = Coordinates(channels=(Axes("yx"), Radius(normalized=True)))
    values = coords.grid((height, width), dtype=torch.float64).numpy()
    np.testing.assert_allclose(values, np.stack([xx, yy, rr / rr.max()]), rtol=0, atol=1e-15)


def test_a_tile_of_a_normalized_radius_is_cut_from_the_whole() -> None:
    whole = Coordinates(channels=(Radius(normalized=True, center=(0.3, -0.2)),))
    window = Window(offset=(2, 3), size=(4, 5), image_size=(9, 11))
    tile = Coordinates(channels=whole.channels, window=window)
    cut = whole.grid((9, 11), dtype=torch.float64)[:, 2:6, 3:8]
    torch.testing.assert_close(tile.grid((4, 5), dtype=torch.float64), cut, rtol=0, atol=1e-15)
    assert cut.max() < 1  # the largest lies outside of the tile


def test_a_ring_closes() -> None:
    """The last pixel is as far from the first as from the one before it."""
    sin, cos = Coordinates(channels=(Fourier("x", centring="edges"),)).grid((1, 8))[:, 0]
    steps = torch.hypot(sin - sin.roll(1), cos - cos.roll(1))
    torch.testing.assert_close(steps, steps[:1].expand(8))


def test_the_short_fields_are_short_for_blocks() -> None:
    short = Coordinates(order="yx", align_corners=False, value_range=(0.0, 1.0), radius=True)
    assert short.blocks(2) == (
        Axes("yx", (0.0, 1.0), "edges"),
        Radius(axes="yx", value_range=(0.0, 1.0), centring="edges"),
    )
    long = Coordinates(channels=short.blocks(2))
    assert torch.equal(long.grid((4, 7)), short.grid((4, 7)))
    assert long.channel_names(2) == short.channel_names(2)
    swapped = Coordinates(swap_sizes=True)
    assert swapped.blocks(3) == (Axes("xyz", centring="swapped endpoints"),)
    long = Coordinates(channels=swapped.blocks(2))
    assert torch.equal(long.grid((4, 7)), swapped.grid((4, 7)))
    assert Coordinates(fourier=2).blocks(1)[1:] == (Fourier("x", octaves=2),)


def test_names() -> None:
    channels = (Axes("y"), Fourier("x", octaves=2, period=4.0), Radius())
    names = Coordinates(channels=channels).channel_names(2)
    assert names == ("y", "sin(0.25πx)", "cos(0.25πx)", "sin(0.5πx)", "cos(0.5πx)", "r")
    assert str(Coordinates(channels=channels[:1])) == "(Axes(axes='y'))"


class GridOf(torch.nn.Module):
    def __init__(self, coords: Coordinates) -> None:
        super().__init__()
        self.coords = coords

    def forward(self, input: Tensor) -> Tensor:
        size = input.shape[-2:]
        return self.coords.grid(size, device=input.device, dtype=input.dtype) + input.sum() * 0


@pytest.mark.parametrize(
    "channels", [tuple(AXES), tuple(RADII), tuple(FOURIERS)], ids=["axes", "radius", "fourier"]
)
def test_every_capture_follows_the_size(channels: tuple[ChannelBlock, ...]) -> None:
    coords = Coordinates(channels=channels)
    model, example = GridOf(coords), torch.zeros(4, 6)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (example,), dynamic_shapes=(sizes,)).module()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    traced = torch.jit.trace(model, (example,), check_trace=False)
    for size in ((4, 6), (7, 3), (9, 9)):
        for captured in (exported, compiled, traced):
            values = captured(torch.zeros(size))
            torch.testing.assert_close(values, coords.grid(size), rtol=1e-6, atol=1e-5)
