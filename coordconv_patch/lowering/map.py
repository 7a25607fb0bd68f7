"""The lowering ``"map"``: conv(x, W) + m, where m = conv(c, W_c) is a constant."""

from __future__ import annotations

from torch import Tensor

from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.geometry import Call
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.lowering import Stored
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.lowering.sums import Sum

__all__ = ["Map"]


class Map(Sum):
    """The map of each call; a file can hold it as a strip and its kernel, if it has a basis."""

    name = "map"

    def constant(self, site: LoweringSite, call: Call) -> CoordConstant:
        # Convolved when a file is loaded, so what counts is the size of the kernel.
        strip = site.flat_strip(call)
        if strip is None:
            return CoordConstant(site.map(call))
        return CoordConstant(site.map(call), map_of=(site.stored(strip), site.kernel(call, strip)))

    def branch(self, layer: CoordLayer, stored: Stored, input: Tensor) -> Tensor:
        return stored.constant.tensor
