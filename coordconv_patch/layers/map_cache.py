"""Coordinate maps that a layer keeps between inference calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MapCache", "MapKey"]


class _Last(NamedTuple):
    """The map used last, and for what: one object, so that threads never mix two of them."""

    weight: Tensor | None
    input_shape: torch.Size | None
    output_shape: torch.Size | None
    output_dtype: torch.dtype | None
    coord_map: Tensor | None


class MapKey(NamedTuple):
    """What a map was made for.

    ``channels`` are the output's: they may no longer be those of the weight.
    """

    input_size: tuple[int, ...]
    channels: int
    output_size: tuple[int, ...]
    output_dim: int
    output_dtype: torch.dtype


class _Kept(NamedTuple):
    """Maps by what they were made for, and the weight that all of them were made from.

    Never changed, only replaced: a thread that reads one need not look out for others.
    """

    weight: Tensor | None
    maps: Mapping[MapKey, Tensor]


class _Contents:
    """What a cache holds from one ``clear()`` to the next.

    A thread that makes a map puts it where it found none. If the cache was cleared meanwhile,
    because what the map was made from is out of date, nobody looks there any more.
    """

    last = _Last(None, None, None, None, None)
    kept = _Kept(None, {})


class MapCache:
    """Coordinate maps of one layer, kept between inference calls.

    Every use compares the weight's values with those that the maps were made
    from. A version counter would be cheaper, but it misses writes through
    ``.data``, NumPy and DLPack views, and a stale map is a wrong answer. The
    comparison costs microseconds on the CPU; on other devices it would force a
    synchronisation, so maps are kept on the CPU only.

    The cache is not part of the layer's state: copies and pickles start empty. Threads may use
    it together, also while one of them trains the weight or clears the cache. None of them
    waits for another, so one map may be made twice.

    Args:
        is_constant: The weight is promised not to change any more (a folded model), so
            nothing is compared, and maps are kept on every device.
    """

    max_maps = 8
    """Maps kept per layer: a detector's shared head sees five or six input sizes."""

    __slots__ = ("_contents", "is_constant")

    def __init__(self, is_constant: bool = False) -> None:
        self.is_constant = is_constant
        self._contents = _Contents()

    def get(
        self,
        weight: Tensor,
        input: Tensor,
        output: Tensor,
        make: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The map to add to ``output``, made from the values that ``weight`` has now.

        The output's dtype tells whether autocast is on; its shape, the output padding.

        Args:
            weight: The layer's coordinate weight.
            input: The convolution's input.
            output: What the plain convolution made of it.
            make: Makes the map for an input, an output and a weight.
        """
        # Few memory accesses matter here: a convolution before has emptied the processor's
        # caches, and each miss costs as much as a hundred instructions.
        kept, input_shape, output_shape, output_dtype, coord_map = self._contents.last
        if (
            coord_map is not None
            and input.shape == input_shape
            and output.shape == output_shape
            and output.dtype is output_dtype
            and (self.is_constant or _is_equal(kept, weight))
        ):
            return coord_map
        return self._find(input, output, weight, make)

    def _find(
        self,
        input: Tensor,
        output: Tensor,
        weight: Tensor,
        make: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        contents = self._contents
        kept = contents.kept
        if not self.is_constant and not _is_equal(kept.weight, weight):
            with torch.inference_mode(False):
                # A parameter, as the weight: function modes tell stored weights from computed ones.
                copied = nn.Parameter(weight.detach().clone(), requires_grad=False)
                kept = _Kept(copied, {})
        ndim = weight.dim() - 2
        channels, *output_size = output.shape[-ndim - 1 :]
        input_size = tuple(input.shape[-ndim:])
        key = MapKey(input_size, channels, tuple(output_size), output.dim(), output.dtype)
        coord_map = kept.maps.get(key)
        if coord_map is None:
            # From the copy: another thread may be training the weight at this moment.
            source = weight if kept.weight is None else kept.weight
            # Not an inference tensor, whatever mode this call runs in: a later one may train.
            # And not from autocast's own copy of the weight, which may be older than the weight.
            with torch.inference_mode(False), torch.no_grad(), _autocast_cache_off():
                coord_map = make(input, output, source)
            maps = [*kept.maps.items(), (key, coord_map)][-self.max_maps :]
            kept = contents.kept = _Kept(kept.weight, dict(maps))
        contents.last = _Last(kept.weight, input.shape, output.shape, output.dtype, coord_map)
        return coord_map

    def kept_maps(self) -> Mapping[MapKey, Tensor]:
        """The maps, by what they were made for."""
        return self._contents.kept.maps

    def clear(self) -> None:
        """Forget every map, and the memory that they take."""
        self._contents = _Contents()

    def __len__(self) -> int:
        return len(self._contents.kept.maps)

    def __reduce__(self) -> tuple[type[MapCache], tuple[bool]]:
        return MapCache, (self.is_constant,)


def _is_equal(kept: Tensor | None, weight: Tensor) -> bool:
    return kept is not None and kept.dtype is weight.dtype and torch.equal(kept, weight)


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
