"""The control: the same coordinate channels, their values at other places.

A scrambled convention tells places apart as well as the true one does, and has no left, right or
near. What it gains, any code of places would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.channels.registry import register_channel_block
from coordconv_patch.layers.coordinates import Coordinates

__all__ = ["scrambled"]


def scrambled(coords: Coordinates) -> Coordinates:
    """A convention with the pixels in a fixed random order, which depends on the size alone."""
    return Coordinates(channels=(_Scrambled(json.dumps(coords.to_dict())),))


@dataclass(frozen=True)
class _Scrambled(ChannelBlock):
    """The channels of a convention, given as its fields in JSON, at permuted places."""

    kind: ClassVar[str] = "scrambled"

    fields: str

    @property
    def _coords(self) -> Coordinates:
        return Coordinates.from_dict(json.loads(self.fields))

    def names(self, ndim: int) -> tuple[str, ...]:
        return tuple(f"scrambled {name}" for name in self._coords.channel_names(ndim))

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        shapes = [pixels.index.shape for pixels in positions]
        size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        count = size.numel()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        return [
            channel.expand(size).flatten()[order.to(channel.device)].reshape(size)
            for channel in self._coords.values(positions)
        ]


register_channel_block(_Scrambled)
