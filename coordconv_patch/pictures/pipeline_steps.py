"""The steps of a data pipeline, of either library, and what errors say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["not_affine", "steps_of"]


def steps_of(step: Any, name: str = "the pipeline") -> Iterator[tuple[str, Any]]:
    """A transform and those inside of it, each with a description of where it is."""
    yield name, step
    for at, each in enumerate(getattr(step, "transforms", ())):
        yield from steps_of(each, f"step {at} of {name}")


def not_affine(what: str, measured: str = "") -> str:
    """The message about a step that no affine map describes."""
    return (
        f"{what}: what it does to the picture is not one affine map{measured}, so the result has "
        "no place: leave it out of the pipeline"
    )
