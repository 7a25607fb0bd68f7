"""A scale per channel behind a coordinate sum: folded into both convolutions, or left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import HandMadeGraph, assert_close, checked, count, run, serialized

from coordconv_patch.export.graph_passes.fold_scales import FoldScales
from coordconv_patch.export.graph_passes.order_additions import OrderAdditions

CHANNELS = 16
SIZE = (5, CHANNELS)
"""As wide as there are channels: a factor along W must not be taken for one of channels."""


def made() -> HandMadeGraph:
    return HandMadeGraph(size=SIZE)


def folded(model: ir.Model) -> int:
    before = run(model)
    result = FoldScales()(model)
    assert result.modified == (result.count > 0)
    assert_close(run(model), before)
    return result.count


def assert_untouched(model: ir.Model) -> None:
    before = serialized(model)
    checked(model)
    result = FoldScales()(model)
    assert result.count == 0
    assert not result.modified
    assert serialized(model) == before


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1), (CHANNELS, 1, 1), (1, 1, 1, 1), (1,), ()])
@pytest.mark.parametrize("scale_first", [False, True])
@pytest.mark.parametrize("branch_first", [False, True])
def test_a_scale_is_folded_into_both_convolutions(
    shape: tuple[int, ...], scale_first: bool, branch_first: bool
) -> None:
    graph = made()
    pair = [graph.conv(graph.x, (8, CHANNELS), bias=True), graph.conv(graph.coords, (2, CHANNELS))]
    total = graph.node("Add", *(pair[::-1] if branch_first else pair))
    factors = [total, graph.stored(graph.random(*shape))]
    scaled = graph.node("Mul", *(factors[::-1] if scale_first else factors))
    model = graph.model(graph.node("Relu", scaled))
    assert folded(model) == 1
    assert count(model, "Mul") == 0


def test_a_scale_in_a_constant_node() -> None:
    graph = made()
    scale = graph.in_a_node(graph.random(1, CHANNELS, 1, 1))
    scaled = graph.node("Mul", graph.site(graph.x, (8, CHANNELS)), scale)
    model = graph.model(graph.node("Relu", scaled))
    assert folded(model) == 1


@pytest.mark.parametrize("group", [1, 8])
def test_kernels_and_groups(group: int) -> None:
    graph = made()
    options: dict[str, Any] = {"kernel": 3, "pads": [1, 1, 1, 1], "group": group}
    site = graph.site(graph.x, (8 // group, CHANNELS), **options)
    scaled = graph.node("Mul", site, graph.stored(graph.random(1, CHANNELS, 1, 1)))
    assert folded(graph.model(graph.node("Relu", scaled))) == 1


def test_a_residual_behind_the_scale_reaches_the_main_convolution() -> None:
    graph = made()
    residual = graph.node("Relu", graph.conv(graph.x, (8, CHANNELS)))
    scale = graph.stored(graph.random(1, CHANNELS, 1, 1))
    scaled = graph.node("Mul", graph.site(graph.x, (8, CHANNELS)), scale)
    model = graph.model(graph.node("Relu", graph.node("Add", scaled, residual)))
    before = run(model)
    assert FoldScales()(model).count == 1
    assert OrderAdditions()(model).count == 1
    assert_close(run(model), before)
    last = [node for node in model.graph if node.op_type == "Add"][-1]
    first_operand = last.inputs[0]
    assert first_operand is not None
    producer = first_operand.producer()
    assert producer is not None
    assert producer.inputs[0] is not None
    assert producer.inputs[0].name == graph.coords.name


# --- what stays as it is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(CHANNELS,), (1, 1, 1, CHANNELS), (1, 1, 5, 1), (3, 1, 1, 1), (1, CHANNELS, 5, 1)],
)
def test_a_factor_that_differs_along_other_axes(shape: tuple[int, ...]) -> None:
    graph = made()
    scaled = graph.node(
        "Mul", graph.site(graph.x, (8, CHANNELS)), graph.stored(graph.random(*shape))
    )
    assert_untouched(graph.model(graph.node("Relu", scaled)))


@pytest.mark.parametrize("shape", [(1, 1, CHANNELS, 1, 1), (1, 1, 1, 1, 1)])
def test_a_factor_of_more_axes_than_the_sum(shape: tuple[int, ...]) -> None:
    graph = made()
    scale = graph.stored(graph.random(*shape))
    scaled = graph.node("Mul", graph.site(graph.x, (8, CHANNELS)), scale)
    assert_untouched(graph.model(graph.node("Relu", scaled)))


def test_a_factor_that_is_computed() -> None:
    graph = made()
    gate = graph.node("Sigmoid", graph.conv(graph.x, (8, CHANNELS)))
    scaled = graph.node("Mul", graph.site(graph.x, (8, CHANNELS)), gate)
    assert_untouched(graph.model(graph.node("Relu", scaled)))


def test_a_sum_without_coordinates_is_the_runtimes_to_fold() -> None:
    graph = made()
    pair = [graph.conv(graph.x, (8, CHANNELS)) for _ in range(2)]
    scale = graph.stored(graph.random(1, CHANNELS, 1, 1))
    scaled = graph.node("Mul", graph.node("Add", *pair), scale)
    assert_untouched(graph.model(graph.node("Relu", scaled)))


def test_a_sum_of_something_else_than_convolutions() -> None:
    graph = made()
    main = graph.node("Relu", graph.conv(graph.x, (8, CHANNELS)))
    total = graph.node("Add", main, graph.conv(graph.coords, (2, CHANNELS)))
    scaled = graph.node("Mul", total, graph.stored(graph.random(1, CHANNELS, 1, 1)))
    assert_untouched(graph.model(graph.node("Relu", scaled)))


@pytest.mark.parametrize("what", ["sum", "term", "weight", "bias"])
def test_what_something_else_reads_too(what: str) -> None:
    graph = made()
    weight = graph.stored(graph.random(CHANNELS, 8, 1, 1))
    bias = graph.stored(graph.random(CHANNELS))
    main = graph.node("Conv", graph.x, weight, bias)
    total = graph.node("Add", main, graph.conv(graph.coords, (2, CHANNELS)))
    scaled = graph.node("Mul", total, graph.stored(graph.random(1, CHANNELS, 1, 1)))
    read = {"sum": total, "term": main, "weight": weight, "bias": bias}[what]
    model = graph.model(graph.node("Relu", scaled), graph.node("Neg", read))
    assert_untouched(model)


@pytest.mark.parametrize("what", ["sum", "term", "product"])
def test_what_is_the_graphs_output(what: str) -> None:
    graph = made()
    main = graph.conv(graph.x, (8, CHANNELS))
    total = graph.node("Add", main, graph.conv(graph.coords, (2, CHANNELS)))
    scaled = graph.node("Mul", total, graph.stored(graph.random(1, CHANNELS, 1, 1)))
    outputs = {"sum": total, "term": main, "product": scaled}
    model = graph.model(graph.node("Relu", scaled), outputs[what])
    assert_untouched(model)


def test_half_precision_is_left_alone() -> None:
    graph = HandMadeGraph(size=SIZE, dtype=np.float16)
    scale = graph.stored(graph.random(1, CHANNELS, 1, 1))
    scaled = graph.node("Mul", graph.site(graph.x, (8, CHANNELS)), scale)
    assert_untouched(graph.model(graph.node("Relu", scaled)))
