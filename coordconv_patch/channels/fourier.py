"""Fourier features: sines and cosines of the position along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coordconv_patch.channels.axis_fields import axes_of, check_axes, check_centring
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.convention_fields import octaves_of, period_of
from coordconv_patch.channels.positions import AxisPixels, axis_position, dim_of

__all__ = ["Fourier"]


@dataclass(frozen=True)
class Fourier(ChannelBlock):
    """Two channels for each octave and axis: sin and cos of the position.

    With u the position along an axis, -1 to 1, and p the period, for k = 0, 1, ...::

        sin(2^k pi u / p), cos(2^k pi u / p)

    (Mildenhall et al. 2020, "NeRF", eq. 4, where p = 1.) Octave by octave, in each axis by axis.

    A picture that closes to a ring along x, such as a panorama or a map of the world, has
    ``Fourier("x", centring="edges")``: with ``"edges"`` the last pixel is as far from the first
    as any two neighbours are; with ``"endpoints"`` both have the same values.

    Args:
        axes: Which axes, see :class:`coordconv_patch.Axes`.
        octaves: Number of octaves, 1 to 32.
        period: The longest period, as a multiple of the picture's length.
        centring: Where u is -1 and 1, see :class:`coordconv_patch.Axes`; not ``"pixels"``.

    Raises:
        CoordinatesError: If a value is out of range or of another type.
    """

    kind: ClassVar[str] = "fourier"

    axes: str | None = None
    octaves: int = 1
    period: float = 1.0
    centring: str = "endpoints"

    def __post_init__(self) -> None:
        check_axes(self.axes)
        check_centring(self.centring)
        object.__setattr__(self, "octaves", octaves_of("octaves", self.octaves, least=1))
        object.__setattr__(self, "period", period_of(self.period))

    def names(self, ndim: int) -> tuple[str, ...]:
        axes = axes_of(self.axes, ndim)
        return tuple(
            f"{function}({_shown(factor)}\u03c0{axis})"
            for factor in self._factors()
            for axis in axes
            for function in ("sin", "cos")
        )

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        ndim = len(positions)
        dims = [dim_of(axis, ndim) for axis in axes_of(self.axes, ndim)]
        units = [axis_position(positions, dim, self.centring) for dim in dims]
        values = []
        for factor in self._factors():
            for unit in units:
                angle = unit * (factor * math.pi)
                values += [angle.sin(), angle.cos()]
        return values

    def dims(self, ndim: int) -> list[int | None]:
        by_axis = [dim_of(axis, ndim) for axis in axes_of(self.axes, ndim) for _ in range(2)]
        return [*by_axis * self.octaves]

    def _factors(self) -> list[float]:
        return [2**octave / self.period for octave in range(self.octaves)]


def _shown(factor: float) -> str:
    return str(int(factor)) if factor.is_integer() else f"{factor:g}"
