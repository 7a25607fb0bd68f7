"""All kinds of channel blocks, by name: what files and programs are read with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coordconv_patch.arguments import check_word
from coordconv_patch.channels.axes import Axes
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.fourier import Fourier
from coordconv_patch.channels.given import Given
from coordconv_patch.channels.radius import Radius
from coordconv_patch.errors import ArgumentError, CoordinatesError, excerpt

__all__ = ["BLOCKS", "OWN_KINDS", "blocks_from_fields", "blocks_of", "register_channel_block"]

_MOST_BLOCKS = 32

BLOCKS: dict[str, type[ChannelBlock]] = {
    block.kind: block for block in (Axes, Radius, Fourier, Given)
}

OWN_KINDS = frozenset(BLOCKS)
"""Kinds of the package itself."""


def register_channel_block(block: type[ChannelBlock]) -> None:
    """Let conventions have one more kind of channels, under the class's ``kind``.

    Whoever loads weights with such channels registers the class first. A second class of a kind
    takes the place of the first.

    Args:
        block: A subclass of :class:`coordconv_patch.ChannelBlock`, a frozen dataclass.

    Raises:
        ArgumentError: If it is not one, or its kind is not a word, or a kind of the package's own.

    Example::

        @dataclass(frozen=True)
        class Diagonal(ChannelBlock):
            kind = "diagonal"

            def names(self, ndim):
                return ("diagonal",)

            def values(self, positions):
                return [sum(index / length for index, length in positions)]

        register_channel_block(Diagonal)
        patch(model, coords=Coordinates(channels=(Axes(), Diagonal())))
    """
    if not (isinstance(block, type) and issubclass(block, ChannelBlock)):
        raise ArgumentError(f"block={excerpt(block)}: pass a subclass of ChannelBlock itself")
    if "__dataclass_fields__" not in vars(block):
        raise ArgumentError(
            f"block={block.__name__}: write @dataclass(frozen=True) above the class; blocks are "
            "saved and compared by their fields"
        )
    abstract = sorted(getattr(block, "__abstractmethods__", ()))
    if abstract:
        raise ArgumentError(f"block={block.__name__} has no method {abstract[0]}: write it")
    kind = getattr(block, "kind", None)
    check_word(f"{block.__name__}.kind", kind)
    if "kind" in {field.name for field in dataclasses.fields(block)}:
        raise ArgumentError(
            f"{block.__name__}.kind is a field: write kind = {kind!r} without an annotation"
        )
    if kind in OWN_KINDS:
        raise ArgumentError(f"{block.__name__}.kind={kind!r}: that is a kind of the package's own")
    BLOCKS[str(kind)] = block


def blocks_of(value: object) -> tuple[ChannelBlock, ...]:
    """The blocks that a convention is given, which can be saved with weights and come back equal.

    Raises:
        CoordinatesError: If it is not a tuple of blocks, one is not of a registered class or has
            fields that cannot be saved, or one is there twice.
    """
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_BLOCKS:
        raise CoordinatesError(
            f"channels={excerpt(value)}: write a tuple of at most {_MOST_BLOCKS} blocks, such as "
            "(Axes('y'),)"
        )
    for block in value:
        _check_block(block)
    for at, block in enumerate(value):
        if block in value[:at]:
            raise CoordinatesError(f"channels: {block} is there twice: leave one out")
    return tuple(value)


def blocks_from_fields(value: object) -> tuple[ChannelBlock, ...]:
    """Blocks from parsed JSON, which may hold anything.

    Raises:
        CoordinatesError: If a kind is not known here, or a field is unknown or invalid.
    """
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_BLOCKS:
        raise CoordinatesError(
            f"channels: {excerpt(value)}: they must be a list of at most {_MOST_BLOCKS} blocks"
        )
    return tuple(_block_from_fields(fields) for fields in value)


def _check_block(block: object) -> None:
    """Check that a block can be saved with weights, and comes back as what it is."""
    if not isinstance(block, ChannelBlock):
        raise CoordinatesError(
            f"channels: {excerpt(block)} is not a channel block: write Axes(...), Radius(...), "
            "Fourier(...), or one of a class that register_channel_block was given"
        )
    if BLOCKS.get(getattr(block, "kind", "")) is not type(block):
        raise CoordinatesError(
            f"channels: {type(block).__name__} is not a registered class of blocks, so weights "
            f"could not be loaded: call register_channel_block({type(block).__name__}) first"
        )
    if _block_from_fields(block.to_dict()) != block:
        raise CoordinatesError(
            f"channels: {block} does not come back equal from its fields {block.to_dict()}: write "
            "tuples for lists, and let __post_init__ and to_dict keep what they get"
        )
    hash(block)


def _block_from_fields(fields: object) -> ChannelBlock:
    if not isinstance(fields, Mapping) or type(fields.get("kind")) is not str:
        raise CoordinatesError(
            f"channels: {excerpt(fields)}: a channel block is an object that names its 'kind'"
        )
    values: dict[Any, Any] = dict(fields)
    if values["kind"] not in BLOCKS:
        raise CoordinatesError(
            f"channels: no kind of channel block {excerpt(values['kind'])} is known here, only "
            f"{', '.join(sorted(BLOCKS))}: import what defines it and calls "
            "register_channel_block first; or a newer version of coordconv_patch wrote it"
        )
    return BLOCKS[values["kind"]].from_dict(values)
