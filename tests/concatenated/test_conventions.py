"""Conventions read off coordinate channels, which are computed pixel by pixel here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

import coordconv_patch as ccp
from coordconv_patch.concatenated.channel_readings import CANDIDATES, Reading
from coordconv_patch.concatenated.convention import convention_of

SIZES_2D = [(7, 11), (10, 6)]


def grids(sizes: Sequence[tuple[int, ...]] = SIZES_2D, **fields: Any) -> list[Tensor]:
    """As other code computes them, in float32."""
    return [reference.paper_grid(size, **fields).float().double() for size in sizes]


@pytest.mark.parametrize("order", ["xy", "yx"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5), (0.0, 255.0)])
@pytest.mark.parametrize("radius", [{}, {"radius": True}, {"radius": True, "radius_center": 0.125}])
def test_a_convention_is_read_off_its_values(
    order: str, align_corners: bool, value_range: tuple[float, float], radius: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {
        "order": order,
        "align_corners": align_corners,
        "value_range": value_range,
        **radius,
    }
    coords, deviation = convention_of(grids(**fields))
    assert coords == ccp.Coordinates(**fields)
    assert deviation < 1e-6


@pytest.mark.parametrize("sizes", [[(9,), (4,)], [(3, 5, 4), (6, 2, 7)]])
def test_sounds_and_volumes(sizes: list[tuple[int, ...]]) -> None:
    for order in ("xy", "yx") if len(sizes[0]) > 1 else ("xy",):
        assert convention_of(grids(sizes, order=order))[0] == ccp.Coordinates(order=order)


def test_a_divisor_of_the_other_axis_is_told_from_the_own() -> None:
    released = [
        torch.from_numpy(reference.released_reference_grid(*size, radius=True)) for size in SIZES_2D
    ]
    coords, _ = convention_of(released)
    assert coords == ccp.Coordinates.preset("reference", radius=True)


def test_one_size_that_several_fit_is_read_with_round_numbers() -> None:
    for align_corners in (True, False):
        for value_range in ((-1.0, 1.0), (0.0, 1.0)):
            fields = {"align_corners": align_corners, "value_range": value_range}
            assert convention_of(grids([(7, 7)], **fields))[0] == ccp.Coordinates(**fields)


Axes, Radius = ccp.Axes, ccp.Radius


def left_edges(grid: Tensor) -> Tensor:
    """i / n along x and along y."""
    height, width = grid.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.stack([x, y]).double()


def in_pixels(grid: Tensor) -> Tensor:
    return torch.stack(
        torch.meshgrid(*(torch.arange(n).double() for n in grid.shape[1:]), indexing="ij")
    )


def with_largest_1(grid: Tensor) -> Tensor:
    return torch.cat([grid[:2], grid[2:] / grid[2].max()])


BY_BLOCKS: dict[str, tuple[list[Tensor], tuple[ccp.ChannelBlock, ...]]] = {
    "a range for each axis": (
        [torch.stack([grid[0], grid[1] / 2 + 0.5]) for grid in grids()],
        (Axes("x"), Axes("y", (0.0, 1.0))),
    ),
    "from right to left": (
        [torch.stack([-grid[0], grid[1]]) for grid in grids()],
        (Axes("x", (1.0, -1.0)), Axes("y")),
    ),
    "r first": ([grid[[2, 0, 1]] for grid in grids(radius=True)], (Radius(), Axes("xy"))),
    "pixels": ([in_pixels(grid) for grid in grids()], (Axes("yx", centring="pixels"),)),
    "left edges": (
        [left_edges(grid) for grid in grids()],
        (Axes("xy", (0.0, 1.0), "left edges"),),
    ),
    "y alone": ([grid[1:] for grid in grids()], (Axes("y"),)),
    "r divided by its largest": (
        [with_largest_1(grid) for grid in grids(radius=True)],
        (Axes("xy"), Radius(normalized=True)),
    ),
    "that of edges, from a corner": (
        [
            with_largest_1(grid)
            for grid in grids(radius=True, align_corners=False, value_range=(0, 1), radius_center=0)
        ],
        (
            Axes("xy", (0.0, 1.0), "edges"),
            Radius(center=0.0, normalized=True, value_range=(0.0, 1.0), centring="edges"),
        ),
    ),
}


@pytest.mark.parametrize("what", BY_BLOCKS)
def test_what_the_usual_fields_do_not_say_is_read_as_blocks(what: str) -> None:
    values, blocks = BY_BLOCKS[what]
    coords, deviation = convention_of([grid.float().double() for grid in values])
    assert coords == ccp.Coordinates(channels=blocks)
    assert deviation < 1e-6


WRONG: dict[str, tuple[list[Tensor], str]] = {
    "x twice": ([grid[[0, 0]] for grid in grids()], "channel 1 is x from -1 to 1"),
    "one size at odds": (
        [grids()[0], grids(align_corners=False)[1]],
        "its coordinates are not known: channel 0 deviates by 0.0",
    ),
    "zeros": ([grid * 0 for grid in grids()], "channel 0 is constant"),
    "many": ([grid.repeat(5, 1, 1) for grid in grids()], "it sees 10 channels that do not depend"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_convention_is_said_channel_by_channel(what: str) -> None:
    values, message = WRONG[what]
    with pytest.raises(ccp.PatchError) as raised:
        convention_of(values)
    assert message in str(raised.value)


def test_a_deviation_of_a_few_thousandths_is_seen() -> None:
    values = grids()
    values[1][0, 3, 2] += 3e-3
    with pytest.raises(ccp.PatchError, match=r"channel 0 deviates by 0\.003 from the closest, x"):
        convention_of(values)


def test_another_kind_of_channel_is_one_more_candidate() -> None:
    @dataclass(frozen=True)
    class Cube:
        block: ccp.ChannelBlock | None

        def read(self, channel: int, grids: Sequence[Tensor]) -> Iterator[Reading]:
            deviation = 0.0
            for grid in grids:
                x = torch.linspace(-1, 1, grid.shape[-1]).double() ** 3
                deviation = max(deviation, float((grid[channel] - x).abs().max()))
            yield Reading("x cubed", deviation, block=self.block)

    values = [torch.stack([grid[0] ** 3, grid[1]]) for grid in grids()]
    for block in (None, ccp.Axes("y", (0.0, 9.0))):
        candidate = Cube(block)
        CANDIDATES.append(candidate)
        try:
            # The second one's block does not give these values, which is looked at too.
            with pytest.raises(ccp.PatchError, match=r"cannot express .*: channel 0 is x cubed;"):
                convention_of(values)
        finally:
            CANDIDATES.remove(candidate)
