"""A plain module as a GraphModule that stands for it, in both modes and with its arguments.

A trace follows the code once, with the module in one mode and optional arguments at
their defaults. A graph stands for the code only where neither changes its course:

- the traces in training and in evaluation may differ in flags alone, such as the
  ``training`` of ``F.dropout``; the graph then reads the modules' own flags;
- an optional argument must give the same graph as an unknown value and at its default.

Everything else is refused.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.functional import join_names
from coordconv_patch.modes import in_mode, state_restored
from coordconv_patch.tracing import ConvTracer, trace

__all__ = ["TrainingFlag", "as_graph_module"]

FLAG_NAME = "training_flag"
"""Name of the submodule that a :class:`TrainingFlag` is added under."""

_KEPT_STATE = (
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
"""What a GraphModule takes over from the module that it stands for, used by the graph or not."""


class TrainingFlag(nn.Module):
    """Tells a graph whether the module that it is a part of is in training mode.

    As a module, for a flag that a graph read as an attribute would be written into it as
    a constant when the GraphModule is unpickled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["__module__"] = "torch.nn.modules.module"  # an fx leaf, see CoordConvNd

    def forward(self) -> bool:
        """Its own flag, which ``train()`` and ``eval()`` set with those of its module."""
        return self.training


def as_graph_module(owner: str, module: nn.Module) -> tuple[fx.GraphModule, fx.Graph, set[str]]:
    """A GraphModule that computes what a plain module computes, on the same parameters.

    Args:
        owner: Qualified name of the module, for messages; ``""`` for the model itself.
        module: The module, which is not changed.

    Returns:
        The GraphModule; the graph that it is to be given; and the names of the
        :class:`TrainingFlag` modules that have to be added to it for that.

    Raises:
        PatchError: If one graph cannot stand for the module; says why.
    """
    graph = _faithful_graph(owner, module)
    flags = {str(node.target) for node in graph.nodes if _is_flag(node)}
    unflagged = copy.deepcopy(graph)
    _write_flags_(unflagged, set())
    made = fx.GraphModule(module, unflagged, type(module).__name__)
    for name in _KEPT_STATE:
        made.__dict__[name] = copy.copy(module.__dict__[name])
    return made, graph, flags


def _faithful_graph(owner: str, module: nn.Module) -> fx.Graph:
    place = owner or "the model"
    try:
        trained, evaluated = _in_both_modes(module, trace)
    except Exception as error:
        raise PatchError(
            f"{place} calls a functional convolution, but torch.fx cannot trace it: {error}"
        ) from error
    trained, evaluated = _with_optional_arguments(owner, module, trained, evaluated)
    if str(trained) == str(evaluated):
        return evaluated
    merged = _reading_flags(module, trained, evaluated)
    if merged is None:
        raise PatchError(
            f"{place} calls a functional convolution and behaves differently in training and "
            "evaluation, which one graph cannot express: use torch.nn.Conv2d modules there"
        )
    return merged


def _in_both_modes(
    module: nn.Module, tracer: Callable[[nn.Module], fx.Graph]
) -> tuple[fx.Graph, fx.Graph]:
    with in_mode(module, training=True):
        trained = tracer(module)
    with in_mode(module, training=False):
        return trained, tracer(module)


def _with_optional_arguments(
    owner: str, module: nn.Module, trained: fx.Graph, evaluated: fx.Graph
) -> tuple[fx.Graph, fx.Graph]:
    """The graphs with optional arguments as inputs, instead of fixed at their defaults."""
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    if not optional:
        return trained, evaluated
    try:
        free = _in_both_modes(module, _trace_all_arguments)
    except Exception:
        free = None
    if free is not None and all(
        _normal_form(unknown, optional) == _normal_form(fixed, {})
        for unknown, fixed in zip(free, (trained, evaluated), strict=True)
    ):
        return free
    if not owner:
        return trained, evaluated  # whose graph refuses other values when it runs
    raise PatchError(
        f"{owner} calls a functional convolution and its forward has optional arguments "
        f"({', '.join(optional)}) that change its course, which one graph cannot express: use "
        "torch.nn.Conv2d modules there"
    )


def _trace_all_arguments(module: nn.Module) -> fx.Graph:
    with state_restored(module):
        return ConvTracer().trace(module)


def _normal_form(graph: fx.Graph, values: dict[str, Any]) -> list[Any]:
    """A graph's operations without its inputs, arguments of known value written out."""
    graph = copy.deepcopy(graph)
    for node in reversed(graph.nodes):
        checks = node.target is torch._assert or "assert_is_none" in str(node.target)
        if node.op == "call_function" and not node.users and (checks or not node.is_impure()):
            graph.erase_node(node)
    known: dict[fx.Node, Any] = {}
    inputs = 0
    for index, node in enumerate(n for n in graph.nodes if n.op != "placeholder"):
        known[node] = ("node", index)
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target) in values:
            known[node] = values[str(node.target)]
        elif node.op == "placeholder":
            known[node], inputs = ("input", inputs), inputs + 1
    return [
        (
            node.op,
            str(node.target) if node.op != "output" else "output",
            repr(fx.map_arg((node.args, node.kwargs), known.__getitem__)),
        )
        for node in graph.nodes
        if node.op != "placeholder"
    ]


def _reading_flags(module: nn.Module, trained: fx.Graph, evaluated: fx.Graph) -> fx.Graph | None:
    """One graph for both modes, if they differ in flags alone; it reads the modules' own."""
    merged = copy.deepcopy(evaluated)
    pairs = list(zip(merged.nodes, trained.nodes, strict=False))
    if len(merged.nodes) != len(trained.nodes):
        return None
    flags: dict[str, fx.Node] = {}
    first = next(iter(merged.nodes))
    for node, other in pairs:
        if (node.op, node.name, str(node.target)) != (other.op, other.name, str(other.target)):
            return None
        if len(node.args) != len(other.args) or list(node.kwargs) != list(other.kwargs):
            return None
        stack = other.meta.get("nn_module_stack") or {}
        name = join_names(str(list(stack)[-1]) if stack else "", FLAG_NAME)

        def flag_or(value: Any, trained_value: Any, name: str = name) -> Any:
            if value is False and trained_value is True:
                if name not in flags:
                    with merged.inserting_before(first):
                        flags[name] = merged.create_node("call_module", name)
                return flags[name]
            return value

        node.args = tuple(map(flag_or, node.args, other.args))
        node.kwargs = {key: flag_or(node.kwargs[key], other.kwargs[key]) for key in node.kwargs}
    return merged if _flags_are_right(module, merged, list(flags)) else None


def _flags_are_right(module: nn.Module, merged: fx.Graph, flags: list[str]) -> bool:
    """Whether the graph is the module's trace with each of the modules alone in training."""
    for alone in flags:
        with in_mode(module, training=False):
            module.get_submodule(alone.rpartition(".")[0]).training = True
            expected = trace(module)
        if not _is_trace(merged, {alone}, expected):
            return False
    trained, evaluated = _in_both_modes(module, trace)
    return _is_trace(merged, set(flags), trained) and _is_trace(merged, set(), evaluated)


def _is_trace(merged: fx.Graph, training: set[str], expected: fx.Graph) -> bool:
    """Whether a graph is a trace, with these flags true and the others false."""
    graph = copy.deepcopy(merged)
    _write_flags_(graph, training)
    return _normal_form(graph, {}) == _normal_form(expected, {})


def _write_flags_(graph: fx.Graph, training: set[str]) -> None:
    """Write flags into a graph as constants, in place."""
    for node in list(graph.nodes):
        if _is_flag(node):
            values = functools.partial(_looked_up, {node: node.target in training})
            for user in list(node.users):
                user.args = fx.map_arg(user.args, values)
                user.kwargs = fx.map_arg(user.kwargs, values)
            graph.erase_node(node)


def _looked_up(values: dict[fx.Node, bool], node: fx.Node) -> fx.Node | bool:
    return values.get(node, node)


def _is_flag(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == FLAG_NAME
