"""The lowering ``"separable"``: conv(x, W) + conv(s * 1_N, V), s a constant strip of images.

See :mod:`.basis` for the images and V, and :mod:`.strips` for the strip.
"""

from __future__ import annotations

from torch import Tensor

from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.geometry import Call
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.lowering import Stored
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.lowering.strips import Strip
from coordconv_patch.lowering.sums import Sum

__all__ = ["Separable"]


class Separable(Sum):
    """The branch with the fewest multiplications, where coordinates depend on one axis each."""

    name = "separable"
    expands_to_batch = True

    def obstacle(self, site: LoweringSite) -> str:
        if site.num_images is not None:
            return ""
        return (
            f"has no {self.name!r} form, because its coordinates ({site.layer.coords}) do not "
            "each depend on one axis alone: choose 'branch'"
        )

    def constant(self, site: LoweringSite, call: Call) -> CoordConstant:
        return site.stored(_strip(site, call))

    def kernel(self, site: LoweringSite, call: Call) -> CoordKernel:
        return site.kernel(call, _strip(site, call))

    def branch(self, layer: CoordLayer, stored: Stored, input: Tensor) -> Tensor:
        strip, kernel = stored.constant.strip, stored.kernel
        assert strip is not None
        assert kernel is not None
        return strip.add_up(kernel.tensor, stored.expanded(input))


def _strip(site: LoweringSite, call: Call) -> Strip:
    strip = site.banded_strip(call)
    assert strip is not None  # there is no obstacle
    return strip
