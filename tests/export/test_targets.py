"""What ``target=`` writes: forms, constants, passes; and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_graphs import CPU, HandMadeGraph, assert_close, run
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export.graph_passes.evaluate_constants import (
    EvaluateConstants,
    nodes_of_constants,
)
from coordconv_patch.export.graph_passes.expand_coordinates import ExpandCoordinates
from coordconv_patch.export.targets import TARGETS, Target, target_named
from coordconv_patch.verification.verify import Verifier


class Network(nn.Module):
    """Strides, a depthwise convolution, a 1x1 shortcut, a residual, and constants of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, padding=1, groups=8)
        self.shortcut = nn.Conv2d(8, 8, 1, 2)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.depthwise(x) + self.shortcut(x)).relu()
        steps = torch.arange(5, device=x.device).reshape(1, 5, 1, 1) * 0.5
        return (self.head(x) * (steps + 1)).mean((2, 3))


def network(std: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Network().eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=std)
    return model


def images(batch: int, size: tuple[int, int] = (16, 12)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def export(model: nn.Module, path: Path, **options: Any) -> ccp.ExportReport:
    return ccp.export_onnx(model, path, images(2), providers=CPU, **options)


FORM = ("lowering", "whole_constants", "rewrites", "opset")


def test_other_targets_of_stored_maps_write_what_portable_writes() -> None:
    """So that one file of theirs need be looked at here; docs/runtimes.md runs each."""
    portable = TARGETS["portable"]
    for name in ("opencv", "ncnn", "mnn", "coreml"):
        for field in FORM:
            assert getattr(TARGETS[name], field) == getattr(portable, field), name


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_portable_file_computes_nothing_from_constants_alone(
    exporter: Any, tmp_path: Path
) -> None:
    model = network()
    report = export(model, tmp_path / "m.onnx", target="portable", exporter=exporter)
    assert report.target == "portable"
    assert re.search(r"^target +portable$", str(report), re.MULTILINE)
    graph = ir.load(report.path).graph
    assert not nodes_of_constants(graph)
    stored = set(graph.initializers.values())
    for node in graph:
        if node.op_type == "Conv":
            assert node.inputs[0] not in stored
    maps = [n for n in graph if n.op_type == "Add" and any(v in stored for v in n.inputs)]
    assert len(maps) == 4
    assert set(report.lowerings.values()) == {"map"}
    # (8 * 16 * 12 + 2 * 8 * 8 * 6 + 5 * 8 * 6) numbers of four bytes
    assert report.growth == report.coord_constant_bytes == 4 * (8 * 192 + 16 * 48 + 5 * 48)
    for batch in (1, 2, 3):
        x = images(batch)
        assert_close(run(report.path, {"x": x.numpy()}), [model(x).detach().numpy()], 3e-6)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("batch", [1, 3])
def test_litert_files_have_maps_of_the_whole_batch(
    exporter: Any, batch: int, tmp_path: Path
) -> None:
    model = network()
    options: dict[str, Any] = {"dynamic_batch": False, "exporter": exporter, "providers": CPU}
    x = images(batch)
    report = ccp.export_onnx(model, tmp_path / "m.onnx", x, target="litert", **options)
    graph = ir.load(report.path).graph
    assert not nodes_of_constants(graph)
    stored = set(graph.initializers.values())
    convs = [n for n in graph if n.op_type == "Conv" and n.inputs[0] not in stored]
    maps = [
        value
        for conv in convs
        for addition in conv.outputs[0].consumers()
        for value in addition.inputs
        if addition.op_type == "Add" and value in stored
    ]
    assert sorted(tuple(value.shape or ()) for value in maps if value) == sorted(
        [(batch, 8, 16, 12), *[(batch, 8, 8, 6)] * 2, (batch, 5, 8, 6)]
    )
    assert report.growth == batch * 4 * (8 * 192 + 16 * 48 + 5 * 48)
    # The model's own constant, which broadcasts too, is none of coordinates.
    assert any(tuple(value.shape or ()) == (1, 5, 1, 1) for value in stored)
    assert_close(run(report.path, {"x": x.numpy()}), [model(x).detach().numpy()], 3e-6)


def test_the_default_is_what_it_was(tmp_path: Path) -> None:
    model = network()
    options: dict[str, Any] = {"exporter": "torchscript"}
    default = export(model, tmp_path / "default.onnx", **options)
    named = export(model, tmp_path / "named.onnx", target="onnxruntime", **options)
    assert default.path.read_bytes() == named.path.read_bytes()
    assert default.target == "onnxruntime"
    assert nodes_of_constants(ir.load(default.path).graph)
    assert 0 < default.coord_constant_bytes < default.growth < default.file_size


def test_computed_coordinates_are_expanded_before_their_convolution(tmp_path: Path) -> None:
    model = network()
    options: dict[str, Any] = {"exporter": "torchscript", "dynamic_size": True}
    report = export(model, tmp_path / "m.onnx", target="openvino", **options)
    assert set(report.lowerings.values()) == {"computed"}
    graph = ir.load(report.path).graph
    expanded = [n for n in graph if n.op_type == "Conv" and n.name in report.coordinate_nodes]
    assert len(expanded) == 4
    for node in expanded:
        producer = node.inputs[0].producer()
        assert producer is not None
        assert producer.op_type == "Expand"
    x = images(3, (20, 14))
    assert_close(run(report.path, {"x": x.numpy()}), [model(x).detach().numpy()], 3e-6)


def test_a_fixed_batch_is_advised_where_it_is_faster(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "openvino", "exporter": "torchscript"}
    report = export(network(), tmp_path / "m.onnx", **options)
    assert any("pass dynamic_batch=False" in note for note in report.notes)
    fixed = export(network(), tmp_path / "f.onnx", dynamic_batch=False, **options)
    assert not fixed.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onnx"}, r"target='onnx': write 'onnxruntime', 'openvino'"),
        ({"target": None}, r"target=None: write"),
        ({"target": "portable", "lowering": "branch"}, "leave lowering out"),
        ({"target": "openvino", "lowering": "autotune"}, "leave lowering out"),
        ({"target": "portable", "dynamic_size": True}, "dynamic_size=True with target='portable'"),
        ({"target": "ncnn", "dynamic_size": True}, "ncnn, by pnnx takes stored ones"),
        (
            {"target": "litert", "places": True, "dynamic_batch": False},
            "places=True with target='litert'",
        ),
        ({"target": "litert"}, "dynamic_batch=True with target='litert'.* dynamic_batch=False"),
    ],
)
def test_what_a_target_cannot_have_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ccp.ArgumentError, match=message):
        export(network(), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_target_from_outside(tmp_path: Path) -> None:
    theirs = dataclasses.replace(TARGETS["portable"], name="theirs", opset=19)
    try:
        ccp.register_target(theirs)
        assert target_named("theirs") is theirs
        options: dict[str, Any] = {"target": "theirs", "exporter": "torchscript"}
        assert export(network(), tmp_path / "m.onnx", **options).opset == 19
        newer = dataclasses.replace(theirs, opset=None)
        ccp.register_target(newer)
        assert target_named("theirs") is newer
    finally:
        TARGETS.pop("theirs", None)
    with pytest.raises(ccp.ArgumentError, match="write an identifier other than"):
        ccp.register_target(dataclasses.replace(theirs, name="openvino"))
    with pytest.raises(ccp.ArgumentError, match="write a Target"):
        ccp.register_target("theirs")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(TARGETS))
def test_targets_are_named_as_they_are_registered(name: str) -> None:
    target = TARGETS[name]
    assert isinstance(target, Target)
    assert target.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.opset = 3  # type: ignore[misc]


# --- passes -------------------------------------------------------------------------------------


def test_one_picture_of_coordinates_is_expanded_and_a_batch_is_left() -> None:
    graph = HandMadeGraph()
    graph.coords = graph.stored(graph.random(1, 2, *graph.size))
    one = graph.site(graph.x, (8, 4))
    graph.coords = graph.new_coords()
    model = graph.model(one, graph.site(graph.x, (8, 4)))
    before = run(model)
    result = ExpandCoordinates()(model)
    assert result.count == 1
    assert_close(run(model), before)
    assert not ExpandCoordinates()(model).modified


def test_what_cannot_be_evaluated_stays_and_is_named() -> None:
    graph = HandMadeGraph()
    doubled = graph.node("Add", *[graph.stored(graph.random(8, 5, 7))] * 2)
    output = graph.node("Mul", graph.x, graph.node("Sin", doubled))
    model = graph.model(output)
    for node in model.graph:
        if node.op_type == "Sin":
            node.domain, node.op_type = "somebody.else", "Wave"
    result = EvaluateConstants()(model)
    (refusal,) = result.refusals
    assert "cannot evaluate Wave" in refusal.reason
    assert [node.op_type for node in model.graph] == ["Wave", "Mul"]


def test_random_numbers_are_not_constants() -> None:
    graph = HandMadeGraph()
    noise = graph.node("RandomNormal", shape=[8, 5, 7], dtype=1)
    model = graph.model(graph.node("Add", graph.x, noise))
    assert not nodes_of_constants(model.graph)
    assert not EvaluateConstants()(model).modified
    assert "RandomNormal" in [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("target", "forms"), [("openvino", {"separable", "branch"}), ("web", {"map"})]
)
def test_files_for_processors_are_the_same_wherever_they_are_written(
    target: str, forms: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU, too, whose provider would have other forms."""
    model = network()
    here = export(model, tmp_path / "here.onnx", target=target)
    monkeypatch.setattr(
        "coordconv_patch.export.onnx.working_providers",
        lambda given: ("AnotherExecutionProvider", *CPU),
    )
    monkeypatch.setattr(  # files are checked on the CPU still
        "coordconv_patch.export.onnx.Verifier",
        lambda *args, providers, **options: Verifier(*args, providers=providers[1:], **options),
    )
    elsewhere = export(model, tmp_path / "elsewhere.onnx", target=target)
    assert set(here.lowerings.values()) == forms
    assert elsewhere.lowerings == here.lowerings
    assert elsewhere.path.read_bytes() == here.path.read_bytes()
