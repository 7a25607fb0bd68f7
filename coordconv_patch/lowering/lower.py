"""Lower the coordinate branches of a model: give each the form that it takes in the graph.

The pass works on a copy that is made for export: it replaces each layer's forward on the
instance, so that parameter names, and with them initializer names, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coordconv_patch.errors import ExportError
from coordconv_patch.layers.replaced_forward import put_forward
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.lowering import Lowering, Stored, StoredCalls
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite, lowering_sites
from coordconv_patch.lowering.unknown_zero import UnknownZero
from coordconv_patch.lowering.unstored import Zero

__all__ = ["Lowered", "lower_"]


@dataclass(frozen=True)
class Lowered:
    """What a lowering did.

    Attributes:
        lowerings: The form that each site that is called got, by site name; ``"none"``
            where coordinates are zero.
        constants: The coordinate constants that the graph will hold, each once.
        kernels: The kernels that add up strips among them.
    """

    lowerings: dict[str, str]
    constants: tuple[CoordConstant, ...]
    kernels: tuple[CoordKernel, ...]


def lower_(
    model: nn.Module,
    example_inputs: Any,
    choose: Callable[[LoweringSite], str],
    zero: UnknownZero | None = None,
) -> Lowered:
    """Replace the branch of every coordinate layer by its lowered form, in place.

    The model can run afterwards at the sizes of the example only, except where the
    lowering does not fix them; meant for a copy that is about to be exported.

    Args:
        model: A patched model, in the mode in which it will be exported.
        example_inputs: As for :func:`coordconv_patch.plan`; they fix the sizes.
        choose: Gives the name of each site's lowering, see :data:`.registry.LOWERINGS`.
        zero: For an export whose batch is fixed, see :mod:`.unknown_zero`.

    Layers that are not called on the example inputs stay as they are.

    Raises:
        ExportError: If a layer cannot take the form that was chosen for it.
        PatchError: If the model fails on the example inputs.
    """
    lowerings: dict[str, str] = {}
    constants: dict[int, CoordConstant] = {}
    kernels: list[CoordKernel] = []
    for site in lowering_sites(model, example_inputs):
        lowering = LOWERINGS[choose(site)]
        if lowering.fixes_size and site.is_zero:
            lowering = Zero()
        lowerings[site.name] = lowering.name
        stored = _stored(lowering, site, zero)
        for index, part in enumerate(stored.parts):
            tensor = part.constant.tensor
            constants[id(tensor)] = part.constant
            site.layer.register_buffer(f"coord_constant_{index}", tensor, persistent=False)
            if part.kernel is not None:
                kernels.append(part.kernel)
                name = f"coord_weight_{index}"
                site.layer.register_buffer(name, part.kernel.tensor, persistent=False)
        forward = lowering.forward(site, stored)
        if forward is not None:
            put_forward(site.layer, forward)
    return Lowered(lowerings, tuple(constants.values()), tuple(kernels))


@torch.no_grad()
def _stored(lowering: Lowering, site: LoweringSite, zero: UnknownZero | None) -> StoredCalls:
    obstacle = lowering.obstacle(site)
    if obstacle:
        raise ExportError(f"{site.name} {obstacle}")
    constants = {call: lowering.constant(site, call) for call in site.calls}
    parts = [
        Stored(call, constant, lowering.kernel(site, call), zero)
        for call, constant in constants.items()
        if constant is not None
    ]
    return StoredCalls(site.name, tuple(parts))
