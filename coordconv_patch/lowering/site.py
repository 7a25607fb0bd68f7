"""A coordinate layer and its calls: what a lowering is chosen for, and made from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.geometry import Call, ConvGeometry
from coordconv_patch.lowering.basis import SeparableBasis
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.image_cache import ImageCache
from coordconv_patch.lowering.layer_call import grid_of, map_of
from coordconv_patch.lowering.strips import Strip
from coordconv_patch.sites.run_record import record_run

__all__ = ["LoweringSite", "lowering_sites"]


class LoweringSite:
    """A coordinate layer and the calls that its lowering is chosen for.

    Args:
        name: The site's qualified name.
        layer: The layer.
        calls: Its calls on the example inputs, each size once.
        images: Shared by the sites of a model.

    Attributes:
        name: As the argument; so for the others.
        layer: See ``name``.
        calls: See ``name``.
    """

    def __init__(
        self, name: str, layer: CoordLayer, calls: Sequence[Call], images: ImageCache
    ) -> None:
        self.name = name
        self.layer = layer
        self.calls = tuple(calls)
        self._images = images

    @property
    def geometry(self) -> ConvGeometry:
        """The convolution's geometry."""
        return self.layer.coord_geometry

    @property
    def num_taps(self) -> int:
        """Multiplications an output value takes in the branch: channels times kernel pixels."""
        weight = self.layer.coord_weight
        return weight.numel() // self.geometry.out_channels

    @property
    def num_images(self) -> int | None:
        """The same in the separable form, for the largest call; ``None`` if there is none."""
        strips = [self.banded_strip(call) for call in self.calls]
        widths = [strip.width for strip in strips if strip is not None]
        return max(widths) if widths and len(widths) == len(strips) else None

    @property
    def is_zero(self) -> bool:
        """Whether the coordinates of every call are zero."""
        return not any(grid_of(self.layer, call).any() for call in self.calls)

    @property
    def map_bytes(self) -> int:
        """Bytes of the stored maps of all calls."""
        weight = self.layer.coord_weight
        pixels = sum(torch.Size(call.output_size).numel() for call in self.calls)
        return self.geometry.out_channels * pixels * weight.element_size()

    def channels(self, call: Call) -> CoordConstant:
        """The coordinate channels of one call, padded where the layer pads by itself."""
        return self._images.grid(self.layer, call)

    @torch.no_grad()
    def map(self, call: Call) -> Tensor:
        """The coordinate map of one call, shape (1, C_out, *output_size)."""
        return map_of(self.layer, call)

    def basis(self, call: Call) -> SeparableBasis | None:
        """The images that the branch's maps are made of in one call."""
        return self._images.basis(self.layer, call)

    def flat_strip(self, call: Call) -> Strip | None:
        """These images side by side; ``None`` if there are none."""
        basis = self.basis(call)
        return None if basis is None else self._images.flat_strip(basis)

    def banded_strip(self, call: Call) -> Strip | None:
        """These images as the separable form lays them out; ``None`` if there are none."""
        basis = self.basis(call)
        return None if basis is None else self._images.banded_strip(basis)

    def stored(self, strip: Strip) -> CoordConstant:
        """A strip as the graph holds it."""
        return self._images.stored_strip(strip, self.layer.coord_weight.dtype)

    def kernel(self, call: Call, strip: Strip) -> CoordKernel:
        """V, as the kernel that adds up the images of a strip in one call."""
        basis = self.basis(call)
        assert basis is not None
        weight = self._weight_by_output
        coefficients = self._images.coefficients(basis, strip, weight.dtype)
        tensor = strip.kernel(basis.weight(weight)).to(weight.dtype)
        return CoordKernel(tensor, weight, coefficients, basis.rank)

    @functools.cached_property
    def _weight_by_output(self) -> Tensor:
        """The coordinate weight, shape (C_out, T)."""
        weight = self.layer.coord_weight.detach()
        return (weight.transpose(0, 1) if self.geometry.transposed else weight).flatten(1)


def lowering_sites(model: nn.Module, example_inputs: Any) -> list[LoweringSite]:
    """The coordinate layers that a model calls on its example inputs."""
    layers = coord_layers(model)
    calls = record_run(model, example_inputs, layers).calls
    images = ImageCache()
    return [
        LoweringSite(name, layer, tuple(dict.fromkeys(calls[name])), images)
        for name, layer in layers.items()
        if name in calls
    ]
