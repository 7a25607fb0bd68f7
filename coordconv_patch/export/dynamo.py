"""torch.export's ONNX exporter."""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.export.axes import ExportRequest, inputs_for_tracing
from coordconv_patch.running.inputs import split_inputs

__all__ = ["export_dynamo"]

_BFLOAT16_OPSET = 22


def export_dynamo(model: nn.Module, request: ExportRequest) -> onnx_ir.Model:
    """The graph of a model by torch.export; raises whatever torch does.

    Args:
        model: In evaluation mode.
        request: The export.
    """
    args, kwargs = split_inputs(inputs_for_tracing(request))
    shapes = _dynamic_shapes(model, request, args, kwargs) if request.is_dynamic else None
    program = torch.onnx.export(
        model,
        args,
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=_opset(model, request),
        input_names=request.input_names,
        output_names=request.output_names,
        verbose=False,
    )
    assert program is not None
    return program.model


def _opset(model: nn.Module, request: ExportRequest) -> int | None:
    """The operator set asked for; for bfloat16 at least the first whose Conv takes it."""
    if request.opset is None and any(
        parameter.dtype is torch.bfloat16 for parameter in model.parameters()
    ):
        return _BFLOAT16_OPSET
    return request.opset


def _dynamic_shapes(
    model: nn.Module, request: ExportRequest, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Axis names in the structure of the forward's arguments, as torch.export wants them."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    axes = iter(request.axes)
    return pytree.tree_unflatten(
        [(next(axes) or None) if isinstance(leaf, Tensor) else None for leaf in leaves], spec
    )
