"""Record a forward pass: which convolutions run, in which order, at which sizes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from coordconv_patch.functional import conv_arguments
from coordconv_patch.inputs import run_model
from coordconv_patch.modes import evaluating, state_restored

__all__ = [
    "Call",
    "GraphFunctions",
    "record_calls",
]


@dataclass(frozen=True)
class Call:
    """One execution of a site, as seen on the example inputs.

    Sizes are spatial: ``(H, W)`` for images, in pixels.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]


@dataclass(frozen=True)
class GraphFunctions:
    """The functional sites of one traced module.

    Attributes:
        module: The module.
        graph: Its graph.
        names: Site name of each of the graph's functional convolutions.
    """

    module: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]


def record_calls(
    model: nn.Module,
    example_inputs: Any,
    modules: Mapping[str, nn.Module],
    functions: Sequence[GraphFunctions],
) -> dict[str, list[Call]]:
    """Run the model once on the example inputs; the calls of each site, in order of execution.

    Args:
        model: The model; left as it was.
        example_inputs: See :func:`coordconv_patch.inputs.split_inputs`.
        modules: The convolution modules, by site name.
        functions: The functional sites.

    Raises:
        PatchError: If the forward pass fails.
    """
    recorder = _CallRecorder(modules, functions)
    with evaluating(model), state_restored(model), recorder:
        run_model(model, example_inputs)
    return recorder.calls


class _CallRecorder:
    """While entered, notes every execution of the sites.

    A region with functional sites is interpreted node by node on the inputs that it
    gets, which shows all of its sites in order; the real run that follows is not noted.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], functions: Sequence[GraphFunctions]
    ) -> None:
        self.calls: dict[str, list[Call]] = {}
        self._modules = modules
        self._functions = functions
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._regions_noted = 0

    def __enter__(self) -> _CallRecorder:
        for name, module in self._modules.items():
            hook = functools.partial(self._after_module, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for traced in self._functions:
            pre_hook = functools.partial(self._before_region, traced)
            self._handles += [
                traced.module.register_forward_pre_hook(pre_hook, with_kwargs=True),
                traced.module.register_forward_hook(self._after_region, always_call=True),
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, source: Tensor, output: Tensor, ndim: int) -> None:
        if not self._regions_noted:
            call = Call(tuple(source.shape[-ndim:]), tuple(output.shape[-ndim:]))
            self.calls.setdefault(name, []).append(call)

    def _after_module(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        source = args[0] if args else next(iter(kwargs.values()))
        self._note(name, source, output, len(cast(_ConvNd, module).kernel_size))

    def _before_region(
        self,
        traced: GraphFunctions,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        recorder, names = self, traced.names

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n in names:
                    arguments = conv_arguments(n)
                    weight = self.env[arguments["weight"]]
                    source = self.env[arguments["input"]]
                    recorder._note(names[n], source, result, weight.dim() - 2)
                return result

        if not self._regions_noted:
            is_graph = isinstance(module, fx.GraphModule)
            runnable = module if is_graph else fx.GraphModule(module, traced.graph)
            inputs = _placeholder_values(traced.graph, is_graph, args, kwargs)
            Interpreter(runnable).run(*inputs, enable_io_processing=False)
        self._regions_noted += 1

    def _after_region(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._regions_noted -= 1


def _placeholder_values(
    graph: fx.Graph, exported: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """A call's arguments in the order of a graph's placeholders."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if exported and isinstance(graph._codegen, fx.graph._PyTreeCodeGen):
        # Programs of torch.export take nested arguments apart.
        return pytree.arg_tree_leaves(*args, **kwargs)
    values = list(args)
    for node in placeholders[len(args) :]:
        values.append(kwargs.get(str(node.target), node.args[0] if node.args else None))
    return values
