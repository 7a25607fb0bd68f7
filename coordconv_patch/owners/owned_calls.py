"""Which calls of a module's code are those of a functional site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.files.fields import choice, mapping, text, whole, wholes
from coordconv_patch.graphs.own_padding import OwnPadding
from coordconv_patch.layers.geometry import CONV_FUNCTIONS

__all__ = ["OwnedCalls"]


_FUNCTIONS = frozenset(CONV_FUNCTIONS.values())
_MOST_CALLS = 100_000
"""Of one function in one forward pass, in a file."""


@dataclass(frozen=True)
class OwnedCalls:
    """Which calls during a module's forward are those of one site.

    Attributes:
        owner: Qualified name of the module in whose forward the calls happen, ``""`` for the
            model itself.
        function: Name of the convolution function, such as ``"conv2d"``.
        weight: Name of the stored weight relative to the owner; ``None`` where the weight is
            computed.
        padding: How the code pads the convolution's input by an operation of its own.
        indices: Positions of the site's calls among those by the same weight, or by
            computed weights, of that function; from 0 in one forward of the owner.
            ``None``: every call by the weight.
        total: How many such calls one forward makes; 0 where they are not counted.
    """

    owner: str
    function: str
    weight: str | None
    padding: OwnPadding = field(default_factory=OwnPadding)
    indices: tuple[int, ...] | None = None
    total: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready; see :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: object) -> OwnedCalls:
        """Inverse of :meth:`to_dict`, from parsed JSON, which may hold anything.

        Raises:
            ArgumentError: If a field is missing, unknown, of another type or impossible.
        """
        names = ("owner", "function", "weight", "padding", "indices", "total")
        values = mapping(fields, "function", names)
        weight, indices = values["weight"], values["indices"]
        counted = indices is not None
        total = whole(values["total"], "total", low=int(counted), high=_MOST_CALLS)
        if counted:
            indices = wholes(indices, "indices", range(1, total + 1), high=total - 1)
            if list(indices) != sorted(set(indices)):
                raise ArgumentError(f"indices must be in order, each once, not {excerpt(indices)}")
        elif total or weight is None:
            raise ArgumentError("indices must be there where calls are counted")
        return cls(
            owner=text(values["owner"], "owner"),
            function=choice(values["function"], "function", [f.__name__ for f in _FUNCTIONS]),
            weight=None if weight is None else text(weight, "weight"),
            padding=OwnPadding.from_dict(values["padding"]),
            indices=indices,
            total=total,
        )
