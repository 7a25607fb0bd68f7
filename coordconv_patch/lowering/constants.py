"""The tensors that a lowered graph holds, and what a file can make them of instead."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coordconv_patch.lowering.strips import Strip

__all__ = ["CoordConstant", "CoordKernel"]


@dataclass(frozen=True)
class CoordKernel:
    """The kernel that adds up the images of a strip, and what it can be made of instead.

    Attributes:
        tensor: Shape (C_out, 1, bands, ..., S).
        weight: The coordinate weight, shape (C_out, T); one tensor for all calls of a site.
        coefficients: How much of each tap is in each place, shape (T, bands * S); one tensor
            for all sites of a geometry and size. ``weight @ coefficients`` is the kernel.
        num_images: R, the places that have an image.
    """

    tensor: Tensor
    weight: Tensor
    coefficients: Tensor
    num_images: int


@dataclass(frozen=True)
class CoordConstant:
    """A tensor that the graph will hold, and what it can be made of instead.

    Attributes:
        tensor: Coordinate channels (1, K, *size), or a map (1, C_out, *output_size).
        factors: By band of rows, tensors whose broadcast product has the band's numbers in
            their order; ``None`` where there are none.
        strip: Where the tensor is a strip, how it is laid out.
        map_of: Where the tensor is a map, the strip that it can be made of instead, and the
            kernel with which that is convolved.
    """

    tensor: Tensor
    factors: tuple[tuple[Tensor, ...], ...] | None = None
    strip: Strip | None = None
    map_of: tuple[CoordConstant, CoordKernel] | None = None
