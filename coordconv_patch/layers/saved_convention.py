"""The convention that coordinate weights in a state_dict were trained with.

torch keeps a dictionary for each module beside the tensors of a state_dict, ``_metadata``: batch
norms tell their version there. A coordinate layer tells its convention, so that weights of
another one are refused; shapes and names alone are the same for (x, y) and (y, x). There are no
new keys. A state_dict that was copied into a plain ``dict`` has lost it, and loads unchecked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coordconv_patch.errors import CoordinatesError
from coordconv_patch.layers.coordinates import Coordinates

__all__ = ["convention_refusal", "tell_convention"]

_KEY = "coordconv_patch"


def tell_convention(state_dict: Mapping[str, Any], prefix: str, coords: Coordinates) -> None:
    """Write a layer's convention beside its tensors; without the window, which is the input's.

    Args:
        state_dict: What the layer has saved its tensors to, perhaps a plain dictionary.
        prefix: Of the layer's keys.
        coords: The layer's convention.
    """
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        fields = _without_window(coords).to_dict()
        metadata.setdefault(prefix[:-1], {})[_KEY] = fields


def convention_refusal(
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    coords: Coordinates,
) -> str:
    """Why a layer must not load its coordinate weight, ``""`` if it may.

    Args:
        state_dict: What is to be loaded.
        prefix: Of the layer's keys.
        local_metadata: The layer's, as torch passes it on.
        coords: The layer's convention.
    """
    fields = local_metadata.get(_KEY)
    if fields is None:
        return ""
    own = _without_window(coords)
    key = f"{prefix}coord_weight"
    try:
        saved = Coordinates.from_dict(fields)
    except CoordinatesError as error:
        saved, reason = None, str(error)
    if saved == own or not _has_coordinates(state_dict, prefix):
        return ""
    if saved is None:
        return f"{key} was trained with coordinates that cannot be told here: {reason}"
    return (
        f"{key} was trained with coordinates {saved}, but the model is patched with {own}: patch "
        f"it with coords=Coordinates.from_dict({saved.to_dict()})"
    )


def _without_window(coords: Coordinates) -> Coordinates:
    return coords if coords.window is None else dataclasses.replace(coords, window=None)


def _has_coordinates(state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state_dict has the layer's coordinate weight, parametrized perhaps."""
    return any(key.startswith(prefix) and "coord_weight" in key for key in state_dict)
