"""Layers whose channels come with the call, see :class:`coordconv_patch.Given`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from coordconv_patch.channels.given import Given
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.places import maps_entered, shared_places

__all__ = ["blank_maps", "given_blocks"]


@contextmanager
def blank_maps(model: nn.Module) -> Iterator[None]:
    """While entered, maps of zeros stand for those that a call would give.

    For runs of the package itself, which look at a model and at nothing of its coordinates.
    """
    layers = [layer for layer in coord_layers(model).values() if given_blocks(layer)]
    if not layers:
        yield
        return
    zeros = {
        block.name: layer.coord_weight.new_zeros(
            (1, block.channels, *(1,) * layer.coord_geometry.ndim)
        ).detach()
        for layer in layers
        for block in given_blocks(layer)
    }
    with maps_entered(shared_places(layers), zeros, only_missing=True):
        yield


def given_blocks(layer: CoordLayer) -> list[Given]:
    """The channels of a layer that come with the call."""
    return [block for block in layer.coords.channels if isinstance(block, Given)]
