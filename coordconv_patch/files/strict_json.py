"""JSON from a file that may hold anything: parsed within bounds, and without guesses."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from coordconv_patch.errors import ArgumentError, excerpt

__all__ = ["parse"]

_MOST_DIGITS = 20
"""Of a number: 2**63 has 19, and Python needs seconds for one of a million."""


def parse(text: str, what: str) -> Any:
    """Parse a JSON text, which messages call ``what``; its length is the caller's to bound.

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
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {excerpt(name)} stands in it twice")
        fields[name] = value
    return fields


def _integer(digits: str) -> int:
    return int(_bounded(digits, _MOST_DIGITS))


def _number(digits: str) -> float:
    return float(_bounded(digits, 10 * _MOST_DIGITS))


def _bounded(digits: str, most: int) -> str:
    if len(digits) > most:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return digits


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
