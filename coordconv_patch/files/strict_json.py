"""JSON from a file that may hold anything: parsed within bounds, and without guesses."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from coordconv_patch.errors import ArgumentError, excerpt

__all__ = ["parse"]

_MOST_DIGITS = 20
"""Of a number: 2**63 has 19, and Python needs seconds for one of a million."""


def parse(text: str, what: str) -> Any:
    """Parse a JSON text.

    Args:
        text: The text; its length is the caller's to bound.
        what: What it is called in a message.

    Raises:
        ArgumentError: If it is not JSON, names a key twice, holds NaN or Infinity, a number of
            more than 20 digits, or is nested too deeply.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ArgumentError(f"{what} is nested too deeply") from None
    except ValueError as error:  # also what the functions below raise
        raise ArgumentError(f"{what} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(
            name for name, count in Counter(name for name, _ in pairs).items() if count > 1
        )
        raise ValueError(f"the key {excerpt(twice)} stands in it twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    if len(digits) > 10 * _MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
