"""Coordinate grids that have been computed already, within a bound of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from torch import Tensor

from coordconv_patch.running.forks import fork_safe

__all__ = ["GridCache"]

_OVERHEAD = 1024
"""Bytes that an entry takes beside its values, about: small grids must not pile up either."""


class GridCache:
    """Tensors by key, the oldest of which go when all of them take too much memory.

    Threads may share it. Looking up an entry takes no lock and changes nothing: a grid
    is needed in every forward pass, and is wanted in well under a microsecond.

    Args:
        max_bytes: The most memory that the tensors may take together, in bytes, wherever
            they lie. A tensor that is larger by itself is not kept.
    """

    __slots__ = ("_bytes", "_lock", "_tensors", "lookup", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._tensors: dict[Hashable, Tensor] = {}
        self._bytes = 0
        self._lock = fork_safe(threading.Lock())
        self.lookup: Callable[[Hashable], Tensor | None] = self._tensors.get
        """The tensor kept under a key, or ``None``."""

    def keep(self, key: Hashable, tensor: Tensor) -> Tensor:
        """Keep a tensor; returns the one to use, which another thread may have kept before."""
        size = _size(tensor)
        with self._lock:
            kept = self._tensors.get(key)
            if kept is not None:
                return kept
            if size <= self.max_bytes:
                self._bytes += size
                while self._bytes > self.max_bytes:
                    oldest = next(iter(self._tensors))
                    self._bytes -= _size(self._tensors.pop(oldest))
                self._tensors[key] = tensor
        return tensor

    def cache_clear(self) -> None:
        """Forget every tensor (named as in :func:`functools.lru_cache`)."""
        with self._lock:
            self._tensors.clear()
            self._bytes = 0

    @property
    def bytes(self) -> int:
        """Memory that the tensors take, in bytes, with what it takes to keep them."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._tensors)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() + _OVERHEAD
