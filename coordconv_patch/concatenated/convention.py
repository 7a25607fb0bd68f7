"""The convention that a concatenating convolution's coordinate channels follow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from coordconv_patch.concatenated.channel_readings import AXES, CANDIDATES, TOLERANCE, Reading
from coordconv_patch.errors import PatchError
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
        fields = _joined_fields(combination, ndim)
        if fields is None:
            continue
        coords = Coordinates(**fields)
        deviation = max(_deviation(coords, grid) for grid in grids)
        if deviation <= TOLERANCE:
            return coords, deviation
    raise PatchError(
        f"Coordinates cannot express its channels: {_words(readings, fitting)}. It has "
        "each axis once, in one range, and then r"
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


def _joined_fields(readings: Sequence[Reading], ndim: int) -> Mapping[str, Any] | None:
    """The fields of a convention with these channels; ``None`` if there is none."""
    order = _order("".join(reading.axis for reading in readings[:ndim]), ndim)
    if order is None or any(reading.axis for reading in readings[ndim:]):
        return None
    joined: dict[str, Any] = {"order": order}
    for fields in [reading.fields for reading in readings]:
        if fields is None or any(
            joined.get(name, value) != value for name, value in fields.items()
        ):
            return None
        joined |= fields
    if joined.get("radius_center") == sum(joined["value_range"]) / 2:
        joined["radius_center"] = None
    return joined


def _order(axes: str, ndim: int) -> str | None:
    names = "".join(AXES[:ndim])
    return {names[::-1]: "yx", names: "xy"}.get(axes)  # of one axis "xy"


def _deviation(coords: Coordinates, grid: Tensor) -> float:
    expected = coords.grid(tuple(grid.shape[1:]), device="cpu", dtype=grid.dtype)
    if expected.shape != grid.shape:
        return float("inf")
    return float((expected - grid).abs().max() / max(1.0, float(grid.abs().max())))
