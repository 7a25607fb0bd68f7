"""The dynamic axes of an export: which they are, whether the graph has them, inputs to try them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.errors import ArgumentError, ExportError, PatchError
from coordconv_patch.lowering.unknown_zero import ZERO
from coordconv_patch.patching.placed_model import places_to_try, whole_picture, with_places
from coordconv_patch.running.inputs import (
    describe_inputs,
    split_inputs,
    takes_image_list,
    tensors_in,
)
from coordconv_patch.running.one_more_argument import with_argument
from coordconv_patch.verification.torch_run import TorchRun, run_torch

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["ExportRequest", "batch_size", "check_axes", "inputs_for_tracing", "inputs_to_check"]

_SIZE_STEP = 32
"""Other sizes to check a dynamic graph at differ by multiples of this: strides rarely exceed it."""


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of one export but the model, checked.

    Attributes:
        example_inputs: Those of the model itself.
        places: Number of dimensions of the places that the graph takes as its last input; 0: none.
        zero: Whether its last input is a zero, see :mod:`coordconv_patch.lowering.unknown_zero`.
        axes: The names of the dynamic axes of each input tensor, in pytree order.
    """

    example_inputs: Any
    dynamic_batch: bool = True
    dynamic_size: bool = False
    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    places: int = 0
    zero: bool = False
    axes: tuple[dict[int, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        axes = dynamic_axes(self.example_inputs, self.dynamic_batch, self.dynamic_size)
        if self.places:
            axes.append({0: "batch"} if self.dynamic_batch else {})
        if self.zero:
            axes.append({})
        object.__setattr__(self, "axes", tuple(axes))

    @property
    def is_dynamic(self) -> bool:
        return any(self.axes)

    def with_zero(self) -> ExportRequest:
        """The same with one more input, the zero."""
        names = [*self.input_names, ZERO] if self.input_names else self.input_names
        return replace(self, zero=True, input_names=names)


def dynamic_axes(
    example_inputs: Any, dynamic_batch: bool, dynamic_size: bool
) -> list[dict[int, str]]:
    """Dynamic axes of each input tensor, in pytree order.

    Tensors whose first length is that of the first tensor are batched, unless they
    stand in a list of images (C, H, W), as detectors take them.
    """
    args, kwargs = split_inputs(example_inputs)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise ArgumentError(f"example_inputs hold no tensor ({describe_inputs(example_inputs)})")
    image_list = takes_image_list(example_inputs)
    if image_list and dynamic_batch:
        raise ArgumentError(
            "the model takes a list of images, whose number a graph fixes: pass dynamic_batch=False"
        )
    axes: list[dict[int, str]] = []
    batch = batch_size(example_inputs)
    for tensor in tensors:
        names: dict[int, str] = {}
        batched = not image_list and tensor.dim() > 0 and len(tensor) == batch
        if dynamic_batch and batched:
            names[0] = "batch"
        spatial = tensor.dim() - (1 if image_list else 2)
        if dynamic_size and 1 <= spatial <= 3 and tensor.is_floating_point():
            sizes = ("depth", "height", "width")[3 - spatial :]
            first = tensor.dim() - spatial
            names |= {first + index: name for index, name in enumerate(sizes)}
        axes.append(names)
    if dynamic_size and not any(len(names) > dynamic_batch for names in axes):
        raise ArgumentError("dynamic_size=True, but no input is an image (N, C, H, W)")
    return axes


def batch_size(example_inputs: Any) -> int:
    """First length of the first tensor that has axes; 1 if none has."""
    return next((len(tensor) for tensor in tensors_in(example_inputs) if tensor.dim()), 1)


def check_axes(request: ExportRequest, model: onnx_ir.Model) -> dict[str, dict[int, str]]:
    """The graph's dynamic axes; all that were asked for must be among them."""
    dynamic: dict[str, dict[int, str]] = {}
    values = [value for value in model.graph.inputs if not value.is_initializer()]
    for value, wanted in zip(values, request.axes, strict=False):
        axes = {
            index: dim.value or "?"
            for index, dim in enumerate(value.shape or ())
            if not isinstance(dim, int)
        }
        fixed = [name for index, name in wanted.items() if index not in axes]
        if fixed:
            argument = "dynamic_batch" if "batch" in fixed else "dynamic_size"
            raise ExportError(
                f"the {' and '.join(fixed)} of input {value.name!r} came out fixed, although asked "
                f"to be dynamic: the model's code depends on it. Pass {argument}=False"
            )
        dynamic[str(value.name)] = axes
    return {name: axes for name, axes in dynamic.items() if axes}


def inputs_for_tracing(request: ExportRequest) -> Any:
    """The example inputs, with a batch of at least two if the batch is dynamic.

    torch.export takes a length of one for a constant.
    """
    inputs = request.example_inputs
    if request.dynamic_batch and batch_size(inputs) == 1:
        inputs = _with_batch(request, 2)
    if request.zero:
        return with_argument(inputs, ZERO, torch.zeros((), device=tensors_in(inputs)[0].device))
    return _placed(request, inputs)


def _placed(request: ExportRequest, inputs: Any) -> Any:
    """The same inputs and, where the graph takes them, places that differ from sample to sample."""
    if not request.places:
        return inputs
    return with_places(inputs, places_to_try(request.places, batch_size(inputs), inputs))


def _with_batch(request: ExportRequest, batch: int) -> Any:
    """The example inputs repeated and cut to a batch size; copies are mirrored, so they differ."""

    def resize(tensor: Tensor) -> Tensor:
        copies = [tensor if index % 2 == 0 else _mirrored(tensor) for index in range(batch)]
        return torch.cat(copies)[:batch].contiguous()

    return _map_inputs(request, lambda tensor, axes: resize(tensor) if 0 in axes else tensor)


def _mirrored(tensor: Tensor) -> Tensor:
    """Images turned left to right; what is not images as it is."""
    return tensor.flip(-1) if tensor.dim() > 1 and tensor.is_floating_point() else tensor


def _with_size(request: ExportRequest, steps: Sequence[int]) -> Any:
    """The example inputs with each spatial axis longer by a number of steps of 32 pixels."""

    def resize(tensor: Tensor, axes: dict[int, str]) -> Tensor:
        spatial = [index for index, name in axes.items() if name != "batch"]
        for step, index in zip(steps[-len(spatial) :], spatial, strict=False):
            extra = tensor.flip(index)
            while extra.shape[index] < step * _SIZE_STEP:
                extra = torch.cat((extra, extra), dim=index)
            tensor = torch.cat((tensor, extra.narrow(index, 0, step * _SIZE_STEP)), dim=index)
        return tensor.contiguous()

    return _map_inputs(request, resize)


def _map_inputs(request: ExportRequest, change: Callable[[Tensor, dict[int, str]], Tensor]) -> Any:
    leaves, spec = pytree.tree_flatten(request.example_inputs)
    axes = iter(request.axes)
    return pytree.tree_unflatten(
        [change(leaf, next(axes)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )


def inputs_to_check(
    request: ExportRequest, model: nn.Module, *, traced: bool
) -> list[tuple[Any, TorchRun]]:
    """The example and others of other contents and sizes, each with what torch gives on it.

    A trace knows the example's way through the code only, so a ``traced`` graph is tried on
    another content even if no axis is dynamic. Where the graph takes places, the model is the
    placed one.
    """
    example = _placed(request, request.example_inputs)
    checks = [(example, run_torch(model, example))]
    if request.places:
        whole = with_places(request.example_inputs, whole_picture(request.places, example))
        checks.append((whole, run_torch(model, whole)))
    if request.dynamic_batch:
        own = batch_size(request.example_inputs)
        for batch in [batch for batch in (1, 3) if batch != own]:
            other = _placed(request, _with_batch(request, batch))
            run = _run_or_none(model, other)
            if run is None:
                raise ExportError(
                    "dynamic_batch=True, but the torch model itself does not run on "
                    f"{describe_inputs(other)}: pass dynamic_batch=False"
                )
            checks.append((other, run))
    if request.dynamic_size:
        sizes = [_placed(request, _with_size(request, steps)) for steps in ((1, 1, 2), (2, 2, 1))]
        runs = [(other, run) for other in sizes if (run := _run_or_none(model, other)) is not None]
        if not runs:
            raise ExportError(
                "dynamic_size=True, but the torch model itself runs at no other size "
                f"(tried {', '.join(describe_inputs(other) for other in sizes)}): pass "
                "dynamic_size=False"
            )
        checks += runs
    if traced and len(checks) == 1:
        other = _placed(request, pytree.tree_map_only(Tensor, _mirrored, request.example_inputs))
        run = _run_or_none(model, other)
        checks += [(other, run)] if run is not None else []
    return checks


def _run_or_none(model: nn.Module, inputs: Any) -> TorchRun | None:
    try:
        return run_torch(model, inputs)
    except PatchError:
        return None
