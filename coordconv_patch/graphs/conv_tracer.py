"""Symbolic tracing with every convolution and batch norm module as a leaf."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.graphs.norms import is_batch_norm
from coordconv_patch.graphs.stand_ins import TensorProxy, isinstance_answered
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import state_restored

__all__ = ["ConvTracer", "trace"]


class ConvTracer(fx.Tracer):
    """Traces with every convolution and batch norm module as a leaf, subclasses included.

    GraphModules are leaves too: they have a graph of their own.

    Where timm is in use, the modules and functions that it declares untraceable
    are leaves too; so are torchvision's functions that cut out regions of interest.
    """

    def __init__(self) -> None:
        # Only if the program has imported timm: nobody else has its modules. Older versions keep
        # these lists elsewhere; their models are then traced by regions.
        timm_layers: Any = sys.modules.get("timm.layers")
        known = hasattr(timm_layers, "get_notrace_functions")
        functions = timm_layers.get_notrace_functions() if known else []
        self._leaf_classes = tuple(timm_layers.get_notrace_modules()) if known else ()
        # torchvision wraps these in its own files only, and they ask what kind of tensor they get.
        ops = sys.modules.get("torchvision.ops")
        functions = [*functions, *(getattr(ops, name, None) for name in _ROI_FUNCTIONS)]
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)))
        if ops is not None:  # also where they are called as ops.roi_align(...)
            self._autowrap_search.append(ops)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that is known to stand for a tensor, where it certainly does."""
        return TensorProxy(node, self) if self._gives_tensor(node) else super().proxy(node)

    def _gives_tensor(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            kind = self.scope.module_type
            return kind.__module__.startswith("torch.nn") and not issubclass(kind, _GIVES_TUPLES)
        if node.op in ("call_function", "call_method"):
            return str(getattr(node.target, "__name__", node.target)) in _GIVES_A_TENSOR
        return node.op in ("placeholder", "get_attr")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (_ConvNd, CoordBranch, fx.GraphModule, *self._leaf_classes)
        if isinstance(m, leaves) or is_batch_norm(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """As torch.fx traces, but one thread at a time, and unnoticed by the others."""
        with tracing_alone():
            return super().trace(root, concrete_args)


_ROI_FUNCTIONS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")

_GIVES_TUPLES = (
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
"""Layers of torch.nn whose result is not a tensor, or need not be."""

_GIVES_A_TENSOR = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "group_norm"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "pad", "interpolate"),
        *("relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "sigmoid", "tanh"),
        *("softmax", "dropout", "avg_pool2d", "adaptive_avg_pool2d", "flatten", "cat", "stack"),
        *("add", "sub", "mul", "truediv", "neg", "clamp", "float", "half", "contiguous"),
        *("permute", "reshape", "view", "transpose", "unsqueeze", "squeeze", "mean"),
    }
)
"""Names of functions and methods whose result is one tensor if their argument is."""


def trace(module: nn.Module) -> fx.Graph:
    """The graph of a module; optional arguments are fixed at their defaults.

    The module is left as it was, also where tracing fails halfway, by whatever its code raises
    when it meets a proxy.
    """
    if isinstance(module, fx.GraphModule):
        return module.graph
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    with state_restored(module), isinstance_answered(module):
        return ConvTracer().trace(module, concrete_args=defaults or None)
