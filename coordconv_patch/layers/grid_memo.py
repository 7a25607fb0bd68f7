"""Grids that the layers of a forward pass share: they see the same places at the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from coordconv_patch.layers.capture import is_capturing, is_transforming

__all__ = ["GridMemo"]


class GridMemo:
    """What was computed from places since they were entered.

    A graph that is captured would hold the computation once for each layer otherwise: thousands of
    nodes. What was made while a graph was captured is of that graph, so a memo serves either
    a capture that it began in, or none.
    """

    def __init__(self) -> None:
        self._captures = is_capturing()
        self._grids: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor], *, wants_gradients: bool) -> Tensor:
        """The grid that is kept under a key, or a new one.

        Args:
            key: What it depends on besides the places.
            make: Computes it.
            wants_gradients: Whether a backward pass goes through it, which would free what others
                still need: nothing is kept then.
        """
        if (
            torch.compiler.is_dynamo_compiling()  # the compiler sees for itself what is equal
            or is_capturing() is not self._captures
            or wants_gradients
            or (is_transforming() and not self._captures)
        ):
            return make()
        whole = (key, torch.is_inference_mode_enabled())
        kept = self._grids.get(whole)
        if kept is None:
            kept = self._grids[whole] = make()
        return kept
