"""The order of the passes: a value that others can add to; and the same for graphs of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_graphs import (
    CPU,
    HandMadeGraph,
    assert_close,
    checked,
    optimized_operators,
    run,
    serialized,
)
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export import model_file
from coordconv_patch.export.graph_passes.order_additions import OrderAdditions
from coordconv_patch.export.rewrites import ANY_PROVIDER, REWRITES, passes_for, rewrite_
from coordconv_patch.lowering.lower import Lowered

EMPTY = Lowered({}, (), ())


class Everything(nn.Module):
    """Something for every pass: ReLU6, a narrow linear activation, a layer scale, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 24, 1)
        self.wide = nn.Conv2d(24, 32, 1)
        self.back = nn.Conv2d(32, 16, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        start = self.stem(x).relu()
        narrow = self.narrow(nn.functional.relu6(self.first(start)))
        wide = self.wide(narrow).relu()
        return (start + self.scale * self.back(wide)).relu().mean((2, 3))


def everything() -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Everything().eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(std=0.2)
    return model


X = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_graph_with_its_weights_beside_it_gets_the_passes_that_others_get(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = everything()
    options: dict[str, Any] = {"exporter": exporter, "providers": CPU}
    small = ccp.export_onnx(model, tmp_path / "small.onnx", X, **options)
    monkeypatch.setattr(model_file, "MAX_BYTES_IN_GRAPH", 0)
    large = ccp.export_onnx(model, tmp_path / "large.onnx", X, **options)
    stored = onnx.load(large.path, load_external_data=False).graph.initializer
    assert any(tensor.external_data for tensor in stored)
    assert large.nodes == small.nodes
    if exporter == "dynamo":  # the other one's graphs read shapes of what should be fused
        assert large.nodes["Add"] == 5  # five branches and a residual; the wide one has none
        assert large.nodes["HardSigmoid"] == 1
    assert large.refusals == small.refusals
    assert large.coord_constant_bytes == small.coord_constant_bytes
    assert optimized_operators(large.path) == optimized_operators(small.path)
    actual, expected = (run(report.path, {"x": X.numpy()}) for report in (large, small))
    np.testing.assert_array_equal(actual, expected)
    assert_close(actual, [model.double()(X.double()).detach().numpy()], 3e-6)


def test_weights_that_lie_in_files_are_rewritten_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnx-ir loads a large graph: its weights stay in their file until they are read."""
    path = tmp_path / "m.onnx"
    model = everything()
    options: dict[str, Any] = {"lowering": "branch", "providers": CPU}
    ccp.export_onnx(model, path, X, **options)
    in_memory = ir.load(path)
    monkeypatch.setattr(model_file, "MAX_BYTES_IN_GRAPH", 0)
    ccp.export_onnx(model, path, X, **options)
    in_files = ir.load(path)
    held = [value.const_value for value in in_files.graph.initializers.values()]
    assert any(isinstance(tensor, ir.ExternalTensor) for tensor in held)
    for graph in (in_memory, in_files):
        rewrite_(graph, passes_for(CPU[0], EMPTY, 2))
    assert [node.op_type for node in in_files.graph] == [n.op_type for n in in_memory.graph]
    assert sum(node.op_type == "HardSigmoid" for node in in_files.graph) == 1
    loaded = ir.external_data.load_to_model(in_files)
    np.testing.assert_array_equal(*(run(g, {"x": X.numpy()}) for g in (loaded, in_memory)))


def test_tensors_that_torchscript_puts_into_files_of_their_own_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more than 2 GB it does: weights, and what Constant nodes hold."""
    model = everything()
    options: dict[str, Any] = {"exporter": "torchscript", "providers": CPU}
    expected = ccp.export_onnx(model, tmp_path / "expected.onnx", X, **options)
    export = torch.onnx.export

    def export_into_many_files(exported: nn.Module, args: Any, path: str, **kwargs: Any) -> None:
        export(exported, args, path, **kwargs)
        onnx.save(
            *(onnx.load(path), path),
            save_as_external_data=True,
            all_tensors_to_one_file=False,
            size_threshold=0,
            convert_attribute=True,
        )
        assert len(list(Path(path).parent.iterdir())) > 50

    monkeypatch.setattr(torch.onnx, "export", export_into_many_files)
    report = ccp.export_onnx(model, tmp_path / "m.onnx", X, **options)
    assert report.nodes == expected.nodes
    assert report.coord_constant_bytes == expected.coord_constant_bytes
    np.testing.assert_array_equal(*(run(r.path, {"x": X.numpy()}) for r in (report, expected)))


class NoteAuthor(ir.passes.InPlacePass):
    """Somebody else's pass."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.doc_string = "by somebody else"
        return ir.passes.PassResult(model, modified=True)


def test_a_pass_from_outside_runs_for_its_target_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWRITES, CPU[0], [*REWRITES[CPU[0]], NoteAuthor])
    model = everything()
    report = ccp.export_onnx(model, tmp_path / "m.onnx", X, providers=CPU)
    assert onnx.load(report.path).graph.doc_string == "by somebody else"
    for other in (None, "CUDAExecutionProvider"):
        assert not any(isinstance(each, NoteAuthor) for each in passes_for(other, EMPTY, 2))


def test_a_target_from_outside_has_passes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWRITES, "TheirProvider", [NoteAuthor])
    theirs = [type(each) for each in passes_for("TheirProvider", EMPTY, 2)]
    assert NoteAuthor in theirs
    assert OrderAdditions not in theirs
    others = [type(each) for each in passes_for("AnotherProvider", EMPTY, 2)]
    assert [kind for kind in others if kind in ANY_PROVIDER] == ANY_PROVIDER


@pytest.mark.parametrize("lowering", ["auto", "separable"])
def test_a_second_run_of_every_pass_changes_nothing(lowering: Any, tmp_path: Path) -> None:
    report = ccp.export_onnx(everything(), tmp_path / "m.onnx", X, lowering=lowering, providers=CPU)
    model = ir.load(report.path)
    passes = passes_for(CPU[0] if lowering == "auto" else None, EMPTY, 2)
    for each in passes:
        before = serialized(model)
        assert not each(model).modified, each
        assert serialized(model) == before
    checked(model)


@pytest.mark.parametrize("name", ["", "conv"])
def test_nodes_get_names_of_their_own(name: str) -> None:
    """Quantizers are told by name which nodes to leave out."""
    graph = HandMadeGraph()
    model = graph.model(graph.node("Relu", graph.site(graph.x, (8, 16))))
    for node in model.graph:
        node.name = name
    rewrite_(model, passes_for(None, EMPTY, 2))
    names = [node.name for node in model.graph]
    assert all(names)
    assert len(set(names)) == len(names)
