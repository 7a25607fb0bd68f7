"""The errors this package raises.

Each message says what was wrong, where, and what to write instead. All of them
derive from :class:`CoordConvPatchError`, and each also from the built-in error
that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Any, ClassVar

__all__ = [
    "ArgumentError",
    "CoordConvPatchError",
    "CoordinatesError",
    "ExampleInputsError",
    "ExportError",
    "MissingPackageError",
    "ModelSourceError",
    "PatchError",
    "SelectionError",
    "WeightsError",
    "excerpt",
    "first_line",
    "listing",
    "path_text",
]


class CoordConvPatchError(Exception):
    """Base class of every error that this package raises on purpose.

    Its message is cut at 2,000 characters: what it quotes may be of any length.
    """

    _longest: ClassVar[int] = 2000

    def __init__(self, message: str) -> None:
        super().__init__(_cut(message, self._longest))


class ArgumentError(CoordConvPatchError, ValueError):
    """An argument, or a command line, makes no sense."""


class CoordinatesError(CoordConvPatchError, ValueError):
    """A description of coordinate channels is impossible or does not fit an input."""


class SelectionError(CoordConvPatchError, ValueError):
    """A ``where=`` selector matches nothing, or cannot be decided."""


class PatchError(CoordConvPatchError, RuntimeError):
    """A model, or a chosen site of it, cannot be patched or unpatched."""


class ExampleInputsError(PatchError):
    """The model fails on the example inputs that it was to be run on."""


class WeightsError(CoordConvPatchError, ValueError):
    """A coordinate-weights file does not fit the model, or is not such a file.

    Its message is cut at 1,000 characters.
    """

    _longest = 1000


class ExportError(CoordConvPatchError, RuntimeError):
    """An export failed, or its result does not agree with the torch model."""


class MissingPackageError(CoordConvPatchError, ImportError):
    """A package that is needed here is not installed; the message has the pip command."""


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
    shown = ", ".join(_cut(name, 100) for name in names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown


def path_text(path: object) -> str:
    """A path for a message: whole, unless it is longer than paths are in earnest."""
    return _cut(str(path), 500)


def excerpt(value: object) -> str:
    """A value for a message, as ``repr`` shows it but short: of any type, size and depth."""
    try:
        return _cut(_EXCERPT.repr(value), 200)
    except Exception:  # of a container whose items cannot be read
        return f"<{type(value).__name__}>"


def _cut(text: str, length: int) -> str:
    """A text of at most so many characters; of a longer one the middle is left out."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 5]} ... {text[-tail:]}"


class _Excerpt(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out an integer of thousands of digits.
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            return super().repr_instance(x, level)
        except Exception:
            return f"<{type(x).__name__}>"


_EXCERPT = _Excerpt()
