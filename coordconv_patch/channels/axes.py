"""The coordinates of the axes: x, y, z."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coordconv_patch.channels.axis_fields import axes_of, axis_values, check_axes, check_centring
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.convention_fields import range_of
from coordconv_patch.channels.positions import AxisPixels, dim_of
from coordconv_patch.errors import CoordinatesError

__all__ = ["Axes"]

_WHOLE_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class Axes(ChannelBlock):
    """A channel for each of some axes: its coordinate.

    Args:
        axes: Which, in the order of their channels, such as ``"yx"`` or ``"y"``: x runs along W,
            y along H, z along D. ``None``: every axis of the input, x first.
        value_range: The coordinate at the picture's beginning and at its end; ``(1.0, -1.0)``
            lets y grow upwards.
        centring: Where these two lie: ``"endpoints"``, at the outer pixel centres;
            ``"edges"``, at the outer pixel edges; ``"left edges"``, at the first pixel's centre and
            one pixel beyond the last, so that ``value_range=(0.0, 1.0)`` gives i / n.
            ``"pixels"`` has no range: the coordinate is the pixel's index in the whole picture,
            in pixels of the layer's input. ``"swapped endpoints"`` is a known bug of the paper's
            released code, which divides x by H - 1 and y by W - 1.

    Raises:
        CoordinatesError: If a value is out of range or of another type.

    Example:
        >>> Coordinates(channels=(Axes("y", value_range=(0.0, 1.0)),)).grid((3, 2)).tolist()
        [[[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]]
    """

    kind: ClassVar[str] = "axes"
    is_affine: ClassVar[bool] = True

    axes: str | None = None
    value_range: tuple[float, float] = _WHOLE_RANGE
    centring: str = "endpoints"

    def __post_init__(self) -> None:
        check_axes(self.axes)
        check_centring(self.centring, also=("pixels",))
        object.__setattr__(self, "value_range", range_of(self.value_range))
        if self.centring == "pixels" and self.value_range != _WHOLE_RANGE:
            raise CoordinatesError(
                f"value_range={self.value_range} with centring='pixels': the values are indices of "
                "pixels, leave value_range out, or write another centring"
            )

    def names(self, ndim: int) -> tuple[str, ...]:
        return tuple(axes_of(self.axes, ndim))

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        axes = axes_of(self.axes, len(positions))
        if self.centring == "pixels":
            return [positions[dim_of(axis, len(positions))].index for axis in axes]
        return axis_values(positions, axes, self.centring, self.value_range)

    def dims(self, ndim: int) -> list[int | None]:
        return [dim_of(axis, ndim) for axis in axes_of(self.axes, ndim)]
