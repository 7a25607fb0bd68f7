"""The errors this package raises.

Each message says what was wrong, where, and what to write instead. All of them
derive from :class:`CoordConvPatchError`, and each also from the built-in error
that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "CoordConvPatchError",
    "CoordinatesError",
    "ExportError",
    "ModelSourceError",
    "PatchError",
    "SelectionError",
    "WeightsError",
    "first_line",
    "listing",
]


class CoordConvPatchError(Exception):
    """Base class of every error that this package raises on purpose."""


class ArgumentError(CoordConvPatchError, ValueError):
    """An argument, or a command line, makes no sense."""


class CoordinatesError(CoordConvPatchError, ValueError):
    """A description of coordinate channels is impossible or does not fit an input."""


class SelectionError(CoordConvPatchError, ValueError):
    """A ``where=`` selector matches nothing, or cannot be decided."""


class PatchError(CoordConvPatchError, RuntimeError):
    """A model, or a chosen site of it, cannot be patched or unpatched."""


class WeightsError(CoordConvPatchError, ValueError):
    """A coordinate-weights file does not fit the model, or is no such file."""


class ExportError(CoordConvPatchError, RuntimeError):
    """An export failed, or its result does not agree with the torch model."""


class ModelSourceError(CoordConvPatchError, ValueError):
    """A model named on the command line cannot be loaded."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error in one line, without terminal codes: its class and the first line it says."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    said = text.partition("\n")[0].strip()[:limit]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def listing(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many there are in all."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown
