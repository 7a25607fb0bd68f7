"""The user's batches: some to train on, some held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from coordconv_patch.errors import ArgumentError
from coordconv_patch.running.losses import iterated

__all__ = ["Batches", "split"]

_FEWEST = 8
_MOST = 64
"""All of them are kept in memory, and each measurement runs every held-out one."""
_ONE_HELD_OUT_OF = 4
_MOST_HELD_OUT = 8
"""Measuring on more costs steps that training needs."""


class Batches(NamedTuple):
    """Batches, as they came.

    Attributes:
        training: To train on.
        held_out: To measure on: a quarter of all, but eight at most.
    """

    training: Sequence[Any]
    held_out: Sequence[Any]


def split(batches: Iterable[Any]) -> Batches:
    """Take the first 64 batches, and hold every fourth out; of more than 32 fewer.

    Raises:
        ArgumentError: If they cannot be iterated over, are one batch, or are fewer than 8.
    """
    taken = list(islice(iterated(batches), _MOST))
    if len(taken) < _FEWEST:
        raise ArgumentError(
            f"batches: {len(taken)} of them are too few, because a quarter is held out: pass "
            f"{_FEWEST} or more ({_MOST} are the most that are used, and best)"
        )
    one_of = max(_ONE_HELD_OUT_OF, -(-len(taken) // _MOST_HELD_OUT))
    held_out = taken[one_of - 1 :: one_of]
    training = [one for index, one in enumerate(taken) if (index + 1) % one_of]
    return Batches(training, held_out)
