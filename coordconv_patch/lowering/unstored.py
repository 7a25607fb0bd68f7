"""The lowerings that store nothing: coordinates that are computed at run time, or zero."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import Call
from coordconv_patch.lowering.lowering import Lowering, StoredCalls
from coordconv_patch.lowering.site import LoweringSite

__all__ = ["Computed", "Zero"]


class Computed(Lowering):
    """``conv(x, W) + conv(c(x), W_c)``, c from x's size at run time: the layer as it is."""

    name = "computed"
    fixes_size = False

    def constant(self, site: LoweringSite, call: Call) -> None:
        return None

    def forward(self, site: LoweringSite, stored: StoredCalls) -> None:
        return None


class Zero(Lowering):
    """``conv(x, W)``: where coordinates are zero, as the paper's are on inputs of 1 x 1 pixels.

    The pass takes it by itself; it cannot be asked for.
    """

    name = "none"

    def constant(self, site: LoweringSite, call: Call) -> None:
        return None

    def forward(self, site: LoweringSite, stored: StoredCalls) -> Callable[..., Tensor]:
        layer = site.layer
        if isinstance(layer, CoordConvNd):
            return functools.partial(layer._plain_class.forward, layer)
        return _zero


def _zero(input: Tensor) -> Tensor:
    return input.new_zeros(())
