"""The operators that cut regions of interest, such as the boxes of a detector, out of features.

RoIAlign, RoIPool and their like make a small map for every box. A convolution behind one of them
has coordinates of the box: -1 and 1 at its edges, wherever in the picture it lies. Which
convolutions these are is told by the data flow: what such an operator gives is marked, and so is
all that is computed from something marked, as long as it is made of floating point numbers
(indices and masks carry no features on). A convolution is behind an operator if its input is
marked; see :mod:`coordconv_patch.sites.roi_flow` and :mod:`coordconv_patch.sites.roi_graph_flow`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["roi_operator", "roi_pools", "writes_in_place"]

_OPERATORS = frozenset(
    {
        *("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"),
        *("qroi_align", "roi_align_rotated", "_multiscale_roi_align"),
    }
)
_POOLS = ("MultiScaleRoIAlign", "PSRoIAlign", "PSRoIPool", "RoIAlign", "RoIPool")
"""The modules of torchvision.ops that call them."""


def roi_operator(function: Any) -> str:
    """Name of an operator for regions of interest, ``""`` for other functions.

    Args:
        function: An operator of torch.ops, of any library, or a function of torchvision.ops,
            which is one node of a trace. Autograd functions are not known.
    """
    if isinstance(function, torch._ops.OpOverload):
        function = function.overloadpacket
    name = getattr(function, "__name__", "")
    if name not in _OPERATORS:
        return ""
    of_torchvision = str(getattr(function, "__module__", "")).startswith("torchvision.ops")
    known = of_torchvision or isinstance(function, torch._ops.OpOverloadPacket)
    return name.removeprefix("_multiscale_") if known else ""


def roi_pools(model: nn.Module) -> list[str]:
    """Names of a model's modules that are torchvision's pools of regions of interest."""
    ops = sys.modules.get("torchvision.ops")  # nobody else has its modules
    kinds = tuple(getattr(ops, name) for name in _POOLS if hasattr(ops, name))
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def writes_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch function or method of this name writes into its first argument."""
    name = name.split(".")[0]  # of an overload, "add_.Tensor"
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_") or bool(kwargs.get("inplace"))
