"""Fields of parsed JSON, read with strict types.

JSON comes from files, and a file may hold anything: ``true`` where a number belongs, 1.5, a
number of a thousand digits, a name of a megabyte. Python would take much of it for what it is
not (``True`` is an ``int``, ``int(1.5)`` is 1), so every field is read through these functions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from coordconv_patch.errors import ArgumentError, excerpt

__all__ = ["choice", "mapping", "text", "truth", "whole", "wholes"]

LARGEST = 2**31 - 1
"""The largest number that a field may hold where nothing smaller is said."""
LONGEST_TEXT = 1000
"""Characters of a name."""


def mapping(
    value: object, what: str, required: Collection[str] = (), optional: Collection[str] = ()
) -> dict[str, Any]:
    """An object that has the required fields, and besides those the optional ones at most.

    ``what`` is what messages call it.

    Raises:
        ArgumentError: If it is something else; so for the functions below.
    """
    if not isinstance(value, dict):
        raise ArgumentError(f"{what} must be an object, not {excerpt(value)}")
    missing = sorted(set(required) - set(value))
    if missing:
        raise ArgumentError(f"{what} has no field {missing[0]!r}")
    unknown = [name for name in value if name not in required and name not in optional]
    if unknown:
        raise ArgumentError(
            f"{what} has an unknown field {excerpt(unknown[0])}: a newer version of "
            "coordconv_patch may have written it"
        )
    return value


def whole(value: object, what: str, low: int = 0, high: int = LARGEST) -> int:
    """A whole number from ``low`` to ``high``; 1.0 and ``true`` are not whole numbers."""
    if type(value) is not int or not low <= value <= high:
        raise ArgumentError(
            f"{what} must be a whole number from {low} to {high}, not {excerpt(value)}"
        )
    return value


def wholes(
    value: object, what: str, count: range, low: int = 0, high: int = LARGEST
) -> tuple[int, ...]:
    """A list of whole numbers, as many as ``count`` holds."""
    if not isinstance(value, (list, tuple)) or len(value) not in count:
        numbers = f"{count[0]}" if len(count) == 1 else f"{count[0]} to {count[-1]}"
        raise ArgumentError(f"{what} must be a list of {numbers} numbers, not {excerpt(value)}")
    return tuple(whole(each, what, low, high) for each in value)


def truth(value: object, what: str) -> bool:
    """``true`` or ``false``."""
    if type(value) is not bool:
        raise ArgumentError(f"{what} must be true or false, not {excerpt(value)}")
    return value


def text(value: object, what: str) -> str:
    """A text of at most 1,000 characters, each of which Unicode can encode."""
    if type(value) is not str or len(value) > LONGEST_TEXT:
        raise ArgumentError(
            f"{what} must be a text of at most {LONGEST_TEXT} characters, not {excerpt(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{what} is not valid Unicode: {excerpt(value)}") from None
    return value


def choice(value: object, what: str, choices: Collection[str]) -> str:
    """One of a few texts."""
    if type(value) is not str or value not in choices:
        raise ArgumentError(f"{what} must be one of {', '.join(choices)}, not {excerpt(value)}")
    return value
