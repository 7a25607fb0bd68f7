"""torch.export's ONNX exporter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.export.axes import ExportRequest, inputs_for_tracing
from coordconv_patch.running.inputs import split_inputs
from coordconv_patch.running.torch_versions import as_captured_for_onnx, dynamic_axes, name_axes_

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["dynamic_shapes", "export_dynamo"]

_BFLOAT16_OPSET = 22


def export_dynamo(model: nn.Module, request: ExportRequest) -> onnx_ir.Model:
    """The graph of a model in evaluation mode by torch.export; raises whatever torch does."""
    args, kwargs = split_inputs(inputs_for_tracing(request))
    shapes = dynamic_shapes(model, request.axes, args, kwargs)
    program = torch.onnx.export(
        as_captured_for_onnx(model, args, kwargs, shapes),
        args,
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=_opset(model, request),
        input_names=request.input_names,
        output_names=request.output_names,
        verbose=False,
        optimize=True,  # as newer versions of torch than 2.6 do by themselves
    )
    assert program is not None
    name_axes_(program.model, request.axes)
    return program.model


def _opset(model: nn.Module, request: ExportRequest) -> int | None:
    """The operator set asked for; for bfloat16 at least the first whose Conv takes it."""
    if request.opset is None and any(
        parameter.dtype is torch.bfloat16 for parameter in model.parameters()
    ):
        return _BFLOAT16_OPSET
    return request.opset


def dynamic_shapes(
    model: nn.Module,
    axes: Sequence[Mapping[int, Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any] | None:
    """The dynamic axes of each tensor among a forward's arguments, as torch.export takes them.

    That is in the structure of the arguments; ``None`` where no axis is dynamic.
    """
    if not any(axes):
        return None
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    remaining = iter(dynamic_axes(axes))
    each = [(next(remaining) or None) if isinstance(leaf, Tensor) else None for leaf in leaves]
    return cast("dict[str, Any]", pytree.tree_unflatten(each, spec))
