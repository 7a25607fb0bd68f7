"""The networks of the supervised experiments, all of them plain.

None of them knows of coordinates: :func:`coordconv_patch.patch` adds those. Sizes are the
released code's (https://github.com/uber-research/CoordConv) where not said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from not_so_clevr import CANVAS
from tile import Tile
from torch import Tensor, nn


class PixelSoftmax(nn.Module):
    """Softmax over the pixels of ``(N, 1, H, W)``, times their number: the mean is 1.

    Without the factor a pixel holds 1/4096 at first, and the convolutions behind see nothing.
    """

    def forward(self, logits: Tensor) -> Tensor:
        shares = F.softmax(logits.flatten(1), dim=1)
        return (shares * shares.shape[1]).view_as(logits)


def _he_initialised(*layers: nn.Module) -> nn.Sequential:
    """The layers with He's normal weights and biases of zero, as in the released code."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def tiled_net() -> nn.Sequential:
    """The classifier: (x, y) at every pixel, then 1x1 convolutions; 7,489 parameters plain.

    From ``(N, 2)`` to logits ``(N, 1, 64, 64)``. As it stands all pixels are alike to it.
    Initialised as PyTorch does it: with He's larger weights this net and the renderer do worse in
    the quadrant that is held out.
    """
    return nn.Sequential(Tile(CANVAS), *_convolutions(2, (32, 32, 64, 64), kernel=1))


def renderer(widths: Sequence[int] = (8, 8, 16, 16)) -> nn.Sequential:
    """The classifier, a softmax, and 3x3 convolutions that paint; 11,786 parameters plain.

    From ``(N, 2)`` to logits ``(N, 1, 64, 64)``.

    Args:
        widths: Of the 3x3 convolutions.
    """
    return nn.Sequential(*tiled_net(), PixelSoftmax(), *_convolutions(1, widths, kernel=3))


def _convolutions(channels: int, widths: Sequence[int], *, kernel: int) -> list[nn.Module]:
    """Convolutions and ReLUs, and a convolution to one channel."""
    layers: list[nn.Module] = []
    for width in widths:
        padding = kernel // 2
        layers += [nn.Conv2d(channels, width, kernel, padding=padding), nn.ReLU(inplace=True)]
        channels = width
    return [*layers, nn.Conv2d(channels, 1, kernel, padding=kernel // 2)]


def deconv_stack(kernel: int, multiplier: int) -> nn.Sequential:
    """Six transposed convolutions of stride 2: ``(N, 2)`` to logits ``(N, 1, 64, 64)``.

    Initialised as PyTorch does it: batch norms take out the scale of the weights before them.

    Args:
        kernel: Of every layer: 2, 3 or 4.
        multiplier: Of the widths 64, 64, 64, 32, 32.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (2, 1, 1))]
    channels = 2
    for width in (64, 64, 64, 32, 32):
        width *= multiplier
        layers += [_doubling(channels, width, kernel), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, _doubling(channels, 1, kernel))


def _doubling(channels: int, width: int, kernel: int) -> nn.ConvTranspose2d:
    """A transposed convolution whose output is exactly twice as wide and high as its input."""
    padding = (kernel - 1) // 2
    return nn.ConvTranspose2d(
        channels, width, kernel, 2, padding, output_padding=2 - kernel + 2 * padding
    )


def linear_net() -> nn.Sequential:
    """Convolutions without any activation, and the maximum over the canvas; 890 parameters plain.

    From ``(N, 1, 64, 64)`` to positions ``(N, 2)``. The bright pixel lifts its surroundings so
    high that the maximum is taken there, and coordinates are what is left to tell. That needs
    biases that start at zero: with others the padded border is the highest, wherever the bright
    pixel is, the maximum and with it the gradient go there, and the net is stuck.
    """
    pointwise = [nn.Conv2d(channels, 8, 1) for channels in (1, 8, 8)]
    local = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)]
    return _he_initialised(*pointwise, *local, nn.MaxPool2d(CANVAS), nn.Flatten())


def pooling_net() -> nn.Sequential:
    """Four 3x3 convolutions, three max-pools, two fully connected layers; 72,850 parameters.

    From ``(N, 1, 64, 64)`` to positions ``(N, 2)``; the authors' plain net on the uniform split.
    Initialised as PyTorch does it, which serves this one better.
    """
    layers: list[nn.Module] = []
    for channels in (1, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *_two_numbers(16 * (CANVAS // 8) ** 2))


def strided_net() -> nn.Sequential:
    """Six 3x3 convolutions of stride 2, two fully connected layers; 12,978 parameters.

    From ``(N, 1, 64, 64)`` to positions ``(N, 2)``; stands for the authors' plain net on the
    quadrant split, a strided stack of about 13,000 parameters.
    """
    layers: list[nn.Module] = []
    for channels in (1, 16, 16, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, 2, padding=1), nn.ReLU(inplace=True)]
    return _he_initialised(*layers, *_two_numbers(16))


def _two_numbers(features: int) -> list[nn.Module]:
    """The end of a net that answers with (x, y)."""
    return [nn.Flatten(), nn.Linear(features, 64), nn.ReLU(inplace=True), nn.Linear(64, 2)]
