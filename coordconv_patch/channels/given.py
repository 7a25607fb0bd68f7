"""Channels that come with the call: maps of something that no position tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.convention_fields import is_whole
from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["Given"]

_MOST_CHANNELS = 1024
_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Given(ChannelBlock):
    """Maps that are given with each call, by :func:`coordconv_patch.maps`.

    Such as the ground resolution of a satellite picture, the depth of a scene, or what a camera's
    intrinsics say of each pixel (Facil et al. 2019, "CAM-Convs"). A layer sees them at its own
    resolution: each of its pixels has the mean over the map's pixels that it covers.

    Args:
        name: A Python identifier: the name of the argument of :func:`coordconv_patch.maps`.
        channels: Number of maps under this name.

    Raises:
        CoordinatesError: If the name is not an identifier, or the number not a positive one.
    """

    kind: ClassVar[str] = "given"

    name: str
    channels: int = 1

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name.isidentifier() or self.name == "model":
            raise CoordinatesError(
                f"name={excerpt(self.name)}: write a name such as 'depth', by which "
                "coordconv_patch.maps(model, depth=...) gives the maps"
            )
        if not is_whole(self.channels) or not 1 <= self.channels <= _MOST_CHANNELS:
            raise CoordinatesError(
                f"channels={excerpt(self.channels)}: write a number of maps, 1 to {_MOST_CHANNELS}"
            )
        object.__setattr__(self, "channels", int(self.channels))

    def names(self, ndim: int) -> tuple[str, ...]:
        if self.channels == 1:
            return (self.name,)
        return tuple(f"{self.name}[{channel}]" for channel in range(self.channels))

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        """Always refuses, for positions do not tell it.

        Raises:
            CoordinatesError: With what to write.
        """
        raise self.missing()

    def missing(self) -> CoordinatesError:
        """The error for a call that the maps were not given with."""
        return CoordinatesError(
            f"the maps {self.name!r} come with the call, and were not given: write `with "
            f"coordconv_patch.maps(model, {self.name}=...): model(images)`, a tensor of shape "
            f"(N, {self.channels}, H, W)"
        )

    def resized(self, maps: Mapping[str, Tensor], size: Sequence[int]) -> list[Tensor]:
        """The channels at a layer's resolution.

        Args:
            maps: Tensors of shape (N, channels, *any size), or N = 1 for all samples, by name.
            size: Spatial size of the layer's input.

        Returns:
            One tensor a channel, shape (N, *size).

        Raises:
            CoordinatesError: If they were not given.
        """
        if self.name not in maps:
            raise self.missing()
        wanted: Any = tuple(size)
        return list(_POOLS[len(wanted)](maps[self.name], wanted).unbind(1))
