"""The order of additions: what ONNX Runtime fuses, and that the sum stays the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from coordconv_patch.export.graph_passes.order_additions import OrderAdditions

CHANNELS, SIZE = 16, 12
generator = np.random.default_rng(0)


def constant(*shape: int) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


class Graph:
    """A small graph: x is the input; convolutions of x, branches and sums are added by name."""

    def __init__(self) -> None:
        self.x = ir.Value(
            name="x",
            shape=ir.Shape(["N", CHANNELS, SIZE, SIZE]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        batch = self.node("Shape", [self.x], end=1)
        rest = self.initializer("rest", np.array([2, SIZE, SIZE], dtype=np.int64))
        shape = self.node("Concat", [batch, rest], axis=0)
        self.grid = self.node(
            "Expand", [self.initializer("grid", constant(1, 2, SIZE, SIZE)), shape]
        )

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
        )
        self.initializers.append(value)
        return value

    def node(self, kind: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes)
        output = node.outputs[0]
        output.name = f"{kind.lower()}_{len(self.nodes)}"
        if kind in ("Conv", "Add", "Relu"):
            # As exporters write it down: ONNX Runtime fuses what is known to be of one shape.
            output.type, output.shape = self.x.type, self.x.shape
        self.nodes.append(node)
        return output

    def conv(self, source: ir.Value, channels: int) -> ir.Value:
        weight = self.initializer(f"w{len(self.nodes)}", constant(CHANNELS, channels, 1, 1))
        return self.node("Conv", [source, weight])

    def main(self) -> ir.Value:
        return self.conv(self.x, CHANNELS)

    def branch(self) -> ir.Value:
        return self.conv(self.grid, 2)

    def add(self, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.node("Add", [left, right])

    def model(self, output: ir.Value) -> ir.Model:
        relu = self.node("Relu", [output])
        graph = ir.Graph(
            [self.x],
            [relu],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": 18},
            name="graph",
        )
        return ir.Model(graph, ir_version=9)


def run(model: ir.Model, tmp_path: object) -> tuple[np.ndarray, list[str]]:
    """The output on fixed inputs, and the operators that ONNX Runtime's CPU provider runs."""
    path, kept = f"{tmp_path}/model.onnx", f"{tmp_path}/optimized.onnx"
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = kept
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, CHANNELS, SIZE, SIZE), dtype=np.float32)
    (output,) = session.run(None, {"x": x})
    return output, [node.op_type for node in ir.load(kept).graph]


def operands(model: ir.Model) -> list[tuple[str, ...]]:
    """The operands of each addition, by the kind of what makes them."""
    found = []
    for node in model.graph:
        if node.op_type == "Add":
            names = [value.name or "" for value in node.inputs if value is not None]
            found.append(tuple(names))
    return found


def test_the_branch_comes_first() -> None:
    graph = Graph()
    main, branch = graph.main(), graph.branch()
    model = graph.model(graph.add(main, branch))
    assert OrderAdditions()(model).count == 1
    assert operands(model) == [(branch.name, main.name)]


@pytest.mark.parametrize("residual_first", [False, True])
@pytest.mark.parametrize("branch_first", [False, True])
def test_a_residual_goes_to_the_main_convolution(
    residual_first: bool, branch_first: bool, tmp_path: object
) -> None:
    graph = Graph()
    main, branch = graph.main(), graph.branch()
    residual = graph.node("Relu", [graph.main()])
    inner = graph.add(branch, main) if branch_first else graph.add(main, branch)
    outer = graph.add(residual, inner) if residual_first else graph.add(inner, residual)
    model = graph.model(outer)
    before, _ = run(model, tmp_path)
    assert OrderAdditions()(model).count == 1
    first, second = operands(model)
    assert set(first) == {main.name, residual.name}
    assert second[0] == branch.name
    after, kinds = run(model, tmp_path)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)
    assert "Add" not in kinds
    assert kinds.count("Relu") == 0  # in the convolutions


@pytest.mark.parametrize("residual_first", [False, True])
def test_a_residual_that_the_runtime_cannot_fuse_is_added_last(
    residual_first: bool, tmp_path: object
) -> None:
    """As in the plain model: one addition that runs by itself, and not two."""
    graph = Graph()
    main, branch = graph.main(), graph.branch()
    swapped = graph.node("Transpose", [graph.x], perm=[0, 1, 3, 2])
    residual = graph.node("Relu", [swapped])
    inner = graph.add(main, branch)
    outer = graph.add(residual, inner) if residual_first else graph.add(inner, residual)
    model = graph.model(outer)
    before, _ = run(model, tmp_path)
    assert OrderAdditions()(model).count == 1
    first, second = operands(model)
    assert first == (branch.name, main.name)
    assert second[1] == residual.name
    after, kinds = run(model, tmp_path)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)
    assert kinds.count("Add") == 1


def test_two_branches_of_one_sum(tmp_path: object) -> None:
    """The last convolution of a block and the one on its shortcut."""
    graph = Graph()
    left = graph.add(graph.main(), graph.branch())
    right = graph.add(graph.main(), graph.branch())
    model = graph.model(graph.add(left, right))
    before, _ = run(model, tmp_path)
    assert OrderAdditions()(model).count == 1
    after, kinds = run(model, tmp_path)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)
    assert "Add" not in kinds


def test_the_exporters_order_leaves_an_addition(tmp_path: object) -> None:
    """What the pass is for: without it, ONNX Runtime keeps an Add and a Relu of their own."""
    graph = Graph()
    residual = graph.node("Relu", [graph.main()])
    model = graph.model(graph.add(graph.add(graph.main(), graph.branch()), residual))
    _, kinds = run(model, tmp_path)
    assert "Add" in kinds


class TestWhatStaysAsItIs:
    def unchanged(self, graph: Graph, output: ir.Value) -> None:
        model = graph.model(output)
        before = operands(model)
        assert OrderAdditions()(model).count == 0
        assert operands(model) == before

    def test_sums_without_branches(self) -> None:
        graph = Graph()
        self.unchanged(graph, graph.add(graph.add(graph.main(), graph.main()), graph.x))

    def test_sums_of_branches_alone(self) -> None:
        graph = Graph()
        self.unchanged(graph, graph.add(graph.branch(), graph.branch()))

    def test_a_branch_with_other_users(self) -> None:
        graph = Graph()
        branch = graph.branch()
        left = graph.node("Relu", [graph.add(graph.main(), branch)])
        self.unchanged(graph, graph.node("Mul", [left, branch]))


def test_a_sum_that_is_used_twice_stays_a_sum(tmp_path: object) -> None:
    graph = Graph()
    main, branch = graph.main(), graph.branch()
    inner = graph.add(main, branch)
    model = graph.model(graph.add(inner, graph.node("Relu", [inner])))
    before, _ = run(model, tmp_path)
    assert OrderAdditions()(model).count == 1
    assert operands(model)[0] == (branch.name, main.name)
    np.testing.assert_allclose(run(model, tmp_path)[0], before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [1, SIZE])
def test_a_partial_sum_of_terms_that_are_broadcast_is_not_said_to_have_the_sums_shape(
    width: int,
) -> None:
    graph = Graph()
    left = graph.initializer("a", constant(1, CHANNELS, 1, 1))
    right = graph.initializer("b", constant(1, CHANNELS, 1, width))
    inner = graph.add(left, graph.branch())
    model = graph.model(graph.add(inner, right))
    assert OrderAdditions()(model).count == 1
    partial = next(node.outputs[0] for node in model.graph if node.op_type == "Add")
    assert partial.shape == (left.shape if width == 1 else None)
    model.graph.outputs[0].type, model.graph.outputs[0].shape = graph.x.type, graph.x.shape
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
