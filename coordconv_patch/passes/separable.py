"""Write a coordinate map as a convolution of few images, each a product of one vector per axis.

A tap (k, u, v) of the coordinate weight contributes W_c[:, k, u, v] times an image: channel k
shifted by (u, v), cut off at the border, taken at the stride. Where channel k depends on one
axis alone, as x and y do, that image is an outer product a_u b_v. All a_u together span few
dimensions (a constant, y, and one per border row), and so do the b_v. With e_i and f_j
bases of the two spans, orthogonal for each channel k::

    conv(c, W_c) = sum over taps t of W_c[:, t] a_t b_t
                 = sum over (i, j) of V[:, i, j] e_i f_j
    V[:, i, j]   = sum over taps t of W_c[:, t] <a_t, e_i> <b_t, f_j>

The images e_i f_j have the size of the *output*, and are fewer than the taps: 14 instead of
18 for 3x3, 8 with stride 2, 24 instead of 98 for 7x7 with stride 2. They depend on the
geometry alone and are stored as vectors.

The R images stand side by side in a *strip* of one channel, H x (R W) pixels, and V is a
kernel of 1 x R pixels with dilation W: kernels add up the taps of one channel in registers,
but write their output anew for every channel. (ONNX Runtime's CPU kernels, 144 outputs at
56 x 56: 3x3 of two channels 138 microseconds, 14 channels 199, a strip of 14 images 130.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SeparableBasis", "factors", "separable_basis"]

_RELATIVE_ZERO = 1e-9
"""In float64: what is this much smaller than what it was made of is rounding error."""

_SAME_DIRECTION = 1e-12
"""How far below 1 the cosine between two directions may be that are one."""


@dataclass(frozen=True)
class SeparableBasis:
    """Images that the responses of all taps are sums of.

    Attributes:
        vectors: One matrix an axis, of shape (R, length), whose rows multiply to image r.
        coefficients: Shape (T, R): how much of each image is in each tap's response.
    """

    vectors: tuple[Tensor, ...]
    coefficients: Tensor

    @property
    def rank(self) -> int:
        """R, the number of images."""
        return self.coefficients.shape[1]

    def strip_factors(self) -> tuple[Tensor, ...]:
        """Vectors whose broadcast product is the strip, but for its shape.

        (1, H, R, 1) and (1, 1, R, W), whose product has the pixels of (1, 1, H, R * W) in
        the same order.
        """
        *others, last = self.vectors
        ones = (1,) * len(others)
        shaped = [
            matrix.T.reshape(
                1, *(-1 if axis == at else 1 for axis in range(len(others))), self.rank, 1
            )
            for at, matrix in enumerate(others)
        ]
        return (*shaped, last.reshape(1, *ones, self.rank, -1))

    def strip(self) -> Tensor:
        """The images side by side, shape (1, 1, H, R * W)."""
        product = functools.reduce(torch.mul, self.strip_factors())
        return product.flatten(-2).unsqueeze(0)

    def weight(self, coord_weight: Tensor) -> Tensor:
        """V for a coordinate weight.

        Args:
            coord_weight: Shape (C_out, K, kH, kW), with as many taps as the basis has.

        Returns:
            Shape (C_out, 1, 1, R), float64.
        """
        combined = coord_weight.flatten(1).double() @ self.coefficients
        return combined.reshape(len(combined), *(1,) * len(self.vectors), self.rank)

    @property
    def dilation(self) -> tuple[int, ...]:
        """The dilation with which V is applied to the strip: (1, W)."""
        return (*(1,) * (len(self.vectors) - 1), self.vectors[-1].shape[1])


def factors(images: Tensor) -> tuple[Tensor, ...] | None:
    """Vectors whose products are exactly the given images, if there are such.

    Args:
        images: Shape (1, K, *size).

    Returns:
        Per axis a tensor of shape (1, K, ..., length, ...); ``None`` where a product
        would round, or an image is no product.
    """
    found: list[list[Tensor]] = []
    for image in images[0]:
        vectors = _exact_vectors(image)
        if vectors is None:
            return None
        found.append(vectors)
    stacked = [torch.stack(axis) for axis in zip(*found, strict=True)]
    return tuple(
        matrix.reshape(1, len(found), *(-1 if axis == at else 1 for axis in range(len(stacked))))
        for at, matrix in enumerate(stacked)
    )


def _exact_vectors(image: Tensor) -> list[Tensor] | None:
    for scaled in range(image.dim()):
        vectors = _vectors(image, scaled)
        if torch.equal(_product(vectors), image):
            return vectors
    return None


def _vectors(image: Tensor, scaled: int) -> list[Tensor]:
    """The lines through the largest pixel; all but the one along axis ``scaled`` are one there."""
    pivot = torch.unravel_index(image.abs().argmax(), image.shape)
    lines = []
    for axis in range(image.dim()):
        line = image[tuple(slice(None) if at == axis else pivot[at] for at in range(image.dim()))]
        largest = line[pivot[axis]]
        lines.append(line if axis == scaled or largest == 0 else line / largest)
    return lines


def _product(vectors: Sequence[Tensor]) -> Tensor:
    result = vectors[0]
    for vector in vectors[1:]:
        result = result.unsqueeze(-1) * vector
    return result


def separable_basis(responses: Tensor, planes: Sequence[int]) -> SeparableBasis | None:
    """The basis for the responses of the taps of a coordinate weight.

    Args:
        responses: Shape (T, *output_size), float64: the coordinate map of each tap alone.
        planes: The coordinate channel of each tap; channels share what their spans share.

    Returns:
        ``None`` if a response is no product of vectors, as those of a radius, or all are zero.
    """
    if not responses.any():
        return None
    lines = [_vectors(response, scaled=0) for response in responses]
    by_axis = [torch.stack(axis) for axis in zip(*lines, strict=True)]
    vectors, spans = zip(*(_axis_bases(axis, planes) for axis in by_axis), strict=True)
    # How much of each vector of an axis is in each tap's line; orthogonal within a channel.
    parts = [a @ v.T / v.shape[1] for a, v in zip(by_axis, vectors, strict=True)]
    column: dict[tuple[int, ...], int] = {}
    entries: list[tuple[list[int], tuple[int, ...]]] = []
    for plane in dict.fromkeys(planes):
        taps = [tap for tap, own in enumerate(planes) if own == plane]
        for index in itertools.product(*(span[plane] for span in spans)):
            column.setdefault(index, len(column))
            entries.append((taps, index))
    coefficients = responses.new_zeros(len(responses), len(column))
    for taps, index in entries:
        chosen = [part[taps, at] for part, at in zip(parts, index, strict=True)]
        coefficients[taps, column[index]] = torch.stack(chosen).prod(0)
    matrices = [axis[list(at)] for axis, at in zip(vectors, zip(*column, strict=True), strict=True)]
    basis = SeparableBasis(tuple(matrices), coefficients)
    images = torch.stack(
        [_product([matrix[r] for matrix in basis.vectors]) for r in range(basis.rank)]
    )
    rest = responses - torch.tensordot(coefficients, images, dims=1)
    return basis if rest.abs().max() <= _RELATIVE_ZERO * responses.abs().max() else None


def _axis_bases(lines: Tensor, planes: Sequence[int]) -> tuple[Tensor, dict[int, list[int]]]:
    """Vectors along one axis, and the numbers of those that span each channel's lines.

    Each channel's vectors are orthogonal and of mean square 1. What all channels share comes
    first and is stored once; so are the vectors of channels with the same span.
    """
    spans: dict[int, Tensor] = {}
    for plane in dict.fromkeys(planes):
        own = lines[[tap for tap, at in enumerate(planes) if at == plane]]
        left, sizes, _ = torch.linalg.svd(own.T, full_matrices=False)
        spans[plane] = left[:, sizes > _RELATIVE_ZERO * sizes.max().clamp(min=1e-300)]
    shared = functools.reduce(_intersection, spans.values())
    scale = len(shared) ** 0.5
    basis = [vector * scale for vector in shared.T]
    remainders: list[tuple[Tensor, list[int]]] = []
    indices: dict[int, list[int]] = {}
    for plane, span in spans.items():
        known = next((at for other, at in remainders if _same_span(other, span)), None)
        if known is None:
            left, sizes, _ = torch.linalg.svd(span - shared @ (shared.T @ span))
            rest = left[:, : span.shape[1] - shared.shape[1]]
            known = list(range(len(basis), len(basis) + rest.shape[1]))
            basis += [vector * scale for vector in rest.T]
            remainders.append((span, known))
        indices[plane] = [*range(shared.shape[1]), *known]
    return torch.stack(basis), indices


def _intersection(left: Tensor, right: Tensor) -> Tensor:
    """Orthonormal columns that span what both orthonormal columns span."""
    principal, cosines, _ = torch.linalg.svd(left.T @ right)
    return left @ principal[:, : int((cosines > 1 - _SAME_DIRECTION).sum())]


def _same_span(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and _intersection(left, right).shape == left.shape
