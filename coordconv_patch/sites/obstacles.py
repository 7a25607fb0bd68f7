"""Convolutions that coordinates cannot be added to, because another tool has taken them over."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.sites.site import ForeignSite

__all__ = ["adapter_obstacle", "foreign_sites", "quantization_obstacle"]

_CONV_NAME = re.compile(r"(Quantized)?(Lazy)?Conv(Transpose)?[123]d")

_SCRIPTED = (
    "it is compiled by TorchScript, which has no Python code to add to: patch the Python model, "
    "then script or trace it"
)

_QUANTIZED = (
    "it is quantized ({name}), and its weight is not a float tensor: patch the float model, and "
    "leave the patched convolutions out of the quantization"
)

_PREPARED = (
    "it is prepared for quantization ({name}), which knows nothing of coordinates: patch the float "
    "model before, and leave the patched convolutions out (qconfig = None)"
)


def foreign_sites(model: nn.Module) -> Iterator[ForeignSite]:
    """Convolutions that are not torch.nn modules: TorchScript's and quantized ones."""
    scripted: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            original = str(getattr(module, "original_name", type(module).__name__))
            inside = any(not outer or name.startswith(f"{outer}.") for outer in scripted)
            if _CONV_NAME.fullmatch(original) or (
                not inside and _is_frozen_with_convolutions(module)
            ):
                yield _foreign(name, original, _SCRIPTED)
            scripted.append(name)
        elif not isinstance(module, _ConvNd) and _is_quantized_convolution(module):
            obstacle = _QUANTIZED.format(name=_full_name(module))
            yield _foreign(name, type(module).__name__, obstacle)


def _foreign(name: str, class_name: str, obstacle: str) -> ForeignSite:
    return ForeignSite(name=name, class_name=class_name, geometry=None, obstacle=obstacle)


def quantization_obstacle(module: _ConvNd) -> str:
    """Why quantization keeps coordinates from a convolution module; empty if it does not."""
    weight = module._parameters.get("weight")
    if weight is not None and type(weight.data).__module__.startswith("torchao"):
        return _QUANTIZED.format(name=type(weight.data).__name__)
    if any(base.__module__.startswith("torch.ao.nn") for base in type(module).__mro__):
        return _PREPARED.format(name=_full_name(module))
    if hasattr(module, "activation_post_process"):
        return _PREPARED.format(name=type(module.activation_post_process).__name__)
    return ""


def _is_quantized_convolution(module: nn.Module) -> bool:
    """Whether a module is one of torch.ao's convolutions, which derive from none of torch.nn's."""
    return any(
        base.__module__.startswith("torch.ao.nn") and base.__name__ == "_ConvNd"
        for base in type(module).__mro__
    )


def _is_frozen_with_convolutions(module: torch.jit.ScriptModule) -> bool:
    """Whether TorchScript has moved the convolutions of a module into its graph."""
    if any(
        _CONV_NAME.fullmatch(str(getattr(inner, "original_name", ""))) for inner in module.modules()
    ):
        return False
    graph = getattr(module, "inlined_graph", None)
    return graph is not None and re.search(r"aten::_?conv", str(graph)) is not None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def adapter_obstacle(model: nn.Module, name: str) -> str:
    """Why a convolution inside a PEFT adapter cannot carry coordinates; empty if it is in none."""
    module = model
    for child in name.split(".") if name else ():
        is_adapter = type(module).__module__.startswith("peft.tuners.")
        if is_adapter and hasattr(module, "base_layer") and child != "base_layer":
            return (
                "it is part of a PEFT adapter, whose merging would drop the coordinates: patch the "
                "base layers ('*.base_layer'), or the model before PEFT wraps it"
            )
        module = getattr(module, child)
    return ""
