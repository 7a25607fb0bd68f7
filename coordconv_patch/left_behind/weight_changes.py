"""What has become of coordinates where the weight beside them has changed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.norms import is_batch_norm
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.weight_marks import WeightMark, rows_of
from coordconv_patch.left_behind.inventory import Inventory
from coordconv_patch.left_behind.last_weights import is_trained, layout_of, mark_of, weight_of
from coordconv_patch.left_behind.messages import (
    on_merges,
    on_scales,
    on_silent_scales,
    on_unknown_changes,
    on_unknown_scales,
)

__all__ = ["check_changes"]

_Message: TypeAlias = Callable[[Mapping[str, str]], str]
_ERRORS = (on_scales, on_merges)


def check_changes(
    inventory: Inventory, module: nn.Module, *, norm_gone: bool, can_wait: bool
) -> None:
    """Check that no weights were scaled or summed without their trained coordinate weights.

    Args:
        inventory: What the module had.
        module: The module now.
        norm_gone: Whether a batch norm is gone, which may have been folded in.
        can_wait: Whether values on other devices may be waited for.

    Raises:
        PatchError: If they were, surely; of what may be meant it warns.
    """
    fewer_norms = norm_gone and _has_fewer_norms(inventory, module)
    found: dict[_Message, dict[str, str]] = {}
    for name, layer in inventory.layers.items():
        if not isinstance(layer, CoordLayer) or "weight_mark" not in layer.__dict__:
            continue
        weight = weight_of(module, name, layer)
        if weight is None or not (weight.is_cpu or can_wait):
            continue
        if not is_trained(layer._parameters.get("coord_weight")):
            continue
        known = inventory.weights.get(name)
        replaced = known is not None and known is not weight
        message, what = _judged(
            layer, weight, norm_gone=norm_gone, fewer_norms=fewer_norms, replaced=replaced
        )
        if message is not None:
            found.setdefault(message, {})[name] = what
    _tell(inventory, found)


def _judged(
    layer: CoordLayer, weight: Tensor, *, norm_gone: bool, fewer_norms: bool, replaced: bool
) -> tuple[_Message | None, str]:
    """What is to be said of a layer's weight, and what of it in particular."""
    mark: WeightMark | None = layer.__dict__["weight_mark"]
    now = mark_of(layer, weight)
    if mark is None or now is None or mark.weight.shape != now.weight.shape:
        return None, ""
    if replaced:  # autograd was told nothing, whatever the other one counts
        now = dataclasses.replace(now, version=mark.version)
    # A training moves the coordinates: whether they were scaled too, after it, nobody knows.
    is_known = not ((layer.training or mark.is_outdated) and mark.shows_trained_coords(now))
    transposed, groups = layout_of(layer)
    scaling = mark.scaling_until(now, rows_of(weight, transposed=transposed, groups=groups))
    if scaling is None:
        return _on_other_change(mark, now, is_known=is_known) if fewer_norms else None, ""
    if scaling.is_followed:
        return None, ""
    factors = f"{scaling.least:.3g} to {scaling.largest:.3g}"
    return _on_scaling(mark, now, norm_gone=norm_gone, is_known=is_known), factors


def _has_fewer_norms(inventory: Inventory, module: nn.Module) -> bool:
    """Whether batch norms are gone, and no others are in their places."""
    return sum(map(is_batch_norm, inventory.layers.values())) > sum(
        map(is_batch_norm, module.modules())
    )


def _on_scaling(
    mark: WeightMark, now: WeightMark, *, norm_gone: bool, is_known: bool
) -> _Message | None:
    """What is to be said of a scale of output channels that the coordinates do not follow."""
    if norm_gone or mark.shows_new_bias(now):
        return on_scales if is_known else on_unknown_changes
    if mark.version != now.version:
        return None
    # Coordinates that were set since may have been scaled alike (vector_to_parameters).
    return on_silent_scales if mark.has_same_coords(now) else on_unknown_scales


def _on_other_change(mark: WeightMark, now: WeightMark, *, is_known: bool) -> _Message | None:
    """What is to be said of a change of the weight where a batch norm is gone.

    Branches that are merged into the convolution that stays bring it a bias; one that had a bias
    is only suspect where autograd was told nothing.
    """
    new_bias = mark.shows_new_bias(now)
    if mark.has_same_weight(now) or not (new_bias or mark.version == now.version):
        return None
    if mark.has_same_coords(now):
        return on_merges if new_bias else on_unknown_changes
    return None if is_known or not new_bias else on_unknown_changes


def _tell(inventory: Inventory, found: Mapping[_Message, Mapping[str, str]]) -> None:
    for error in _ERRORS:
        if error in found:
            raise PatchError(error(inventory.sites(found[error])))
    for message, layers in found.items():
        warnings.warn(message(inventory.sites(layers)), stacklevel=3)
