"""Padding by operations of their own, in front of a convolution function.

A subclass such as Conv2dSame, and ``padding_mode="circular"``, pad an image by ``F.pad`` before
they call ``F.conv2d``; so may any code. Coordinates are those of the image before it, and are
padded as the image is. The same rules read nodes of a graph and tensors of a running model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from coordconv_patch.errors import ArgumentError, PatchError, excerpt
from coordconv_patch.files.fields import choice, mapping, wholes
from coordconv_patch.layers.geometry import (
    DECLARED,
    PADDING_MODES,
    ConvGeometry,
    Padding,
    pad_amounts,
)

__all__ = ["NOT_PADDED", "PADS", "OwnPadding", "pad_arguments", "unpadded"]

_aten = torch.ops.aten

PADS = (F.pad, _aten.pad.default, _aten.constant_pad_nd.default)
"""Functions that pad."""


@dataclass(frozen=True)
class OwnPadding:
    """How code pads a convolution's input by operations of its own.

    Attributes:
        rule: How the input is padded, where the function's arguments do not say it.
        mode: As torch.nn's convolutions have it in ``padding_mode``.
        declared: The ``padding`` that such a convolution would declare; ``None``: as the
            function's arguments say.
        amounts: The pixels of that padding, ``(before, after)`` per spatial dimension;
            empty where there is none.
    """

    rule: Padding = DECLARED
    mode: str = "zeros"
    declared: str | tuple[int, ...] | None = None
    amounts: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_dict(cls, fields: object) -> OwnPadding:
        """A padding from JSON (of ``dataclasses.asdict``), which may hold anything; or raises."""
        values = mapping(fields, "padding", ("rule", "mode", "declared", "amounts"))
        declared, amounts = values["declared"], _pairs(values["amounts"])
        if isinstance(declared, str):
            choice(declared, "declared", ("same",))
        elif declared is not None:
            declared = wholes(declared, "declared", _DIMENSIONS)
        return cls(
            rule=Padding.from_dict(values["rule"]),
            mode=choice(values["mode"], "mode", PADDING_MODES),
            declared=declared,
            amounts=amounts,
        )


_DIMENSIONS = range(1, 4)


def _pairs(value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list) or len(value) >= _DIMENSIONS.stop:
        raise ArgumentError(f"amounts must be a list of at most 3 pairs, not {excerpt(value)}")
    pairs = [wholes(pair, "amounts", range(2, 3)) for pair in value]
    return tuple((before, after) for before, after in pairs)


NOT_PADDED = OwnPadding()


def pad_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a padding function by the names that ``F.pad`` has."""
    constant = function is _aten.constant_pad_nd.default
    names = ("input", "pad", "value") if constant else ("input", "pad", "mode", "value")
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def unpadded(
    arguments: Mapping[str, Any],
    ndim: int | None,
    kernel_size: Sequence[int] | None,
    pad_behind: Callable[[Any], Mapping[str, Any] | None],
) -> tuple[Any, OwnPadding]:
    """A convolution's input before its own code pads it, and how that pads.

    Several pads in a row, and the function's own padding, are one where no two of them pad
    the same axis: seamless tiling pads one axis by its other end, and the other by zeros.

    Args:
        arguments: The convolution function's arguments, by name.
        ndim: Number of its spatial dimensions; ``None`` if unknown.
        kernel_size: Its kernel size; ``None`` if unknown.
        pad_behind: Gives the arguments of the pad that a value comes from (see
            :func:`pad_arguments`); ``None`` if it comes from none of the same code.

    Raises:
        PatchError: If the amounts are computed at run time.
    """
    source, padding = arguments["input"], arguments.get("padding", 0)
    if ndim is None or (isinstance(padding, str) and padding != "valid"):
        return source, NOT_PADDED
    pads: list[_Pad] = []
    inner = source
    while True:
        behind = pad_behind(inner)
        pad = None if behind is None else _read_pad(behind, ndim)
        if behind is None or pad is None or not _are_apart([*pads, pad], padding):
            break
        pads.append(pad)
        inner = behind["input"]
    if not pads:
        return source, NOT_PADDED
    return inner, _as_one(pads, padding, kernel_size, arguments.get("dilation", 1))


class _Pad(NamedTuple):
    """One operation that pads an image."""

    pairs: tuple[tuple[int, int], ...]
    mode: str


def _read_pad(given: Mapping[str, Any], ndim: int) -> _Pad | None:
    """What a padding operation does; ``None`` if the border is a part of the image."""
    flat = given["pad"]
    if isinstance(flat, (fx.Node, fx.Proxy)) or not all(isinstance(each, int) for each in flat):
        raise PatchError("it pads by amounts that are computed at run time, from the image size")
    mode = str(given.get("mode") or "constant").replace("constant", "zeros")
    if mode == "zeros" and given.get("value"):
        return None
    pairs = tuple((int(a), int(b)) for a, b in zip(flat[::2], flat[1::2], strict=True))[::-1]
    pairs = ((0, 0),) * (ndim - len(pairs)) + pairs  # F.pad takes the last dimensions alone
    if any(map(any, pairs[:-ndim])):
        return None  # it pads channels or the batch
    return _Pad(pairs[-ndim:], mode)


def _are_apart(pads: Sequence[_Pad], padding: Any) -> bool:
    """Whether pads, and a function's own padding, leave each other's axes alone."""
    ndim = len(pads[0].pairs)
    parts = [_spread_zeros(padding, ndim), *(pad.pairs for pad in pads)]
    return all(sum(any(part[axis]) for part in parts) <= 1 for axis in range(ndim))


def _spread_zeros(padding: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    """A function's own padding, which is of zeros, as ``(before, after)`` per dimension."""
    numbers = [0] if isinstance(padding, str) else [int(n) for n in _as_list(padding)] or [0]
    return tuple((n, n) for n in (numbers * ndim if len(numbers) == 1 else numbers))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _as_one(
    pads: Sequence[_Pad], padding: Any, kernel_size: Sequence[int] | None, dilation: Any
) -> OwnPadding:
    """Pads of different axes, and a function's own, as one padding of the innermost image."""
    ndim = len(pads[0].pairs)
    amounts, modes = [(0, 0)] * ndim, ["zeros"] * ndim
    for pad in pads:
        for axis, pair in enumerate(pad.pairs):
            if any(pair):
                amounts[axis], modes[axis] = pair, pad.mode
    explicit = tuple(amounts)
    own = _spread_zeros(padding, ndim)
    pairs = tuple(a if any(a) else b for a, b in zip(explicit, own, strict=True))
    padded = {mode for mode, pair in zip(modes, pairs, strict=True) if any(pair)}
    if padded <= {"zeros"}:
        return OwnPadding(Padding("fixed", pairs), amounts=explicit)
    if len(padded) == 1:
        declared = _declared_padding(pairs, kernel_size, dilation)
        if declared is not None:
            return OwnPadding(DECLARED, padded.pop(), declared, explicit)
    return OwnPadding(Padding("fixed", pairs, tuple(modes)), amounts=explicit)


def _declared_padding(
    pairs: Sequence[tuple[int, int]], kernel_size: Sequence[int] | None, dilation: Any
) -> str | tuple[int, ...] | None:
    """The ``padding`` attribute of a convolution that pads by these amounts."""
    if all(before == after for before, after in pairs):
        return tuple(before for before, _ in pairs)
    if kernel_size is None:
        return None
    ndim, dilation = len(kernel_size), tuple(_as_list(dilation))
    geometry = ConvGeometry(
        transposed=False,
        in_channels=1,
        out_channels=1,
        kernel_size=tuple(kernel_size),
        stride=(1,) * ndim,
        padding="same",
        dilation=dilation * ndim if len(dilation) == 1 else dilation,
    )
    amounts = pad_amounts(DECLARED, (), geometry)
    return "same" if amounts == list(pairs) else None
