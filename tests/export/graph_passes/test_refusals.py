"""What a pass leaves alone is told with its reason, by the pass and by the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_graphs import CPU, HandMadeGraph
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export.graph_passes.carry_coordinates import CarryCoordinates
from coordconv_patch.export.graph_passes.fold_scales import FoldScales
from coordconv_patch.export.graph_passes.fuse_clips import FuseClips
from coordconv_patch.export.graph_passes.refusals import Refusal, RefusedError, Tally

CHANNELS = 24


def scaled(graph: HandMadeGraph, total: ir.Value, *shape: int) -> ir.Value:
    return graph.node("Mul", total, graph.stored(graph.random(*shape)))


def clipped(graph: HandMadeGraph, total: ir.Value, low: float = 0, high: float = 6) -> ir.Value:
    limits = [graph.stored(np.array(limit, dtype=graph.dtype)) for limit in (low, high)]
    return graph.node("Clip", total, *limits)


def site(graph: HandMadeGraph) -> ir.Value:
    return graph.site(graph.x, (8, CHANNELS))


def read(graph: HandMadeGraph, value: ir.Value) -> ir.Value:
    return graph.node("Relu", value)


def with_shared_weight(graph: HandMadeGraph) -> list[ir.Value]:
    weight = graph.stored(graph.random(CHANNELS, 8, 1, 1))
    total = graph.site(graph.x, (8, CHANNELS), weight=weight)
    return [read(graph, scaled(graph, total, 1)), graph.node("Neg", weight)]


def with_shared_sum(graph: HandMadeGraph) -> list[ir.Value]:
    total = site(graph)
    return [read(graph, scaled(graph, total, 1)), read(graph, total)]


def with_another_term(graph: HandMadeGraph) -> list[ir.Value]:
    total = graph.node("Add", read(graph, graph.x), graph.conv(graph.coords, (2, 8)))
    return [read(graph, scaled(graph, total, 1))]


SCALES: dict[str, Callable[[HandMadeGraph], list[ir.Value]]] = {
    "the scale has shape (7,), not one number for each channel": lambda graph: [
        read(graph, scaled(graph, site(graph), 7))
    ],
    "the scale has 5 axes, more than the sum's 4": lambda graph: [
        read(graph, scaled(graph, site(graph), 1, 1, 1, 1, 1))
    ],
    "the product is an output of the graph": lambda graph: [scaled(graph, site(graph), 1)],
    "the sum is read elsewhere too": with_shared_sum,
    "weights of node_Conv_4 are not float32 initializers of its own": with_shared_weight,
    "a term of the sum is a Relu, not a Conv": with_another_term,
}


def refusals_of(graph_pass: ir.passes.InPlacePass, model: ir.Model) -> list[Refusal]:
    result = graph_pass(model)
    assert result.modified == (result.count > 0)
    return list(result.refusals)


@pytest.mark.parametrize("reason", SCALES)
def test_a_scale_that_is_not_folded(reason: str) -> None:
    graph = HandMadeGraph()
    model = graph.model(*SCALES[reason](graph))
    (product,) = (node for node in model.graph if node.op_type == "Mul")
    (refusal,) = refusals_of(FoldScales(), model)
    assert refusal == Refusal("fold_scales", str(product.name), refusal.reason)
    assert named(refusal.reason, model) == named(reason, model)


def named(reason: str, model: ir.Model) -> str:
    """A reason in which the name of a convolution is that of its kind."""
    for node in model.graph:
        reason = reason.replace(str(node.name), node.op_type)
    return reason.replace("node_Conv_4", "Conv")


def test_a_scale_of_another_type() -> None:
    graph = HandMadeGraph(dtype="f2")
    model = graph.model(read(graph, scaled(graph, site(graph), 1)))
    (refusal,) = refusals_of(FoldScales(), model)
    assert refusal.reason == "the scale is FLOAT16, not FLOAT"


def test_one_of_two_scales_is_folded_and_the_other_is_told() -> None:
    graph = HandMadeGraph()
    outputs = [read(graph, scaled(graph, site(graph), *shape)) for shape in ((1,), (7,))]
    result = FoldScales()(graph.model(*outputs))
    assert result.modified
    assert result.count == len(result.refusals) == 1


def test_what_is_not_meant_is_not_told() -> None:
    """Scales and clips of plain sums are the runtime's to fold; a gate is not a scale."""
    graph = HandMadeGraph()
    plain = graph.node("Add", *(graph.conv(graph.x, (8, CHANNELS)) for _ in range(2)))
    gate = graph.node("Sigmoid", graph.conv(graph.x, (8, CHANNELS)))
    model = graph.model(
        scaled(graph, plain, 1),
        clipped(graph, plain),
        read(graph, graph.node("Mul", site(graph), gate)),
    )
    for graph_pass in (FoldScales(), FuseClips(), CarryCoordinates()):
        assert refusals_of(graph_pass, model) == []


CLIPS: dict[str, Callable[[HandMadeGraph], ir.Value]] = {
    "it clips to [-1, 6], not from 0 to at most 1e+06": lambda graph: graph.conv(
        clipped(graph, site(graph), -1), (CHANNELS, 4)
    ),
    "it is an output of the graph": lambda graph: clipped(graph, site(graph)),
    "GlobalAveragePool reads it, not as the input of a convolution": lambda graph: graph.node(
        "GlobalAveragePool", clipped(graph, site(graph))
    ),
    "it does not have two limits as inputs": lambda graph: graph.conv(
        graph.node("Clip", site(graph), graph.stored(np.float32(0))), (CHANNELS, 4)
    ),
    "a limit is not stored in the graph": lambda graph: graph.conv(
        graph.node(
            *("Clip", site(graph), graph.stored(np.float32(0))),
            graph.node("ReduceMax", graph.x, keepdims=0),
        ),
        (CHANNELS, 4),
    ),
}


@pytest.mark.parametrize("reason", CLIPS)
def test_a_clip_that_is_not_fused(reason: str) -> None:
    graph = HandMadeGraph()
    model = graph.model(CLIPS[reason](graph))
    (refusal,) = refusals_of(FuseClips(), model)
    assert refusal.rewrite == "fuse_clips"
    assert named(refusal.reason, model) == reason


NARROW: dict[str, Callable[[HandMadeGraph, ir.Value], ir.Value]] = {
    "Relu reads it, and is not a 1x1 convolution with coordinates": read,
    "its sum is an output of the graph": lambda graph, value: value,
    "what Add adds to it cannot carry coordinates": lambda graph, value: read(
        graph, graph.node("Add", value, graph.conv(graph.x, (8, CHANNELS)))
    ),
}


@pytest.mark.parametrize("reason", NARROW)
def test_an_activation_that_does_not_carry_coordinates(reason: str) -> None:
    graph = HandMadeGraph()
    narrow = site(graph)
    wide = read(graph, graph.site(narrow, (CHANNELS, 32)))
    model = graph.model(wide, NARROW[reason](graph, narrow))
    (refusal,) = refusals_of(CarryCoordinates(), model)
    assert refusal.rewrite == "carry_coordinates"
    assert named(refusal.reason, model) == reason


def test_an_activation_without_room_for_coordinates() -> None:
    graph = HandMadeGraph()
    model = graph.model(read(graph, graph.site(graph.site(graph.x, (8, 32)), (32, 48))))
    (refusal,) = refusals_of(CarryCoordinates(), model)
    assert refusal.reason == "its 32 channels leave no room for 2 more in blocks of 16"


def test_only_refusals_are_caught() -> None:
    tally = Tally("fold_scales")
    node = ir.node("Relu", [], name="here")
    with tally.attempt(node):
        raise RefusedError("no")
    with pytest.raises(KeyError), tally.attempt(node):
        raise KeyError("a fault")
    assert tally.refusals == [Refusal("fold_scales", "here", "no")]


# --- in the report ------------------------------------------------------------------------------


class ClippedAndPooled(nn.Module):
    """Two ReLU6 behind convolutions: one that a convolution reads, and one that a pooling does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.first(x))
        return nn.functional.relu6(self.second(x)).mean((2, 3))


def test_the_report_tells_what_was_not_rewritten_and_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ccp.patch(ClippedAndPooled().eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    report = ccp.export_onnx(
        *(model, tmp_path / "m.onnx", torch.randn(2, 3, 8, 12)), exporter="dynamo", providers=CPU
    )
    assert report.nodes["HardSigmoid"] == report.nodes["Clip"] == 1
    (refusal,) = report.refusals
    (clip,) = (node for node in ir.load(report.path).graph if node.op_type == "Clip")
    assert (refusal.rewrite, refusal.place) == ("fuse_clips", clip.name)
    assert "reads it, not as the input of a convolution" in refusal.reason
    text = " ".join(str(report).replace("│", " ").split())
    assert f"not rewritten fuse_clips at {clip.name}: {refusal.reason}" in text


def test_a_constant_that_the_exporter_expanded_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    report = ccp.export_onnx(
        *(model, tmp_path / "m.onnx", torch.randn(3, 3, 32, 24)),
        **{"lowering": "channels", "dynamic_batch": False, "providers": CPU},
    )
    (refusal,) = report.refusals
    assert refusal.rewrite == "compact_constants"
    assert refusal.reason == "the exporter expanded it from (1, 2, 32, 24) to (3, 2, 32, 24)"
