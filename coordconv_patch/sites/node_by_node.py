"""Run a GraphModule so that it shows which of its nodes each convolution call is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import conv_arguments, function_input
from coordconv_patch.sites.regions import Region

__all__ = ["NodeByNode"]


class NodeByNode(fx.Interpreter):
    """Runs a GraphModule node by node, and notes the calls of its functional sites.

    Args:
        region: The GraphModule.
        names: The site names of its functional convolutions.
        note: Called with a site's name, the input and the output of one call, the number of
            spatial dimensions, and the pixels ``(before, after)`` by which the code pads each.
    """

    def __init__(
        self, region: Region, names: Mapping[fx.Node, str], note: Callable[..., None]
    ) -> None:
        super().__init__(region.module, graph=region.graph)
        self._site_names = names
        self._note = note

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if n in self._site_names:
            weight = self.env[conv_arguments(n)["weight"]]
            source = self.env[conv_arguments(n)["input"]]
            name, ndim = self._site_names[n], weight.dim() - 2
            self._note(name, source, output, ndim, _padding_amounts(n))
        return output

    def run_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output of one call of the GraphModule."""
        inputs = _placeholder_values(self.graph, args, kwargs)
        return self.graph.process_outputs(self.run(*inputs, enable_io_processing=False))


def _padding_amounts(node: fx.Node) -> Sequence[tuple[int, int]]:
    """Pixels by which the module that calls a functional convolution has padded its input."""
    try:
        return function_input(node).own.amounts
    except PatchError:
        return ()


def _placeholder_values(
    graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The arguments of a GraphModule's call in the order of its graph's placeholders."""
    if isinstance(graph._codegen, fx.graph._PyTreeCodeGen):
        # Programs of torch.export take nested arguments apart.
        return pytree.arg_tree_leaves(*args, **kwargs)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values = list(args)
    for node in placeholders[len(args) :]:
        values.append(kwargs.get(str(node.target), node.args[0] if node.args else None))
    return values
