"""What has become of coordinates where layers are gone or doubled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import join_names
from coordconv_patch.layers.call_hooks import branches_without_hook
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.left_behind.heir_modules import Heir, inheritance_of
from coordconv_patch.left_behind.heirs import holds_part_of, is_published_form
from coordconv_patch.left_behind.inventory import Inventory
from coordconv_patch.left_behind.last_weights import (
    is_coord_layer,
    is_trained,
    kernel_of,
)
from coordconv_patch.left_behind.messages import on_heirs, on_lost_hooks, on_parts

__all__ = ["check_gone", "check_hooks", "doubles_of"]


def check_gone(inventory: Inventory, module: nn.Module, gone: Mapping[str, nn.Module]) -> None:
    """Check that the trained coordinates of layers which are gone were not left behind.

    Args:
        inventory: What the module had.
        module: The module now.
        gone: The layers that are not in it any more.

    Raises:
        PatchError: If they were, surely; of what may be meant it warns.
    """
    last = inventory.last_weights_of(gone)
    lost = [
        name
        for name, (_, coords) in last.items()
        if coords is not None and is_coord_layer(gone[name]) and is_trained(coords)
    ]
    if not lost:
        return
    kernels = {name: kernel_of(gone[name], *weights) for name, weights in last.items()}
    heirs = list(inventory.heirs_in(module))
    surely: dict[str, str] = {}
    perhaps: dict[str, str] = {}
    for name in lost:
        for heir in heirs:
            if heir.hides(gone[name]):
                continue
            kernel = heir.kernel_like(gone[name], *last[name])
            if kernel is None:
                continue
            whole, carried = inheritance_of(heir, kernel, name, kernels)
            if whole:
                if not carried:
                    surely[name] = str(heir)
                break
            if is_published_form(kernel.rows, kernels[name]):
                break
            if holds_part_of(kernel.rows, kernels[name].rows):
                perhaps[name] = str(heir)
    if surely:
        raise PatchError(on_heirs(inventory.sites(surely)))
    if perhaps:
        warnings.warn(on_parts(inventory.sites(perhaps)), stacklevel=2)


def check_hooks(module: nn.Module, prefix: str = "") -> None:
    """Check that every branch of chosen calls still has the hook which adds it to them.

    Args:
        module: The module now.
        prefix: Its qualified name, for messages.

    Raises:
        PatchError: If a hook was taken away, and its branch was trained.
    """
    lost = [
        join_names(prefix, name)
        for name, inner in module.named_modules()
        for branch in branches_without_hook(inner)
        if is_coord_layer(branch) and is_trained(branch._parameters.get("coord_weight"))
    ]
    if lost:
        raise PatchError(on_lost_hooks(lost))


def doubles_of(inventory: Inventory, module: nn.Module, present: set[nn.Module]) -> dict[str, Heir]:
    """New modules with the weight of layers that are still there, and may not run any more."""
    heirs = [heir for heir in inventory.heirs_in(module) if heir.before is None]
    if not heirs:
        return {}
    last = inventory.last_weights_of(
        {name: layer for name, layer in inventory.layers.items() if layer in present}
    )
    kernels = {name: kernel_of(inventory.layers[name], *last[name]) for name in last}
    doubles: dict[str, Heir] = {}
    for name, (weight, coords) in last.items():
        layer = inventory.layers[name]
        if not isinstance(layer, CoordConvNd) or not weight.is_cpu or not is_trained(coords):
            continue
        for heir in heirs:
            # A wrapper holds the layer, or shares its Parameter.
            if heir.tensor is weight or heir.hides(layer) or layer in heir.module.modules():
                continue
            kernel = heir.kernel_like(layer, weight, coords)
            if kernel is None:
                continue
            whole, carried = inheritance_of(heir, kernel, name, kernels)
            if whole and not carried:
                doubles[name] = heir
                break
    return doubles
