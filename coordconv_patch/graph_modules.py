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

__all__ = ["as_graph_module"]

_KEPT_STATE = (
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
"""What a GraphModule takes over from the module that it stands for, used by the graph or not."""


def as_graph_module(owner: str, module: nn.Module) -> fx.GraphModule:
    """A GraphModule that computes what a plain module computes, on the same parameters.

    Args:
        owner: Qualified name of the module, for messages; ``""`` for the model itself.
        module: The module, which is not changed.

    Raises:
        PatchError: If one graph cannot stand for the module; says why.
    """
    made = fx.GraphModule(module, _faithful_graph(owner, module), type(module).__name__)
    for name in _KEPT_STATE:
        made.__dict__[name] = copy.copy(module.__dict__[name])
    return made


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
        name = join_names(str(list(stack)[-1]) if stack else "", "training")

        def flag_or(value: Any, trained_value: Any, name: str = name) -> Any:
            if value is False and trained_value is True:
                if name not in flags:
                    with merged.inserting_before(first):
                        flags[name] = merged.create_node("get_attr", name)
                return flags[name]
            return value

        node.args = tuple(map(flag_or, node.args, other.args))
        node.kwargs = {key: flag_or(node.kwargs[key], other.kwargs[key]) for key in node.kwargs}
    return merged if _flags_are_right(module, merged, list(flags)) else None


def _flags_are_right(module: nn.Module, merged: fx.Graph, flags: list[str]) -> bool:
    """Whether the graph is the module's trace with each of the modules alone in training."""
    for alone in [*flags, None]:
        with in_mode(module, training=False):
            holder = None if alone is None else alone.rpartition(".")[0]
            if holder is not None:
                module.get_submodule(holder).training = True
            expected = trace(module)
        if _with_flags(merged, alone) != _normal_form(expected, {}):
            return False
    return True


def _with_flags(merged: fx.Graph, training: str | None) -> list[Any]:
    """The normal form of a graph whose flags are false, but for one."""
    graph = copy.deepcopy(merged)
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training":
            for user in list(node.users):
                values = {node: node.target == training}
                user.args = fx.map_arg(user.args, functools.partial(_looked_up, values))
                user.kwargs = fx.map_arg(user.kwargs, functools.partial(_looked_up, values))
            graph.erase_node(node)
    return _normal_form(graph, {})


def _looked_up(values: dict[fx.Node, bool], node: fx.Node) -> fx.Node | bool:
    return values.get(node, node)
