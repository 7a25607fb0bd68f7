"""Export a patched model to ONNX, check it in ONNX Runtime, and only then put the file in place."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from coordconv_patch.atomic import obstacle_to_writing, replacing
from coordconv_patch.errors import ArgumentError, ExportError, PatchError
from coordconv_patch.export.providers import CPU, working_providers
from coordconv_patch.export.verify import Check, tensors_in, verify_onnx
from coordconv_patch.passes.lower import LOWERINGS, Lowering, lower_
from coordconv_patch.sites import (
    describe_inputs,
    evaluating,
    in_signature_order,
    run_model,
    split_inputs,
)

__all__ = ["ExportReport", "export_onnx"]

_MAX_PROTOBUF_BYTES = 2_000_000_000
"""ONNX files are protobuf messages, which end at 2 GiB; larger weights go to a file beside."""

_SIZE_STEP = 32
"""Other sizes to check a dynamic graph at differ by multiples of this: strides rarely exceed it."""


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_onnx` wrote, and how it was checked. ``print(report)`` shows a table.

    Attributes:
        path: The ONNX file.
        file_size: Its size in bytes, with the weights beside it if there are such.
        nodes: Number of nodes by operator.
        coord_constant_bytes: Bytes of coordinate constants in the graph.
        lowerings: The lowering of each patched site, by site name.
        exporter: ``"dynamo"`` (torch.export) or ``"torchscript"``.
        opset: The ONNX operator set.
        provider: The execution provider that the check ran on.
        dynamic_axes: Named axes of each graph input, by input name.
        checks: The comparisons with torch.
        notes: What else happened; a fallback to the other exporter, say.
    """

    path: Path
    file_size: int
    nodes: dict[str, int]
    coord_constant_bytes: int
    lowerings: dict[str, str]
    exporter: str
    opset: int
    provider: str
    dynamic_axes: dict[str, dict[int, str]]
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst_difference(self) -> float:
        """Largest difference from torch in any check, relative to the largest output."""
        return max(check.difference for check in self.checks)

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=str(self.path), title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        kinds = Counter(self.lowerings.values())
        forms = ", ".join(f"{count} as {kind}" for kind, count in kinds.items())
        table.add_row("file", f"{self.file_size / 1e6:.2f} MB, opset {self.opset}")
        table.add_row("exporter", self.exporter)
        table.add_row("nodes", ", ".join(f"{count} {op}" for op, count in self.nodes.items()))
        table.add_row("coordinate sites", forms or "none")
        table.add_row("coordinate constants", f"{self.coord_constant_bytes:,} bytes")
        table.add_row(
            "dynamic axes",
            "; ".join(
                f"{name}: {', '.join(axes.values())}" for name, axes in self.dynamic_axes.items()
            )
            or "none",
        )
        table.add_row("checked on", self.provider)
        for check in self.checks:
            table.add_row(f"  {check.inputs}", f"differs by {check.difference:.2g}")
        for note in self.notes:
            table.add_row("note", note)
        return table

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


@dataclass
class _Request:
    """The arguments of one export, checked."""

    model: nn.Module
    example_inputs: Any
    dynamic_batch: bool
    dynamic_size: bool
    opset: int | None
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    axes: list[dict[int, str]] = field(init=False)
    """Dynamic axes of each input tensor, in pytree order."""

    def __post_init__(self) -> None:
        self.axes = _dynamic_axes(self.example_inputs, self.dynamic_batch, self.dynamic_size)

    @property
    def is_dynamic(self) -> bool:
        return any(self.axes)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    lowering: Literal["auto", "channels", "map", "branch", "computed"] = "auto",
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto",
    providers: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    disabled_optimizers: Sequence[str] = (),
) -> ExportReport:
    """Export a model to ONNX in evaluation mode; verified in ONNX Runtime before it is written.

    The file is run on the example inputs, and with dynamic axes at other batch
    and image sizes, and compared with torch. It is put in place only if all agree.

    Args:
        model: A patched model; one without coordinates is exported as it is.
        path: The file to write, ending in ``.onnx``.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments).
        dynamic_batch: The first axis of every batched input is dynamic.
        dynamic_size: The spatial axes of images are dynamic; coordinates are then
            computed in the graph. Otherwise they are constants.
        lowering: The form of the coordinate branch: ``"channels"``, ``"map"``,
            ``"branch"``, ``"computed"``, see :mod:`coordconv_patch.passes.lower`;
            ``"auto"`` takes what suits the provider and the axes.
        opset: ONNX operator set; ``None``: the exporter's choice.
        input_names: Names of the graph's inputs; ``None``: the forward's argument names.
        output_names: Names of the graph's outputs.
        exporter: ``"dynamo"`` (torch.export), ``"torchscript"``, or ``"auto"``: the
            first, and where that fails the second.
        providers: Execution providers to check on; ``None``: those that work here.
        tolerance: Largest difference allowed, relative to the largest output; three
            times the model's own float32 rounding noise is allowed too.
        disabled_optimizers: ONNX Runtime graph optimizers to leave out in the check.

    Returns:
        What was written, and how far it is from torch.

    Raises:
        ArgumentError: If an argument is impossible, or arguments exclude each other.
        ExportError: If the export fails, an axis that was asked to be dynamic is not,
            or the file and torch disagree; nothing is left behind.
    """
    path = Path(path)
    _check_path(path)
    working = working_providers(providers)
    choose = _lowering_rule(lowering, working[0], dynamic_batch, dynamic_size)
    example_inputs = in_signature_order(model, example_inputs)
    request = _Request(
        model, example_inputs, dynamic_batch, dynamic_size, opset, input_names, output_names
    )
    progress = tqdm(total=3, desc="lowering", delay=1.0, disable=None, leave=False)
    with replacing(path) as temporary, progress:
        lowered_model = _evaluation_copy(model)
        lowered = lower_(lowered_model, _for_tracing(request), choose)
        progress.set_description("exporting")
        progress.update()
        request.model = lowered_model
        used, notes = _export(request, temporary, exporter)
        proto = onnx.load(temporary, load_external_data=False)
        axes = _check_axes(request, proto)
        progress.set_description("verifying")
        progress.update()
        checks = tuple(
            verify_onnx(
                temporary,
                model,
                inputs,
                providers=working,
                tolerance=tolerance,
                disabled_optimizers=disabled_optimizers,
            )
            for inputs in _inputs_to_check(request, model)
        )
        progress.update()
        return ExportReport(
            path=path,
            file_size=sum(file.stat().st_size for file in temporary.parent.iterdir()),
            nodes=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
            coord_constant_bytes=_constant_bytes(
                temporary, lowered.constants, _batch_size(tensors_in(example_inputs))
            ),
            lowerings=dict(lowered.lowerings),
            exporter=used,
            opset=max(entry.version for entry in proto.opset_import if entry.domain == ""),
            provider=working[0],
            dynamic_axes=axes,
            checks=checks,
            notes=tuple(notes),
        )


def _check_path(path: Path) -> None:
    if path.suffix != ".onnx":
        raise ArgumentError(f"path={str(path)!r}: write a file name that ends in .onnx")
    obstacle = obstacle_to_writing(path)
    if obstacle:
        raise ArgumentError(obstacle)


def _lowering_rule(
    lowering: str, provider: str, dynamic_batch: bool, dynamic_size: bool
) -> Callable[[str], Lowering]:
    """The lowering of each site: the one asked for, or by the rule of ``"auto"``.

    With dynamic sizes coordinates must be computed. On the CPU the branch stays a
    convolution, whose blocked layout the sum keeps; but with a fixed batch every
    exporter folds that convolution into the map anyway. On GPUs the map's addition
    fuses with the convolution.
    """
    if lowering not in ("auto", *LOWERINGS):
        raise ArgumentError(
            f"lowering={lowering!r}: write 'auto', {', '.join(map(repr, LOWERINGS))}"
        )
    if lowering == "auto":
        if dynamic_size:
            lowering = "computed"
        else:
            lowering = "branch" if provider == CPU and dynamic_batch else "map"
    if lowering == "branch" and not dynamic_batch:
        # With a fixed batch every exporter folds the branch into the map, with its own rounding.
        lowering = "map"
    if dynamic_size and lowering != "computed":
        raise ArgumentError(
            f"lowering={lowering!r} stores coordinates of one size, but dynamic_size=True: write "
            "lowering='computed' or 'auto'"
        )
    if lowering == "computed" and not dynamic_size:
        raise ArgumentError(
            "lowering='computed' derives coordinates from the size at run time, but the size is "
            "fixed: write dynamic_size=True, or another lowering"
        )
    return lambda site: cast(Lowering, lowering)


def _evaluation_copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ExportError(
            f"the model cannot be deep-copied, which an export needs: {error}"
        ) from error
    for module in copied.modules():  # not eval(): models of torch.export refuse it
        module.training = False
    return copied


# --- axes ---------------------------------------------------------------------------------------


def _dynamic_axes(
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
    image_list = bool(args) and isinstance(args[0], (list, tuple))
    if image_list and dynamic_batch:
        raise ArgumentError(
            "the model takes a list of images, whose number a graph fixes: pass dynamic_batch=False"
        )
    axes: list[dict[int, str]] = []
    batch = _batch_size(tensors)
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


def _batch_size(tensors: Sequence[Tensor]) -> int:
    """First length of the first tensor that has axes; 1 if none has."""
    return next((len(tensor) for tensor in tensors if tensor.dim()), 1)


def _check_axes(request: _Request, proto: onnx.ModelProto) -> dict[str, dict[int, str]]:
    """The graph's dynamic axes; all that were asked for must be among them."""
    found: dict[str, dict[int, str]] = {}
    initializers = {initializer.name for initializer in proto.graph.initializer}
    values = [value for value in proto.graph.input if value.name not in initializers]
    for value, wanted in zip(values, request.axes, strict=False):
        dims = value.type.tensor_type.shape.dim
        found[value.name] = {
            index: dim.dim_param or "?"
            for index, dim in enumerate(dims)
            if not dim.HasField("dim_value")
        }
        fixed = [name for index, name in wanted.items() if index not in found[value.name]]
        if fixed:
            raise ExportError(
                f"the {' and '.join(fixed)} of input {value.name!r} came out fixed, although asked "
                f"to be dynamic: the model's code depends on it. {_static_hint(fixed)}"
            )
    return {name: axes for name, axes in found.items() if axes}


def _static_hint(names: Sequence[str]) -> str:
    return f"Pass {'dynamic_batch' if 'batch' in names else 'dynamic_size'}=False"


def _for_tracing(request: _Request) -> Any:
    """The example inputs, with a batch of at least two if the batch is dynamic.

    torch.export takes a length of one for a constant.
    """
    if not request.dynamic_batch or _batch_size(tensors_in(request.example_inputs)) > 1:
        return request.example_inputs
    return _with_batch(request, 2)


def _with_batch(request: _Request, batch: int) -> Any:
    """The example inputs repeated and cut to a batch size; copies are mirrored, so they differ."""

    def resize(tensor: Tensor) -> Tensor:
        mirrored = tensor.flip(-1) if tensor.dim() > 1 and tensor.is_floating_point() else tensor
        copies = [tensor if index % 2 == 0 else mirrored for index in range(batch)]
        return torch.cat(copies)[:batch].contiguous()

    return _map_inputs(request, lambda tensor, axes: resize(tensor) if 0 in axes else tensor)


def _with_size(request: _Request, steps: Sequence[int]) -> Any:
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


def _map_inputs(request: _Request, change: Callable[[Tensor, dict[int, str]], Tensor]) -> Any:
    leaves, spec = pytree.tree_flatten(request.example_inputs)
    axes = iter(request.axes)
    return pytree.tree_unflatten(
        [change(leaf, next(axes)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )


def _inputs_to_check(request: _Request, model: nn.Module) -> list[Any]:
    """The example, and with dynamic axes other batch sizes and image sizes."""
    inputs = [request.example_inputs]
    if request.dynamic_batch:
        own = _batch_size(tensors_in(request.example_inputs))
        others = [_with_batch(request, batch) for batch in (1, 3) if batch != own]
        refused = [other for other in others if not _runs(model, other)]
        if refused:
            raise ExportError(
                "dynamic_batch=True, but the torch model itself does not run on "
                f"{describe_inputs(refused[0])}: pass dynamic_batch=False"
            )
        inputs += others
    if request.dynamic_size:
        other_sizes = [_with_size(request, steps) for steps in ((1, 1, 2), (2, 2, 1))]
        runnable = [other for other in other_sizes if _runs(model, other)]
        if not runnable:
            raise ExportError(
                "dynamic_size=True, but the torch model itself runs at no other size "
                f"(tried {', '.join(describe_inputs(other) for other in other_sizes)}): pass "
                "dynamic_size=False"
            )
        inputs += runnable
    return inputs


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with evaluating(model):
            run_model(model, inputs)
    except PatchError:
        return False
    return True


# --- the two exporters --------------------------------------------------------------------------


def _export(request: _Request, path: Path, exporter: str) -> tuple[str, list[str]]:
    """Write the graph with the exporter asked for; returns the one that did it, and notes."""
    if exporter not in ("auto", "dynamo", "torchscript"):
        raise ArgumentError(f"exporter={exporter!r}: write 'auto', 'dynamo' or 'torchscript'")
    if exporter == "torchscript":
        _export_torchscript(request, path)
        return "torchscript", []
    try:
        _export_dynamo(request, path)
    except Exception as error:
        if exporter == "dynamo":
            raise ExportError(_reason("torch.export", error, request)) from error
        for partial in path.parent.iterdir():
            partial.unlink()
        try:
            _export_torchscript(request, path)
        except ExportError as second:
            raise ExportError(f"{_reason('torch.export', error, request)}\n{second}") from error
        return "torchscript", [
            f"torch.export could not export it ({_root_cause(error)}); the TorchScript exporter did"
        ]
    return "dynamo", []


def _export_dynamo(request: _Request, path: Path) -> None:
    args, kwargs = split_inputs(_for_tracing(request))
    with _quiet():
        program = torch.onnx.export(
            request.model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(request, args, kwargs) if request.is_dynamic else None,
            opset_version=request.opset,
            input_names=request.input_names,
            output_names=request.output_names,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=_weight_bytes(request.model) > _MAX_PROTOBUF_BYTES)


def _dynamic_shapes(request: _Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Axis names in the structure of the forward's arguments, as torch.export wants them."""
    bound = inspect.signature(request.model.forward).bind(*args, **kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    axes = iter(request.axes)
    return pytree.tree_unflatten(
        [(next(axes) or None) if isinstance(leaf, Tensor) else None for leaf in leaves], spec
    )


def _export_torchscript(request: _Request, path: Path) -> None:
    args, kwargs = split_inputs(_for_tracing(request))
    names = list(request.input_names or _argument_names(request.model, args, kwargs, request.axes))
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _scriptable(request.model),
                (*args, kwargs) if kwargs else args,
                str(path),
                dynamo=False,
                opset_version=request.opset,
                input_names=names,
                output_names=request.output_names,
                dynamic_axes=dict(zip(names, request.axes, strict=False)),
            )
    except Exception as error:
        raise ExportError(_reason("the TorchScript exporter", error, request)) from error


class _Wrapped(nn.Module):
    """A GraphModule inside a plain module: the TorchScript exporter mistakes its ``graph``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _scriptable(model: nn.Module) -> nn.Module:
    return _Wrapped(model) if isinstance(model, torch.fx.GraphModule) else model


def _argument_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Sequence[Any]
) -> list[str]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    names = []
    for name, value in bound.items():
        count = len(tensors_in(value))
        names += [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
    return names if len(names) == len(axes) else [f"input_{index}" for index in range(len(axes))]


def _reason(tool: str, error: Exception, request: _Request) -> str:
    hint = ""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    if request.is_dynamic and any(w in text for w in ("ynamic", "onstraint", "pecializ")):
        hint = ". If the model's code depends on the batch or image size, pass " + (
            "dynamic_size=False" if request.dynamic_size else "dynamic_batch=False"
        )
    return f"{tool} cannot export the model: {text[:1500]}{hint}"


def _root_cause(error: BaseException) -> str:
    """The innermost reason in one line, without terminal codes: exporters wrap their errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:200]}"


class _quiet(warnings.catch_warnings):  # noqa: N801  # a context manager, named like a function
    """Without the exporters' warnings and log lines: the report says what matters."""

    def __enter__(self) -> Any:
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self._output = contextlib.ExitStack()
        self._output.enter_context(contextlib.redirect_stdout(io.StringIO()))
        self._output.enter_context(contextlib.redirect_stderr(io.StringIO()))
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered

    def __exit__(self, *exception: Any) -> None:
        self._output.close()
        logging.disable(self._level)
        super().__exit__(*exception)


# --- figures for the report ---------------------------------------------------------------------


def _weight_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _constant_bytes(path: Path, constants: Sequence[Tensor], batch: int) -> int:
    """Bytes of the initializers (and Constant nodes) that hold coordinate constants.

    Found by their values: exporters rename, merge and reshape initializers, and expand
    them to a fixed batch.
    """
    wanted = {
        _digest(form.detach().cpu().numpy())
        for constant in constants
        for form in (constant, constant.expand(batch, *constant.shape[1:]))
    }
    proto = onnx.load(path)
    stored = list(proto.graph.initializer)
    stored += [
        attribute.t
        for node in proto.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in stored]
    return sum(array.nbytes for array in arrays if _digest(array) in wanted)


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
