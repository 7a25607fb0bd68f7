"""Lay images out in one channel, and add them up with one kernel.

Images of H x W pixels that stand side by side are a *strip* of one channel, H x (R W) pixels,
and a kernel of 1 x R pixels with dilation W adds them up with the weights V. One channel is
better than R: kernels add up the taps of a channel in registers, but write their output anew
for every channel. (ONNX Runtime's CPU kernels, 144 outputs at 56 x 56: 3x3 of two channels 138
microseconds, 14 channels 199, a strip of 14 images 130.)

Most images of :mod:`.basis` are there for the border: each is zero but for one row, and all
other rows need few of them (11 of 35 for 5x5). So a strip may have three *bands*, one above the
other, and the kernel three rows with dilation H, padded by H - n above and below, where n is
the number of border rows::

    rows of the strip                  kernel row    is inside the strip for
    n      images of the lower border  0             the last n rows of the output
    H      images of more rows         1             all rows
    n      images of the upper border  2             the first n rows

Elsewhere a kernel row lies in the padding, and kernels skip such rows. What an output costs is
the S images side by side in the widest band: 7 instead of 15 for 3x3, 12 instead of 35 for 5x5,
10 instead of 24 for 7x7 with stride 2. (144 outputs at 56 x 56, 3x3: 104 microseconds instead
of 160; 5x5 at 28 x 28: 43 instead of 85. Measured apart from the figures above.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordconv_patch.layers.geometry import CONV_FUNCTIONS
from coordconv_patch.lowering.basis import SeparableBasis

__all__ = ["Strip", "banded_strip", "flat_strip"]

_NO_IMAGE = -1


@dataclass(frozen=True, eq=False)
class Strip:
    """Images in one channel, and the kernel that adds them up.

    Attributes:
        bands: From the top; each as one matrix an axis, of shape (S, length), whose rows
            multiply to the images that stand side by side. Zero where there is no image.
        images: Shape (bands, S): the number of the image in each place; -1 where there is none.
        dilation: Of the kernel (bands, ..., S).
        padding: Of the strip, on both sides of each axis.
    """

    bands: tuple[tuple[Tensor, ...], ...]
    images: Tensor
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def width(self) -> int:
        """S, the images side by side: multiplications that an output value takes."""
        return self.images.shape[1]

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], ...]:
        """By band, vectors whose broadcast product is the band, but for its shape.

        (1, H, S, 1) and (1, 1, S, W), whose product has the pixels of (1, 1, H, S * W) in
        the same order.
        """
        return tuple(_factors_of(band, dtype) for band in self.bands)

    def tensor(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The strip, shape (1, 1, rows, S * W), as its factors give it."""
        products = [functools.reduce(torch.mul, factors) for factors in self.factors(dtype)]
        return torch.cat([product.flatten(-2).unsqueeze(0) for product in products], dim=2)

    def kernel(self, weight: Tensor) -> Tensor:
        """The kernel for weights of the images.

        Args:
            weight: Shape (C_out, R).

        Returns:
            Shape (C_out, 1, bands, ..., S). What stands where there is no image does not
            matter: it is the first image's weight.
        """
        taken = weight[:, self.images.clamp(min=0).to(weight.device)]
        ones = (1,) * (len(self.dilation) - 2)
        shape = (len(self.bands), *ones, self.width) if len(self.dilation) > 1 else (self.width,)
        return taken.reshape(len(weight), 1, *shape)

    def add_up(self, kernel: Tensor, strip: Tensor) -> Tensor:
        """The images weighed by a kernel and added up.

        Args:
            kernel: As :meth:`kernel` makes it.
            strip: The strip's tensor, expanded to a batch perhaps: shape (N, 1, rows, S * W).

        Returns:
            Shape (N, C_out, H, W).
        """
        convolve = CONV_FUNCTIONS[len(self.dilation), False]
        return convolve(strip, kernel, None, 1, self.padding, self.dilation)


def flat_strip(basis: SeparableBasis) -> Strip:
    """The strip whose images all stand side by side."""
    ndim = len(basis.vectors)
    return Strip(
        bands=(basis.vectors,),
        images=torch.arange(basis.rank).unsqueeze(0),
        dilation=(*(1,) * (ndim - 1), basis.vectors[-1].shape[1]),
        padding=(0,) * ndim,
    )


def banded_strip(basis: SeparableBasis) -> Strip:
    """The strip with border images in bands of their own, where that takes fewer multiplications.

    In two dimensions: the kernels that skip rows are those for pictures.
    """
    flat = flat_strip(basis)
    if len(basis.vectors) != 2:
        return flat
    rows, columns = basis.vectors
    height = rows.shape[1]
    used = rows != 0
    first = used.to(torch.int64).argmax(1)
    is_single = used.sum(1) == 1
    upper = (is_single & (2 * first < height)).nonzero().flatten().tolist()
    lower = (is_single & (2 * first >= height)).nonzero().flatten().tolist()
    inner = (~is_single).nonzero().flatten().tolist()
    depths = [int(first[image]) + 1 for image in upper]
    depths += [height - int(first[image]) for image in lower]
    border = max(depths, default=0)
    width = max(len(upper), len(inner), len(lower))
    if width >= flat.width:
        return flat
    bands = [
        (lower, rows[:, height - border :]),
        (inner, rows),
        (upper, rows[:, :border]),
    ]
    return Strip(
        bands=tuple(
            (_padded(part[images], width), _padded(columns[images], width))
            for images, part in bands
        ),
        images=torch.tensor([_filled(images, width) for images, _ in bands]),
        dilation=(height, columns.shape[1]),
        padding=(height - border, 0),
    )


def _factors_of(band: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    *others, last = band
    ones = (1,) * len(others)
    width = len(last)
    shaped = [
        matrix.T.reshape(1, *(-1 if axis == at else 1 for axis in range(len(others))), width, 1)
        for at, matrix in enumerate(others)
    ]
    return tuple(factor.to(dtype) for factor in (*shaped, last.reshape(1, *ones, width, -1)))


def _padded(matrix: Tensor, count: int) -> Tensor:
    """A matrix with rows of zeros at its end."""
    return torch.cat((matrix, matrix.new_zeros(count - len(matrix), matrix.shape[1])))


def _filled(images: list[int], count: int) -> list[int]:
    return images + [_NO_IMAGE] * (count - len(images))
