"""Export a patched model to ONNX, check it in ONNX Runtime, and only then put the file in place."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import onnx_ir
from torch import Tensor, nn
from tqdm.auto import tqdm

from coordconv_patch.atomic import obstacle_to_writing, replacing
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export.axes import (
    ExportRequest,
    batch_size,
    check_axes,
    inputs_to_check,
)
from coordconv_patch.export.exporters import write_graph
from coordconv_patch.export.ordering import order_additions_
from coordconv_patch.export.providers import CPU, working_providers
from coordconv_patch.export.report import ExportReport
from coordconv_patch.export.verify import Check, Verifier, tensors_in
from coordconv_patch.inputs import check_is_module, in_signature_order
from coordconv_patch.passes.fold import fold_batch_norms_
from coordconv_patch.passes.lower import LOWERINGS, Lowering, lower_

__all__ = [
    "export_onnx",
]


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
    Detections are matched one to one, see :func:`coordconv_patch.verify_onnx`.

    Args:
        model: A patched model; one without coordinates is exported as it is.
        path: The file to write, ending in ``.onnx``.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). A detector of torchvision takes a list of images, each
            (C, H, W): ``[image]``; best a picture on which it finds something.
        dynamic_batch: The first axis of every batched input is dynamic. A list of
            images has none: its number is fixed, so pass ``False``.
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
    check_is_module(model)
    working = working_providers(providers)
    choose = _lowering_rule(lowering, working[0], dynamic_batch, dynamic_size)
    example_inputs = in_signature_order(model, example_inputs)
    request = ExportRequest(
        model, example_inputs, dynamic_batch, dynamic_size, opset, input_names, output_names
    )
    progress = tqdm(total=3, desc="lowering", delay=1.0, disable=None, leave=False)
    with replacing(path) as temporary, progress:
        lowered_model = _evaluation_copy(model)
        folded = fold_batch_norms_(lowered_model)
        lowered = lower_(lowered_model, example_inputs, choose)
        progress.set_description("exporting")
        progress.update()
        request.model = lowered_model
        used, notes = write_graph(request, temporary, exporter)
        proto = _in_order(temporary)
        axes = check_axes(request, proto)
        progress.set_description("verifying")
        progress.update()
        verifier = Verifier(
            temporary,
            model,
            providers=working,
            tolerance=tolerance,
            disabled_optimizers=disabled_optimizers,
        )
        inputs = inputs_to_check(request, model, traced=used == "torchscript")
        checks = tuple(verifier.check(*pair) for pair in inputs)
        notes += _notes_on(checks)
        progress.update()
        return ExportReport(
            path=path,
            file_size=sum(file.stat().st_size for file in temporary.parent.iterdir()),
            nodes=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
            coord_constant_bytes=_constant_bytes(
                proto, lowered.constants, batch_size(tensors_in(example_inputs))
            ),
            lowerings=dict(lowered.lowerings),
            folded_batch_norms=sum(bool(folding.convolution) for folding in folded),
            exporter=used,
            opset=max(entry.version for entry in proto.opset_import if entry.domain == ""),
            provider=working[0],
            dynamic_axes=axes,
            checks=checks,
            notes=tuple(notes),
        )


def _in_order(path: Path) -> onnx.ModelProto:
    """Order the additions in a file that was just exported, and load it."""
    proto = onnx.load(path)
    weights_are_inside = len(list(path.parent.iterdir())) == 1
    if weights_are_inside:
        model = onnx_ir.from_proto(proto)
        if order_additions_(model.graph):
            proto = onnx_ir.to_proto(model)
            onnx.save(proto, path)
    return proto


def _notes_on(checks: Sequence[Check]) -> list[str]:
    if any(check.detections is None or check.detections for check in checks):
        return []
    return [
        "the model detects nothing on the example inputs, so no detection was compared: pass a "
        "picture on which it does"
    ]


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
    # With gradients, attention whose mask is trained (Swin, BEiT) takes another path through torch
    # than in the exporter's next step, which then meets strides that it cannot view.
    return copied.requires_grad_(False)


def _constant_bytes(proto: onnx.ModelProto, constants: Sequence[Tensor], batch: int) -> int:
    """Bytes of the initializers (and Constant nodes) that hold coordinate constants.

    Found by their values: exporters rename, merge and reshape initializers, and expand
    them to a fixed batch.
    """
    forms = [
        form.detach().cpu().numpy()
        for constant in constants
        for form in (constant, constant.expand(batch, *constant.shape[1:]))
    ]
    wanted = {_digest(form) for form in forms}
    lengths = {form.nbytes for form in forms}
    stored = list(proto.graph.initializer)
    stored += [
        attribute.t
        for node in proto.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in stored]
    return sum(
        array.nbytes for array in arrays if array.nbytes in lengths and _digest(array) in wanted
    )


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
