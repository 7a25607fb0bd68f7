"""ReLU6 as a hard sigmoid: the function stays, and only what can take the factor changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import HandMadeGraph, assert_close, checked, count, run, serialized

from coordconv_patch.export.graph_passes.fuse_clips import FuseClips

CHANNELS = 16


def clip(
    graph: HandMadeGraph, value: ir.Value, low: float = 0.0, high: float = 6.0, kind: Any = "f4"
) -> ir.Value:
    limits = [graph.stored(np.array(limit, dtype=kind)) for limit in (low, high)]
    return graph.node("Clip", value, *limits)


def large_site(graph: HandMadeGraph) -> ir.Value:
    """A sum that is below zero, between, and above six at many pixels."""
    return graph.site(graph.x, (8, CHANNELS))


def fused(model: ir.Model) -> int:
    before = run(model)
    result = FuseClips()(model)
    assert result.modified == (result.count > 0)
    assert_close(run(model), before)
    return result.count


def assert_untouched(model: ir.Model) -> None:
    before = serialized(model)
    checked(model)
    result = FuseClips()(model)
    assert result.count == 0
    assert not result.modified
    assert serialized(model) == before


@pytest.mark.parametrize("high", [1.0, 6.0, 2.5])
@pytest.mark.parametrize("branch_first", [False, True])
def test_a_clip_behind_a_branch_becomes_a_hard_sigmoid(branch_first: bool, high: float) -> None:
    graph = HandMadeGraph()
    pair = [graph.conv(graph.x, (8, CHANNELS)), graph.conv(graph.coords, (2, CHANNELS))]
    total = graph.node("Add", *(pair[::-1] if branch_first else pair))
    model = graph.model(graph.conv(clip(graph, total, high=high), (CHANNELS, 4)))
    assert fused(model) == 1
    assert count(model, "Clip") == 0
    assert count(model, "HardSigmoid") == 1


def test_every_part_of_the_clip_matters_in_these_tests() -> None:
    graph = HandMadeGraph()
    total = large_site(graph)
    (values,) = run(graph.model(total))
    assert (values < 0).mean() > 0.1
    assert (values > 6).mean() > 0.01
    assert ((values > 0) & (values < 6)).mean() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "pads": [1, 1, 1, 1]},
        {"kernel": 3, "pads": [1, 1, 1, 1], "group": CHANNELS, "strides": [2, 2]},
        {"kernel": 2, "auto_pad": "SAME_UPPER"},
        {"bias": True},
    ],
)
def test_readers_of_every_geometry_take_the_factor_and_biases_do_not(
    options: dict[str, Any],
) -> None:
    graph = HandMadeGraph()
    inputs = CHANNELS // options.get("group", 1)
    model = graph.model(graph.conv(clip(graph, large_site(graph)), (inputs, CHANNELS), **options))
    assert fused(model) == 1


def test_several_readers_all_take_the_factor() -> None:
    graph = HandMadeGraph()
    clipped = clip(graph, large_site(graph))
    model = graph.model(*(graph.conv(clipped, (CHANNELS, wide)) for wide in (4, 8)))
    assert fused(model) == 1


def test_clips_that_share_their_limits() -> None:
    graph = HandMadeGraph()
    low, high = (graph.stored(np.array(limit, dtype="f4")) for limit in (0, 6))
    first = graph.node("Clip", large_site(graph), low, high)
    second = graph.node("Clip", graph.site(first, (CHANNELS, CHANNELS)), low, high)
    model = graph.model(graph.conv(second, (CHANNELS, 4)))
    assert fused(model) == 2


def test_limits_in_constant_nodes() -> None:
    graph = HandMadeGraph()
    limits = [graph.in_a_node(np.array(limit, dtype="f4")) for limit in (0, 6)]
    clipped = graph.node("Clip", large_site(graph), *limits)
    model = graph.model(graph.conv(clipped, (CHANNELS, 4)))
    assert fused(model) == 1


# --- what stays as it is ------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.0, 6.0), (0.5, 6.0), (0.0, np.inf), (0.0, 0.0)])
def test_a_clip_of_other_limits(low: float, high: float) -> None:
    graph = HandMadeGraph()
    clipped = clip(graph, large_site(graph), low, high)
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


def test_a_limit_that_weights_cannot_take() -> None:
    graph = HandMadeGraph()
    clipped = clip(graph, large_site(graph), 0.0, 3e38)
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


def test_a_clip_without_an_upper_limit() -> None:
    graph = HandMadeGraph()
    clipped = graph.node("Clip", large_site(graph), graph.stored(np.array(0.0, dtype="f4")))
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


def test_a_limit_that_is_computed() -> None:
    graph = HandMadeGraph()
    high = graph.node("ReduceMax", graph.x, keepdims=0)
    clipped = graph.node("Clip", large_site(graph), graph.stored(np.array(0.0, dtype="f4")), high)
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


def test_a_clip_behind_a_plain_convolution_which_the_runtime_fuses_itself() -> None:
    graph = HandMadeGraph()
    clipped = clip(graph, graph.conv(graph.x, (8, CHANNELS)))
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


def test_a_clip_behind_a_sum_without_a_branch() -> None:
    graph = HandMadeGraph()
    pair = [graph.conv(graph.x, (8, CHANNELS)) for _ in range(2)]
    clipped = clip(graph, graph.node("Add", *pair))
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


def test_half_precision_is_left_alone() -> None:
    graph = HandMadeGraph(dtype="f2")
    clipped = clip(graph, large_site(graph), kind="f2")
    assert_untouched(graph.model(graph.conv(clipped, (CHANNELS, 4))))


READERS = {
    "the graph's output": lambda graph, value: value,
    "a residual sum": lambda graph, value: graph.node(
        "Add", value, graph.conv(graph.x, (8, CHANNELS))
    ),
    "a pooling": lambda graph, value: graph.node("GlobalAveragePool", value),
    "a transposed convolution": lambda graph, value: graph.node(
        "ConvTranspose", value, graph.stored(graph.random(CHANNELS, 4, 1, 1))
    ),
    "a convolution of a computed weight": lambda graph, value: graph.node(
        "Conv", value, graph.node("Neg", graph.stored(graph.random(4, CHANNELS, 1, 1)))
    ),
    "a convolution of which it is the weight": lambda graph, value: graph.node(
        "Conv",
        graph.stored(graph.random(1, CHANNELS, 9, 9)),
        graph.node("Slice", value, *graph.numbers([0], [1])),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_clip_that_is_also_read_by(reader: str) -> None:
    graph = HandMadeGraph()
    clipped = clip(graph, large_site(graph))
    plain = graph.conv(clipped, (CHANNELS, 4))
    assert_untouched(graph.model(plain, READERS[reader](graph, clipped)))


def test_a_sum_that_is_read_before_its_clip_too() -> None:
    graph = HandMadeGraph()
    total = large_site(graph)
    clipped = graph.conv(clip(graph, total), (CHANNELS, 4))
    assert_untouched(graph.model(clipped, graph.node("Neg", total)))


@pytest.mark.parametrize("other", ["convolution", "output", "input"])
def test_a_weight_that_is_not_the_readers_own(other: str) -> None:
    graph = HandMadeGraph()
    weight = graph.stored(graph.random(4, CHANNELS, 1, 1))
    outputs = [graph.conv(clip(graph, large_site(graph)), (CHANNELS, 4), weight=weight)]
    if other == "convolution":
        outputs.append(graph.conv(graph.conv(graph.x, (8, CHANNELS)), (1, 4), weight=weight))
    elif other == "output":
        outputs.append(weight)
    else:
        graph.inputs.append(weight)  # an initializer that the caller may replace
    assert_untouched(graph.model(*outputs))


def test_a_weight_in_a_constant_node_is_not_the_readers_own() -> None:
    graph = HandMadeGraph()
    weight = graph.in_a_node(graph.random(4, CHANNELS, 1, 1))
    model = graph.model(graph.conv(clip(graph, large_site(graph)), (CHANNELS, 4), weight=weight))
    for node in model.graph:  # as a pass that looks for constants leaves it
        if node.op_type == "Constant":
            node.outputs[0].const_value = node.attributes["value"].as_tensor()
    assert fused(model) == 0
