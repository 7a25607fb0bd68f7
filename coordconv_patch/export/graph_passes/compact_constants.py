"""Store coordinate constants as what they are made of.

Coordinate channels are products of one vector per axis (x along W times ones along H), the
bands of a strip of images likewise, of few different lines, and a map is a convolution of a
strip. The kernel of a strip with several bands has places without an image, which need no
weight; and the kernels of a layer that sees several sizes, as a detector's head does, come from
one coordinate weight::

    c                ->   Mul(rows, columns)
    s                ->   Concat(Reshape(Mul(rows, columns)), ...)
    rows, columns    ->   Gather(lines, images)
    m                ->   Conv(s, V)
    V                ->   Gather(V of the images, images), or Reshape(MatMul(W_c, coefficients))

A runtime folds these when it loads the file, so they cost bytes neither in the file nor
time at inference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from coordconv_patch.export.graph_passes.order_additions import is_read_once
from coordconv_patch.export.graph_passes.recipes import Recipes, array_of
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.strips import Strip

__all__ = ["compact_constants_", "constant_bytes"]


def constant_bytes(graph: ir.Graph, constants: Sequence[CoordConstant], batch: int) -> int:
    """Bytes of the stored values of a graph that hold coordinate constants."""
    return sum(_bytes_of(value) for value, _ in _found(graph, constants, batch))


def compact_constants_(
    graph: ir.Graph,
    constants: Sequence[CoordConstant],
    batch: int,
    kernels: Sequence[CoordKernel] = (),
) -> int:
    """Replace coordinate constants by what they are made of, where that is smaller, in place.

    The last of the passes: the weight of a strip is no initializer any more afterwards.

    Args:
        graph: An exported graph.
        constants: What the lowering stored.
        batch: The batch size of the example: with a fixed batch exporters expand constants.
        kernels: The kernels of strips that the lowering stored.

    Returns:
        Bytes of coordinate constants that the graph holds now.
    """
    first = next((node for node in graph if node.op_type != "Constant"), None)
    if first is None:
        return constant_bytes(graph, constants, batch)
    of_maps = [constant.map_of[1] for constant in constants if constant.map_of is not None]
    compactor = _Compactor(Recipes(graph, first), _cheap_products([*kernels, *of_maps]))
    whole = 0
    for value, constant in list(_found(graph, constants, batch)):
        if _is_replaceable(value, constant):
            compactor.compact_(value, constant)
        else:
            whole += _bytes_of(value)
    return whole + compactor.recipes.stored_bytes


@dataclass(frozen=True)
class _Compactor:
    """Puts recipes in the place of what a graph stores.

    Attributes:
        recipes: Adds them to the graph.
        products: The kernels to be stored as products, by digest.
    """

    recipes: Recipes
    products: Mapping[str, CoordKernel]

    def compact_(self, value: ir.Value, constant: CoordConstant) -> None:
        """Put a recipe in a stored constant's place, and in that of the kernels that meet it."""
        name = f"{value.name}"
        if constant.strip is not None:
            self._compact_kernels_(value, constant.strip)
        if constant.map_of is None:
            result = self.recipes.product(name, constant)
        else:
            strip, kernel = constant.map_of
            assert strip.strip is not None
            stored = self.products.get(_digest(array_of(kernel.tensor)))
            weight = (
                self.recipes.map_weight(name, kernel)
                if stored is None
                else self.recipes.kernel_of_taps(name, stored)
            )
            source = self.recipes.product(name, strip)
            result = self.recipes.convolution(source, weight, strip.strip)
        self._put_in_place_of(value, result)

    def _compact_kernels_(self, value: ir.Value, strip: Strip) -> None:
        """Store the kernels that convolve a strip as products, or without empty places."""
        for convolution in _convolutions_of(value):
            kernel = convolution.inputs[1]
            tensor = ir.convenience.get_const_tensor(kernel) if kernel is not None else None
            if kernel is None or tensor is None:
                continue
            if kernel.is_graph_input() or not is_read_once(kernel):
                continue
            name, numbers = f"{kernel.name}", tensor.numpy()
            product = self.products.get(_digest(numbers))
            if product is not None:
                result = self.recipes.kernel_of_taps(name, product)
            elif numbers.shape[2:] == strip.images.shape and (strip.images < 0).any():
                result = self.recipes.kernel_of_images(name, numbers, strip)
            else:
                continue
            kernel.type, kernel.shape = ir.TensorType(tensor.dtype), ir.Shape(numbers.shape)
            self._put_in_place_of(kernel, result)

    def _put_in_place_of(self, value: ir.Value, result: ir.Value) -> None:
        """Let a computed value be read where a stored one was, which is removed."""
        graph, producer = self.recipes.graph, value.producer()
        result.type, result.shape = value.type, value.shape
        value.replace_all_uses_with(result)
        if producer is None:
            assert value.name is not None
            del graph.initializers[value.name]
        else:
            graph.remove(producer, safe=True)


def _cheap_products(kernels: Iterable[CoordKernel]) -> dict[str, CoordKernel]:
    """Kernels that take fewer bytes as products of their site's one weight, by digest.

    In float32 at least: narrow types would round coefficients too, and every product.
    """
    by_site: dict[int, list[CoordKernel]] = {}
    for kernel in kernels:
        by_site.setdefault(id(kernel.weight), []).append(kernel)
    found: dict[str, CoordKernel] = {}
    for calls in by_site.values():
        weight = calls[0].weight
        itemsize = weight.element_size()
        as_products = weight.nbytes + sum(kernel.coefficients.nbytes for kernel in calls)
        by_images = sum(len(weight) * kernel.num_images * itemsize for kernel in calls)
        if itemsize >= 4 and as_products < by_images:
            found |= {_digest(array_of(kernel.tensor)): kernel for kernel in calls}
    return found


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
        return _compact_bytes(strip) + kernel.tensor.nbytes
    if constant.factors is None:
        return float("inf")
    return sum(factor.nbytes for band in constant.factors for factor in band)


def _found(
    graph: ir.Graph, constants: Sequence[CoordConstant], batch: int
) -> Iterator[tuple[ir.Value, CoordConstant]]:
    """Stored values that hold a constant, found by their numbers: exporters rename them."""
    wanted: dict[str, CoordConstant] = {}  # by the digest of their type and numbers
    lengths = set()
    for constant in constants:
        tensor = constant.tensor.detach()
        for form in (tensor, tensor.expand(batch, *tensor.shape[1:])):
            array = array_of(form)
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


def _convolutions_of(value: ir.Value) -> Iterator[ir.Node]:
    """The convolutions that read a value, also expanded to a batch."""
    for user, position in value.uses():
        if user.op_type == "Expand":
            yield from _convolutions_of(user.outputs[0])
        elif user.op_type == "Conv" and position == 0:
            yield user


def _bytes_of(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return value.const_value.numpy().shape


def _digest(array: np.ndarray) -> str:
    kind = str(array.dtype).encode()
    return hashlib.sha256(kind + np.ascontiguousarray(array).tobytes()).hexdigest()
