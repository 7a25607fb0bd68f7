"""A small net that says where on a canvas a digit is: its box, as four numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Localiser(nn.Module):
    """3x3 convolutions, an average over all places, and two linear layers.

    After the average nothing tells one place from another but what the convolutions have
    themselves written down of it.

    Args:
        padded: Whether the convolutions pad with zeros, as usual, or not at all.
        strides: Of the convolutions. Strides 2, 2, 1 let a place of the last map see 15 x 15
            pixels of the picture; 2, 2, 2, 2 let it see 31 x 31.
    """

    def __init__(self, padded: bool, strides: tuple[int, ...] = (2, 2, 1)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for index, stride in enumerate(strides):
            width = 32 if index else 16
            conv = nn.Conv2d(before, width, 3, stride, padding=int(padded), bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(before, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, images: Tensor) -> Tensor:
        """Boxes of pictures ``(N, 1, S, S)``: x0, y0, x1, y1 as parts of S, shape ``(N, 4)``."""
        x, y, log_width, log_height = self.head(self.features(images).mean((2, 3))).unbind(1)
        half = torch.stack([log_width, log_height], dim=1).exp() / 8
        centre = torch.stack([x, y], dim=1) + 0.5
        return torch.cat([centre - half, centre + half], dim=1)
