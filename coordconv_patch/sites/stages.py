"""Stages of a model: its sites in a few groups, by the beginnings of their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Stage", "stages_of"]

T = TypeVar("T")

_LARGEST = 0.5
"""A group with more than this share of all members is taken apart."""


@dataclass(frozen=True)
class Stage(Generic[T]):
    """Some members whose names begin alike.

    Attributes:
        name: What their names begin with, as a glob where there are several: ``"layer1.*"``.
        members: In the order that they came in.
    """

    name: str
    members: tuple[T, ...]


def stages_of(
    members: Sequence[T], name: Callable[[T], str], most: int | None = None
) -> tuple[Stage[T], ...]:
    """Group members by their names, in the order of the first of each group.

    Groups are those of the outermost modules, but one that has more than half of all members
    is taken apart: the backbone of a detector, or the list of a network's stages.

    Args:
        members: What to group.
        name: A member's qualified name, parts divided by dots.
        most: No group is taken apart where that would give more groups than so many.
    """
    whole = [(tuple(name(member).split(".")), member) for member in members]
    groups = _split(whole, 0)
    if most is not None and len(groups) > most:
        groups = [whole]
    while True:
        place, largest = max(enumerate(groups), key=lambda item: len(item[1]), default=(0, []))
        if len(largest) < 2 or len(largest) <= _LARGEST * len(members):
            break
        parts = _split(largest, _shared(largest))
        if len(parts) < 2 or (most is not None and len(groups) - 1 + len(parts) > most):
            break
        groups[place : place + 1] = parts
    ordered = sorted(groups, key=lambda group: members.index(group[0][1]))
    return tuple(Stage(_name(group), tuple(member for _, member in group)) for group in ordered)


_Named = list[tuple[tuple[str, ...], T]]


def _split(group: _Named[T], depth: int) -> list[_Named[T]]:
    """The group by the part of the names at a depth."""
    parts: dict[tuple[str, ...], _Named[T]] = {}
    for names, member in group:
        parts.setdefault(names[: depth + 1], []).append((names, member))
    return list(parts.values())


def _shared(group: _Named[T]) -> int:
    """How many parts all names of a group begin with."""
    names = [names for names, _ in group]
    depth = 0
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        depth += 1
    return depth


def _name(group: _Named[T]) -> str:
    names = group[0][0]
    if len(group) == 1:
        return ".".join(names)
    return ".".join((*names[: _shared(group)], "*"))
