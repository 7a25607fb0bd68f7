"""Export: what the file computes, what the report says, and what a failure leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import errno
import logging
import os
import re
import resource
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
import torch
import torch.nn.functional as F
from concat_model import concatenating
from old_torch import BEFORE_2_9
from onnx_graphs import PADDED_3X3, banded_strip_bytes, flat_strip_bytes
from reference import concatenating_conv, paper_grid
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, CoordConvPatchError, ExportError
from coordconv_patch.export import model_file
from coordconv_patch.export import onnx as onnx_module
from coordconv_patch.export.axes import ExportRequest
from coordconv_patch.export.exporters import EXPORTERS as TORCHS
from coordconv_patch.export.exporters import Exporter, export_graph
from coordconv_patch.export.model_file import write_model
from coordconv_patch.layers.coord_layer import coord_layers

CPU = ["CPUExecutionProvider"]
EXPORTERS = ["dynamo", "torchscript"]
STORED = ["channels", "map", "branch", "separable"]


class Net(nn.Module):
    """Two convolutions, a batch norm between them; statistics that are not the initial ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.stem(x))))


def images(batch: int, height: int = 8, width: int = 12, seed: int = 7) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(generator=generator)
    return model


def fresh(make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def net() -> nn.Module:
    return filled(ccp.patch(fresh(), "all"))


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """ONNX Runtime as a user calls it, without the package."""
    session = ort.InferenceSession(str(path), providers=CPU)
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})


def assert_same(actual: np.ndarray, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected.detach()
    assert actual.shape == tuple(expected.shape)
    scale = expected.abs().max().item()
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=tolerance * scale)


def constants(path: Path) -> list[np.ndarray]:
    """Every floating-point tensor that the graph stores."""
    proto = onnx.load(path)
    stored = list(proto.graph.initializer)
    for node in proto.graph.node:
        stored += [a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in stored]
    return [array for array in arrays if array.dtype.kind == "f" and array.size > 1]


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


# --- each lowering by each exporter -------------------------------------------------------------

CASES = [(exporter, lowering) for exporter in EXPORTERS for lowering in [*STORED, "computed"]]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path, ccp.ExportReport, nn.Module]:
    exporter, lowering = request.param
    model = net()
    report = ccp.export_onnx(
        model,
        tmp_path_factory.mktemp("case") / "net.onnx",
        images(2),
        exporter=exporter,
        lowering=lowering,
        dynamic_size=lowering == "computed",
        providers=CPU,
    )
    return exporter, lowering, report.path, report, model


def test_the_file_computes_the_concatenating_model_at_any_batch(case: Any) -> None:
    _, _, path, _, model = case
    reference = concatenating(model)
    plain = ccp.unpatch(model, discard=True)
    for batch in (1, 2, 5):
        x = images(batch, seed=batch)
        (actual,) = run(path, x)
        assert_same(actual, reference(x))
        assert np.abs(actual - plain(x).detach().numpy()).max() > 0.1


def test_x_and_y_are_not_each_other_in_the_file(case: Any) -> None:
    _, _, path, _, model = case
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(swapped):
            parameter.copy_(parameter.flip(1))
    x = images(2)
    assert np.abs(run(path, x)[0] - concatenating(swapped)(x).detach().numpy()).max() > 0.1


def test_sizes_are_dynamic_where_computed_and_fixed_elsewhere(case: Any) -> None:
    _, lowering, path, report, model = case
    if lowering == "computed":
        reference = concatenating(model)
        for batch, height, width in ((2, 8, 12), (3, 9, 31), (1, 23, 5), (4, 50, 50)):
            x = images(batch, height, width)
            assert_same(run(path, x)[0], reference(x))
        assert set(report.dynamic_axes["x"]) == {0, 2, 3}
    else:
        with pytest.raises(Exception, match=r"(?i)invalid"):
            run(path, images(2, 9, 12))
        assert set(report.dynamic_axes["x"]) == {0}


def test_coordinates_are_constants_where_the_size_is_fixed(case: Any) -> None:
    _exporter, lowering, path, report, _model = case
    if lowering == "computed":
        assert report.coord_constant_bytes == 0
        assert "Range" in operators(path)
        return
    assert not operators(path) & {"Range", "Linspace"}
    # Both read 8 x 12. Channels are a vector an axis each; the stem's map is made of a flat strip
    # and a weight, the head's 3 x 5 is whole.
    assert (
        report.coord_constant_bytes
        == {
            "channels": 2 * (8 + 12) * 4,
            "branch": 2 * (8 + 12) * 4,
            # The head does not pad: x and y, shifted and not, span x, y and a constant.
            "separable": banded_strip_bytes((8, 12), PADDED_3X3) + flat_strip_bytes((3, 5), 3, 2),
            "map": flat_strip_bytes((8, 12), 15, 4) + 4 * 15 * 4 + 2 * 3 * 5 * 4,
        }[lowering]
    )


def test_constants_are_whole_once_the_file_is_loaded(case: Any, tmp_path: Path) -> None:
    _, lowering, path, _, model = case
    found = [array for array in constants(folded(path, tmp_path)) if array.ndim == 4]
    scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()  # folded into the stem
    maps = [branch_of(model.stem) * scale.reshape(-1, 1, 1), branch_of(model.head)]
    expected = {
        "channels": [paper_grid((8, 12)).numpy()[None]],
        "branch": [paper_grid((8, 12)).numpy()[None]],
        "map": [tensor.detach().numpy() for tensor in maps],
        "separable": [],
        "computed": [],
    }[lowering]
    for array in expected:
        same = [other for other in found if other.shape == array.shape]
        assert any(np.allclose(other, array, rtol=0, atol=1e-5) for other in same)


def branch_of(layer: nn.Module) -> Tensor:
    """The coordinate map of a layer that reads 8 x 12."""
    grid = paper_grid((8, 12)).unsqueeze(0)
    weight = layer.coord_weight.detach().double()
    return F.conv2d(grid, weight, None, layer.stride, layer.padding)


def folded(path: Path, folder: Path) -> Path:
    """The file as ONNX Runtime has it in memory: constants folded."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "folded.onnx")
    ort.InferenceSession(str(path), options, providers=CPU)
    return folder / "folded.onnx"


def test_the_graph_has_the_form_of_its_lowering(case: Any) -> None:
    _, lowering, _path, report, _ = case
    # The stem's map is a convolution of a strip, which is folded when the file is loaded.
    convs = {"channels": 2, "map": 3, "branch": 4, "separable": 4, "computed": 4}[lowering]
    assert report.nodes["Conv"] == convs
    assert report.nodes.get("Add", 0) == (0 if lowering == "channels" else 2)


def test_the_report_says_what_was_written_and_checked(case: Any) -> None:
    exporter, lowering, path, report, _ = case
    assert report.exporter == exporter
    assert report.lowerings == {"stem": lowering, "head": lowering}
    assert report.file_size == path.stat().st_size
    assert sum(report.nodes.values()) == len(onnx.load(path).graph.node)
    assert report.opset == onnx.load(path).opset_import[0].version
    assert report.provider == "CPUExecutionProvider"
    assert report.notes == ()
    sizes = [check.inputs for check in report.checks]
    batches = ["(2, 3, 8, 12)", "(1, 3, 8, 12)", "(3, 3, 8, 12)"]
    others = ["(2, 3, 40, 76)", "(2, 3, 72, 44)"] if lowering == "computed" else []
    assert sizes == [f"a tensor of shape {size}, torch.float32" for size in batches + others]
    assert all(check.agrees for check in report.checks)
    assert report.worst_difference == max(check.difference for check in report.checks) < 1e-5


def test_the_printed_report_names_the_figures(case: Any) -> None:
    exporter, lowering, path, report, _ = case
    text = str(report)
    assert path.name in text.replace("\n", "")
    for part in (
        exporter,
        f"2 as {lowering}",
        f"{report.coord_constant_bytes:,} bytes",
        f"opset {report.opset}",
        "CPUExecutionProvider",
        "(3, 3, 8, 12)",
        f"{report.nodes['Conv']} Conv",
        "x: batch",
    ):
        assert part in text


def test_the_file_is_whole_and_alone(case: Any) -> None:
    _, _, path, _, _ = case
    onnx.checker.check_model(str(path))
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("lowering", [*STORED, "computed"])
def test_zero_coordinates_give_the_plain_models_outputs(lowering: str, tmp_path: Path) -> None:
    model = ccp.patch(fresh(), "all")
    ccp.export_onnx(
        model,
        tmp_path / "zero.onnx",
        images(2),
        exporter="torchscript",
        lowering=lowering,
        dynamic_size=lowering == "computed",
        providers=CPU,
    )
    assert_same(run(tmp_path / "zero.onnx", images(4))[0], fresh()(images(4)))


# --- static and dynamic axes --------------------------------------------------------------------


@pytest.mark.parametrize("lowering", STORED)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_static_batch_is_static_and_its_constants_are_counted(
    exporter: str, lowering: str, tmp_path: Path
) -> None:
    model = net()
    report = ccp.export_onnx(
        model,
        tmp_path / "static.onnx",
        images(2),
        exporter=exporter,
        lowering=lowering,
        dynamic_batch=False,
        providers=CPU,
    )
    assert report.dynamic_axes == {}
    assert len(report.checks) == (2 if exporter == "torchscript" else 1)
    assert_same(run(report.path, images(2))[0], concatenating(model)(images(2)))
    with pytest.raises(Exception, match=r"(?i)invalid"):
        run(report.path, images(3))
    if lowering in ("branch", "separable"):  # not folded: as in a file for any batch
        path = tmp_path / "any.onnx"
        any_batch = ccp.export_onnx(
            model, path, images(2), exporter=exporter, lowering=lowering, providers=CPU
        )
        assert report.coord_constant_bytes == any_batch.coord_constant_bytes
        return
    # Vectors at least; where a constant folder expanded them, two images' worth of channels; of
    # maps the lines of 15 images, a weight, and the head's 3 x 5 whole.
    most = {"channels": 2 * 2 * 8 * 12 * 4}
    maps = flat_strip_bytes((8, 12), 15, 4) + 4 * 15 * 4 + 2 * 3 * 5 * 4
    assert 2 * (8 + 12) * 4 <= report.coord_constant_bytes <= most.get(lowering, maps)


def test_auto_is_the_cheaper_branch_on_the_cpu_whatever_the_batch(tmp_path: Path) -> None:
    forms = {}
    for batch, size in ((True, False), (False, False), (True, True), (False, True)):
        report = ccp.export_onnx(
            net(),
            tmp_path / "auto.onnx",
            images(1),
            dynamic_batch=batch,
            dynamic_size=size,
            exporter="torchscript",
            providers=CPU,
        )
        forms[batch, size] = set(report.lowerings.values())
    # 15 and 3 images instead of 18 taps
    assert forms[True, False] == forms[False, False] == {"separable"}
    assert forms[True, True] == forms[False, True] == {"computed"}


def test_one_example_image_still_gives_a_dynamic_batch(tmp_path: Path) -> None:
    model = net()
    report = ccp.export_onnx(model, tmp_path / "one.onnx", images(1), providers=CPU)
    assert report.exporter == "dynamo"
    assert [check.inputs[19:20] for check in report.checks] == ["1", "3"]
    assert_same(run(report.path, images(5))[0], concatenating(model)(images(5)))


class CountsImages(Net):
    """Its code loops over the batch, so a trace fixes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.stack([y[index] * (index + 1) for index in range(int(x.shape[0]))])


@pytest.mark.parametrize("exporter", ["auto", *EXPORTERS])
def test_a_model_that_fixes_its_batch_is_an_error_not_a_static_file(
    exporter: str, tmp_path: Path
) -> None:
    model = filled(ccp.patch(fresh(CountsImages), "all"))
    with pytest.raises(ExportError):
        ccp.export_onnx(model, tmp_path / "fixed.onnx", images(2), exporter=exporter, providers=CPU)
    assert not list(tmp_path.iterdir())
    if exporter != "dynamo":
        report = ccp.export_onnx(
            model,
            tmp_path / "fixed.onnx",
            images(2),
            exporter="torchscript",
            dynamic_batch=False,
            providers=CPU,
        )
        assert report.dynamic_axes == {}


def test_an_axis_that_came_out_fixed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_exporter(monkeypatch, "torchscript", _export_without_axes)
    for size, axis in ((False, "batch"), (True, "batch and height and width")):
        with pytest.raises(ExportError, match=f"the {axis} of input 'x' came out fixed"):
            ccp.export_onnx(
                net(),
                tmp_path / "fixed.onnx",
                images(2),
                exporter="torchscript",
                dynamic_size=size,
                providers=CPU,
            )
    assert not list(tmp_path.iterdir())


def _export_without_axes(model: nn.Module, request: ExportRequest) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fixed.onnx"
        torch.onnx.export(
            model, (images(2),), str(path), dynamo=False, input_names=["x"], opset_version=17
        )
        return ir.load(path)


def replace_exporter(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    export: Callable[[nn.Module, ExportRequest], ir.Model],
) -> None:
    monkeypatch.setitem(TORCHS, name, Exporter(TORCHS[name].title, export))


class OneSize(nn.Module):
    """A linear layer behind the convolution fixes the image size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.linear = nn.Linear(2 * 8 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).flatten(1))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_dynamic_sizes_of_a_model_with_one_size_are_an_error(exporter: str, tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(OneSize), "all"))
    with pytest.raises(ExportError, match=r"dynamic_size"):
        ccp.export_onnx(
            model,
            tmp_path / "size.onnx",
            images(2),
            dynamic_size=True,
            exporter=exporter,
            providers=CPU,
        )
    assert not list(tmp_path.iterdir())


# --- inputs, outputs and names ------------------------------------------------------------------


def test_names_and_opset_are_the_callers(tmp_path: Path) -> None:
    for exporter in EXPORTERS:
        report = ccp.export_onnx(
            net(),
            tmp_path / "named.onnx",
            images(2),
            input_names=["image"],
            output_names=["score"],
            opset=18,
            exporter=exporter,
            providers=CPU,
        )
        session = ort.InferenceSession(str(report.path), providers=CPU)
        assert [value.name for value in session.get_inputs()] == ["image"]
        assert [value.name for value in session.get_outputs()] == ["score"]
        assert report.opset == 18
        assert list(report.dynamic_axes) == ["image"]


@pytest.mark.parametrize("lowering", [*STORED, "auto"])
@pytest.mark.parametrize("opset", [11, 13])
def test_an_old_operator_set(opset: int, lowering: Any, tmp_path: Path) -> None:
    model, path = net(), tmp_path / "old.onnx"
    report = ccp.export_onnx(
        *(model, path, images(2)),
        lowering=lowering,
        opset=opset,
        exporter="torchscript",
        providers=CPU,
    )
    assert report.opset == opset == onnx.load(path).opset_import[0].version
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert_same(run(path, images(3))[0], model(images(3)))


def test_an_impossible_operator_set_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*arguments: Any, **options: Any) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(onnx_module, "evaluation_copy", works)
    monkeypatch.setattr(onnx_module, "working_providers", works)
    for opset in (True, "17", 17.0, 6, 99):
        with pytest.raises(ArgumentError, match="opset="):
            ccp.export_onnx(net(), tmp_path / "no.onnx", images(2), opset=opset)  # type: ignore[arg-type]


def test_the_windows_of_a_file_are_named(tmp_path: Path) -> None:
    model = net()
    assert ccp.export_onnx(model, tmp_path / "a.onnx", images(2), providers=CPU).windows == {}
    left, right = ccp.Window((0, 0), (8, 8), (8, 16)), ccp.Window((0, 8), (8, 8), (8, 16))
    ccp.set_window_(model, left)
    names = tuple(coord_layers(model))
    report = ccp.export_onnx(model, tmp_path / "a.onnx", images(2), providers=CPU)
    assert report.windows == {left: names}
    assert str(left) in str(report).replace("\n", " ")
    layer = coord_layers(model)[names[0]]
    layer.coords = dataclasses.replace(layer.coords, window=right)
    report = ccp.export_onnx(model, tmp_path / "a.onnx", images(2), providers=CPU)
    assert report.windows == {right: names[:1], left: names[1:]}


@pytest.mark.parametrize("lowering", [*STORED, "auto"])
def test_weights_too_large_for_the_file_lie_beside_it(
    lowering: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "MAX_BYTES_IN_GRAPH", 0)
    model, path = net(), tmp_path / "large.onnx"
    report = ccp.export_onnx(model, path, images(2), lowering=lowering, providers=CPU)
    (beside,) = set(tmp_path.iterdir()) - {path}
    assert re.fullmatch(r"large\.onnx\.[0-9a-f]{16}\.data", beside.name)
    assert weights_of(path) == {beside.name}
    assert report.file_size == path.stat().st_size + beside.stat().st_size
    assert report.coord_constant_bytes > 0
    assert_same(run(path, images(3))[0], model(images(3)))


def weights_of(path: Path) -> set[str]:
    """Names of the files in which a graph's weights lie."""
    graph = onnx.load(path, load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    return {entry.value for entry in entries if entry.key == "location"}


def test_a_large_file_is_replaced_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "MAX_BYTES_IN_GRAPH", 0)
    path, model = tmp_path / "large.onnx", net()
    ccp.export_onnx(model, path, images(2), providers=CPU)
    (first,) = weights_of(path)
    expected = run(path, images(3))[0]
    with torch.no_grad():
        model.stem.weight.mul_(2)
    real = os.replace

    def refuse_the_graph(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patched:  # the new weights lie there already
        patched.setattr(os, "replace", refuse_the_graph)
        with pytest.raises(ExportError, match=r"cannot write .*large\.onnx: No space left"):
            ccp.export_onnx(model, path, images(2), providers=CPU)
    assert weights_of(path) == {first}
    assert np.array_equal(run(path, images(3))[0], expected)

    ccp.export_onnx(model, path, images(2), providers=CPU)
    (second,) = weights_of(path)
    assert first != second
    assert {file.name for file in tmp_path.iterdir()} == {path.name, second}
    assert_same(run(path, images(3))[0], model(images(3)))


def test_a_link_to_a_large_file_is_told_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "MAX_BYTES_IN_GRAPH", 0)
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.onnx"
    link.symlink_to("real/large.onnx")
    model = net()
    report = ccp.export_onnx(model, link, images(2), providers=CPU)
    real = tmp_path / "real" / "large.onnx"
    assert any("is a symbolic link" in note and str(real) in note for note in report.notes)
    assert weights_of(link) == {file.name for file in real.parent.iterdir()} - {real.name}
    assert_same(run(real, images(3))[0], model(images(3)))


@pytest.mark.parametrize("exporter", ["auto", *EXPORTERS])
def test_a_file_that_cannot_grow_is_an_error_with_the_path(exporter: Any, tmp_path: Path) -> None:
    path = tmp_path / "full.onnx"
    path.write_bytes(b"old")
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, previous[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot write .*full\.onnx: File too large"):
            ccp.export_onnx(net(), path, images(2), exporter=exporter, providers=CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_in_many_files_are_gathered_into_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TorchScript's exporter leaves them: a file for each tensor, with the tensor's name."""
    path, model = tmp_path / "in" / "many.onnx", net()
    path.parent.mkdir()
    ccp.export_onnx(model, path, images(2), providers=CPU)
    expected = run(path, images(3))[0]
    proto = onnx.load(path)
    onnx.save(
        proto,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
    )
    assert len(list(path.parent.iterdir())) > 5
    gathered = tmp_path / "out" / "one.onnx"
    gathered.parent.mkdir()
    assert write_model(ir.load(path), gathered) == (gathered,)  # they are in the graph's own file
    monkeypatch.setattr(model_file, "MAX_BYTES_IN_GRAPH", 0)
    _, part = write_model(ir.load(path), gathered)
    assert weights_of(gathered) == {part.name}
    assert set(gathered.parent.iterdir()) == {gathered, part}
    assert np.array_equal(run(gathered, images(3))[0], expected)


def test_an_export_follows_a_link_and_replaces_what_it_points_to(tmp_path: Path) -> None:
    link, target = tmp_path / "link.onnx", tmp_path / "stored"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target.name)
    model = net()
    ccp.export_onnx(model, link, images(2), providers=CPU)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert_same(run(link, images(3))[0], model(images(3)))


class Several(nn.Module):
    """Three inputs, of which one may be a constant; outputs in a dict, out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        y = self.conv(x) * scale.reshape(-1, 1, 1, 1)
        return {"z": y, "a": y.mean((1, 2, 3)) + shift}


class SeveralTuple(Several):
    """The same with a tuple of outputs, one of them whole numbers."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        made = super().forward(x, scale, shift)
        return made["z"], (made["a"], made["z"].flatten(1).argmax(1))


def several_reference(model: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    layer = coord_layers(model)["conv"]
    y = concatenating_conv(
        x,
        paper_grid(x.shape[2:]),
        layer.weight,
        layer.coord_weight,
        layer.bias,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    ) * scale.reshape(-1, 1, 1, 1)
    return [y, y.mean((1, 2, 3)) + shift]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("form", ["positional", "keyword", "keyword in another order"])
def test_several_inputs_and_a_dict_of_outputs(form: str, exporter: str, tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(Several), "all"))
    x, scale, shift = images(2), torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    example = {
        "positional": (x, scale, shift),
        "keyword": (x, {"scale": scale, "shift": shift}),
        "keyword in another order": (x, {"shift": shift, "scale": scale}),
    }[form]
    report = ccp.export_onnx(
        model, tmp_path / "several.onnx", example, exporter=exporter, providers=CPU
    )
    session = ort.InferenceSession(str(report.path), providers=CPU)
    feeds = {
        "x": images(5),
        "scale": torch.arange(5.0) + 1,
        "shift": torch.arange(5.0) * 10,
    }
    assert {value.name for value in session.get_inputs()} == set(feeds)
    actual = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    expected = several_reference(model, **feeds)
    for array, tensor in zip(actual, expected, strict=True):
        assert_same(array, tensor)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nested_outputs_and_whole_numbers(exporter: str, tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(SeveralTuple), "all"))
    example = (images(2), torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]))
    report = ccp.export_onnx(
        model, tmp_path / "nested.onnx", example, exporter=exporter, providers=CPU
    )
    y, mean = several_reference(model, *example)
    actual = run(report.path, *example)
    assert_same(actual[0], y)
    assert_same(actual[1], mean)
    np.testing.assert_array_equal(actual[2], y.flatten(1).argmax(1).numpy())


def test_an_input_without_a_batch_stays_fixed(tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(SeveralTuple), "all"))
    example = (images(2), torch.tensor([2.0, 3.0]), torch.tensor(5.0))
    report = ccp.export_onnx(
        model, tmp_path / "scalar.onnx", example, exporter="torchscript", providers=CPU
    )
    assert list(report.dynamic_axes) == ["x", "scale"]


class ScalarFirst(nn.Module):
    """A number without axes comes before the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return self.conv(x) * scale


def test_a_scalar_before_the_image_is_no_obstacle(tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(ScalarFirst), "all"))
    report = ccp.export_onnx(
        model,
        tmp_path / "scalar.onnx",
        (torch.tensor(2.0), images(2)),
        exporter="torchscript",
        providers=CPU,
    )
    assert_same(
        run(report.path, torch.tensor(3.0), images(4))[0], model(torch.tensor(3.0), images(4))
    )


class Detector(nn.Module):
    """Takes a list of images of different sizes, gives a list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        made = [self.conv(image[None])[0] for image in images]
        return [{"scores": y.mean((1, 2)), "best": y.flatten().argmax()} for y in made]


def test_a_detector_on_a_list_of_images(tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(Detector), "all"))
    pictures = [images(1, 6, 9)[0], images(1, 7, 5, seed=8)[0]]
    with pytest.raises(ArgumentError, match=r"list of images, .*dynamic_batch=False"):
        ccp.export_onnx(model, tmp_path / "detector.onnx", (pictures,), exporter="torchscript")
    report = ccp.export_onnx(
        model,
        tmp_path / "detector.onnx",
        (pictures,),
        dynamic_batch=False,
        exporter="torchscript",
        lowering="map",
        providers=CPU,
    )
    assert report.coord_constant_bytes == (2 * 6 * 9 + 2 * 7 * 5) * 4
    reference = concatenating(model)(pictures)
    actual = run(report.path, *pictures)
    assert len(actual) == 4
    for index, array in enumerate(actual):
        kind = "scores" if array.size == 2 else "best"
        assert_same(np.atleast_1d(array), torch.atleast_1d(reference[index // 2][kind]))


# --- which exporter -----------------------------------------------------------------------------


class Branches(nn.Module):
    """Looks at values to decide: torch.export refuses, a trace does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > -1e9:
            y = y * 2
        return y[y > 0]


def test_auto_falls_back_quietly_and_the_report_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = filled(ccp.patch(fresh(Branches), "all"))
    with pytest.raises(ExportError, match=r"torch\.export cannot export the model"):
        ccp.export_onnx(
            model,
            tmp_path / "branches.onnx",
            images(2),
            exporter="dynamo",
            dynamic_batch=False,
            providers=CPU,
        )
    assert not list(tmp_path.iterdir())
    capfd.readouterr()
    report = ccp.export_onnx(
        model, tmp_path / "branches.onnx", images(2), dynamic_batch=False, providers=CPU
    )
    assert report.exporter == "torchscript"
    assert any("the TorchScript exporter did" in note for note in report.notes)
    assert "TorchScript" in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["branches.onnx"]
    layer = model.conv
    y = 2 * concatenating_conv(
        images(2),
        paper_grid((8, 12)),
        layer.weight,
        layer.coord_weight,
        layer.bias,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    assert_same(run(report.path, images(2))[0], y[y > 0])
    printed = "".join(capfd.readouterr())
    assert "GraphModule" not in printed
    assert "def forward" not in printed


class TrainedMask(nn.Module):
    """Attention between pixels, with a trained bias of each pair, as in Swin and BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.qkv = nn.Linear(16, 48)
        self.bias = nn.Parameter(torch.randn(2, 24, 24))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # (N, 24, 16)
        heads = self.qkv(tokens).reshape(-1, 24, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), attn_mask=self.bias[None])
        return mixed.transpose(1, 2).reshape(-1, 24, 16)


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["zero", "non-zero"])
def test_attention_with_a_trained_mask_is_exported_by_torch_export(
    scale: float, tmp_path: Path
) -> None:
    """With gradients torch takes another path through attention, and fails at its strides."""
    model = filled(ccp.patch(fresh(TrainedMask), "all"))
    with torch.no_grad():
        model.stem.coord_weight.mul_(scale)
    report = ccp.export_onnx(
        model, tmp_path / "a.onnx", images(2), dynamic_batch=False, exporter="dynamo", providers=CPU
    )
    with torch.no_grad():
        expected = concatenating(model)(images(2, seed=8))
    assert_same(run(report.path, images(2, seed=8))[0], expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_note_on_a_fallback_gives_a_reason_without_terminal_codes(tmp_path: Path) -> None:
    report = ccp.export_onnx(
        fresh(Branches), tmp_path / "b.onnx", images(2), dynamic_batch=False, providers=CPU
    )
    (note,) = report.notes
    assert "\x1b" not in note
    assert "data-dependent" in note or "guard" in note.lower()


def test_when_both_exporters_fail_both_reasons_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: nn.Module, request: ExportRequest) -> ir.Model:
        raise ValueError("no such operator")

    replace_exporter(monkeypatch, "dynamo", refuse)
    monkeypatch.setattr(torch.onnx, "export", _raise_unsupported)
    with pytest.raises(ExportError) as caught:
        ccp.export_onnx(net(), tmp_path / "n.onnx", images(2), providers=CPU)
    assert "torch.export cannot export the model: ValueError: no such operator" in str(caught.value)
    assert "the TorchScript exporter cannot export the model: KeyError" in str(caught.value)
    assert not list(tmp_path.iterdir())


def _raise_unsupported(*args: Any, **kwargs: Any) -> None:
    raise KeyError("aten::strange")


def test_nothing_of_a_failed_first_exporter_stays_beside_the_second_ones_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_exporter(monkeypatch, "dynamo", _interrupted)
    report = ccp.export_onnx(net(), tmp_path / "n.onnx", images(2), providers=CPU)
    assert report.exporter == "torchscript"
    assert "interrupted" in report.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["n.onnx"]
    assert report.file_size == report.path.stat().st_size


def _interrupted(model: nn.Module, request: ExportRequest) -> ir.Model:
    raise ValueError("interrupted")


def test_a_fallback_leaves_other_files_of_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_exporter(monkeypatch, "dynamo", _interrupted)
    (tmp_path / "other.onnx").write_bytes(b"mine")
    exported = export_graph(net(), ExportRequest(images(2)), "auto")
    write_model(exported.model, tmp_path / "n.onnx")
    assert exported.exporter == "torchscript"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.onnx", "other.onnx"]
    assert (tmp_path / "other.onnx").read_bytes() == b"mine"


class LooksLeft(nn.Module):
    """Takes another way through its code on a picture whose left half is the brighter one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        y = self.conv(x)
        return y if left.mean() > right.mean() else -y


def test_a_trace_that_knows_only_the_examples_way_is_refused(tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(LooksLeft), "all"))
    for example in (images(2), images(2).flip(-1)):
        with pytest.raises(ExportError, match="differ"):
            ccp.export_onnx(
                model, tmp_path / "left.onnx", example, dynamic_batch=False, providers=CPU
            )
    assert not list(tmp_path.iterdir())


# --- kinds of models ----------------------------------------------------------------------------


def test_an_unpatched_model_is_exported_as_it_is(tmp_path: Path) -> None:
    report = ccp.export_onnx(
        fresh(), tmp_path / "plain.onnx", images(2), exporter="torchscript", providers=CPU
    )
    assert report.lowerings == {}
    assert report.coord_constant_bytes == 0
    assert "none" in str(report)
    assert_same(run(report.path, images(3))[0], fresh()(images(3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, None, 2, 1)


@pytest.mark.parametrize(
    ("lowering", "exporter"),
    [("map", "dynamo"), ("branch", "dynamo"), ("computed", "dynamo"), ("branch", "torchscript")],
)
def test_functional_convolutions_are_exported_with_their_coordinates(
    lowering: str, exporter: str, tmp_path: Path
) -> None:
    model = filled(ccp.patch(fresh(Functional), "all"))
    report = ccp.export_onnx(
        model,
        tmp_path / "f.onnx",
        images(2),
        lowering=lowering,
        dynamic_size=lowering == "computed",
        exporter=exporter,
        providers=CPU,
    )
    assert report.lowerings == {"kernel": lowering}
    x = images(3)
    expected = concatenating_conv(
        x,
        paper_grid(x.shape[2:]),
        model.kernel,
        coord_layers(model)["kernel"].coord_weight,
        None,
        stride=(2, 2),
        padding=(1, 1),
        dilation=(1, 1),
    )
    assert_same(run(report.path, x)[0], expected)


def test_a_patched_exported_program_is_exported_with_its_dynamic_batch(tmp_path: Path) -> None:
    batch = {0: torch.export.Dim("n", min=1, max=64)}
    program = torch.export.export(fresh(), (images(2),), dynamic_shapes={"x": batch})
    model = filled(ccp.patch(program, "all"))
    report = ccp.export_onnx(model, tmp_path / "program.onnx", images(2), providers=CPU)
    assert set(report.lowerings) == {"stem", "head"}
    assert_same(run(report.path, images(5))[0], concatenating(net())(images(5)))


def test_a_program_with_a_fixed_batch_refuses_a_dynamic_one(tmp_path: Path) -> None:
    model = filled(ccp.patch(torch.export.export(fresh(), (images(2),)), "all"))
    if BEFORE_2_9:  # whose programs hold nobody to the batch that they were made with
        report = ccp.export_onnx(model, tmp_path / "program.onnx", images(2), providers=CPU)
        assert_same(run(report.path, images(5))[0], concatenating(net())(images(5)))
        return
    with pytest.raises(ExportError, match=r"dynamic_batch=False"):
        ccp.export_onnx(model, tmp_path / "program.onnx", images(2), providers=CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_half_precision_stays_half(exporter: str, tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(OneSize).half(), "all"))
    report = ccp.export_onnx(
        model,
        tmp_path / "half.onnx",
        images(2).half(),
        tolerance=5e-3,
        exporter=exporter,
        providers=CPU,
    )
    assert {array.dtype for array in constants(report.path)} == {np.dtype(np.float16)}
    assert report.coord_constant_bytes == banded_strip_bytes((8, 12), PADDED_3X3, itemsize=2)
    (actual,) = run(report.path, images(3).half())
    assert actual.dtype == np.float16
    assert_same(actual.astype(np.float32), concatenating(model).float()(images(3)), 1e-2)


def test_a_pretrained_architecture_from_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ccp.patch(timm.create_model("resnet18").eval(), ["conv1", "layer2.*.conv1"])
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(std=0.05)
    x = torch.rand(2, 3, 64, 96)
    report = ccp.export_onnx(model, tmp_path / "resnet18.onnx", x, providers=CPU)
    assert set(report.lowerings) == {"conv1", "layer2.0.conv1", "layer2.1.conv1"}
    # A strip of each geometry, of images of the outputs' sizes: 32 x 48, and twice 8 x 12.
    assert report.coord_constant_bytes == (
        banded_strip_bytes((32, 48), (10, 2, (3, 6)))
        + banded_strip_bytes((8, 12), (5, 1, (2, 4)))
        + banded_strip_bytes((8, 12), PADDED_3X3)
    )
    other = torch.rand(5, 3, 64, 96)
    assert_same(run(report.path, other)[0], concatenating(model)(other), 1e-4)


def test_exporting_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = net().train()
    model.bn.eval()
    calls: list[str] = []
    model.head.register_forward_hook(lambda *parts: calls.append("head"))
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    seed = torch.get_rng_state()
    level = logging.root.manager.disable
    for exporter in EXPORTERS:
        ccp.export_onnx(model, tmp_path / "net.onnx", images(2), exporter=exporter, providers=CPU)
    assert [module.training for module in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert len(model.head._forward_hooks) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(torch.get_rng_state(), seed)
    assert logging.root.manager.disable == level


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_training_mode_is_not_what_gets_exported(exporter: str, tmp_path: Path) -> None:
    model = net().train()
    report = ccp.export_onnx(
        model, tmp_path / "net.onnx", images(2), exporter=exporter, providers=CPU
    )
    assert_same(run(report.path, images(3))[0], concatenating(net())(images(3)))


# --- a file that does not agree -----------------------------------------------------------------


def corrupt(graph: ir.Model) -> None:
    """Change one weight of the graph, as a wrong exporter would."""
    stored = graph.graph.initializers
    weight = next(value for name, value in stored.items() if name.endswith("head.weight"))
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array.flat[0] += 0.5
    weight.const_value = ir.tensor(array, name=weight.name)


@pytest.fixture
def corrupting(monkeypatch: pytest.MonkeyPatch) -> None:
    export = TORCHS["torchscript"].export

    def export_wrongly(model: nn.Module, request: ExportRequest) -> ir.Model:
        graph = export(model, request)
        corrupt(graph)
        return graph

    replace_exporter(monkeypatch, "torchscript", export_wrongly)


def test_a_wrong_file_is_an_error_with_the_difference_and_leaves_nothing(
    corrupting: None, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"differ on .*\(2, 3, 8, 12\).* by 0\.\d+ .*0\.0001"):
        ccp.export_onnx(
            net(), tmp_path / "n.onnx", images(2), exporter="torchscript", providers=CPU
        )
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_does_not_replace_an_older_one(corrupting: None, tmp_path: Path) -> None:
    older = tmp_path / "n.onnx"
    older.write_bytes(b"an older model")
    with pytest.raises(ExportError):
        ccp.export_onnx(net(), older, images(2), exporter="torchscript", providers=CPU)
    assert older.read_bytes() == b"an older model"
    assert [path.name for path in tmp_path.iterdir()] == ["n.onnx"]


def test_a_larger_tolerance_accepts_the_same_file(corrupting: None, tmp_path: Path) -> None:
    report = ccp.export_onnx(
        net(),
        tmp_path / "n.onnx",
        images(2),
        exporter="torchscript",
        providers=CPU,
        tolerance=0.9,
    )
    assert 1e-3 < report.worst_difference < 0.9


def test_a_file_that_is_wrong_only_at_another_batch_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ScalesByBatch(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if x.shape[0] == 1 else 1.0)

    model = filled(ccp.patch(fresh(ScalesByBatch), "all"))
    with pytest.raises(ExportError, match=r"differ on a tensor of shape \(1, 3, 8, 12\)"):
        ccp.export_onnx(
            model, tmp_path / "n.onnx", images(2), exporter="torchscript", providers=CPU
        )
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_wrong_only_at_another_size_is_found(tmp_path: Path) -> None:
    class ScalesBySize(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.shape[-1])

    model = filled(ccp.patch(fresh(ScalesBySize), "all"))
    with pytest.raises(ExportError, match=r"differ on a tensor of shape \(2, 3, 40, 76\)"):
        ccp.export_onnx(
            model,
            tmp_path / "n.onnx",
            images(2),
            exporter="torchscript",
            dynamic_size=True,
            providers=CPU,
        )
    assert not list(tmp_path.iterdir())


class PadThenPool(nn.Module):
    """A zero pad before a max pool of negative numbers, which ONNX Runtime once merged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.pad = nn.ConstantPad2d(1, 0.0)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.pad(-self.conv(x).abs() - 1))


def test_a_wrong_optimizer_of_the_runtime_is_named_or_the_file_is_right(tmp_path: Path) -> None:
    model = filled(ccp.patch(fresh(PadThenPool), "all"))
    path = tmp_path / "pool.onnx"
    options: dict[str, Any] = {"exporter": "torchscript", "providers": CPU}
    report = ccp.export_onnx(model, path, images(2), disabled_optimizers=["Pad_Fusion"], **options)
    assert report.worst_difference < 1e-5
    (actual,) = run(path, images(2))  # with Pad_Fusion, as any user's session has it
    if np.abs(actual - model(images(2)).detach().numpy()).max() < 1e-4:
        assert ccp.export_onnx(model, path, images(2), **options).worst_difference < 1e-5
    else:
        with pytest.raises(ExportError, match=r'Pad_Fusion.*disabled_optimizers=\["Pad_Fusion"\]'):
            ccp.export_onnx(model, path, images(2), **options)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": "model.bin"}, r"model\.bin'?: write a file name that ends in \.onnx"),
        ({"path": "missing/model.onnx"}, "the folder .*missing does not exist"),
        (
            {"lowering": "fold"},
            "lowering='fold': write 'auto', .*'channels', 'map', 'branch', 'separable'",
        ),
        ({"exporter": "onnxscript"}, "exporter='onnxscript': write 'auto', 'dynamo'"),
        ({"providers": ["Abacus"]}, "this ONNX Runtime has no Abacus; it has .*CPU"),
        ({"lowering": "computed"}, "the size is fixed: write dynamic_size=True"),
        ({"lowering": "map", "dynamic_size": True}, "stores coordinates of one size"),
        ({"example_inputs": ()}, "hold no tensor"),
        ({"example_inputs": (torch.zeros(2, 3),), "dynamic_size": True}, "no input is an image"),
    ],
)
def test_impossible_arguments_are_named_with_what_to_write(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"example_inputs": images(2), "providers": CPU} | changes
    path = tmp_path / arguments.pop("path", "model.onnx")
    with pytest.raises(ArgumentError, match=f"(?s){reason}"):
        ccp.export_onnx(net(), path, **arguments)
    assert not list(tmp_path.iterdir())


def test_inputs_that_the_model_refuses_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CoordConvPatchError, match=r"\(2, 4, 8, 8\)"):
        ccp.export_onnx(net(), tmp_path / "n.onnx", torch.zeros(2, 4, 8, 8), providers=CPU)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_copied_says_so(tmp_path: Path) -> None:
    model = net()
    model.lock = open(tmp_path / "lock", "w")  # noqa: SIM115  # an attribute that does not copy
    with pytest.raises(ExportError, match=r"cannot be deep-copied"):
        ccp.export_onnx(model, tmp_path / "n.onnx", images(2), providers=CPU)
    model.lock.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_path_may_be_a_string(tmp_path: Path) -> None:
    report = ccp.export_onnx(
        fresh(),
        str(tmp_path / "n.onnx"),
        images(2),
        exporter="torchscript",
        providers=CPU,
    )
    assert report.path == tmp_path / "n.onnx"
    assert report.path.is_file()


def test_added_nodes_do_not_repeat_their_convolutions_origin(tmp_path: Path) -> None:
    """Stack traces would be most of what coordinates add to a small network's file."""
    path = tmp_path / "m.onnx"
    options: dict[str, Any] = {"exporter": "dynamo", "providers": CPU}
    ccp.export_onnx(net(), path, images(2), **options)
    noted = {node.name: bool(node.metadata_props) for node in onnx.load(path).graph.node}
    plain = tmp_path / "plain.onnx"
    ccp.export_onnx(fresh().eval(), plain, images(2), **options)
    assert sum(noted.values()) == sum(
        bool(node.metadata_props) for node in onnx.load(plain).graph.node
    )
