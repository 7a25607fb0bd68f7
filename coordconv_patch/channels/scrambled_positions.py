"""A fixed permutation of the places of a picture, for coordinates that say nothing of where.

The pixels of a picture of n = H x W pixels, numbered row by row, are shuffled by the swap-or-not
shuffle (Hoang, Morris, Rogaway 2012, "An Enciphering Scheme Based on a Card Shuffle",
https://arxiv.org/abs/1208.1176). A round has a number k, and swaps number p with its partner
``k - p mod n``, or not, as one pseudo-random bit says that both of them share::

    q = (k - p) mod n
    p = q if bit(max(p, q)) else p

Every round is a permutation for every n. It is whole-number arithmetic, elementwise in p: the same
on every device, in every version of torch and in an exported graph, where n may be symbolic, and
where each sample of a batch lies elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coordconv_patch.channels.positions import AxisPixels

__all__ = ["scrambled_positions"]

_ROUNDS = 16
"""With 8, pixels of 224 x 224 are near one another 20 times as often as by chance; with 16 (and 24)
just as often, and neither they nor their coordinates are correlated any more."""
_PRIME = 2**31 - 1
"""Products of two numbers below it fit into 64 bits."""


def scrambled_positions(positions: Sequence[AxisPixels], seed: int) -> tuple[AxisPixels, ...]:
    """For each pixel the one whose place it gets.

    Args:
        positions: The pixels along each axis. Those that are fractions are rounded to the nearest
            pixel of the picture; beyond the picture, too.
        seed: Which permutation, see :func:`coordconv_patch.scrambled`.

    Returns:
        Pixels as whole numbers, of the shape that the given ones broadcast to. Every axis' index
        depends on all axes, and on the picture's size.
    """
    lengths = [_whole(length) for _, length in positions]
    number: Any = 0
    for (index, _), length in zip(positions, lengths, strict=True):
        number = number * length + _within(index.round().long(), length)
    count: Any = functools.reduce(lambda product, length: product * length, lengths)
    for key, factor, shift in _rounds(seed):
        number = _swapped_or_not(number, count, key, factor, shift)
    dtype = positions[0].index.dtype
    indices = []
    for length in reversed(lengths):
        # Not number % length, which torch.onnx does not know where the length is symbolic.
        above = number.div(length, rounding_mode="floor")
        indices.append((number - above * length).to(dtype))
        number = above
    return tuple(
        AxisPixels(index, length) for index, length in zip(reversed(indices), lengths, strict=True)
    )


def _swapped_or_not(number: Tensor, count: Any, key: int, factor: int, shift: int) -> Tensor:
    """One round of the shuffle."""
    partner = key % count - number
    partner = torch.where(partner < 0, partner + count, partner)
    bits = (torch.maximum(number, partner) * factor + shift) % _PRIME
    return torch.where(bits * bits % _PRIME > _PRIME // 2, partner, number)


def _rounds(seed: int) -> Iterator[tuple[int, int, int]]:
    """Three numbers below the prime for each round, by SplitMix64 (Steele, Lea, Flood 2014)."""
    state = seed
    numbers = []
    for _ in range(3 * _ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        numbers.append((mixed ^ (mixed >> 31)) % (_PRIME - 1) + 1)
    for at in range(0, len(numbers), 3):
        yield numbers[at], numbers[at + 1], numbers[at + 2]


def _whole(length: Any) -> Any:
    """A length in whole pixels, at least one."""
    if isinstance(length, int):
        return length
    if isinstance(length, Tensor):
        return length.round().long().clamp(min=1) if length.is_floating_point() else length
    if isinstance(length, float):
        return max(round(length), 1)
    return torch.sym_max(torch.sym_int(length + 0.5), 1)


def _within(index: Tensor, length: Any) -> Tensor:
    """Indices in the picture, the nearest for those beyond it."""
    if isinstance(length, Tensor):
        return torch.minimum(index.clamp(min=0), length - 1)
    return index.clamp(min=0, max=length - 1)
