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

from coordconv_patch.export.graph_passes.recipes import Recipes, array_of
from coordconv_patch.export.graph_passes.refusals import RefusedError, RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import (
    is_read_once,
    mark_as_coordinates_,
    stored_numbers,
)
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.strips import Strip

__all__ = ["CompactConstants"]


class CompactConstants(ir.passes.InPlacePass):
    """Replaces coordinate constants by what they are made of, where that is smaller.

    Constants must be initializers: onnx-ir's ``LiftConstantsToInitializersPass`` makes them so.
    The last of the rewrites, as weights are computed afterwards. All that it leaves in the graph
    of coordinates is marked, see :mod:`coordconv_patch.export.graph_passes.vocabulary`.

    The constants, and the kernels of strips, are those that the lowering stored; with a fixed
    batch, that of the example, exporters expand them. ``whole`` ones are marked, and stay.
    """

    def __init__(
        self,
        constants: Sequence[CoordConstant],
        kernels: Sequence[CoordKernel],
        batch: int,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.constants = constants
        self.batch = batch
        self.whole = whole
        of_maps = [constant.map_of[1] for constant in constants if constant.map_of is not None]
        self.products = _cheap_products([*kernels, *of_maps])

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("compact_constants")
        compactor = _Compactor(Recipes(graph), self.products)
        for value, constant in tuple(_stored_in(graph, self.constants, self.batch)):
            mark_as_coordinates_(value)
            if self.whole:
                continue
            if value.uses() and _compact_bytes(constant) < stored_numbers(value).nbytes:
                with tally.attempt(value):
                    _check_replaceable(value, constant)
                    compactor.compact_(value, constant)
                    tally.count += 1
        return tally.result(model)


@dataclass(frozen=True)
class _Compactor:
    """Puts recipes in the place of what a graph stores; the products are kernels by digest."""

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
            if kernel is None or not kernel.is_initializer() or kernel.is_graph_input():
                continue
            if not is_read_once(kernel):
                continue
            name, numbers = str(kernel.name), stored_numbers(kernel)
            product = self.products.get(_digest(numbers))
            if product is not None:
                result = self.recipes.kernel_of_taps(name, product)
            elif numbers.shape[2:] == strip.images.shape and (strip.images < 0).any():
                result = self.recipes.kernel_of_images(name, numbers, strip)
            else:
                continue
            self._put_in_place_of(kernel, result)

    def _put_in_place_of(self, value: ir.Value, result: ir.Value) -> None:
        """Let a computed value be read where a stored one was, which is removed."""
        result.type, result.shape = value.type, value.shape
        value.replace_all_uses_with(result)
        del self.recipes.graph.initializers[str(value.name)]


def _cheap_products(kernels: Iterable[CoordKernel]) -> dict[str, CoordKernel]:
    """Kernels that take fewer bytes as products of their site's one weight, by digest.

    In float32 at least: narrow types would round coefficients too, and every product.
    """
    by_site: dict[int, list[CoordKernel]] = {}
    for kernel in kernels:
        by_site.setdefault(id(kernel.weight), []).append(kernel)
    products: dict[str, CoordKernel] = {}
    for calls in by_site.values():
        weight = calls[0].weight
        itemsize = weight.element_size()
        as_products = weight.nbytes + sum(kernel.coefficients.nbytes for kernel in calls)
        by_images = sum(len(weight) * kernel.num_images * itemsize for kernel in calls)
        if itemsize >= 4 and as_products < by_images:
            products |= {_digest(array_of(kernel.tensor)): kernel for kernel in calls}
    return products


def _check_replaceable(value: ir.Value, constant: CoordConstant) -> None:
    """Check that a recipe can stand where a stored value stands."""
    shape, wanted = stored_numbers(value).shape, tuple(constant.tensor.shape)
    if shape != wanted:
        raise RefusedError(f"the exporter expanded it from {wanted} to {shape}")
    if value.is_graph_input() or value.is_graph_output():
        raise RefusedError("it is an input or an output of the graph")


def _compact_bytes(constant: CoordConstant) -> float:
    if constant.map_of is not None:
        strip, kernel = constant.map_of
        return _compact_bytes(strip) + kernel.tensor.nbytes
    if constant.factors is None:
        return float("inf")
    return sum(factor.nbytes for band in constant.factors for factor in band)


def _stored_in(
    graph: ir.Graph, constants: Sequence[CoordConstant], batch: int
) -> Iterator[tuple[ir.Value, CoordConstant]]:
    """Initializers that hold a constant, told by their numbers: exporters rename them."""
    by_digest: dict[str, CoordConstant] = {}  # of type and numbers
    lengths = set()
    for constant in constants:
        tensor = constant.tensor.detach()
        for form in (tensor, tensor.expand(batch, *tensor.shape[1:])):
            array = array_of(form)
            by_digest.setdefault(_digest(array), constant)
            lengths.add(array.nbytes)
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes in lengths:
            held = by_digest.get(_digest(stored_numbers(value)))
            if held is not None:
                yield value, held


def _convolutions_of(value: ir.Value) -> Iterator[ir.Node]:
    """The convolutions that read a value, also expanded to a batch."""
    for user, position in value.uses():
        if user.op_type == "Expand":
            yield from _convolutions_of(user.outputs[0])
        elif user.op_type == "Conv" and position == 0:
            yield user


def _digest(array: np.ndarray) -> str:
    kind = str(array.dtype).encode()
    return hashlib.sha256(kind + np.ascontiguousarray(array).tobytes()).hexdigest()
