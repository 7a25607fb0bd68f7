"""The conventions of published implementations, by name."""

from __future__ import annotations

import difflib
from typing import Any

from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["PRESET_NAMES", "preset_fields"]

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference": {"swap_sizes": True},
    "mkocabas": {"order": "yx"},
    "solo": {},
    "paddledetection": {},
}
_PRESETS_WITHOUT_RADIUS = ("solo", "paddledetection")
PRESET_NAMES = ", ".join(sorted(_PRESETS))
"""Every preset's name, for messages."""


def preset_fields(name: object, *, radius: bool) -> dict[str, Any]:
    """The fields of :class:`~coordconv_patch.Coordinates` that a preset sets.

    Args:
        name: See :meth:`coordconv_patch.Coordinates.preset`, so for ``radius``.
        radius: See there.

    Raises:
        CoordinatesError: If there is no such preset, or it has no radius channel.
    """
    if type(radius) is not bool:
        raise CoordinatesError(f"radius={excerpt(radius)}: write True or False")
    if not isinstance(name, str):
        raise CoordinatesError(f"preset {excerpt(name)}: write one of {PRESET_NAMES}")
    if name not in _PRESETS:
        close = difflib.get_close_matches(name, _PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise CoordinatesError(
            f"no coordinate preset {excerpt(name)}: {hint}presets are {PRESET_NAMES}; "
            "other conventions are written in Python, as Coordinates(channels=...). The command "
            "line takes these from a file of save_coords"
        )
    fields = dict(_PRESETS[name])
    if radius:
        if name in _PRESETS_WITHOUT_RADIUS:
            raise CoordinatesError(
                f"preset {name!r} has no radius channel; write Coordinates(radius=True) for "
                "the paper's"
            )
        fields["radius"] = True
        if name == "mkocabas":
            fields["radius_center"] = 0.5
    return fields
