"""What several blocks have: which axes they are about, and coordinates along these."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coordconv_patch.channels.positions import (
    AXIS_NAMES,
    CENTRINGS,
    AxisPixels,
    axis_position,
    dim_of,
)
from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["axes_of", "axis_values", "check_axes", "check_centring"]


def check_axes(axes: object) -> None:
    """Check that a field names axes, each once.

    Raises:
        CoordinatesError: If it does not.
    """
    if axes is None:
        return
    if (
        type(axes) is not str
        or not 1 <= len(axes) <= len(AXIS_NAMES)
        or len(set(axes)) != len(axes)
        or not set(axes) <= set(AXIS_NAMES)
    ):
        raise CoordinatesError(
            f"axes={excerpt(axes)}: write letters of 'xyz', each once, such as 'xy' or 'y', or "
            "None for every axis of the input"
        )


def check_centring(centring: object, also: tuple[str, ...] = ()) -> None:
    """Check that a field names a centring.

    Raises:
        CoordinatesError: If it does not.
    """
    choices = (*CENTRINGS, *also)
    if type(centring) is not str or centring not in choices:
        raise CoordinatesError(
            f"centring={excerpt(centring)}: write one of {', '.join(map(repr, choices))}"
        )


def axes_of(axes: str | None, ndim: int) -> str:
    """The axes that a field means for inputs of ``ndim`` spatial dimensions.

    Raises:
        CoordinatesError: If the inputs do not have one of them.
    """
    present = "".join(AXIS_NAMES[:ndim])
    if axes is None:
        return present
    for axis in axes:
        if axis not in present:
            raise CoordinatesError(
                f"axes={axes!r} has {axis!r}, but inputs of {ndim} spatial dimensions have "
                f"{present!r}: leave it out, or choose convolutions of more dimensions"
            )
    return axes


def axis_values(
    positions: Sequence[AxisPixels],
    axes: str,
    centring: str,
    value_range: tuple[float, float],
) -> list[Tensor]:
    """The coordinate along each of some axes: the position u, mapped linearly to a range.

    Args:
        positions: The pixels along each spatial dimension.
        axes: Names of axes that the positions have.
        centring: See :func:`.positions.axis_position`.
        value_range: Values at u = -1 and u = 1.
    """
    low, high = value_range
    dims = [dim_of(axis, len(positions)) for axis in axes]
    units = [axis_position(positions, dim, centring) for dim in dims]
    if (low, high) == (-1.0, 1.0):
        return units
    half, middle = (high - low) / 2, (low + high) / 2
    return [middle + unit * half for unit in units]
