"""The convention that a concatenating convolution's coordinate channels follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coordconv_patch.channels.axes import Axes
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.radius import Radius
from coordconv_patch.concatenated.channel_readings import AXES, CANDIDATES, TOLERANCE, Reading
from coordconv_patch.errors import CoordinatesError, PatchError
from coordconv_patch.layers.coordinates import Coordinates

__all__ = ["convention_of"]


def convention_of(grids: Sequence[Tensor]) -> tuple[Coordinates, float]:
    """The convention under which coordinate channels have these values, and how well it fits.

    Args:
        grids: Coordinate channels at the sizes that were seen, ``(K, *size)``, float64 on the CPU.

    Returns:
        The convention, and the largest deviation from it (see
        :data:`~coordconv_patch.concatenated.channel_readings.TOLERANCE`).

    Raises:
        PatchError: If a channel is none that is known, or they are none that a
            :class:`Coordinates` can say; with each channel's closest reading and deviation.
    """
    count = len(grids[0])
    if count > _MOST_CHANNELS:
        raise PatchError(
            f"it sees {count} channels that do not depend on the image, more than are looked at "
            f"({_MOST_CHANNELS})"
        )
    readings = [_readings(channel, grids) for channel in range(count)]
    fitting = [[each for each in some if each.deviation <= TOLERANCE] for some in readings]
    if not all(fitting):
        raise PatchError(f"its coordinates are not known: {_words(readings, fitting)}")
    ndim = grids[0].dim() - 1
    for combination in itertools.product(*fitting):
        coords = _short(combination, ndim) or _by_blocks(combination)
        if coords is None:
            continue
        deviation = max(_deviation(coords, grid) for grid in grids)
        if deviation <= TOLERANCE:
            return coords, deviation
    raise PatchError(
        f"Coordinates cannot express its channels: {_words(readings, fitting)}. It has no block "
        "twice, and measures r in coordinates of one range"
    )


_MOST_CHANNELS = 8


def _readings(channel: int, grids: Sequence[Tensor]) -> list[Reading]:
    """Every reading of a channel, the most likely first."""
    readings = [each for candidate in CANDIDATES for each in candidate.read(channel, grids)]
    return sorted(readings, key=lambda each: not each.is_round)


def _words(readings: Sequence[Sequence[Reading]], fitting: Sequence[Sequence[Reading]]) -> str:
    return "; ".join(map(_channel_words, itertools.count(), readings, fitting))


def _channel_words(channel: int, readings: Sequence[Reading], fitting: Sequence[Reading]) -> str:
    if fitting:
        return f"channel {channel} is {fitting[0].what}"
    if not readings:
        return f"channel {channel} is constant"
    best = min(readings, key=lambda each: each.deviation)
    return f"channel {channel} deviates by {best.deviation:.2g} from the closest, {best.what}"


_SHORT = {
    "endpoints": {"align_corners": True},
    "edges": {"align_corners": False},
    "swapped endpoints": {"align_corners": True, "swap_sizes": True},
}
"""Fields of :class:`Coordinates` by centring."""


def _short(readings: Sequence[Reading], ndim: int) -> Coordinates | None:
    """The convention by its usual fields: every axis once, in one range, and then perhaps r."""
    axes, rest = readings[:ndim], readings[ndim:]
    order = _order("".join(reading.axis for reading in axes), ndim)
    kinds = {(reading.value_range, reading.centring) for reading in axes}
    if (
        order is None
        or len(kinds) > 1
        or len(rest) > 1
        or any(r.axis or r.normalized for r in rest)
    ):
        return None
    ((low, high), centring) = kinds.pop()
    if centring not in _SHORT or low >= high:
        return None
    fields: dict[str, Any] = {"order": order, "value_range": (low, high), **_SHORT[centring]}
    if rest:
        is_middle = rest[0].center == (low + high) / 2
        fields |= {"radius": True, "radius_center": None if is_middle else rest[0].center}
    return Coordinates(**fields)


def _by_blocks(readings: Sequence[Reading]) -> Coordinates | None:
    """The convention as a list of channel blocks; ``None`` if there is none."""
    kinds = {(each.value_range, each.centring) for each in readings if each.axis}
    blocks: list[ChannelBlock] = []
    try:
        for is_axis, grouped in itertools.groupby(readings, lambda each: bool(each.axis)):
            group = list(grouped)
            blocks += _axes(group) if is_axis else [_other(each, kinds) for each in group]
        return Coordinates(channels=tuple(blocks))
    except CoordinatesError:  # such as a block that is there twice
        return None


def _axes(readings: Sequence[Reading]) -> list[ChannelBlock]:
    """Blocks of neighbouring axis channels, as few as say it."""
    by_kind = itertools.groupby(readings, lambda reading: (reading.value_range, reading.centring))
    return [
        Axes("".join(reading.axis for reading in group), value_range, centring)
        for (value_range, centring), group in by_kind
    ]


def _other(reading: Reading, kinds: set[tuple[tuple[float, float], str]]) -> ChannelBlock:
    """The block of a channel that is not an axis."""
    if reading.block is not None:
        return reading.block
    if reading.center is None or len(kinds) != 1:
        raise CoordinatesError("not a radius, or not measured in coordinates of one range")
    ((low, high), centring) = next(iter(kinds))
    center = None if reading.center == (low + high) / 2 else reading.center
    return Radius(
        center=center, normalized=reading.normalized, value_range=(low, high), centring=centring
    )


def _order(axes: str, ndim: int) -> str | None:
    names = "".join(AXES[:ndim])
    return {names[::-1]: "yx", names: "xy"}.get(axes)  # of one axis "xy"


def _deviation(coords: Coordinates, grid: Tensor) -> float:
    expected = coords.grid(tuple(grid.shape[1:]), device="cpu", dtype=grid.dtype)
    if expected.shape != grid.shape:
        return float("inf")
    return float((expected - grid).abs().max() / max(1.0, float(grid.abs().max())))
