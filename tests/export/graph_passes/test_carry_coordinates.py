"""Coordinates in narrow activations: the function stays, and nothing is widened that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_graphs import HandMadeGraph, assert_close, checked, count, run, serialized
from onnx_ir.passes.common import RemoveUnusedNodesPass

from coordconv_patch.export.graph_passes.carry_coordinates import CarryCoordinates

NARROW, WIDE = 24, 32


def relu(graph: HandMadeGraph, value: ir.Value) -> ir.Value:
    return graph.node("Relu", value)


def carried(model: ir.Model, in_blocks: bool = True) -> int:
    """How many branches were carried; the outputs are what they were, and the file is valid."""
    before = run(model)
    result = CarryCoordinates(in_blocks)(model)
    assert result.modified == (result.count > 0)
    RemoveUnusedNodesPass()(model)
    assert_close(run(model), before)
    return result.count


def assert_untouched(model: ir.Model) -> None:
    before = serialized(model)
    checked(model)
    result = CarryCoordinates()(model)
    assert result.count == 0
    assert not result.modified
    assert serialized(model) == before


def channels_read(model: ir.Model) -> list[int]:
    """Input channels of every convolution of the graph's own data, in order."""
    return [
        node.inputs[1].const_value.shape[1]
        for node in model.graph
        if (node.op_type == "Conv" and node.inputs[0].producer() is None)
        or (node.op_type == "Conv" and node.inputs[0].producer().op_type != "Expand")
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_a_wide_convolution_reads_coordinates_with_its_input(bias: bool) -> None:
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, NARROW), bias=bias)
    model = graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE), bias=bias)))
    assert carried(model) == 1
    assert count(model, "Conv") == 3  # the wide one's branch is gone
    assert count(model, "Add") == 1
    # 24 channels and 2 coordinates, filled up to a multiple of 4.
    assert channels_read(model) == [8, 28]


def test_the_first_convolution_may_be_of_any_kernel_and_stride() -> None:
    graph = HandMadeGraph()
    main = graph.conv(graph.x, (8, NARROW), 3, pads=[1, 1, 1, 1])
    narrow = graph.node("Add", graph.conv(graph.coords, (2, NARROW)), main)
    model = graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE))))
    assert carried(model) == 1


def test_several_readers_of_one_activation() -> None:
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, NARROW))
    outputs = [relu(graph, graph.site(narrow, (NARROW, wide))) for wide in (16, 48)]
    model = graph.model(*outputs)
    assert carried(model) == 2
    assert count(model, "Add") == 1


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_chain_of_residual_blocks(blocks: int) -> None:
    """As in MobileNetV2: each block widens, mixes, narrows and adds to what it read."""
    graph = HandMadeGraph()
    stream = graph.site(graph.x, (8, NARROW))
    for index in range(blocks):
        hidden = relu(graph, graph.site(stream, (NARROW, WIDE)))
        narrow = graph.site(hidden, (WIDE, NARROW), bias=True)
        pair = (stream, narrow) if index % 2 else (narrow, stream)
        stream = graph.node("Add", *pair)
    model = graph.model(relu(graph, graph.site(stream, (NARROW, WIDE))))
    assert carried(model) == blocks + 1
    # The first branch stays, those of the narrow ones have moved on into the next readers.
    assert count(model, "Add") == 1 + blocks
    assert count(model, "Conv") == 1 + 1 + 2 * blocks + 1


def test_two_streams_of_different_width() -> None:
    graph = HandMadeGraph()
    hidden = relu(graph, graph.site(graph.site(graph.x, (8, 24)), (24, WIDE)))
    model = graph.model(relu(graph, graph.site(graph.site(hidden, (WIDE, 40)), (40, WIDE))))
    assert carried(model) == 2
    assert channels_read(model) == [8, 28, 32, 44]


def test_a_sum_of_two_activations_that_begin_by_themselves() -> None:
    graph = HandMadeGraph()
    left, right = graph.site(graph.x, (8, NARROW)), graph.site(graph.x, (8, NARROW))
    total = graph.node("Add", left, right)
    model = graph.model(relu(graph, graph.site(total, (NARROW, WIDE))))
    assert carried(model) == 1
    assert count(model, "Add") == 2  # the first branch, and the sum itself


def test_a_sum_of_three_activations() -> None:
    graph = HandMadeGraph()
    terms = [graph.site(graph.x, (8, NARROW)) for _ in range(3)]
    total = graph.node("Add", terms[0], graph.node("Add", terms[1], terms[2]))
    hidden = relu(graph, graph.site(total, (NARROW, WIDE)))
    model = graph.model(hidden)
    before = run(model)
    CarryCoordinates()(model)  # whether it can or not, the sum stays the sum
    assert_close(run(model), before)


@pytest.mark.parametrize("width", [16, 32, 15, 31])
def test_an_activation_whose_last_block_is_full_is_left_alone(width: int) -> None:
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, width))
    assert_untouched(graph.model(relu(graph, graph.site(narrow, (width, 48)))))


@pytest.mark.parametrize("width", [14, 20, 24, 40, 72])
def test_an_activation_whose_last_block_has_room_takes_them(width: int) -> None:
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, width))
    model = graph.model(relu(graph, graph.site(narrow, (width, 48))))
    assert carried(model) == 1
    widened = channels_read(model)[1]
    assert widened % 4 == 0
    assert -(-widened // 16) == -(-width // 16)


@pytest.mark.parametrize("width", [15, 16, 24, 31, 32])
def test_without_blocks_every_activation_takes_them_and_nothing_more(width: int) -> None:
    graph = HandMadeGraph()
    stream = graph.site(graph.x, (8, width))
    hidden = relu(graph, graph.site(stream, (width, 48)))
    stream = graph.node("Add", stream, graph.site(hidden, (48, width)))
    model = graph.model(relu(graph, graph.site(stream, (width, 48))))
    assert carried(model, in_blocks=False) == 2
    assert channels_read(model) == [8, width + 2, 48, width + 2]


# --- what stays as it is ------------------------------------------------------------------------


def with_reader(read: Any, width: int = NARROW) -> ir.Model:
    """A narrow site, whose sum a function reads besides a wide site."""
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, width))
    wide = relu(graph, graph.site(narrow, (width, WIDE)))
    return graph.model(wide, read(graph, narrow))


READERS = {
    "an activation": lambda graph, t: relu(graph, t),
    "the graph's output": lambda graph, t: t,
    "a sum with something else": lambda graph, t: relu(
        graph, graph.node("Add", t, graph.conv(graph.x, (8, NARROW)))
    ),
    "itself": lambda graph, t: relu(graph, graph.node("Add", t, t)),
    "a product": lambda graph, t: graph.node("Mul", t, t),
    "a concatenation": lambda graph, t: graph.node("Concat", t, t, axis=1),
    "a plain convolution": lambda graph, t: graph.conv(t, (NARROW, WIDE)),
    "a larger kernel": lambda graph, t: relu(
        graph,
        graph.node(
            "Add",
            graph.conv(t, (NARROW, WIDE), 3, pads=[1, 1, 1, 1]),
            graph.conv(graph.coords, (2, WIDE), 3, pads=[1, 1, 1, 1]),
        ),
    ),
    "a stride": lambda graph, t: relu(
        graph,
        graph.node(
            "Add",
            graph.conv(t, (NARROW, WIDE), strides=[2, 2]),
            graph.conv(graph.coords, (2, WIDE), strides=[2, 2]),
        ),
    ),
    "padding": lambda graph, t: relu(
        graph,
        graph.node(
            "Add",
            graph.conv(t, (NARROW, WIDE), pads=[1, 1, 1, 1]),
            graph.conv(graph.coords, (2, WIDE), pads=[1, 1, 1, 1]),
        ),
    ),
    "groups": lambda graph, t: relu(graph, graph.site(t, (NARROW // 4, WIDE), group=4)),
    "another size of coordinates": lambda graph, t: relu(
        graph,
        graph.node("Add", graph.conv(t, (NARROW, WIDE)), graph.conv(graph.new_coords(), (2, WIDE))),
    ),
    "a sum over channels": lambda graph, t: relu(
        graph, graph.node("Add", t, graph.site(graph.x, (8, 1)))
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_activation_that_is_also_read_by(reader: str) -> None:
    assert_untouched(with_reader(READERS[reader]))


def test_a_wide_sum_that_is_the_graphs_output() -> None:
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, NARROW))
    assert_untouched(graph.model(graph.site(narrow, (NARROW, WIDE))))


def test_a_convolution_whose_own_output_is_the_graphs() -> None:
    graph = HandMadeGraph()
    main = graph.conv(graph.x, (8, NARROW))
    narrow = graph.node("Add", main, graph.conv(graph.coords, (2, NARROW)))
    assert_untouched(graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE))), main))


def test_a_residual_term_that_is_the_graphs_output() -> None:
    graph = HandMadeGraph()
    first, second = graph.site(graph.x, (8, NARROW)), graph.site(graph.x, (8, NARROW))
    total = graph.node("Add", first, second)
    assert_untouched(graph.model(relu(graph, graph.site(total, (NARROW, WIDE))), second))


def test_a_residual_term_of_one_channel_that_is_broadcast() -> None:
    graph = HandMadeGraph()
    first, second = graph.site(graph.x, (8, NARROW)), graph.site(graph.x, (8, 1))
    total = graph.node("Add", first, second)
    assert_untouched(graph.model(relu(graph, graph.site(total, (NARROW, WIDE)))))


def test_a_linear_block_that_reads_the_activation_and_is_added_to_it() -> None:
    graph = HandMadeGraph()
    stream = graph.site(graph.x, (8, NARROW))
    total = graph.node("Add", stream, graph.site(stream, (NARROW, NARROW)))
    assert_untouched(graph.model(relu(graph, graph.site(total, (NARROW, WIDE)))))


def test_a_grouped_first_convolution() -> None:
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (2, NARROW), group=4)
    assert_untouched(graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE)))))


@pytest.mark.parametrize("where", ["first", "reader", "branch"])
def test_weights_that_others_read_too(where: str) -> None:
    graph = HandMadeGraph()
    shapes = {"first": (NARROW, 8), "reader": (WIDE, NARROW), "branch": (WIDE, 2)}
    shared = graph.stored(graph.random(*shapes[where], 1, 1))
    narrow = graph.site(graph.x, (8, NARROW), weight=shared if where == "first" else None)
    main = graph.conv(narrow, (NARROW, WIDE), weight=shared if where == "reader" else None)
    branch = graph.conv(graph.coords, (2, WIDE), weight=shared if where == "branch" else None)
    wide = relu(graph, graph.node("Add", main, branch))
    assert_untouched(graph.model(wide, graph.node("Relu", shared)))


def test_a_weight_that_is_the_graphs_output() -> None:
    graph = HandMadeGraph()
    weight = graph.stored(graph.random(WIDE, NARROW, 1, 1))
    narrow = graph.site(graph.x, (8, NARROW))
    wide = relu(graph, graph.site(narrow, (NARROW, WIDE), weight=weight))
    assert_untouched(graph.model(wide, weight))


@pytest.mark.parametrize("where", ["first", "reader", "branch"])
def test_weights_in_constant_nodes_are_changed_in_the_file_or_left_alone(where: str) -> None:
    graph = HandMadeGraph()
    shapes = {"first": (NARROW, 8), "reader": (WIDE, NARROW), "branch": (NARROW, 2)}
    held = graph.in_a_node(graph.random(*shapes[where], 1, 1))
    main = graph.conv(graph.x, (8, NARROW), weight=held if where == "first" else None)
    branch = graph.conv(graph.coords, (2, NARROW), weight=held if where == "branch" else None)
    narrow = graph.node("Add", main, branch)
    reader = held if where == "reader" else None
    model = graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE), weight=reader)))
    for node in model.graph:  # as a pass that looks for constants leaves it
        if node.op_type == "Constant":
            node.outputs[0].const_value = node.attributes["value"].as_tensor()
    carried(model)


def test_half_precision_is_left_alone() -> None:
    graph = HandMadeGraph(dtype="f2")
    narrow = graph.site(graph.x, (8, NARROW))
    assert_untouched(graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE)))))


def test_a_branch_with_padding_of_its_own_is_left_alone() -> None:
    graph = HandMadeGraph()
    main = graph.conv(graph.x, (8, NARROW), 3, pads=[1, 1, 1, 1])
    branch = graph.conv(graph.coords, (2, NARROW), 3, pads=[1, 1, 1, 1])
    narrow = graph.node("Add", main, branch)
    assert_untouched(graph.model(relu(graph, graph.site(narrow, (NARROW, WIDE)))))


def test_coordinates_that_are_not_moved_would_be_seen() -> None:
    """The comparison has teeth: coordinates make most of the output here."""
    graph = HandMadeGraph()
    narrow = graph.site(graph.x, (8, NARROW))
    model = graph.model(graph.node("Relu", graph.site(narrow, (NARROW, WIDE))))
    feeds = {"x": np.zeros((3, 8, 5, 7), dtype=np.float32)}
    (output,) = run(model, feeds)
    assert np.abs(output).max() > 1
