"""Nodes that make coordinate constants of the little that a file stores.

See :mod:`coordconv_patch.export.graph_passes.compact_constants`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from coordconv_patch.export.graph_passes.vocabulary import mark_as_coordinates_
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.strips import Strip

__all__ = ["Recipes", "array_of"]


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers, of any type that ONNX has."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # which numpy does not have by itself
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@dataclass
class Recipes:
    """Adds recipes to a graph: nodes, and what they read to what the graph stores.

    What several recipes read, such as the strip of several maps, is there once. Names begin
    what is stored for a recipe. New nodes are put before the graph's others, in the order in
    which they are made.
    """

    graph: ir.Graph
    _values: dict[tuple[str, int], tuple[object, ir.Value]] = field(default_factory=dict)

    @functools.cached_property
    def _first(self) -> ir.Node:
        """The first node of the graph before any recipe."""
        return self.graph[0]

    def product(self, name: str, constant: CoordConstant) -> ir.Value:
        """The products of the factors one below the other, in the constant's shape."""

        def make() -> ir.Value:
            assert constant.factors is not None
            bands = [[array_of(factor) for factor in band] for band in constant.factors]
            if constant.strip is None:
                (factors,) = bands
                return self._multiplied(
                    self._coordinates(f"{name}_axis_{axis}", array)
                    for axis, array in enumerate(factors)
                )
            parts = self._bands(name, bands)
            result = parts[0] if len(parts) == 1 else self._node("Concat", parts, {"axis": 2})
            result.shape = ir.Shape(constant.tensor.shape)
            return result

        return self._once("product", constant, make)

    def kernel_of_images(self, name: str, numbers: np.ndarray, strip: Strip) -> ir.Value:
        """A kernel (C_out, 1, bands, S), of which only places with an image are stored."""
        images = strip.images.numpy()
        is_used = images >= 0
        places = self._once(
            *("places", strip),
            lambda: self._coordinates(f"{name}_images", np.where(is_used, images, 0)[np.newaxis]),
        )
        order = images[is_used].argsort()  # an image stands in one place
        by_image = np.ascontiguousarray(numbers[:, 0, is_used][:, order])
        stored = self._stored(f"{name}_of_images", by_image)
        return self._node("Gather", [stored, places], {"axis": 1})

    def kernel_of_taps(self, name: str, kernel: CoordKernel) -> ir.Value:
        """A kernel as the product of its site's coordinate weight and its coefficients."""
        weight, coefficients = kernel.weight, kernel.coefficients
        numbers = [
            self._once(
                *("weight", weight), lambda: self._stored(f"{name}_of_taps", array_of(weight))
            ),
            self._once(
                *("coefficients", coefficients),
                lambda: self._coordinates(f"{name}_coefficients", array_of(coefficients)),
            ),
        ]
        shape = self._coordinates(
            f"{name}_kernel_shape", np.array(kernel.tensor.shape, dtype=np.int64)
        )
        return self._node("Reshape", [self._node("MatMul", numbers), shape])

    def convolution(self, strip: ir.Value, kernel: ir.Value, layout: Strip) -> ir.Value:
        """The map that a kernel makes of a flat strip."""
        return self._node("Conv", [strip, kernel], {"dilations": layout.dilation})

    def map_weight(self, name: str, kernel: CoordKernel) -> ir.Value:
        """The kernel of a map, which stands for coordinates and weights at once."""
        return self._coordinates(f"{name}_weight", array_of(kernel.tensor))

    def _bands(self, name: str, bands: Sequence[Sequence[np.ndarray]]) -> list[ir.Value]:
        """Products (1, rows, S, W) of a strip's factors, each as (1, 1, rows, S * W).

        Images have few different lines along an axis, and bands the same along all but the rows.
        """
        names = [
            f"{name}_band_{number}" if len(bands) > 1 else name for number in range(len(bands))
        ]
        *others, last = zip(*bands, strict=True)
        columns = self._lines(f"{name}_axis_{len(others)}", last)
        products = []
        for number, band in enumerate(names):
            rows = [
                self._lines(f"{band}_axis_{axis}", [factors[number]])[0]
                for axis, factors in enumerate(others)
            ]
            arrays = bands[number]
            first, *sizes, images, width = np.broadcast_shapes(*(array.shape for array in arrays))
            wanted = np.array((first, 1, *sizes, images * width), dtype=np.int64)
            shape = self._coordinates(f"{band}_shape", wanted)
            product = self._multiplied([*rows, columns[number]])
            products.append(self._node("Reshape", [product, shape]))
        return products

    def _lines(self, name: str, factors: Sequence[np.ndarray]) -> list[ir.Value]:
        """Factors whose next to last axis counts images; every line that they have is stored once.

        They are alike but for that axis.
        """
        together = np.concatenate(factors, axis=-2)
        lines, places = np.unique(together, axis=together.ndim - 2, return_inverse=True)
        places = places.reshape(-1).astype(np.int32)
        if lines.nbytes + places.nbytes >= together.nbytes:
            return [
                self._coordinates(f"{name}_{number}" if number else name, array)
                for number, array in enumerate(factors)
            ]
        stored = self._coordinates(f"{name}_lines", lines)
        ends = np.cumsum([factor.shape[-2] for factor in factors])[:-1]
        return [
            self._node(
                "Gather",
                [stored, self._coordinates(f"{name}_images_{number}", images)],
                {"axis": together.ndim - 2},
            )
            for number, images in enumerate(np.split(places, ends))
        ]

    def _multiplied(self, factors: Iterable[ir.Value]) -> ir.Value:
        return functools.reduce(lambda left, right: self._node("Mul", [left, right]), factors)

    def _once(self, kind: str, source: object, make: Callable[[], ir.Value]) -> ir.Value:
        """What is made of an object, kept under the object's identity."""
        key = kind, id(source)
        if key not in self._values:
            self._values[key] = source, make()  # kept, so that the identity stays its own
        return self._values[key][1]

    def _coordinates(self, name: str, array: np.ndarray) -> ir.Value:
        """Store what counts as coordinates; weights do not."""
        value = self._stored(name, array)
        mark_as_coordinates_(value)
        return value

    def _stored(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _node(
        self, op_type: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].type = inputs[0].type
        self.graph.insert_before(self._first, node)
        return node.outputs[0]
