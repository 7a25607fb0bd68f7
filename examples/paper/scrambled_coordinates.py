"""The control for CoordConv: coordinate channels that say nothing about where a pixel is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import coordconv_patch as ccp


@dataclass(frozen=True, kw_only=True)
class ScrambledCoordinates(ccp.Coordinates):
    """The same coordinate channels, with the pixels in a fixed random order.

    A net patched with these has every parameter of a patched one, and pixels that can be told
    apart, but no notion of left, right or near. The order depends on the size alone, so it
    is the same at each call.
    """

    def grid(
        self,
        size: Sequence[int | torch.SymInt | Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The scrambled channels ``(K, *size)``."""
        true = super().grid(size, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(true[0].numel())
        order = torch.randperm(true[0].numel(), generator=generator).to(true.device)
        return true.flatten(1)[:, order].reshape(true.shape)
