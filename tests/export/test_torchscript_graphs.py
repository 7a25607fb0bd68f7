"""Graphs of the TorchScript exporter: sizes read once, constants folded, as the other's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_graphs import CPU, HandMadeGraph, assert_close, run
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export.graph_passes.read_sizes_once import ReadSizesOnce
from coordconv_patch.export.graph_passes.unguard_lengths import UnguardLengths


class Halves(nn.Module):
    """What hides a batch from shape inference: chunks, an upsampling, a reshape by sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().chunk(2, 1)
        x = torch.cat((self.branch(left), right), 1).relu()
        x = self.up(nn.functional.interpolate(x, scale_factor=2.0)).relu()
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).flip(1).view(batch, channels, height, -1)
        return self.head(x).mean((2, 3))


def test_both_exporters_write_the_same_coordinates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ccp.patch(Halves().eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.3)
    x = torch.randn(2, 3, 16, 12)
    nodes = {}
    for exporter in ("dynamo", "torchscript"):
        options: dict[str, Any] = {"exporter": exporter, "providers": CPU}
        report = ccp.export_onnx(model, tmp_path / f"{exporter}.onnx", x, **options)
        nodes[exporter] = report.nodes
        more = torch.randn(5, 3, 16, 12)
        assert_close(run(report.path, {"x": more.numpy()}), [model(more).detach().numpy()], 3e-6)
    for kind in ("Conv", "Add", "Mul", "Expand", "Shape"):
        assert nodes["torchscript"][kind] == nodes["dynamo"][kind], kind
    assert not {"Where", "Equal", "ConstantOfShape"} & set(nodes["torchscript"])


def guarded(graph: HandMadeGraph, unknown: int = -1) -> Any:
    """Lengths of the input, guarded against a number as torch writes that."""
    ones = graph.node("ConstantOfShape", *graph.numbers([4]), value=graph_tensor())
    (limit,) = graph.numbers([unknown])
    equal = graph.node("Equal", graph.shape, graph.node("Mul", ones, limit))
    return graph.node("Where", equal, ones, graph.shape)


def graph_tensor() -> Any:
    import onnx_ir as ir

    return ir.tensor([1], dtype=ir.DataType.INT64)


@pytest.mark.parametrize(("unknown", "count"), [(-1, 1), (1, 0)])
def test_only_what_no_length_equals_is_unguarded(unknown: int, count: int) -> None:
    graph = HandMadeGraph()
    lengths = guarded(graph, unknown)
    picture = graph.stored(graph.random(1, 2, *graph.size))
    model = graph.model(graph.node("Expand", picture, lengths))
    before = run(model)
    assert UnguardLengths()(model).count == count
    assert_close(run(model), before)


def test_lengths_of_activations_are_read_from_the_input() -> None:
    graph = HandMadeGraph()
    (axis, channels) = graph.numbers([0], [1])
    active = graph.node("Relu", graph.conv(graph.x, (8, 6)))
    batch = graph.node("Gather", graph.node("Shape", active), axis, axis=0)
    width = graph.node("Gather", graph.node("Shape", active), channels, axis=0)
    shape = graph.node("Concat", batch, width, *graph.numbers([5], [7]), axis=0)
    model = graph.model(graph.node("Reshape", active, shape))
    before = run(model)
    assert ReadSizesOnce()(model).count == 2
    assert_close(run(model), before)
    gathered = [node for node in model.graph if node.op_type == "Gather" and node.outputs[0].uses()]
    (node,) = gathered
    assert node.inputs[0].producer().inputs[0] is model.graph.inputs[0]
    assert ReadSizesOnce()(model).count == 0


def test_lengths_that_are_not_those_of_an_input_stay() -> None:
    graph = HandMadeGraph()
    (axis,) = graph.numbers([0])
    positive = graph.node("NonZero", graph.x)
    count = graph.node("Gather", graph.node("Shape", graph.node("Transpose", positive)), axis)
    model = graph.model(graph.node("Cast", count, to=1))
    assert ReadSizesOnce()(model).count == 0
