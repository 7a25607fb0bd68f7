"""Patch and unpatch: the plan carried out.

A module site is rewritten by giving the convolution module its coordinate class
in place, in the module tree that every graph refers to; the model keeps its
class, methods, hooks, aliases, flags and state_dict names. A functional site is
rewritten in a graph: conv(x, W) becomes conv(x, W) + branch(x).

Everything that can fail is done before the first change.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.branch import BRANCH_NAME, CoordBranch
from coordconv_patch.chosen_calls import add_to_calls_, chosen_calls_of, remove_from_calls_
from coordconv_patch.conversion import check_not_wrapped, convert_, revert_
from coordconv_patch.coords import Coordinates, Window
from coordconv_patch.errors import PatchError
from coordconv_patch.folding import guard_folding_, release_folding_
from coordconv_patch.functional import (
    branch_of,
    conv_arguments,
    function_input,
    function_nodes,
)
from coordconv_patch.graph_modules import TrainingFlag, as_graph_module
from coordconv_patch.layers import CoordConvNd, coord_layers
from coordconv_patch.left_behind import (
    check_left_behind,
    dismiss_,
    is_watched,
    release_watches_,
    watch_,
)
from coordconv_patch.plan import Plan, PlanRow, plan
from coordconv_patch.programs import from_exported, why_not_patched
from coordconv_patch.select import Where
from coordconv_patch.sites import Site

__all__ = ["apply_plan_", "patch", "patch_", "set_window_", "unpatch", "unpatch_"]


def patch(
    model: nn.Module | ExportedProgram,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
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
            trace.

    Returns:
        The patched copy. Where a functional convolution of a plain module was chosen,
        the smallest submodule that calls it is a GraphModule; the plan says which.

    Raises:
        SelectionError: If a selector matches nothing that can be patched.
        PatchError: If the model cannot be copied, or a chosen site cannot be patched.
    """
    given = model
    if isinstance(model, ExportedProgram):
        model = from_exported(model)
    decided = plan(model, where, coords=coords, example_inputs=example_inputs)
    _warn_of_obstacles(decided)
    return apply_plan_(copied(model) if model is given else model, decided)


def patch_(
    model: nn.Module,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Patch a model in place; see :func:`patch` for the arguments and errors.

    An optimizer that was built before does not know the coordinate weights; see
    :func:`coordconv_patch.add_to_optimizer_`.

    Returns:
        The model itself.

    Raises:
        PatchError: As :func:`patch`; also for an ExportedProgram, and if the model's
            own forward calls a chosen functional convolution: both need :func:`patch`.
    """
    if isinstance(model, ExportedProgram):
        raise PatchError("an ExportedProgram cannot be patched in place: use patch(...)")
    decided = plan(model, where, coords=coords, example_inputs=example_inputs)
    _warn_of_obstacles(decided)
    patched = apply_plan_(model, decided)
    assert patched is model
    return model


def unpatch(model: nn.Module | ExportedProgram, *, discard: bool = False) -> nn.Module:
    """A copy of the model without coordinates; see :func:`unpatch_`.

    An ExportedProgram gives a GraphModule, see :func:`coordconv_patch.from_exported`.
    """
    if isinstance(model, ExportedProgram):
        return unpatch_(from_exported(model), discard=discard)
    _check_unpatchable(model, discard)
    return unpatch_(copied(model), discard=discard)


def unpatch_(model: nn.Module, *, discard: bool = False) -> nn.Module:
    """Take the coordinates away again, in place.

    Modules get back the class that they had. A submodule that had become a
    GraphModule stays one, without the branches.

    Args:
        model: A patched model.
        discard: Drop coordinate weights that are not zero; the outputs then change.

    Returns:
        The model itself.

    Raises:
        PatchError: If the model is not patched, or coordinate weights are not zero, or were
            left behind by other code, and ``discard`` is false.
    """
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
        The model; a GraphModule in its stead if the model's own forward calls a
        chosen functional convolution and the model is not the one that was planned.

    Raises:
        PatchError: If a chosen site cannot be patched. The model is unchanged then.
    """
    check_not_wrapped(model)
    modules = [row for row in decided.rows if row.chosen and row.site.kind == "module"]
    functions = [row for row in decided.rows if row.chosen and row.site.kind == "function"]
    edits = [
        _GraphEdit(model, owner, rows, decided.coords)
        for owner, rows in _by_owner(functions).items()
    ]
    planned = any(row.site.region and row.site.region.module is model for row in functions)
    if planned and any(edit.replaces_root for edit in edits):
        raise PatchError(
            "the model's own forward calls a chosen functional convolution, so the model has to "
            "become a GraphModule: use patch(...), which returns one"
        )
    _check_callers(modules, edits)
    done: list[_ConvNd] = []
    try:
        for row in modules:
            site, module = row.site, cast(_ConvNd, model.get_submodule(row.site.name))
            if row.calls is None:
                convert_(module, decided.coords, site.padding)
            else:
                add_to_calls_(model, site.name, row.calls, decided.coords, site.padding)
            done.append(module)
    except BaseException:
        for module in done:
            _revert_(model, module)
        raise
    for edit in edits:
        model = edit.commit()
    guard_folding_(model)
    watch_(model)
    return model


def _revert_(model: nn.Module, module: nn.Module) -> None:
    if isinstance(module, CoordConvNd):
        revert_(module)
    elif chosen_calls_of(module) is not None:
        remove_from_calls_(model, module)


def _check_callers(modules: Sequence[PlanRow], edits: Sequence[_GraphEdit]) -> None:
    """Refuse to count calls in a module that becomes a graph, which would not run the hooks."""
    for row in modules:
        for edit in edits if row.calls is not None else ():
            assert row.calls is not None
            caller = row.calls.caller
            if edit.replaces_module and (caller == edit.owner or _is_inside(caller, edit.owner)):
                raise PatchError(
                    f"{row.site.name}: its calls cannot be chosen while "
                    f"{edit.owner or 'the model'} becomes a GraphModule for its functional "
                    "convolutions: choose all its calls, or leave those functions out"
                )


def _warn_of_obstacles(decided: Plan) -> None:
    skipped = [row.site for row in decided.rows if row.skipped]
    if skipped:
        shown = "; ".join(f"{site.name or 'the model'}: {site.obstacle}" for site in skipped[:3])
        more = f"; and {len(skipped) - 3} more, see plan(...)" if len(skipped) > 3 else ""
        warnings.warn(
            f"convolutions without coordinates, because they cannot carry them: {shown}{more}",
            stacklevel=3,
        )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        PatchError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise PatchError(
            f"the model cannot be deep-copied ({error}): use the in-place form, patch_ or unpatch_"
        ) from error


def _by_owner(rows: Iterable[PlanRow]) -> dict[str, list[PlanRow]]:
    """Functional sites by the qualified name of the module whose graph is to be edited.

    The graph of a plain module holds those of its submodules, so where both a module and one
    inside it call functional convolutions, the outer one's graph is edited for both.
    """
    owners: dict[str, list[PlanRow]] = {}
    for row in sorted(rows, key=lambda row: _owner(row.site)):
        owner = _owner(row.site)
        enclosing = (other for other in owners if other == owner or _is_inside(owner, other))
        owners.setdefault(next(enclosing, owner), []).append(row)
    return owners


def _owner(site: Site) -> str:
    assert site.region is not None
    in_graph_module = isinstance(site.region.module, fx.GraphModule)
    return site.region.name if in_graph_module else site.owner


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


class _GraphEdit:
    """Branches added to the functional convolutions of one module; prepared, then committed."""

    def __init__(
        self, model: nn.Module, owner: str, rows: list[PlanRow], coords: Coordinates
    ) -> None:
        self.model = model
        self.owner = owner
        self.module = model.get_submodule(owner)
        self.replaces_module = not isinstance(self.module, fx.GraphModule)
        self.added: dict[str, nn.Module] = {}
        if self.replaces_module:
            self.target, self.graph, flags = as_graph_module(owner, self.module)
            for name in sorted(flags):
                flag = self.added[name] = TrainingFlag()
                flag.training = self.module.get_submodule(name.rpartition(".")[0]).training
        else:
            self.target = cast(fx.GraphModule, self.module)
            self.graph = copy.deepcopy(self.target.graph)
        nodes_by_site = function_nodes(owner, self.module, self.graph)
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
        if row.calls is not None:
            added.chosen_calls = row.calls
            nodes = [nodes[index] for index in row.calls.indices]
        for node in nodes:
            with self.graph.inserting_after(node):
                branch = self.graph.call_module(name, (function_input(node).node,))
            with self.graph.inserting_after(branch):
                total = self.graph.call_function(operator.add)
            total.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
            node.replace_all_uses_with(total)
            total.args = (node, branch)

    @property
    def replaces_root(self) -> bool:
        return self.replaces_module and not self.owner

    def commit(self) -> nn.Module:
        """Put the edited graph in place; returns the model, or what stands for it now."""
        for name, module in self.added.items():
            self.target.add_submodule(name, module)
        self.target.graph = self.graph
        if not self.replaces_module:
            return self.model
        if not self.owner:
            return self.target
        for parent in list(self.model.modules()):
            for child_name, child in parent._modules.items():
                if child is self.module:
                    parent._modules[child_name] = self.target
        return self.model


def _check_unpatchable(model: nn.Module, discard: bool) -> None:
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
