"""What has become of coordinates where layers are gone, doubled or scaled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.weight_marks import rows_of
from coordconv_patch.left_behind.heir_modules import Heir, inheritance_of
from coordconv_patch.left_behind.heirs import holds_part_of, is_published_form
from coordconv_patch.left_behind.inventory import Inventory
from coordconv_patch.left_behind.last_weights import (
    is_coord_layer,
    is_trained,
    kernel_of,
    layout_of,
    mark_of,
    weight_of,
)
from coordconv_patch.left_behind.messages import on_heirs, on_parts, on_scales, on_silent_scales

__all__ = ["check_gone", "check_scales", "doubles_of"]


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


def check_scales(
    inventory: Inventory, module: nn.Module, *, norm_gone: bool, can_wait: bool
) -> None:
    """Check that no weights were scaled without their trained coordinate weights.

    Args:
        inventory: What the module had.
        module: The module now.
        norm_gone: Whether a batch norm is gone, which may have been folded in.
        can_wait: Whether values on other devices may be waited for.

    Raises:
        PatchError: If they were, surely; of what may be meant it warns.
    """
    surely: dict[str, str] = {}
    perhaps: dict[str, str] = {}
    for name, layer in inventory.layers.items():
        mark = layer.__dict__.get("weight_mark")
        if mark is None or not isinstance(layer, CoordLayer):
            continue
        weight = weight_of(module, name, layer)
        if weight is None or not (weight.is_cpu or can_wait):
            continue
        if not is_trained(layer._parameters.get("coord_weight")):
            continue
        now = mark_of(layer, weight)
        transposed, groups = layout_of(layer)
        rows = rows_of(weight, transposed=transposed, groups=groups)
        scaling = None if now is None else mark.scaling_until(now, rows)
        if scaling is None:
            continue
        if norm_gone or scaling.new_bias:
            surely[name] = f"{scaling.least:.3g} to {scaling.largest:.3g}"
        elif scaling.silent:
            perhaps[name] = f"{scaling.least:.3g} to {scaling.largest:.3g}"
    if surely:
        raise PatchError(on_scales(inventory.sites(surely)))
    if perhaps:
        warnings.warn(on_silent_scales(inventory.sites(perhaps)), stacklevel=2)
