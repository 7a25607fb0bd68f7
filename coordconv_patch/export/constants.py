"""Store coordinate constants as what they are made of.

Coordinate channels are products of one vector per axis (x along W times ones along H), the
bands of a strip of images likewise, and a map is a convolution of a strip. The kernel of a
strip with several bands has places without an image, which need no weight::

    c                ->   Mul(rows, columns)
    s                ->   Concat(Reshape(Mul(rows, columns)), ...)
    m                ->   Conv(s, V)
    V                ->   Gather(V of the images, images)

A runtime folds these when it loads the file, so they cost bytes neither in the file nor
time at inference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from coordconv_patch.export.ordering import is_read_once
from coordconv_patch.passes.lower import CoordConstant
from coordconv_patch.passes.strips import Strip

__all__ = ["compact_constants_", "constant_bytes"]


def constant_bytes(graph: ir.Graph, constants: Sequence[CoordConstant], batch: int) -> int:
    """Bytes of the stored values of a graph that hold coordinate constants."""
    return sum(_bytes_of(value) for value, _ in _found(graph, constants, batch))


def compact_constants_(graph: ir.Graph, constants: Sequence[CoordConstant], batch: int) -> int:
    """Replace coordinate constants by what they are made of, where that is smaller, in place.

    The last of the passes: the weight of a strip is no initializer any more afterwards.

    Args:
        graph: An exported graph.
        constants: What the lowering stored.
        batch: The batch size of the example: with a fixed batch exporters expand constants.

    Returns:
        Bytes of coordinate constants that the graph holds now.
    """
    total = 0
    stored: dict[int, ir.Value] = {}
    first = next((node for node in graph if node.op_type != "Constant"), None)
    for value, constant in list(_found(graph, constants, batch)):
        if first is None or not _is_replaceable(value, constant):
            total += _bytes_of(value)
            continue
        builder = _Builder(graph, first, f"{value.name}", [])
        if constant.strip is not None:
            _compact_kernels_(value, constant.strip, builder)
        _replace_(graph, value, constant, builder, stored)
        total += sum(array.nbytes for array in builder.arrays)
    return total


def _is_replaceable(value: ir.Value, constant: CoordConstant) -> bool:
    """Whether a recipe is smaller, and can stand where a stored value stands."""
    return (
        _compact_bytes(constant) < _bytes_of(value)
        and _shape(value) == tuple(constant.tensor.shape)
        and not (value.is_graph_input() or value.is_graph_output())
    )


def _compact_bytes(constant: CoordConstant) -> float:
    if constant.map_of is not None:
        strip, kernel = constant.map_of
        return _compact_bytes(strip) + kernel.numel() * kernel.element_size()
    if constant.factors is None:
        return float("inf")
    factors = [factor for band in constant.factors for factor in band]
    return sum(factor.numel() * factor.element_size() for factor in factors)


def _found(
    graph: ir.Graph, constants: Sequence[CoordConstant], batch: int
) -> Iterator[tuple[ir.Value, CoordConstant]]:
    """Stored values that hold a constant, found by their numbers: exporters rename them."""
    wanted: dict[str, CoordConstant] = {}  # by the digest of their type and numbers
    lengths = set()
    for constant in constants:
        tensor = constant.tensor.detach()
        for form in (tensor, tensor.expand(batch, *tensor.shape[1:])):
            array = _array(form)
            wanted.setdefault(_digest(array), constant)
            lengths.add(array.nbytes)
    for value in _stored_values(graph):
        assert value.const_value is not None
        if value.const_value.nbytes in lengths:
            found = wanted.get(_digest(value.const_value.numpy()))
            if found is not None:
                yield value, found


def _stored_values(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            output = node.outputs[0]
            output.const_value = node.attributes["value"].as_tensor()
            yield output


def _bytes_of(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return value.const_value.numpy().shape


def _replace_(
    graph: ir.Graph,
    value: ir.Value,
    constant: CoordConstant,
    builder: _Builder,
    made: dict[int, ir.Value],
) -> None:
    """Put the recipe in a stored value's place.

    Args:
        graph: The graph.
        value: The stored value.
        constant: What it holds.
        builder: Adds the recipe's nodes.
        made: Strips that were made for other maps already, by identity.
    """
    if constant.map_of is None:
        result = builder.product(constant)
    else:
        strip, kernel = constant.map_of
        assert strip.strip is not None
        if id(strip) not in made:
            made[id(strip)] = builder.product(strip)
        result = builder.node(
            "Conv",
            [made[id(strip)], builder.stored("weight", _array(kernel))],
            {"dilations": strip.strip.dilation},
        )
    result.type, result.shape = value.type, value.shape
    _put_in_place_of(value, result, graph)


def _put_in_place_of(value: ir.Value, result: ir.Value, graph: ir.Graph) -> None:
    """Let a computed value be read where a stored one was, which is removed."""
    producer = value.producer()
    value.replace_all_uses_with(result)
    if producer is None:
        assert value.name is not None
        del graph.initializers[value.name]
    else:
        graph.remove(producer, safe=True)


def _compact_kernels_(value: ir.Value, strip: Strip, builder: _Builder) -> None:
    """Store the kernels that convolve a strip without the places that have no image."""
    images = strip.images.numpy()
    is_used = images >= 0
    if is_used.all():
        return
    order = images[is_used].argsort()  # an image stands in one place
    places: ir.Value | None = None
    for convolution in _convolutions_of(value):
        kernel = convolution.inputs[1]
        stored = ir.convenience.get_const_tensor(kernel) if kernel is not None else None
        if kernel is None or stored is None or kernel.is_graph_input() or not is_read_once(kernel):
            continue
        numbers = stored.numpy()
        if numbers.shape[2:] != images.shape:
            continue
        places = places or builder.stored("images", np.where(is_used, images, 0)[np.newaxis])
        by_image = np.ascontiguousarray(numbers[:, 0, is_used][:, order])
        gathered = builder.node(
            "Gather", [builder.kept(f"{kernel.name}_of_images", by_image), places], {"axis": 1}
        )
        gathered.shape = ir.Shape(numbers.shape)
        _put_in_place_of(kernel, gathered, builder.graph)


def _convolutions_of(value: ir.Value) -> Iterator[ir.Node]:
    """The convolutions that read a value, also expanded to a batch."""
    for user, position in value.uses():
        if user.op_type == "Expand":
            yield from _convolutions_of(user.outputs[0])
        elif user.op_type == "Conv" and position == 0:
            yield user


@dataclass
class _Builder:
    """Adds nodes to a graph, and what they read to what the graph stores.

    Attributes:
        graph: The graph.
        before: The node that new nodes are put before, in the order in which they are made.
        name: Begins the names of what is stored.
        arrays: What was stored.
    """

    graph: ir.Graph
    before: ir.Node
    name: str
    arrays: list[np.ndarray]

    def product(self, constant: CoordConstant) -> ir.Value:
        """The products of the factors one below the other, in the constant's shape."""
        assert constant.factors is not None
        names = [f"band_{number}_" for number in range(len(constant.factors))]
        bands = [
            self._band(name if len(names) > 1 else "", factors, constant.strip is not None)
            for name, factors in zip(names, constant.factors, strict=True)
        ]
        result = bands[0] if len(bands) == 1 else self.node("Concat", bands, {"axis": 2})
        result.shape = ir.Shape(constant.tensor.shape)
        return result

    def _band(self, name: str, factors: Sequence[Tensor], is_strip: bool) -> ir.Value:
        """The product of factors; in a strip (1, rows, S, W) becomes (1, 1, rows, S * W)."""
        arrays = [_array(factor) for factor in factors]
        running, *rest = (
            self.stored(f"{name}axis_{axis}", array) for axis, array in enumerate(arrays)
        )
        for factor in rest:
            running = self.node("Mul", [running, factor])
        if not is_strip:
            return running
        first, *rows, images, width = np.broadcast_shapes(*(array.shape for array in arrays))
        wanted = (first, 1, *rows, images * width)
        shape = self.stored(f"{name}shape", np.array(wanted, dtype=np.int64))
        return self.node("Reshape", [running, shape])

    def stored(self, what: str, array: np.ndarray) -> ir.Value:
        """Store what counts as a coordinate constant."""
        self.arrays.append(array)
        return self.kept(f"{self.name}_{what}", array)

    def kept(self, name: str, array: np.ndarray) -> ir.Value:
        """Store an array."""
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].type = inputs[0].type
        self.graph.insert_before(self.before, node)
        return node.outputs[0]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # which numpy does not have by itself
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _digest(array: np.ndarray) -> str:
    kind = str(array.dtype).encode()
    return hashlib.sha256(kind + np.ascontiguousarray(array).tobytes()).hexdigest()
