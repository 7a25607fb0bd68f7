"""Which calls of a convolution get coordinates, where not all of them do."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.files.fields import mapping, text, whole, wholes

__all__ = ["ChosenCalls"]

_MOST_CALLS = 100_000
"""Calls of one convolution in a forward pass, at most."""


@dataclass(frozen=True)
class ChosenCalls:
    """Which calls of a convolution get coordinates, where not all of them do.

    Attributes:
        indices: The calls, counted from 0 in order of execution.
        total: How many calls there were when they were chosen.
        caller: Qualified name of the module during whose call they are counted, ``""``
            for the model itself; in a graph they are the convolution's nodes.
    """

    indices: tuple[int, ...]
    total: int
    caller: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready; see :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ChosenCalls:
        """Inverse of :meth:`to_dict`, from parsed JSON, which may hold anything.

        Raises:
            ArgumentError: If a field is missing, unknown or of another type, or the calls
                are not in order, each once and below ``total``.
        """
        values = mapping(fields, "calls", ("indices", "total", "caller"))
        total = whole(values["total"], "total", low=1, high=_MOST_CALLS)
        indices = wholes(values["indices"], "indices", range(1, total + 1), high=total - 1)
        if any(later <= earlier for earlier, later in itertools.pairwise(indices)):
            raise ArgumentError(
                f"indices must be in order, each call once, not {excerpt(list(indices))}"
            )
        return cls(indices, total, text(values["caller"], "caller"))

    def __str__(self) -> str:
        """Such as ``calls 0, 3 of 5``."""
        plural = "s" if len(self.indices) > 1 else ""
        return f"call{plural} {', '.join(map(str, self.indices))} of {self.total}"
