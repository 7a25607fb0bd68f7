"""What containers and objects hold: the values that a model is given, gives, or keeps."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping, Set
from enum import Enum
from typing import Any

from torch import Tensor, nn

__all__ = ["held_by", "tensors_held_by"]

_HOLD_NOTHING = (Tensor, nn.Module, Enum, type, types.ModuleType, types.FunctionType)
"""Objects with attributes that are not looked into: they are values themselves, or are code."""


def held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """The values right in a container or in an object's attributes, each with its place there."""
    if isinstance(value, _HOLD_NOTHING):
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", each) for key, each in value.items())
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{index}]", each) for index, each in enumerate(value))
    elif isinstance(value, Set):
        yield from (("{...}", each) for each in value)
    else:
        yield from ((f".{name}", each) for name, each in _attributes_of(value).items())


def _attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots too."""
    attributes: dict[str, Any] = {}
    for base in reversed(type(value).__mro__):
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = vars(base).get(_mangled(base, name))
            # Not what a class computes under such a name.
            if isinstance(member, types.MemberDescriptorType) and hasattr(value, member.__name__):
                attributes[name] = getattr(value, member.__name__)
    attributes.update(getattr(value, "__dict__", {}))
    return attributes


def _mangled(base: type, name: str) -> str:
    """The name under which Python keeps a private slot."""
    private = name.startswith("__") and not name.endswith("__")
    return f"_{base.__name__.lstrip('_')}{name}" if private else name


def tensors_held_by(value: Any) -> Iterator[Tensor | nn.Module]:
    """The tensors and modules in a value, however deep, each once."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each  # held, so that no other object gets its id
        if isinstance(each, (Tensor, nn.Module)):
            yield each
        else:
            waiting += [part for _, part in held_by(each)]
