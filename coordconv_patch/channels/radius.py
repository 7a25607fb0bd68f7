"""The distance from a point."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from coordconv_patch.channels.axis_fields import axes_of, axis_values, check_axes, check_centring
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.convention_fields import center_of, range_of
from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["Radius"]


@dataclass(frozen=True, kw_only=True)
class Radius(ChannelBlock):
    """A channel r: the distance from a point, measured in coordinates as :class:`Axes` has them.

    With v_k the coordinate of a pixel along axis k and c_k that of the point::

        r = sqrt(sum over k of (v_k - c_k)^2)

    Args:
        center: The point: one coordinate for every axis, or a tuple with one for each of
            ``axes``, in their order (x first, where that is ``None``). ``None``: the middle of
            ``value_range``, the picture's centre where ``centring`` is ``"endpoints"`` or
            ``"edges"``.
        normalized: Divide by the largest r of a pixel of the whole picture (at one of its
            corners), as public copies of AdaptiveWingLoss's face-landmark net do
            (https://arxiv.org/abs/1904.07399). In a picture of one pixel r is not divided where it
            is 0.
        axes: Which axes are measured along, see :class:`Axes`.
        value_range: The coordinates that r is measured in, see :class:`Axes`.
        centring: See :class:`Axes`; not ``"pixels"``.

    Raises:
        CoordinatesError: If a value is out of range or of another type.
    """

    kind: ClassVar[str] = "radius"

    center: float | tuple[float, ...] | None = None
    normalized: bool = False
    axes: str | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    centring: str = "endpoints"

    def __post_init__(self) -> None:
        check_axes(self.axes)
        check_centring(self.centring)
        object.__setattr__(self, "value_range", range_of(self.value_range))
        if type(self.normalized) is not bool:
            raise CoordinatesError(f"normalized={excerpt(self.normalized)}: write True or False")
        if self.center is not None:
            object.__setattr__(self, "center", center_of(self.center, self.axes))

    def names(self, ndim: int) -> tuple[str, ...]:
        self._centers(axes_of(self.axes, ndim))
        return ("r",)

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        radius = self._distance(self._along_axes(positions))
        if not self.normalized:
            return [radius]
        first = [AxisPixels(index.new_zeros(()), length) for index, length in positions]
        last = [AxisPixels(index.new_zeros(()) + _last(n), n) for index, n in positions]
        corners = zip(self._along_axes(first), self._along_axes(last), strict=True)
        largest = self._distance([torch.maximum(low.abs(), high.abs()) for low, high in corners])
        return [radius / torch.where(largest > 0, largest, 1.0)]

    def _along_axes(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        """How far pixels lie from the point along each axis; with a sign."""
        axes = axes_of(self.axes, len(positions))
        values = axis_values(positions, axes, self.centring, self.value_range)
        return [value - center for value, center in zip(values, self._centers(axes), strict=True)]

    def _distance(self, along_axes: list[Tensor]) -> Tensor:
        return functools.reduce(torch.add, [value.square() for value in along_axes]).sqrt()

    def _centers(self, axes: str) -> tuple[float, ...]:
        low, high = self.value_range
        center = (low + high) / 2 if self.center is None else self.center
        if not isinstance(center, tuple):
            return (center,) * len(axes)
        if len(center) != len(axes):
            raise CoordinatesError(
                f"center={center} has {len(center)} numbers, but r is measured along {len(axes)} "
                f"axes here ({', '.join(axes)}): write one number for each, or name the axes"
            )
        return center


def _last(length: Any) -> Any:
    """The index of the last pixel; 0 in a picture of a part of a pixel."""
    if isinstance(length, Tensor):
        return (length - 1).clamp(min=0)
    if isinstance(length, (int, float)):
        return max(length - 1, 0)
    return length - 1
