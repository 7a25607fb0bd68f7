"""Which coordinate a channel holds, read off its values at several image sizes.

A channel is compared with every candidate of :data:`CANDIDATES`. An axis candidate has a position
u of pixel i of n, from -1 to 1, and the channel is fitted as ``a * u + b`` over all sizes at once,
so that ``b - a`` and ``b + a`` are its range. Two sizes tell the candidates apart: at one size
``i / (n - 1)`` and ``(i + 0.5) / n`` differ by a linear map only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coordconv_patch.channels.block import ChannelBlock

__all__ = [
    "AXES",
    "CANDIDATES",
    "TOLERANCE",
    "AxisCandidate",
    "Candidate",
    "RadiusCandidate",
    "Reading",
]

TOLERANCE = 1e-5
"""Largest deviation of a channel from its formula, relative to its largest value (or to 1).

Coordinates computed in float32 deviate by some 2e-7; conventions differ by 1 / n and more.
"""

AXES = ("x", "y", "z")
"""Axis names, counted from the last dimension."""


@dataclass(frozen=True)
class Reading:
    """What a channel may be.

    Attributes:
        what: In words, such as ``"x from -1 to 1 at the outer pixel centres"``.
        deviation: Largest deviation from that, see :data:`TOLERANCE`.
        axis: ``"x"``, ``"y"``, ``"z"``; empty where it is not an axis.
        value_range: Of an axis.
        centring: Where the ends of the range lie, as :class:`coordconv_patch.Axes` has it.
        center: Of a radius: the value that it is measured from on each axis.
        normalized: Whether a radius is divided by its largest value.
        block: The block of a channel that is neither an axis nor a radius, if there is one.
        is_round: Whether its numbers are such as people write: multiples of 0.5.
    """

    what: str
    deviation: float
    axis: str = ""
    value_range: tuple[float, float] = (-1.0, 1.0)
    centring: str = ""
    center: float | None = None
    normalized: bool = False
    block: ChannelBlock | None = None
    is_round: bool = True


class Candidate(Protocol):
    """A kind of coordinate channel that is looked for."""

    def read(self, channel: int, grids: Sequence[Tensor]) -> Iterator[Reading]:
        """How well a channel fits.

        Args:
            channel: Which one.
            grids: All coordinate channels, shape ``(K, *size)``, float64, one for each size.
        """


@dataclass(frozen=True)
class AxisCandidate:
    """A linear map of the position along one axis.

    Attributes:
        axis: Position of the axis from the last dimension: 0 is x.
        where: Where the ends of the range lie, in words.
        position: u of pixel i, from i, n and the length m of the other image axis.
        centring: As :attr:`Reading.centring`.
    """

    axis: int
    where: str
    position: Callable[[Tensor, int, int], Tensor]
    centring: str

    def read(self, channel: int, grids: Sequence[Tensor]) -> Iterator[Reading]:
        """See :class:`Candidate`."""
        ndim = grids[0].dim() - 1
        if self.axis >= ndim:
            return
        pairs = [self._along(grid) for grid in grids if min(grid.shape[1:]) > 1]
        if not pairs:
            return
        positions = torch.cat([line.flatten() for line in pairs])
        values = torch.cat([grid[channel].flatten() for grid in grids if min(grid.shape[1:]) > 1])
        slope, middle = _line_through(positions, values)
        if slope == 0:
            return
        deviation = _relative(slope * positions + middle - values, values)
        low, high = _snapped(middle - slope), _snapped(middle + slope)
        name = AXES[self.axis]
        yield Reading(
            f"{name} from {low:.6g} to {high:.6g} {self.where}",
            deviation,
            name,
            (low, high),
            self.centring,
            is_round=all(abs(2 * end - round(2 * end)) < TOLERANCE for end in (low, high)),
        )

    def _along(self, grid: Tensor) -> Tensor:
        """The position of every pixel of a grid, shape ``size``."""
        size = grid.shape[1:]
        dim = len(size) - 1 - self.axis
        length, other = size[dim], size[-2 if self.axis == 0 else -1] if len(size) > 1 else 0
        line = self.position(torch.arange(length, dtype=torch.float64), length, other)
        return line.reshape([-1 if at == dim else 1 for at in range(len(size))]).expand(size)


@dataclass(frozen=True)
class RadiusCandidate:
    """The distance of the axis channels from one value, the same on each axis."""

    def read(self, channel: int, grids: Sequence[Tensor]) -> Iterator[Reading]:
        """See :class:`Candidate`. The axis channels are the first ``ndim`` others."""
        ndim = grids[0].dim() - 1
        axes = [index for index in range(len(grids[0])) if index != channel][:ndim]
        if len(axes) < ndim:
            return
        points = [grid[axes] for grid in grids]
        radii = [grid[channel] for grid in grids]
        middle = _snapped(float(torch.stack([_middle(point) for point in points]).mean()))
        center = _center(points, radii)
        fits = [
            _distance(point, center) - radius for point, radius in zip(points, radii, strict=True)
        ]
        center = _snapped(center)
        yield Reading(
            f"r from {center:.6g}",
            max(_relative(fit, radius) for fit, radius in zip(fits, radii, strict=True)),
            center=center,
        )
        for each in dict.fromkeys((middle, 0.0, 0.5)):
            distances = [_distance(point, each) for point in points]
            fits = [d / d.max() - radius for d, radius in zip(distances, radii, strict=True)]
            yield Reading(
                f"r from {each:.6g}, divided by its largest",
                max(_relative(fit, radius) for fit, radius in zip(fits, radii, strict=True)),
                center=each,
                normalized=True,
            )


def _line_through(positions: Tensor, values: Tensor) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    centred = positions - positions.mean()
    slope = float((centred * (values - values.mean())).sum() / centred.square().sum())
    return slope, float(values.mean() - slope * positions.mean())


def _center(points: Sequence[Tensor], radii: Sequence[Tensor]) -> float:
    """The c that fits r^2 = sum of (v - c)^2: linear in c and in c^2, taken as two unknowns."""
    total = torch.cat([point.sum(0).flatten() for point in points])
    rest = [
        radius.square() - point.square().sum(0) for point, radius in zip(points, radii, strict=True)
    ]
    slope, _ = _line_through(total, torch.cat([part.flatten() for part in rest]))
    return -slope / 2


def _distance(point: Tensor, center: float) -> Tensor:
    return (point - center).square().sum(0).sqrt()


def _middle(values: Tensor) -> Tensor:
    return (values.max() + values.min()) / 2


def _relative(differences: Tensor, values: Tensor) -> float:
    return float(differences.abs().max() / max(1.0, float(values.abs().max())))


def _snapped(number: float) -> float:
    """A fitted number without the rounding errors of what it was fitted to."""
    near = round(number, 4) + 0.0  # not -0.0
    return near if abs(number - near) < TOLERANCE else number


def _axis_candidates(axis: int) -> list[Candidate]:
    """In order of preference, where one size alone does not tell them apart."""
    kinds: list[tuple[str, str, Callable[[Tensor, int, int], Tensor]]] = [
        ("endpoints", "at the outer pixel centres", lambda i, n, m: 2 * i / (n - 1) - 1),
        ("edges", "at the outer pixel edges", lambda i, n, m: (2 * i + 1) / n - 1),
        ("left edges", "at the left edges of the pixels, i / n", lambda i, n, m: 2 * i / n - 1),
        (
            "swapped endpoints",
            "divided by the length of the other axis",
            lambda i, n, m: 2 * i / max(m - 1, 1) - 1,
        ),
        ("pixels", "in pixels", lambda i, n, m: i + 0.0),
    ]
    return [
        AxisCandidate(axis, where, position, centring)
        for centring, where, position in kinds
        if axis < 2 or centring != "swapped endpoints"  # only x and y can be mixed up
    ]


CANDIDATES: list[Candidate] = [
    *(candidate for axis in range(len(AXES)) for candidate in _axis_candidates(axis)),
    RadiusCandidate(),
]
"""Every kind of channel that is looked for; append to it to have more recognised."""
