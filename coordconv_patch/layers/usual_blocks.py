"""The channel blocks that the fields of a convention are short for."""

from __future__ import annotations

from coordconv_patch.channels.axes import Axes
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.fourier import Fourier
from coordconv_patch.channels.positions import AXIS_NAMES
from coordconv_patch.channels.radius import Radius

__all__ = ["usual_blocks"]


def usual_blocks(
    ndim: int,
    *,
    order: str,
    align_corners: bool,
    value_range: tuple[float, float],
    radius: bool,
    radius_center: float | None,
    fourier: int,
    swap_sizes: bool,
) -> tuple[ChannelBlock, ...]:
    """The blocks for ``ndim`` spatial dimensions, in the order of their channels.

    Arguments as those of :class:`coordconv_patch.Coordinates`.
    """
    axes = "".join(AXIS_NAMES[:ndim])
    axes = axes if order == "xy" else axes[::-1]
    centring = "endpoints" if align_corners else "edges"
    centring = "swapped endpoints" if swap_sizes else centring
    blocks: list[ChannelBlock] = [Axes(axes, value_range, centring)]
    if radius:
        blocks.append(
            Radius(axes=axes, center=radius_center, value_range=value_range, centring=centring)
        )
    if fourier:
        blocks.append(Fourier(axes, octaves=fourier, centring=centring))
    return tuple(blocks)
