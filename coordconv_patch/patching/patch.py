"""Patch and unpatch: the plan carried out.

A module site is rewritten by giving the convolution module its coordinate class
in place, in the module tree that every graph refers to; the model keeps its
class, methods, hooks, aliases, flags and state_dict names. So does a module that calls a
convolution function itself: see :mod:`coordconv_patch.owners.call_owners`. Only in a GraphModule,
which has no other code, is the graph rewritten: conv(x, W) becomes conv(x, W) + branch(x).

Everything that can fail is done before the first change.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Iterable
from typing import Any, cast

from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.arguments import check_flag
from coordconv_patch.errors import PatchError, listing
from coordconv_patch.folding.other_libraries import guard_folding_, release_folding_
from coordconv_patch.graphs.functional import (
    branch_of,
    conv_arguments,
    function_input,
    function_nodes,
)
from coordconv_patch.graphs.programs import from_exported, why_not_patched
from coordconv_patch.layers.branch import BRANCH_NAME, ChosenCalls, CoordBranch
from coordconv_patch.layers.call_hooks import add_to_calls_, chosen_calls_of, remove_from_calls_
from coordconv_patch.layers.conversion import check_not_wrapped, convert_, revert_
from coordconv_patch.layers.coordconv import CoordConvNd, coord_layers
from coordconv_patch.layers.coordinates import Coordinates, Window
from coordconv_patch.left_behind.watch import (
    check_left_behind,
    dismiss_,
    is_watched,
    release_watches_,
    watch_,
)
from coordconv_patch.owners.call_owners import CallOwner, add_to_owner_, remove_from_owner_
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.patching.plan import Plan, PlanRow, plan
from coordconv_patch.patching.same_outputs import Promise
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.running.rollback import ModuleStates, unchanged_on_failure
from coordconv_patch.running.untouched import LOOK, copied
from coordconv_patch.sites.select import Where
from coordconv_patch.sites.site import GraphFunctionSite, OwnedFunctionSite

__all__ = ["apply_plan_", "patch", "patch_", "set_window_", "unpatch", "unpatch_"]


def patch(
    model: nn.Module | ExportedProgram,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    check: bool = True,
) -> nn.Module:
    """A copy of the model whose chosen convolutions also see coordinates.

    The coordinate weights start at zero, so the copy's outputs equal the
    model's to the last bit, in training and in evaluation mode. The model itself
    is not changed.

    Args:
        model: Any module (the copy has its class), a GraphModule, or a torch.export
            ExportedProgram (gives a GraphModule, see :func:`coordconv_patch.from_exported`).
        where: Which convolutions: ``"first"``, ``"all"``, a name, a glob, ``"re:..."``,
            a type, a callable on a :class:`Site`, ``"stem"``, ``"neck"``, ``"head"``,
            chosen calls of a shared one (``"head.conv@0,3"``), or a list of these.
        coords: The convention of the coordinate channels, or the name of a preset;
            ``None``: the paper's.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). Needed for ``"first"`` on models that torch.fx cannot
            trace, and for convolution functions whose weight the code computes.
        check: With example inputs, compare the outputs of the copy with the model's bit for
            bit, in evaluation and in training mode: two forward passes of each. A mode in which
            the model itself fails on them is left out.

    Returns:
        The patched copy.

    Warns:
        UserWarning: Of convolutions that a selector describes and that cannot be patched, and
            of chosen ones that the example inputs do not reach, or in one mode only.

    Raises:
        SelectionError: If a selector matches nothing that can be patched.
        PatchError: If the model cannot be copied, or a chosen site cannot be patched, or if
            the copy's outputs differ.
    """
    module = from_exported(model) if isinstance(model, ExportedProgram) else model
    with LOOK:
        decided = plan(module, where, coords=coords, example_inputs=example_inputs)
        _warn_of_obstacles(decided)
        target = module if module is not model else copied(module)
        return _patch_and_check_(module, target, decided, example_inputs if check else None)


def patch_(
    model: nn.Module,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    check: bool = True,
) -> nn.Module:
    """Patch a model in place; see :func:`patch` for the arguments and errors.

    An optimizer that was built before does not know the coordinate weights; see
    :func:`coordconv_patch.add_to_optimizer_`.

    Returns:
        The model itself.

    Raises:
        PatchError: As :func:`patch`; also for an ExportedProgram, which needs :func:`patch`.
    """
    if isinstance(model, ExportedProgram):
        raise PatchError("an ExportedProgram cannot be patched in place: use patch(...)")
    with LOOK:
        decided = plan(model, where, coords=coords, example_inputs=example_inputs)
        _warn_of_obstacles(decided)
        return _patch_and_check_(model, model, decided, example_inputs if check else None)


def _patch_and_check_(
    model: nn.Module, target: nn.Module, decided: Plan, example_inputs: Any
) -> nn.Module:
    """Carry a plan out on a model or its copy; with example inputs, if outputs stay the same."""
    promise = None if example_inputs is None else Promise(model, target, example_inputs)
    before = None if promise is None else ModuleStates(target)
    apply_plan_(target, decided)
    broken = None if promise is None else promise.broken()
    if promise is not None and before is not None and broken is not None:
        before.restore()
        promise.explain(broken)
        warnings.warn(
            "the model gives other outputs each time that it is run on the example inputs, so they "
            "could not be compared before and after patching",
            stacklevel=3,
        )
        apply_plan_(target, decided)
    _warn_of_unreached(decided, promise)
    return target


def unpatch(model: nn.Module | ExportedProgram, *, discard: bool = False) -> nn.Module:
    """A copy of the model without coordinates; see :func:`unpatch_`.

    An ExportedProgram gives a GraphModule, see :func:`coordconv_patch.from_exported`.
    """
    if isinstance(model, ExportedProgram):
        return unpatch_(from_exported(model), discard=discard)
    with LOOK:
        _check_unpatchable(model, discard)
        return unpatch_(copied(model), discard=discard)


def unpatch_(model: nn.Module, *, discard: bool = False) -> nn.Module:
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
        release_folding_(model)
        release_watches_(model)
        dismiss_(model)
        for module in list(model.modules()):
            _revert_(model, module)
        for module in model.modules():
            if isinstance(module, fx.GraphModule):
                _remove_branches(module)
    return model


def set_window_(model: nn.Module, window: Window | None) -> nn.Module:
    """Tell every coordinate layer where in a larger image its input lies, in place.

    For inference on tiles: each tile then gets the coordinates that it has in the
    whole image.

    Args:
        model: A patched model.
        window: The tile's place; ``None``: the input is the whole image again.

    Returns:
        The model itself.

    Raises:
        PatchError: If the model is not patched.
        CoordinatesError: If a layer's convention knows no windows.
    """
    layers = coord_layers(model)
    if not layers:
        raise PatchError(why_not_patched(model))
    changed = {
        name: dataclasses.replace(layer.coords, window=window) for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.coords = changed[name]
    return model


def apply_plan_(model: nn.Module, decided: Plan) -> nn.Module:
    """Carry a plan out on a model, in place; on the model that was planned, or on a copy of it.

    Returns:
        The model itself.

    Raises:
        PatchError: If a chosen site cannot be patched. The model is unchanged then.
    """
    check_not_wrapped(model)
    chosen = [row for row in decided.rows if row.chosen]
    in_graphs = [row for row in chosen if isinstance(row.site, GraphFunctionSite)]
    edits = [
        _GraphEdit(model, name, rows, decided.coords) for name, rows in _by_graph(in_graphs).items()
    ]
    with unchanged_on_failure(model):
        for row in chosen:
            if not isinstance(row.site, GraphFunctionSite):
                _patch_module_(model, row, decided.coords)
        for edit in edits:
            edit.commit()
        guard_folding_(model)
        watch_(model)
    return model


def _patch_module_(model: nn.Module, row: PlanRow, coords: Coordinates) -> None:
    """Patch one site that is not in a graph."""
    site, chosen_calls = row.site, row.choice.chosen_calls
    if isinstance(site, OwnedFunctionSite):
        assert site.geometry is not None
        assert site.weight is not None
        owned = site.owned if chosen_calls is None else _narrowed(site.owned, chosen_calls)
        add_to_owner_(model, site.name, owned, site.geometry, coords, site.weight, chosen_calls)
    elif chosen_calls is None:
        convert_(cast(_ConvNd, model.get_submodule(site.name)), coords, site.padding)
    else:
        add_to_calls_(model, site.name, chosen_calls, coords, site.padding)


def _narrowed(owned: OwnedCalls, chosen: ChosenCalls) -> OwnedCalls:
    """Some of a functional site's calls alone; calls that a file names are those already."""
    if owned.indices is not None and len(owned.indices) != chosen.total:
        return owned
    positions = owned.indices or tuple(range(chosen.total))
    indices = tuple(positions[index] for index in chosen.indices)
    return dataclasses.replace(owned, indices=indices, total=owned.total or chosen.total)


def _revert_(model: nn.Module, module: nn.Module) -> None:
    if isinstance(module, CoordConvNd):
        revert_(module)
    elif chosen_calls_of(module) is not None:
        remove_from_calls_(model, module)
    elif isinstance(module, CallOwner):
        remove_from_owner_(module)


def _warn_of_obstacles(decided: Plan) -> None:
    skipped = [row.site for row in decided.rows if row.choice.skipped]
    if skipped:
        shown = "; ".join(f"{site.name or 'the model'}: {site.obstacle}" for site in skipped[:3])
        more = f"; and {len(skipped) - 3} more, see plan(...)" if len(skipped) > 3 else ""
        warnings.warn(
            f"convolutions without coordinates, because they cannot carry them: {shown}{more}",
            stacklevel=3,
        )


def _warn_of_unreached(decided: Plan, promise: Promise | None) -> None:
    """Warn of coordinates that the example inputs never reach, or in one mode only."""
    if promise is not None:
        reached = promise.reached
    else:
        known = [row.site for row in decided.rows if row.site.calls is not None]
        if not known:
            return
        reached = {"evaluation": frozenset(site.name for site in known if site.calls)}
    names = [site.name for site in decided.chosen]
    everywhere = {name for name in names if all(name in run for run in reached.values())}
    nowhere = [name for name in names if not any(name in run for run in reached.values())]
    texts = []
    if nowhere:
        texts.append(f"never run on the example inputs: {listing(nowhere)}")
    for mode, run in reached.items():
        only = [name for name in names if name in run and name not in everywhere]
        if only:
            other = "evaluation" if mode == "training" else "training"
            texts.append(
                f"run in {mode} only, so that {other} knows nothing of their coordinates: "
                f"{listing(only)}"
            )
    if texts:
        warnings.warn(f"chosen convolutions {'; '.join(texts)}", stacklevel=4)


def _by_graph(rows: Iterable[PlanRow]) -> dict[str, list[PlanRow]]:
    """Sites in graphs, by the qualified name of the GraphModule whose graph is to be edited."""
    graphs: dict[str, list[PlanRow]] = {}
    for row in rows:
        assert row.site.region is not None
        graphs.setdefault(row.site.region.name, []).append(row)
    return graphs


class _GraphEdit:
    """Branches added to the functional convolutions of a GraphModule; prepared, then committed."""

    def __init__(
        self, model: nn.Module, owner: str, rows: list[PlanRow], coords: Coordinates
    ) -> None:
        self.owner = owner
        self.target = cast(fx.GraphModule, model.get_submodule(owner))
        self.added: dict[str, nn.Module] = {}
        self.graph = copy.deepcopy(self.target.graph)
        nodes_by_site = function_nodes(owner, self.target, self.graph)
        for row in rows:
            name = row.site.name
            if name not in nodes_by_site:
                raise PatchError(f"{name}: not found when {owner or 'the model'} is traced")
            self._add_branch(row, nodes_by_site[name], coords)
        self.graph.lint()

    def _add_branch(self, row: PlanRow, nodes: list[fx.Node], coords: Coordinates) -> None:
        site = row.site
        assert site.geometry is not None
        holder = site.name[len(self.owner) :].lstrip(".")
        name = BRANCH_NAME
        if holder:
            is_module = holder in dict(self.target.named_modules())
            name = f"{holder}.{BRANCH_NAME}" if is_module else f"{holder}_{BRANCH_NAME}"
        weight = conv_arguments(nodes[0])["weight"]
        if weight.op == "get_attr":
            tensor = operator.attrgetter(str(weight.target))(self.target)
        else:
            tensor = weight.meta["val"]
        added = self.added[name] = CoordBranch(
            site.geometry,
            coords,
            padding=site.padding,
            device=tensor.device,
            dtype=tensor.dtype,
        )
        if row.choice.chosen_calls is not None:
            added.chosen_calls = row.choice.chosen_calls
            nodes = [nodes[index] for index in row.choice.chosen_calls.indices]
        for node in nodes:
            with self.graph.inserting_after(node):
                branch = self.graph.call_module(name, (function_input(node).node,))
            with self.graph.inserting_after(branch):
                total = self.graph.call_function(operator.add)
            total.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
            node.replace_all_uses_with(total)
            total.args = (node, branch)

    def commit(self) -> None:
        """Put the edited graph in place."""
        for name, module in self.added.items():
            self.target.add_submodule(name, module)
        self.target.graph = self.graph


def _check_unpatchable(model: nn.Module, discard: bool) -> None:
    check_flag("discard", discard)
    check_is_module(model)
    check_not_wrapped(model)
    layers = coord_layers(model)
    if not discard:
        check_left_behind(model)
    if not layers and not is_watched(model):
        raise PatchError(why_not_patched(model))
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


def _remove_branches(graph_module: fx.GraphModule) -> None:
    branches: set[str] = set()
    for nodes in function_nodes("", graph_module, graph_module.graph).values():
        for node in nodes:
            found = branch_of(graph_module, node)
            if found is None:
                continue
            total, branch = found
            total.replace_all_uses_with(node)
            graph_module.graph.erase_node(total)
            graph_module.graph.erase_node(branch)
            branches.add(str(branch.target))
    for name in branches:
        graph_module.delete_submodule(name)
    if branches:
        graph_module.recompile()
