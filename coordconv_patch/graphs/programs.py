"""Programs of torch.export as models to train: coordinate branches as layers, and two modes.

An exported program is a flat list of operations. A coordinate branch in it is::

    add(convolution(x, W), convolution(pad(grid), W_c))

where W_c is a parameter whose name ends in ``coord_weight`` and the grid's nodes carry
the convention, see :func:`coordconv_patch.layers.coordinate_map.grid_for`. :func:`from_exported`
makes of its second convolution a :class:`CoordBranch` again, on the same parameter.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from coordconv_patch.arguments import given
from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import (
    ADDITIONS,
    CONV_SIGNATURES,
    conv_arguments,
    function_geometry,
    function_input,
    is_coordinate_convolution,
    is_function_site,
    join_names,
    stored_weight,
)
from coordconv_patch.layers.branch import BRANCH_NAME, CoordBranch
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordinate_map import CONVENTION_KEY
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.running.torch_versions import strict_export_hint

__all__ = ["ExportedModule", "from_exported", "require_coord_layers"]

_aten = torch.ops.aten

_BATCH_NORMS = (_aten.batch_norm.default, _aten._native_batch_norm_legit_functional.default)
_DROPOUTS = (
    *(_aten.dropout.default, _aten.native_dropout.default, _aten.feature_dropout.default),
    *(_aten.alpha_dropout.default, _aten.feature_alpha_dropout.default),
)
_TRAINING_ARGUMENT: dict[Any, int] = dict.fromkeys(_BATCH_NORMS, 5) | dict.fromkeys(_DROPOUTS, 2)
"""Position of the training flag among the arguments of an operation."""


class ExportedModule(fx.GraphModule):
    """The GraphModule of an exported program, which ``train()`` and ``eval()`` reach.

    torch.export writes the mode of batch norm and dropout into each operation; here
    the operations read the modules' ``training`` flags, as the model's code did.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedModule:
        copied = cast(ExportedModule, super().__deepcopy__(memo))
        _keep_out_of_the_state_dict(self, copied)
        return copied


def _follow_flags_(root: fx.GraphModule) -> None:
    """Let the operations of a program read the ``training`` flags, which start as exported."""
    flags: dict[str, list[tuple[fx.Node, int, bool]]] = {}
    for node in root.graph.nodes:
        if _has_mode(node):
            position = _TRAINING_ARGUMENT[node.target]
            flag = bool(node.args[position])
            flags.setdefault(_flag_holder(node), []).append((node, position, flag))
    training = any(flag for of_holder in flags.values() for _, _, flag in of_holder)
    for part in root.modules():
        part.training = training
    counters = [node for node in root.graph.nodes if _counts_batches(node)]
    for holder, of_holder in flags.items():
        mode = training if not holder else any(flag for _, _, flag in of_holder)
        root.get_submodule(holder).training = mode
        # An operation of another mode than its module's was frozen by the model's code.
        uses = [(node, position) for node, position, flag in of_holder if flag is mode]
        uses += [(node, 1) for node in counters if _holder(node.args[0]) == holder]
        with root.graph.inserting_before(next(iter(root.graph.nodes))):
            read = root.graph.create_node("get_attr", join_names(holder, "training"))
        for node, position in uses:
            node.update_arg(position, read)


def _has_mode(node: fx.Node) -> bool:
    """Whether a node does something else in training than in evaluation."""
    if node.target in _BATCH_NORMS and node.args[3] is None:
        return False  # no running statistics: some standardise a weight by it, in every mode
    return node.target in _TRAINING_ARGUMENT


def _flag_holder(node: fx.Node) -> str:
    """The module whose flag tells a node's mode: a batch norm's own, else the program's."""
    return _holder(node.args[3]) if node.target in _BATCH_NORMS else ""


def _holder(node: Any) -> str:
    """Qualified name of the module that holds a tensor of the program."""
    is_attribute = isinstance(node, fx.Node) and node.op == "get_attr"
    return str(node.target).rpartition(".")[0] if is_attribute else ""


def _counts_batches(node: fx.Node) -> bool:
    """Whether a node is ``num_batches_tracked + 1`` of a batch norm."""
    if node.target not in ADDITIONS or not isinstance(node.args[0], fx.Node):
        return False
    counter = node.args[0]
    return counter.op == "get_attr" and str(counter.target).endswith("num_batches_tracked")


def _keep_out_of_the_state_dict(source: nn.Module, copied: nn.Module) -> None:
    """GraphModule's constructor registers constants and non-persistent buffers as persistent."""
    parts = dict(source.named_modules())
    for name, part in copied.named_modules():
        if name in parts:
            kept = set(parts[name]._buffers) - parts[name]._non_persistent_buffers_set
            part._non_persistent_buffers_set |= set(part._buffers) - kept


def from_exported(program: ExportedProgram | fx.GraphModule) -> nn.Module:
    """The model in a torch.export program, to fine-tune, patch, unpatch and export.

    The Python source that the program was exported from is not needed. If the
    program was exported from a patched model, its coordinate branches are layers
    again: :func:`coord_parameters`, :func:`save_coords`, :func:`unpatch`,
    :func:`set_window_` and the lowerings of :func:`export_onnx` reach them.

    Args:
        program: A program, as :func:`torch.export.load` gives it, or its ``module()``.
            It is not changed.

    Returns:
        A GraphModule with weights of its own. Unlike those of torch.export it has
        ``train()`` and ``eval()``; its mode is the one that the program was exported in.

    Raises:
        PatchError: If a coordinate branch of the program cannot be made a layer again;
            says which and why.

    Example:
        >>> program = torch.export.load("model.pt2")               # doctest: +SKIP
        >>> model = ccp.from_exported(program)                     # doctest: +SKIP
        >>> ccp.save_coords(model, "coords.safetensors")           # doctest: +SKIP
    """
    module = program.module() if isinstance(program, ExportedProgram) else program
    if not isinstance(module, fx.GraphModule):
        raise PatchError(
            f"{given('program', program)}: from_exported takes a program of torch.export"
        )
    model = ExportedModule(module, fx.Graph.__deepcopy__(module.graph))
    model.meta.update(module.meta)
    _keep_out_of_the_state_dict(module, model)
    model = copy.deepcopy(model)  # with tensors of its own
    _follow_flags_(model)
    _restore_layers_(model)
    model.graph.lint()
    model.recompile()
    return model


def require_coord_layers(model: nn.Module) -> dict[str, CoordLayer]:
    """As :func:`coord_layers`, of a model that has to be patched; else a PatchError."""
    layers = coord_layers(model)
    if layers:
        return layers
    if any(map(has_exported_branches, model.modules())):
        raise PatchError(
            "the model is the module of an exported program, whose coordinates are not layers: use "
            "from_exported(program) in place of program.module()"
        )
    raise PatchError("the model is not patched, it has no coordinate layers: patch it first")


def has_exported_branches(module: nn.Module) -> bool:
    """Whether a module's graph holds coordinate branches that are not layers (any more)."""
    return isinstance(module, fx.GraphModule) and bool(_coordinate_convolutions(module.graph))


def _coordinate_convolutions(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The convolutions by coordinate weights, by the weights' qualified names."""
    by_weight: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_coordinate_convolution(node):
            by_weight.setdefault(str(stored_weight(node)), []).append(node)
    return by_weight


class _Branch:
    """A coordinate branch of a graph: geometry and padding of its convolution, and the convention.

    ``plain`` and ``input`` are the nodes of the plain convolution and of its input, ``end`` that
    whose value is added to the plain convolution's output. A PatchError if the graph is none that a
    coordinate layer leaves behind.
    """

    def __init__(self, root: fx.GraphModule, convolution: fx.Node) -> None:
        self.end, addition = _addition(convolution)
        self.plain = plain = next(node for node in addition.all_input_nodes if node is not self.end)
        if plain.target not in CONV_SIGNATURES:
            raise PatchError(f"it is added to {plain.name}, which is not a convolution")
        geometry = function_geometry(root, plain)
        own, given = function_input(convolution), function_input(plain)
        if replace(own.own, amounts=given.own.amounts) != given.own:
            raise PatchError("its grid is not padded as the convolution's input is")
        self.input, self.padding = given.node, given.own.rule
        self.coords = _convention(own.node)
        self.geometry = replace(
            function_geometry(root, convolution),
            in_channels=geometry.in_channels,
            out_channels=geometry.out_channels,
            groups=geometry.groups,
        )


_BETWEEN = (_aten.squeeze.dim, _aten.squeeze.dims, _aten.to.dtype, _aten._to_copy.default)
"""Operations that may stand between a branch's convolution and the addition."""


def _addition(convolution: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The last node of the branch, and the addition that takes it."""
    end = convolution
    while True:
        users = [user for user in end.users if not _is_assertion(user)]
        if len(users) != 1:
            raise PatchError(f"{end.name} is used {len(users)} times, a branch's end is used once")
        if users[0].target in ADDITIONS:
            return end, users[0]
        if users[0].target not in _BETWEEN:
            raise PatchError(f"it goes into {users[0].name}, not into an addition")
        end = users[0]


def _is_assertion(node: fx.Node) -> bool:
    return node.target is _aten._assert_tensor_metadata.default


def _convention(grid: fx.Node) -> Coordinates:
    fields = _fields_of_convention(grid)
    if fields is not None:
        return Coordinates.from_dict(fields)
    if any(_fields_of_convention(node) is not None for node in _ancestors(grid)):
        raise PatchError(f"its grid is changed on the way to the convolution, in {grid.name}")
    raise PatchError(
        f"the program does not tell the convention of its coordinates{strict_export_hint()}"
    )


def _fields_of_convention(node: fx.Node) -> Mapping[str, Any] | None:
    """What a node of a grid carries, see :meth:`Coordinates.to_dict`; of others ``None``."""
    return (node.meta.get("custom") or {}).get(CONVENTION_KEY)


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """What a node is computed from, itself not included; the latest nodes first."""
    needed: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each not in needed:
            needed[each] = None
            waiting += each.all_input_nodes
    order = {each: index for index, each in enumerate(node.graph.nodes)}
    return sorted(needed, key=order.__getitem__, reverse=True)


def _restore_layers_(module: fx.GraphModule) -> None:
    """Replace every exported branch of a graph by a layer, in place."""
    convolutions = _coordinate_convolutions(module.graph)
    branches = {name: _read(module, name, nodes) for name, nodes in convolutions.items()}
    for name, nodes in convolutions.items():
        _restore_layer_(module, name, list(zip(nodes, branches[name], strict=True)))
    for node in reversed(module.graph.nodes):
        if not node.users and _fields_of_convention(node) is not None:
            module.graph.erase_node(node)


def _read(module: fx.GraphModule, name: str, nodes: Sequence[fx.Node]) -> list[_Branch]:
    try:
        branches = [_Branch(module, node) for node in nodes]
        if len({(b.geometry, b.padding, b.coords) for b in branches}) > 1:
            raise PatchError("its calls differ in padding, output size or convention")
    except PatchError as error:
        raise PatchError(
            f"the coordinates of {name} cannot be made a layer again: {error}. Export the patched "
            "model without run_decompositions and with fixed image sizes, or patch the model "
            "before the export anew"
        ) from error
    return branches


def _restore_layer_(
    module: fx.GraphModule, weight_name: str, branches: Sequence[tuple[fx.Node, _Branch]]
) -> None:
    weight = cast(nn.Parameter, operator.attrgetter(weight_name)(module))
    first = branches[0][1]
    layer = CoordBranch(
        first.geometry, first.coords, padding=first.padding, device=torch.device("meta")
    )
    layer.coord_weight = weight
    layer.chosen_calls = _chosen_calls(branches)
    layer.training = module.training
    holder, _, _ = weight_name.rpartition(".")
    name = _layer_name(holder)
    if name == holder:
        module.delete_submodule(holder)
    else:
        delattr(module.get_submodule(holder), weight_name.rpartition(".")[2])
    module.add_submodule(name, layer)
    for convolution, branch in branches:
        with module.graph.inserting_before(convolution):
            call = module.graph.call_module(name, (branch.input,))
        call.meta = {k: branch.end.meta[k] for k in ("val", "tensor_meta") if k in branch.end.meta}
        branch.end.replace_all_uses_with(call, delete_user_cb=lambda user: not _is_assertion(user))
        _erase(branch.end)


def _chosen_calls(branches: Sequence[tuple[fx.Node, _Branch]]) -> ChosenCalls | None:
    """Which of the convolutions by one weight have the branch; ``None`` if all of them."""
    plain = [branch.plain for _, branch in branches]
    weight = conv_arguments(plain[0])["weight"]
    same = [
        node
        for node in plain[0].graph.nodes
        if is_function_site(node) and conv_arguments(node)["weight"] is weight
    ]
    if len(same) == len(plain):
        return None
    return ChosenCalls(tuple(same.index(node) for node in plain), len(same), "")


def _layer_name(holder: str) -> str:
    """Name of the layer whose weight was held by a module: as patching a program names it."""
    if holder.endswith(BRANCH_NAME):
        return holder
    return f"{holder}.{BRANCH_NAME}" if holder else f"weight_{BRANCH_NAME}"


def _erase(end: fx.Node) -> None:
    """Erase a branch from its end back to its grid."""
    for node in [end, *_ancestors(end)]:
        for user in list(node.users):
            if _is_assertion(user):
                user.graph.erase_node(user)
        if not node.users and node.op != "placeholder":
            node.graph.erase_node(node)
