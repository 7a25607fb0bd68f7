"""All lowerings, by name: what the export, its autotuning, the benchmark and the command line read.

With x the input, c the coordinates of its size, W and W_c the weights::

    channels    conv([x ; c], [W ; W_c])         c constant; the published CoordConv
    map         conv(x, W) + m                   m = conv(c, W_c) constant
    branch      conv(x, W) + conv(c * 1_N, W_c)  c constant, expanded to the batch
    separable   conv(x, W) + conv(s * 1_N, V)    s constant, see :mod:`.separable`
    computed    conv(x, W) + conv(c(x), W_c)     c from x's size at run time

All are the same sum; they differ in what a runtime can fuse.
"""

from __future__ import annotations

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.lowering.branch import Branch
from coordconv_patch.lowering.channels import Channels
from coordconv_patch.lowering.lowering import Lowering
from coordconv_patch.lowering.map import Map
from coordconv_patch.lowering.separable import Separable
from coordconv_patch.lowering.unstored import Computed, Zero

__all__ = ["LOWERINGS", "register_lowering"]

LOWERINGS: dict[str, Lowering] = {
    lowering.name: lowering for lowering in (Channels(), Map(), Branch(), Separable(), Computed())
}

_TAKEN = frozenset({*LOWERINGS, Zero.name, "auto", "autotune", "plain"})
"""The package's own lowerings, and other words of its reports."""


def register_lowering(lowering: Lowering) -> None:
    """Let ``lowering=`` take one more form, under its own name.

    ``"autotune"`` and the benchmark try it too; ``"auto"`` does not. A second one of a name takes
    the place of the first.

    Args:
        lowering: An instance of a subclass of :class:`.lowering.Lowering`, or of
            :class:`.sums.Sum`.

    Raises:
        ArgumentError: If it is not one, or its name is not an identifier, or taken.

    Example::

        class HalfMap(Sum):
            name = "half_map"

            def constant(self, site, call):
                return CoordConstant(site.map(call).half())

            def branch(self, layer, stored, input):
                return stored.constant.tensor.to(input.dtype)

        register_lowering(HalfMap())
        export_onnx(model, "model.onnx", images, lowering="half_map", tolerance=1e-2)
    """
    if not isinstance(lowering, Lowering):
        raise ArgumentError(
            f"lowering={excerpt(lowering)}: write an instance of a subclass of Lowering"
        )
    name = getattr(lowering, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
        raise ArgumentError(
            f"the lowering's name={excerpt(name)}: write an identifier other than "
            f"{', '.join(map(repr, sorted(_TAKEN)))}"
        )
    LOWERINGS[name] = lowering
