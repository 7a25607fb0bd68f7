"""Export a patched model to ONNX, check it in ONNX Runtime, and only then put the file in place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from coordconv_patch.arguments import (
    check_example_inputs,
    check_flag,
    check_names,
    check_number,
    check_path,
)
from coordconv_patch.display.progress import Progress
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export.auto_lowering import check_lowering
from coordconv_patch.export.autotune import Trial
from coordconv_patch.export.axes import ExportRequest, check_axes, inputs_to_check
from coordconv_patch.export.exporters import check_exporter, evaluation_copy
from coordconv_patch.export.graph_maker import GraphMaker
from coordconv_patch.export.graph_passes.vocabulary import (
    coordinate_bytes,
    coordinate_growth,
    coordinate_nodes,
)
from coordconv_patch.export.model_file import write_model
from coordconv_patch.export.opset import check_opset, opset_of
from coordconv_patch.export.report import ExportReport
from coordconv_patch.export.targets import target_named
from coordconv_patch.files.atomic import obstacle_to_writing, replacement
from coordconv_patch.folding.batch_norms import fold_batch_norms_
from coordconv_patch.followers.follower import followers_of
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.given_maps import given_blocks
from coordconv_patch.layers.window import Window
from coordconv_patch.left_behind.watch import check_left_behind
from coordconv_patch.patching.placed_model import PLACES, PlacedModel
from coordconv_patch.running.inputs import (
    check_has_values,
    check_is_module,
    check_not_scripted,
    in_signature_order,
)
from coordconv_patch.running.wrappers import unwrapped
from coordconv_patch.runtime.providers import working_providers
from coordconv_patch.verification.check import Check
from coordconv_patch.verification.verify import Verifier

__all__ = ["export_onnx"]


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
    places: bool = False,
    target: str = "onnxruntime",
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
        opset: ONNX operator set, from 7 to the newest that ONNX Runtime reads; ``None``: the
            target's, or the exporter's choice. Below 18, torch's newer exporter cannot write every
            model; ``exporter="auto"`` then takes the other, up to 23, and the report says so.
        input_names: Names of the graph's inputs; ``None``: the forward's argument names.
        output_names: Names of the graph's outputs.
        exporter: ``"dynamo"`` (torch.export), ``"torchscript"``, or ``"auto"``: the
            first, and where that fails the second.
        providers: Execution providers to check on; ``None``: those that work here.
        tolerance: Largest difference allowed, relative to the largest output; three
            times the model's own float32 rounding noise is allowed too.
        disabled_optimizers: ONNX Runtime graph optimizers to leave out in the check.
        places: The graph takes one more input, ``places`` of shape (N, 2, 3), which tells the
            part of a larger picture that each sample is, see :func:`coordconv_patch.places`;
            one file then serves all tiles of a picture. Fed nothing for it, the file takes
            samples for whole pictures.
        target: What the file is meant for: ``"onnxruntime"``, ``"openvino"``, ``"opencv"``,
            ``"tensorrt"``, ``"ncnn"``, ``"mnn"``, ``"litert"``, ``"coreml"``, ``"web"``, or
            ``"portable"``: ``Conv(x) + initializer``, which any runtime takes. It decides about
            forms, constants and graph passes, see :mod:`coordconv_patch.export.targets` and
            docs/runtimes.md. The file is checked in ONNX Runtime, whatever the target.

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
    check_not_scripted(
        model, ExportError, "export the model that it was made of, or call torch.onnx.export"
    )
    check_has_values(model)
    model = unwrapped(model)  # torch.jit.trace refuses what torch.compile gives
    check_example_inputs(example_inputs, optional=False)
    check_flag("dynamic_batch", dynamic_batch)
    check_flag("dynamic_size", dynamic_size)
    check_names("input_names", input_names)
    check_names("output_names", output_names)
    check_exporter(exporter)
    check_opset(opset, exporter)
    check_number("tolerance", tolerance)
    check_names("disabled_optimizers", disabled_optimizers)
    check_flag("places", places)
    check_left_behind(model)
    working = working_providers(providers)
    check_lowering(lowering, dynamic_size)
    aim = target_named(target)
    aim.check(lowering, dynamic_batch, _computed_for(model, dynamic_size, places))
    if places and lowering != "auto":
        raise ArgumentError(
            f"lowering={lowering!r} with places=True: coordinates of places have one form, leave "
            "lowering out"
        )
    _check_followed(model, lowering, dynamic_size)
    _check_no_maps(model)
    placed = PlacedModel(model) if places else None
    if placed is None:
        _check_no_places(model)
    example_inputs = in_signature_order(model, example_inputs)
    request = ExportRequest(
        example_inputs,
        dynamic_batch,
        dynamic_size,
        aim.opset if opset is None else opset,
        [*input_names, PLACES] if places and input_names else input_names,
        output_names,
        placed.ndim if placed else 0,
    )
    with replacement(path, ExportError) as temporary, Progress("lowering", 3) as progress:
        folded_model = evaluation_copy(model)
        folded = fold_batch_norms_(folded_model)
        is_asked_for = lowering not in ("auto", "autotune")
        maker = GraphMaker(folded_model, request, exporter, working, aim, is_asked_for)
        trials: tuple[Trial, ...] = ()
        if lowering == "autotune":
            trials, choose = maker.tuned(disabled_optimizers)
        else:
            choose = maker.rule(lowering)
        progress.step()
        progress.describe("exporting")
        graph = maker.make(choose)
        axes = check_axes(request, graph.model)
        files = write_model(graph.model, temporary)
        progress.step()
        progress.describe("verifying")
        checked = placed or model
        verifier = Verifier(
            checked,
            temporary,
            providers=working,
            tolerance=tolerance,
            disabled_optimizers=disabled_optimizers,
        )
        inputs = inputs_to_check(request, checked, traced=graph.exporter == "torchscript")
        checks = tuple(verifier.check(*pair) for pair in inputs)
        progress.step()
        return ExportReport(
            path=path,
            file_size=sum(file.stat().st_size for file in files),
            nodes=dict(Counter(node.op_type for node in graph.model.graph).most_common()),
            coord_constant_bytes=coordinate_bytes(graph.model.graph),
            lowerings=dict(graph.lowerings),
            coordinate_nodes=tuple(str(n.name) for n in coordinate_nodes(graph.model.graph)),
            trials=trials,
            folded_batch_norms=sum(bool(folding.convolution) for folding in folded),
            exporter=graph.exporter,
            opset=opset_of(graph.model),
            provider=working[0],
            dynamic_axes=axes,
            checks=checks,
            notes=(
                *graph.notes,
                *aim.notes_on(dynamic_batch),
                *_notes_on(path, files, checks, verifier, working[0]),
            ),
            windows=_sites_by_window(model),
            refusals=graph.refusals,
            target=aim.name,
            growth=coordinate_growth(graph.model.graph),
        )


def _computed_for(model: nn.Module, dynamic_size: bool, places: bool) -> str:
    """The argument, or what else it is, for which a graph computes coordinates; "" if none does."""
    if dynamic_size:
        return "dynamic_size=True"
    if places:
        return "places=True"
    followed = sorted({follower.kind for _, follower in followers_of(model)})
    return f"a model that follows its {' and '.join(followed)}" if followed else ""


def _sites_by_window(model: nn.Module) -> dict[Window, tuple[str, ...]]:
    sites: dict[Window, tuple[str, ...]] = {}
    for name, layer in coord_layers(model).items():
        window = layer.coords.window
        if window is not None:
            sites[window] = (*sites.get(window, ()), name)
    return sites


def _check_no_places(model: nn.Module) -> None:
    """Check that no places hold, which a file would not have.

    Raises:
        ExportError: If some do.
    """
    for name, layer in coord_layers(model).items():
        if layer._places is not None and layer._places.now() is not None:
            raise ExportError(
                f"places hold for {name}, and a file without them would compute something else: "
                "export with places=True, or after set_places_(model, None), or for one part of a "
                "picture after set_window_(model, window)"
            )


def _check_no_maps(model: nn.Module) -> None:
    """Check that no maps are needed, which a file could not be given.

    Raises:
        ExportError: If some are.
    """
    for name, layer in coord_layers(model).items():
        if blocks := given_blocks(layer):
            raise ExportError(
                f"{name} has channels {blocks[0]} that come with each call, which an ONNX file "
                "cannot be given yet: export the model by torch.export, with the maps as inputs"
            )


def _check_followed(model: nn.Module, lowering: str, dynamic_size: bool) -> None:
    """Check that a file can hold what a model follows: in one form, and at one size.

    Raises:
        ArgumentError: If more was asked for.
    """
    kinds = {follower.kind for _, follower in followers_of(model)} - {"whole regions"}
    if not kinds:
        return
    followed = f"for a model that follows its {' and '.join(sorted(kinds))}"
    if lowering != "auto":
        raise ArgumentError(
            f"lowering={lowering!r} {followed}: coordinates of places have one form, leave "
            "lowering out"
        )
    if dynamic_size:
        raise ArgumentError(
            f"dynamic_size=True {followed}: its places are exported for the sizes of the example's "
            "pictures; export one file for each size"
        )


def _notes_on(
    path: Path, files: Sequence[Path], checks: Sequence[Check], verifier: Verifier, provider: str
) -> Iterator[str]:
    if not any(check.detections is None or check.detections for check in checks):
        yield (
            "the model detects nothing on the example inputs, so no detection was compared: pass a "
            "picture on which it does"
        )
    if path.is_symlink() and len(files) > 1:
        yield (
            f"{path} is a symbolic link, through which ONNX Runtime does not load weights that "
            f"lie beside a graph: load {os.path.realpath(path)}"
        )
    if verifier.runs_bfloat16_in_float32:
        yield f"{provider} does not compute in bfloat16, so the check ran the graph in float32"


def _check_path(path: Path) -> None:
    if path.suffix != ".onnx":
        raise ArgumentError(f"path={str(path)!r}: write a file name that ends in .onnx")
    obstacle = obstacle_to_writing(path)
    if obstacle:
        raise ArgumentError(obstacle)
