"""Symbolic tracing with every convolution and batch norm module as a leaf."""

from __future__ import annotations

import inspect
import sys

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.branch import CoordBranch
from coordconv_patch.modes import state_restored
from coordconv_patch.norms import is_batch_norm

__all__ = [
    "ConvTracer",
    "trace",
]


class ConvTracer(fx.Tracer):
    """Traces with every convolution and batch norm module as a leaf, subclasses included.

    Where timm is in use, the modules and functions that it declares untraceable
    are leaves too.
    """

    def __init__(self) -> None:
        # Only if the program has imported timm: nobody else has its modules. Older versions keep
        # these lists elsewhere; their models are then traced by regions.
        timm_layers = sys.modules.get("timm.layers")
        known = hasattr(timm_layers, "get_notrace_functions")
        functions = timm_layers.get_notrace_functions() if timm_layers and known else []
        self._leaf_classes = (
            tuple(timm_layers.get_notrace_modules()) if timm_layers and known else ()
        )
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (_ConvNd, CoordBranch, *self._leaf_classes)) or is_batch_norm(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of a module; optional arguments are fixed at their defaults.

    The module is left as it was, also where tracing fails halfway.

    Raises:
        Exception: Whatever the module's code raises when it meets a proxy.
    """
    if isinstance(module, fx.GraphModule):
        return module.graph
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    with state_restored(module):
        return ConvTracer().trace(module, concrete_args=defaults or None)
