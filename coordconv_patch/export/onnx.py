"""Export a patched model to ONNX, check it in ONNX Runtime, and only then put the file in place."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn
from tqdm.auto import tqdm

from coordconv_patch.arguments import (
    check_example_inputs,
    check_flag,
    check_names,
    check_number,
    check_path,
)
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export.auto_lowering import MAX_GROWTH, Chooser, check_lowering
from coordconv_patch.export.autotune import Trial, autotune
from coordconv_patch.export.axes import (
    ExportRequest,
    batch_size,
    check_axes,
    inputs_to_check,
)
from coordconv_patch.export.exporters import evaluation_copy, write_graph
from coordconv_patch.export.external_weights import gather_weights
from coordconv_patch.export.graph_passes.carry_coordinates import carry_coordinates_
from coordconv_patch.export.graph_passes.compact_constants import compact_constants_
from coordconv_patch.export.graph_passes.compact_constants import (
    constant_bytes as count_constant_bytes,
)
from coordconv_patch.export.graph_passes.fold_scales import fold_scales_
from coordconv_patch.export.graph_passes.fuse_clips import fuse_clips_
from coordconv_patch.export.graph_passes.order_additions import (
    coordinate_nodes,
    is_read_once,
    order_additions_,
)
from coordconv_patch.export.opset import (
    check_exporter,
    check_opset,
    opset_of,
    require_opset,
)
from coordconv_patch.export.report import ExportReport
from coordconv_patch.files.atomic import obstacle_to_writing, replacing
from coordconv_patch.folding.batch_norms import fold_batch_norms_
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.window import Window
from coordconv_patch.left_behind.watch import check_left_behind
from coordconv_patch.lowering.lower import Lowered, lower_
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite, lowering_sites
from coordconv_patch.running.inputs import check_is_module, in_signature_order, tensors_in
from coordconv_patch.runtime.binding import BoundRun
from coordconv_patch.runtime.providers import CPU, make_session, working_providers
from coordconv_patch.verification.check import Check
from coordconv_patch.verification.differences import to_array
from coordconv_patch.verification.verify import Verifier

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
    lowering: str = "auto",
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
        path: The file to write, ending in ``.onnx``. Weights of more than 2 GB go into a file
            beside it, ``NAME.onnx.DIGEST.data``, which the file names.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). A detector of torchvision takes a list of images, each
            (C, H, W): ``[image]``; best a picture on which it finds something.
        dynamic_batch: The first axis of every batched input is dynamic. A list of
            images has none: its number is fixed, so pass ``False``.
        dynamic_size: The spatial axes of images are dynamic; coordinates are then
            computed in the graph. Otherwise they are constants.
        lowering: The form of the coordinate branch: ``"channels"``, ``"map"``,
            ``"branch"``, ``"separable"``, ``"computed"``, see
            :mod:`coordconv_patch.lowering.registry`; ``"auto"`` takes what suits the provider and
            the axes, see :mod:`coordconv_patch.export.auto_lowering`; ``"autotune"`` times the
            candidates for each group of sites on the provider, with the example's batch
            size, and takes the fastest.
        opset: ONNX operator set, from 7 on; ``None``: the exporter's choice. Below 18, torch's
            newer exporter cannot write every model; ``exporter="auto"`` then takes the other.
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
            the file and torch disagree, or the file cannot be written; nothing is left behind.
        PatchError: If other code has left coordinates behind.
    """
    path = check_path("path", path)
    _check_path(path)
    check_is_module(model)
    check_example_inputs(example_inputs, optional=False)
    check_flag("dynamic_batch", dynamic_batch)
    check_flag("dynamic_size", dynamic_size)
    check_names("input_names", input_names)
    check_names("output_names", output_names)
    check_exporter(exporter)
    check_opset(opset, exporter)
    check_number("tolerance", tolerance)
    check_names("disabled_optimizers", disabled_optimizers)
    check_left_behind(model)
    working = working_providers(providers)
    check_lowering(lowering, dynamic_size)
    example_inputs = in_signature_order(model, example_inputs)
    request = ExportRequest(
        model, example_inputs, dynamic_batch, dynamic_size, opset, input_names, output_names
    )
    progress = tqdm(total=3, desc="lowering", delay=1.0, disable=None, leave=False)
    with replacing(path, ExportError) as temporary, progress:
        folded_model = evaluation_copy(model)
        folded = fold_batch_norms_(folded_model)
        writer = _Writer(folded_model, request, exporter, working, lowering in ("auto", "autotune"))
        trials: tuple[Trial, ...] = ()
        if lowering == "autotune":
            trials, choose = writer.tuned(disabled_optimizers)
        else:
            choose = writer.rule(lowering)
        progress.set_description("exporting")
        progress.update()
        written = writer.write(temporary, choose)
        used, proto, notes = written.exporter, written.proto, written.notes
        require_opset(proto, opset)
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
        if path.is_symlink() and len(list(temporary.parent.iterdir())) > 1:
            notes.append(
                f"{path} is a symbolic link, through which ONNX Runtime does not load weights that "
                f"lie beside a graph: load {os.path.realpath(path)}"
            )
        if verifier.runs_bfloat16_in_float32:
            notes.append(
                f"{working[0]} does not compute in bfloat16, so the check ran the graph in float32"
            )
        progress.update()
        return ExportReport(
            path=path,
            file_size=sum(file.stat().st_size for file in temporary.parent.iterdir()),
            nodes=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
            coord_constant_bytes=written.constant_bytes,
            lowerings=dict(written.lowerings),
            coordinate_nodes=written.coordinate_nodes,
            trials=trials,
            folded_batch_norms=sum(bool(folding.convolution) for folding in folded),
            exporter=used,
            opset=opset_of(proto),
            provider=working[0],
            dynamic_axes=axes,
            checks=checks,
            notes=tuple(notes),
            windows=_sites_by_window(model),
        )


@dataclass(frozen=True)
class _Written:
    """A graph in a file."""

    exporter: str
    notes: list[str]
    lowerings: dict[str, str]
    proto: onnx.ModelProto
    constant_bytes: int
    coordinate_nodes: tuple[str, ...]


@dataclass
class _Writer:
    """Writes the graph of one model, with its batch norms folded, in any lowering."""

    folded: nn.Module
    request: ExportRequest
    exporter: str
    providers: tuple[str, ...]
    fuses: bool
    """Whether sums and clips may be rewritten for the CPU provider's fusions."""

    def write(self, path: Path, choose: Callable[[LoweringSite], str]) -> _Written:
        """Lower, export and rewrite; the model is left as it was."""
        request = self.request
        request.model = copy.deepcopy(self.folded)
        lowered = lower_(request.model, request.example_inputs, choose)
        used, notes = write_graph(request, path, self.exporter)
        batch = batch_size(tensors_in(request.example_inputs))
        fuse = self.fuses and self.providers[0] == CPU
        return _Written(used, notes, lowered.lowerings, *_rewritten(path, lowered, batch, fuse))

    def rule(self, lowering: str) -> Callable[[LoweringSite], str]:
        """The lowering of each site: the one asked for, or by the rule of ``"auto"``."""
        request = self.request
        if lowering == "auto":
            weights = sum(t.numel() * t.element_size() for t in self.folded.parameters())
            return Chooser(
                self.providers[0],
                request.dynamic_batch,
                request.dynamic_size,
                map_budget=MAX_GROWTH * weights,
            )
        if LOWERINGS[lowering].expands_to_batch and not request.dynamic_batch:
            # With a fixed batch exporters fold the branch into the map, with their own rounding.
            lowering = "map"
        return lambda site: lowering

    def tuned(
        self, disabled_optimizers: Sequence[str]
    ) -> tuple[tuple[Trial, ...], Callable[[LoweringSite], str]]:
        """The trials on the provider, and the lowerings that were the fastest."""
        request = self.request
        arrays = [to_array(tensor) for tensor in tensors_in(request.example_inputs)]

        def make_run(lowerings: Mapping[str, str]) -> BoundRun:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trial.onnx"
                self.write(path, lambda site: lowerings[site.name])
                session = make_session(
                    path,
                    self.providers,
                    disabled_optimizers=disabled_optimizers,
                    rests_between_runs=True,
                )
            return BoundRun(session, arrays)

        tuning = autotune(
            lowering_sites(copy.deepcopy(self.folded), request.example_inputs),
            self.rule("auto"),
            make_run,
            dynamic_batch=request.dynamic_batch,
        )
        return tuning.trials, lambda site: tuning.lowerings[site.name]


def _rewritten(
    path: Path, lowered: Lowered, batch: int, fuse: bool
) -> tuple[onnx.ModelProto, int, tuple[str, ...]]:
    """Rewrite a file that was just exported for the runtime, and load it.

    Args:
        path: The file.
        lowered: What the lowering stored.
        batch: Batch size of the example.
        fuse: Whether to prepare for the fusions of ONNX Runtime's CPU provider.

    Returns:
        The graph, the bytes of coordinate constants in it, and the names of the nodes that
        compute with coordinates alone.
    """
    weights_beside = gather_weights(path)
    model = onnx_ir.load(path)
    graph = model.graph
    if weights_beside is not None:
        stored = count_constant_bytes(graph, lowered.constants, batch)
        return onnx.load(path), stored, coordinate_nodes(graph)
    if fuse and carry_coordinates_(graph):
        RemoveUnusedNodesPass()(model)
    fold_scales_(graph)
    order_additions_(graph)
    if fuse:
        fuse_clips_(graph)
    stored = compact_constants_(graph, lowered.constants, batch, lowered.kernels)
    names = coordinate_nodes(graph)
    _forget_origins(graph, names)
    proto = onnx_ir.to_proto(model)
    onnx.save(proto, path)
    return proto, stored, names


def _forget_origins(graph: onnx_ir.Graph, names: Collection[str]) -> None:
    """Drop what torch notes of the origin of nodes that coordinates added to a graph.

    That is a stack trace and the convolution's place in the model, which the plain convolution
    beside has too: most of what coordinates would add to a small network's file.

    Args:
        graph: The graph.
        names: Of the nodes that compute with coordinates alone.
    """
    for node in graph:
        if node.name in names or _is_addition_of_ours(node):
            node.metadata_props.clear()
            for value in node.inputs:
                if value is not None and value.is_initializer() and is_read_once(value):
                    value.metadata_props.clear()


def _is_addition_of_ours(node: onnx_ir.Node) -> bool:
    """Whether a patched layer's forward made the node; the residual additions are the model's."""
    modules = node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
    return node.op_type == "Add" and f"{CoordConvNd.__module__}." in modules


def _sites_by_window(model: nn.Module) -> dict[Window, tuple[str, ...]]:
    found: dict[Window, tuple[str, ...]] = {}
    for name, layer in coord_layers(model).items():
        window = layer.coords.window
        if window is not None:
            found[window] = (*found.get(window, ()), name)
    return found


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
