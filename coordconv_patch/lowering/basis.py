"""Write a coordinate map as a convolution of few images, each a product of one vector per axis.

A tap (k, u, v) of the coordinate weight contributes W_c[:, k, u, v] times an image: channel k
shifted by (u, v), cut off at the border, taken at the stride. Where channel k depends on one
axis alone, as x and y do, that image is an outer product a_u b_v. All a_u together span few
dimensions (a constant, y, and one per border row), and so do the b_v. With e_i and f_j
orthogonal bases of the two spans::

    conv(c, W_c) = sum over taps t of W_c[:, t] a_t b_t
                 = sum over (i, j) of V[:, i, j] e_i f_j
    V[:, i, j]   = sum over taps t of W_c[:, t] <a_t, e_i> <b_t, f_j> / (|e_i|^2 |f_j|^2)

The images e_i f_j have the size of the *output*, and are fewer than the taps: 15 instead of
18 for 3x3, 8 with stride 2, 24 instead of 98 for 7x7 with stride 2. They depend on the
geometry alone and are stored as vectors.

How the images lie in a constant, and which kernel adds them up, is told in :mod:`.strips`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SeparableBasis", "factors", "separable_basis"]

_RELATIVE_ZERO = 1e-9
"""In float64: what is this much smaller than what it was made of is rounding error."""


@dataclass(frozen=True, eq=False)
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

    def weight(self, coord_weight: Tensor) -> Tensor:
        """V for a coordinate weight.

        Args:
            coord_weight: Shape (C_out, K, kH, kW), with as many taps as the basis has.

        Returns:
            Shape (C_out, R), float64.
        """
        return coord_weight.flatten(1).double() @ self.coefficients


def factors(images: Tensor) -> tuple[Tensor, ...] | None:
    """Vectors whose products are exactly the given images, if there are such.

    Args:
        images: Shape (1, K, *size).

    Returns:
        Per axis a tensor of shape (1, K, ..., length, ...); ``None`` where a product
        would round, or an image is not a product.
    """
    vectors_by_image: list[list[Tensor]] = []
    for image in images[0]:
        vectors = _exact_vectors(image)
        if vectors is None:
            return None
        vectors_by_image.append(vectors)
    stacked = [torch.stack(axis) for axis in zip(*vectors_by_image, strict=True)]
    return tuple(
        matrix.reshape(
            1, len(vectors_by_image), *(-1 if axis == at else 1 for axis in range(len(stacked)))
        )
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
        ``None`` if a response is not a product of vectors, as those of a radius, or all are zero.
    """
    if not responses.any():
        return None
    lines = [_vectors(response, scaled=0) for response in responses]
    by_axis = tuple(torch.stack(axis) for axis in zip(*lines, strict=True))
    identity = torch.eye(len(responses), dtype=responses.dtype, device=responses.device)
    taps = SeparableBasis(by_axis, identity)
    if not _reproduces(taps, responses):
        return None
    shared = _shared_basis(by_axis, planes)
    # Tiny pictures are all border, with a vector for every pixel: then the taps are fewer.
    return shared if shared.rank < taps.rank and _reproduces(shared, responses) else taps


def _reproduces(basis: SeparableBasis, responses: Tensor) -> bool:
    images = [_product([matrix[r] for matrix in basis.vectors]) for r in range(basis.rank)]
    rest = responses - torch.tensordot(basis.coefficients, torch.stack(images), dims=1)
    return bool(rest.abs().max() <= _RELATIVE_ZERO * responses.abs().max())


def _shared_basis(lines: Sequence[Tensor], planes: Sequence[int]) -> SeparableBasis:
    """Images that the taps share, from the lines of all taps along each axis."""
    vectors, spans = zip(*(_axis_basis(axis, planes) for axis in lines), strict=True)
    parts = [_components(axis, basis) for axis, basis in zip(lines, vectors, strict=True)]
    column: dict[tuple[int, ...], int] = {}
    entries: list[tuple[list[int], tuple[int, ...]]] = []
    for plane in dict.fromkeys(planes):
        taps = [tap for tap, own in enumerate(planes) if own == plane]
        for index in itertools.product(*(span[plane] for span in spans)):
            column.setdefault(index, len(column))
            entries.append((taps, index))
    coefficients = lines[0].new_zeros(len(planes), len(column))
    for taps, index in entries:
        chosen = [part[taps, at] for part, at in zip(parts, index, strict=True)]
        coefficients[taps, column[index]] = torch.stack(chosen).prod(0)
    matrices = [axis[list(at)] for axis, at in zip(vectors, zip(*column, strict=True), strict=True)]
    return SeparableBasis(tuple(matrices), coefficients)


def _axis_basis(lines: Tensor, planes: Sequence[int]) -> tuple[Tensor, dict[int, list[int]]]:
    """Orthogonal vectors along one axis, and the numbers of those that each channel's lines need.

    A border pixel that the lines can tell from all others has a vector of its own, and the
    other vectors are zero there. So no value is the difference of large ones, which half
    precision would not survive. The others have mean square 1, those of small spans first:
    what x needs along H, a constant, y shares.
    """
    span, sizes, _ = torch.linalg.svd(lines.T, full_matrices=False)
    span = span[:, sizes > _RELATIVE_ZERO * sizes.max()]
    own = (span.square().sum(1) > 1 - _RELATIVE_ZERO).nonzero().flatten()
    basis = list(torch.eye(lines.shape[1], dtype=lines.dtype, device=lines.device)[own])
    smooth = lines.index_fill(1, own, 0.0)
    channels = [
        smooth[[tap for tap, at in enumerate(planes) if at == plane]]
        for plane in dict.fromkeys(planes)
    ]
    channels.sort(key=lambda part: int(torch.linalg.matrix_rank(part, rtol=_RELATIVE_ZERO)))
    for line in torch.cat(channels):
        rest = line
        for _ in range(2):  # once more, against the rounding of the first round
            for known in basis:
                rest = rest - known * (known @ rest) / (known @ known)
        if rest.norm() > _RELATIVE_ZERO * lines.norm():
            basis.append(rest * (len(rest) ** 0.5 / rest.norm()))
    vectors = torch.stack(basis)
    parts = _components(lines, vectors).abs()
    needed = {}
    for plane in dict.fromkeys(planes):
        largest = parts[[tap for tap, at in enumerate(planes) if at == plane]].amax(0)
        needed[plane] = (largest > _RELATIVE_ZERO * largest.max()).nonzero().flatten().tolist()
    return vectors, needed


def _components(lines: Tensor, vectors: Tensor) -> Tensor:
    """How much of each orthogonal vector is in each line, shape (lines, vectors)."""
    return lines @ vectors.T / vectors.square().sum(1)
