"""Small ONNX graphs made by hand, and what tests ask of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

CPU = ["CPUExecutionProvider"]


class HandMadeGraph:
    """Values are added by name of operator; ``x`` is the input, ``coords`` the coordinates."""

    def __init__(
        self, channels: int = 8, size: Sequence[int] = (5, 7), opset: int = 18, dtype: Any = "f4"
    ) -> None:
        self.generator = np.random.default_rng(0)
        self.dtype = np.dtype(dtype)
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.inputs: list[ir.Value] = []
        self.size = tuple(size)
        self.x = self.input("x", ["N", channels, *size])
        batch = self.node("Shape", self.x, end=1) if opset >= 15 else None
        rest = np.array([2, *size], dtype=np.int64)
        if batch is None:
            batch = self.node("Slice", self.node("Shape", self.x), *self.numbers([0], [1]))
        self.batch = batch
        self.shape = self.node("Concat", batch, self.stored(rest), axis=0)
        self.coords = self.new_coords()

    def numbers(self, *values: list[int]) -> list[ir.Value]:
        return [self.stored(np.array(value, dtype=np.int64)) for value in values]

    def input(self, name: str, shape: Sequence[Any]) -> ir.Value:
        kind = ir.TensorType(ir.DataType.from_numpy(self.dtype))
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
        self.inputs.append(value)
        return value

    def random(self, *shape: int) -> np.ndarray:
        return self.generator.standard_normal(shape).astype(self.dtype)

    def stored(self, array: np.ndarray, name: str | None = None) -> ir.Value:
        name = name or f"stored_{len(self.initializers)}"
        value = ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        self.initializers.append(value)
        return value

    def in_a_node(self, array: np.ndarray) -> ir.Value:
        """A stored value as the output of a Constant node."""
        node = ir.node("Constant", [], attributes={"value": ir.tensor(array)})
        node.outputs[0].name = f"constant_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def node(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def new_coords(self) -> ir.Value:
        """Two coordinate channels, expanded to the batch."""
        return self.node("Expand", self.stored(self.random(1, 2, *self.size)), self.shape)

    def conv(
        self,
        source: ir.Value,
        channels: tuple[int, int],
        kernel: int = 1,
        *,
        weight: ir.Value | None = None,
        bias: bool = False,
        **attributes: Any,
    ) -> ir.Value:
        """A convolution of (inputs, outputs) channels."""
        shape = (channels[1], channels[0], kernel, kernel)
        inputs = [source, weight if weight is not None else self.stored(self.random(*shape))]
        if bias:
            inputs.append(self.stored(self.random(channels[1])))
        return self.node("Conv", *inputs, **attributes)

    def site(self, source: ir.Value, channels: tuple[int, int], **options: Any) -> ir.Value:
        """The sum of a convolution and its 1x1 branch."""
        main = self.conv(source, channels, **options)
        return self.node("Add", main, self.conv(self.coords, (2, channels[1])))

    def model(self, *outputs: ir.Value) -> ir.Model:
        """The graph's model, with the shapes that ONNX infers written down in it."""
        for output in outputs:
            output.type = ir.TensorType(ir.DataType.from_numpy(self.dtype))
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": self.opset},
            name="graph",
        )
        proto = ir.to_proto(ir.Model(graph, ir_version=8))
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        return ir.from_proto(inferred)


def checked(model: ir.Model) -> onnx.ModelProto:
    """The model's file, which ONNX's own checks accept: order, types, shapes written down."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return proto


def run(
    model: ir.Model | onnx.ModelProto | Path, feeds: Mapping[str, np.ndarray] | None = None
) -> list[np.ndarray]:
    """The outputs in ONNX Runtime without graph optimisation; on random images by default."""
    if isinstance(model, ir.Model):
        model = checked(model)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(source, options, providers=CPU)
    if feeds is None:
        feeds = {value.name: random_input(value) for value in session.get_inputs()}
    return list(session.run(None, dict(feeds)))


def random_input(value: Any) -> np.ndarray:
    """Three images (a symbolic batch becomes 3) for a session's input."""
    shape = [axis if isinstance(axis, int) else 3 for axis in value.shape]
    kind = np.float16 if "float16" in value.type else np.float32
    return np.random.default_rng(1).standard_normal(shape).astype(kind)


def assert_close(
    actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = 1e-6
) -> None:
    """Equal within a tolerance that is relative to each output's largest number."""
    for left, right in zip(actual, expected, strict=True):
        assert left.shape == right.shape
        scale = max(float(np.abs(right).max()), 1e-30)
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * scale)


def lines_bytes(length: int, images: int, lines: int, itemsize: int = 4, bands: int = 1) -> int:
    """What images along one axis take in a file: each whole, or every line once, and its places.

    Args:
        length: Of the axis.
        images: In each band.
        lines: Different ones among all images.
        itemsize: Bytes of a number; a place has four.
        bands: How many.
    """
    whole = bands * images * length * itemsize
    return min(whole, lines * length * itemsize + bands * images * 4)


def flat_strip_bytes(size: tuple[int, int], images: int, lines: int) -> int:
    """What a strip of one band takes: its lines, so many an axis, and four whole numbers' shape."""
    return sum(lines_bytes(length, images, lines) for length in size) + 4 * 8


PADDED_3X3 = (7, 1, (2, 5))
"""Of a banded strip: images side by side, border rows, lines along y and x.

Lines are a constant and a ramp; along x, where bands share them, also one for each border, and
nothing where a band has no image.
"""


def banded_strip_bytes(
    size: tuple[int, int],
    layout: tuple[int, int, tuple[int, int]],
    itemsize: int = 4,
    *,
    kernels: bool = True,
) -> int:
    """What a strip of three bands takes in a file.

    Lines, three shapes of four whole numbers, and where kernels read it, which image stands in
    each place.

    Args:
        size: Of the images.
        layout: As :data:`PADDED_3X3`.
        itemsize: Bytes of a number.
        kernels: Whether kernels read it.
    """
    width, border, (rows, columns) = layout
    along_x = lines_bytes(size[1], width, columns, itemsize, bands=3)
    along_y = lines_bytes(size[0], width, rows, itemsize)
    borders = 2 * lines_bytes(border, width, border, itemsize)
    return along_x + along_y + borders + 3 * 4 * 8 + (3 * width * 8 if kernels else 0)


def count(model: ir.Model | onnx.ModelProto, kind: str) -> int:
    """How many nodes of a kind the graph has."""
    nodes = model.graph if isinstance(model, ir.Model) else model.graph.node
    return sum(node.op_type == kind for node in nodes)


def optimized_operators(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime's CPU provider runs for a file, all optimisations on."""
    kept = path.with_suffix(".optimized.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(kept)
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=CPU)
    operators = Counter(node.op_type for node in onnx.load(kept).graph.node)
    kept.unlink()
    return operators


def serialized(model: ir.Model) -> bytes:
    """The file's bytes, to see that nothing has changed."""
    return ir.to_proto(model).SerializeToString(deterministic=True)
