"""Which fields of a convention go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordconv_patch.channels.given import Given
from coordconv_patch.errors import CoordinatesError

__all__ = ["SHORT_FIELDS", "check_combination"]

SHORT_FIELDS = (
    *("order", "align_corners", "value_range", "radius", "radius_center", "fourier"),
    "swap_sizes",
)
"""Fields of :class:`coordconv_patch.Coordinates` that are short for channel blocks."""


def check_combination(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that the fields of a convention, each valid by itself, go together.

    Raises:
        CoordinatesError: If they do not.
    """
    if fields["radius_center"] is not None and not fields["radius"]:
        raise CoordinatesError("radius_center is given, but radius=False: write radius=True")
    if fields["swap_sizes"] and (fields["window"] is not None or not fields["align_corners"]):
        raise CoordinatesError(
            "swap_sizes reproduces the released reference code, which knows neither windows "
            "nor align_corners=False: leave those out"
        )
    if not fields["channels"]:
        return
    given = [name for name in SHORT_FIELDS if fields[name] != defaults[name]]
    if given:
        raise CoordinatesError(
            f"channels and {given[0]} are given: write {given[0]} as fields of the blocks of "
            "channels, such as Axes('yx', value_range=(0.0, 1.0)), or leave channels out"
        )
    centrings = [getattr(block, "centring", None) for block in fields["channels"]]
    if fields["window"] is not None and "swapped endpoints" in centrings:
        raise CoordinatesError(
            "centring='swapped endpoints' reproduces the released reference code, which does "
            "not know windows: leave the window out"
        )
    maps = [block.name for block in fields["channels"] if isinstance(block, Given)]
    if fields["scrambled"] is not None and maps:
        raise CoordinatesError(
            f"scrambled={fields['scrambled']} and Given({maps[0]!r}): maps that come with the call "
            "have no places to permute, permute the maps that you give, or leave scrambled out"
        )
