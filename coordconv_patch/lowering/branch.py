"""The lowering ``"branch"``: conv(x, W) + conv(c * 1_N, W_c), c constant, expanded to the batch."""

from __future__ import annotations

from torch import Tensor

from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.geometry import Call
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.layer_call import convolve_padded
from coordconv_patch.lowering.lowering import Stored
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.lowering.sums import Sum

__all__ = ["Branch"]


class Branch(Sum):
    """A convolution of its own for the coordinate channels."""

    name = "branch"
    expands_to_batch = True

    def constant(self, site: LoweringSite, call: Call) -> CoordConstant:
        return site.channels(call)

    def branch(self, layer: CoordLayer, stored: Stored, input: Tensor) -> Tensor:
        return convolve_padded(layer, stored.call, stored.expanded(input))
