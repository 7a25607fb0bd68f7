"""Take the coordinates away again: modules get their class back, graphs lose the branches."""

from __future__ import annotations

from typing import overload

from torch import fx, nn
from torch.export import ExportedProgram

from coordconv_patch.arguments import check_flag
from coordconv_patch.errors import PatchError
from coordconv_patch.folding.other_libraries import release_folding_
from coordconv_patch.followers.follower import release_
from coordconv_patch.graphs.programs import from_exported, require_coord_layers
from coordconv_patch.layers.call_hooks import (
    branches_without_hook,
    chosen_calls_of,
    remove_from_calls_,
)
from coordconv_patch.layers.conversion import revert_
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.left_behind.watch import (
    check_left_behind,
    dismiss_,
    is_watched,
    release_watches_,
)
from coordconv_patch.owners.call_owners import CallOwner, remove_from_owner_
from coordconv_patch.patching.graph_edit import remove_branches_
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.running.rollback import unchanged_on_failure
from coordconv_patch.running.untouched import LOOK, Model, copied
from coordconv_patch.running.wrappers import check_not_wrapped

__all__ = ["unpatch", "unpatch_"]


@overload
def unpatch(model: Model, *, discard: bool = False) -> Model: ...


@overload
def unpatch(model: ExportedProgram, *, discard: bool = False) -> fx.GraphModule: ...


def unpatch(model: nn.Module | ExportedProgram, *, discard: bool = False) -> nn.Module:
    """A copy of the model without coordinates; see :func:`unpatch_`.

    An ExportedProgram gives a GraphModule, see :func:`coordconv_patch.from_exported`.
    """
    if isinstance(model, ExportedProgram):
        return unpatch_(from_exported(model), discard=discard)
    with LOOK:
        _check_unpatchable(model, discard)
        return unpatch_(copied(model), discard=discard)


def unpatch_(model: Model, *, discard: bool = False) -> Model:
    """Take the coordinates away again, in place.

    Modules get back the class that they had, graphs lose the branches.

    Args:
        model: A patched model.
        discard: Drop coordinate weights that are not zero; the outputs then change.

    Returns:
        The model itself.

    Raises:
        PatchError: If the model is not patched, or coordinate weights are not zero, or were
            left behind by other code, and ``discard`` is false.
    """
    with LOOK:
        _check_unpatchable(model, discard)
        with unchanged_on_failure(model):
            _unpatch_(model)
    return model


def _unpatch_(model: nn.Module) -> None:
    release_folding_(model)
    release_(model)
    release_watches_(model)
    dismiss_(model)
    for module in list(model.modules()):
        _revert_(model, module)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            remove_branches_(module)


def _check_unpatchable(model: nn.Module, discard: bool) -> None:
    check_flag("discard", discard)
    check_is_module(model)
    check_not_wrapped(model)
    if not discard:
        check_left_behind(model)
    layers = coord_layers(model) if is_watched(model) else require_coord_layers(model)
    computed = [name for name, layer in layers.items() if "coord_weight" not in layer._parameters]
    if computed:
        raise PatchError(
            f"the coordinate weight of {computed[0]} is parametrized or pruned: first "
            "torch.nn.utils.parametrize.remove_parametrizations(conv, 'coord_weight') or "
            "torch.nn.utils.prune.remove(conv, 'coord_weight')"
        )
    if discard:
        return
    trained = [
        name
        for name, layer in layers.items()
        if layer.coord_weight.is_meta or bool(layer.coord_weight.detach().any())
    ]
    if trained:
        raise PatchError(
            f"coordinate weights are not zero at {', '.join(trained[:5])}"
            f"{' and others' if len(trained) > 5 else ''}: without them the outputs change. Save "
            "them with save_coords(...), and pass discard=True to drop them"
        )


def _revert_(model: nn.Module, module: nn.Module) -> None:
    if isinstance(module, CoordConvNd):
        revert_(module)
    elif chosen_calls_of(module) is not None or branches_without_hook(module):
        remove_from_calls_(model, module)
    elif isinstance(module, CallOwner):
        remove_from_owner_(module)
