"""Coloured shapes: an orange square and a blue disc on black, 32 x 32 pixels.

After the Sort-of-CLEVR pictures of the paper's generative models, made so that each object can
be found again by its colour alone: red light comes from the square only, blue light from the
disc only, and where the two overlap their light adds up. No object ever hides another, so
an object's *presence* at a pixel, 0 to 1, is the red or the blue channel as it stands.

32 x 32 pixels, where the paper has 64 x 64, keeps a generative model within CPU minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
"""Height and width of a picture, in pixels."""
RADIUS = 3
"""An object covers 7 x 7 pixels around its centre (the disc, most of them)."""
PLACES = SIZE - 2 * RADIUS
"""Centres lie on RADIUS ... SIZE - RADIUS - 1 along each axis: 26 x 26 positions."""
GREEN = 0.6
"""Green light of either object: orange is (1, .6, 0) and blue (0, .6, 1)."""


def stencils() -> Tensor:
    """Presence of each object around its centre, float ``(2, 7, 7)``: the square, the disc.

    Pixels that the disc's rim crosses are partly covered.
    """
    side = 2 * RADIUS + 1
    fine = 16  # samples a pixel and axis: the covered part to within about 1%
    steps = (torch.arange(side * fine) + 0.5) / fine - side / 2
    inside = steps.square() + steps.square()[:, None] <= (side / 2) ** 2
    disc = inside.double().reshape(side, fine, side, fine).mean((1, 3)).float()
    return torch.stack([torch.ones(side, side), disc])


ABSENT = PLACES**2
"""Place number of an object that is not in the picture; the others are ``26 y + x``."""


def masks() -> Tensor:
    """Presence of each object at each place number, ``(2, 677, 32, 32)``."""
    drawn = torch.zeros(2, PLACES, PLACES, SIZE, SIZE)
    side = 2 * RADIUS + 1
    shapes = stencils()
    for top in range(PLACES):
        for left in range(PLACES):
            drawn[:, top, left, top : top + side, left : left + side] = shapes
    return torch.cat([drawn.flatten(1, 2), torch.zeros(2, 1, SIZE, SIZE)], 1)


def centres(places: Tensor) -> Tensor:
    """Pixel coordinates (x, y) of place numbers ``(...)``: float ``(..., 2)``."""
    return torch.stack([places % PLACES, places // PLACES], -1).float() + RADIUS


def coloured(presence: Tensor) -> Tensor:
    """The picture ``(..., 3, H, W)`` of two objects' presence ``(..., 2, H, W)``, 0 to 1."""
    square, disc = presence.unbind(-3)
    return torch.stack([square, GREEN * torch.maximum(square, disc), disc], -3)


def presence(pictures: Tensor) -> Tensor:
    """Presence of the square and the disc ``(..., 2, H, W)`` in pictures ``(..., 3, H, W)``."""
    return pictures[..., ::2, :, :]


def cross_fade(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Pictures ``(frames, 3, 32, 32)``: both objects fade out here and in at new places.

    Args:
        start: Place numbers, int ``(2,)``.
        end: Likewise, at the last frame.
        frames: Length of the film.
    """
    first, last = ShapeSet(torch.stack([start, end]))[torch.arange(2)]
    return torch.lerp(first, last, torch.linspace(0, 1, frames)[:, None, None, None])


def sliding(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Pictures ``(frames, 3, 32, 32)`` of both objects sliding straight to new places.

    Args:
        start: Place numbers of the square and the disc, int ``(2,)``; what is absent stays so.
        end: Likewise, at the last frame.
        frames: Length of the film; centres are rounded to whole pixels.
    """
    progress = torch.linspace(0, 1, frames)[:, None, None]
    path = torch.lerp(centres(start), centres(end), progress).round().long() - RADIUS
    x, y = path.unbind(-1)
    places = torch.where(start == ABSENT, start, y * PLACES + x)
    return ShapeSet(places)[torch.arange(frames)]


@dataclass(frozen=True)
class ShapeSet:
    """Pictures of a square and a disc each, drawn on demand.

    Attributes:
        places: Place numbers of the two objects, int ``(N, 2)``; :data:`ABSENT` leaves one out.
    """

    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The pictures ``(B, 3, 32, 32)``, 0 to 1, of the indices ``(B,)``."""
        square, disc = self.places[index].unbind(-1)
        return coloured(torch.stack([_MASKS[0, square], _MASKS[1, disc]], 1))


_MASKS = masks()


def squares() -> tuple[ShapeSet, ShapeSet]:
    """Pictures of the square alone, 541 for training and 135 to test; the same at every call.

    As in the paper's supervised tasks, a fifth of all positions is held out.
    """
    order = torch.randperm(ABSENT, generator=torch.Generator().manual_seed(0))
    places = torch.stack([order, torch.full_like(order, ABSENT)], 1)
    held_out = len(order) // 5
    return ShapeSet(places[held_out:]), ShapeSet(places[:held_out])
