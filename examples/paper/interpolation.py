"""How objects move along a film: do they slide, teleport or fade?

A *film* is a row of pictures along an interpolation between two latents. Everything here
works on the presence of one object, 0 to 1 a pixel, and on its *stencil*, what the object
looks like around its centre. At each position, the *match* is the stencil's least-squares amplitude
(1: the whole object is there; a cross-fade's middle frame has 1/2 at both ends); the object's
centre is where the match is greatest.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TELEPORT_PIXELS = 3.0
"""A step longer than this between two frames is a teleport (see :func:`movement`)."""
WHOLE = 0.75
"""Least match of an object that is really there; less is a faded one."""
THERE = 0.5
"""Least match in every frame of an object that slides along a film."""
VISIBLE = 0.25
"""Least match at which an object has a centre at all."""


def matches(presence: Tensor, stencils: Tensor) -> Tensor:
    """How much of each object is at each position.

    Args:
        presence: ``(N, C, H, W)``, one channel an object.
        stencils: ``(C, k, k)``, 0 to 1, k odd.

    Returns:
        At each pixel the a that minimises the squares of ``presence - a stencil`` with the
        stencil centred there, ``(N, C, H, W)``: 1 where the whole object is.
    """
    kernels = (stencils / stencils.square().sum((1, 2), keepdim=True))[:, None]
    return F.conv2d(
        presence.clamp(0, 1), kernels, padding=stencils.shape[-1] // 2, groups=len(stencils)
    )


def positions(presence: Tensor, stencils: Tensor) -> tuple[Tensor, Tensor]:
    """Where each object is, and how much of it.

    Args:
        presence: ``(N, C, H, W)``.
        stencils: ``(C, k, k)``.

    Returns:
        Centres (x, y) in pixels, float ``(N, C, 2)``, and matches there, ``(N, C)``.
    """
    best, index = matches(presence, stencils).flatten(2).max(-1)
    width = presence.shape[-1]
    return torch.stack([index % width, index // width], -1).float(), best


@dataclass(frozen=True)
class Movement:
    """How objects move along films.

    Attributes:
        sliding_films: Part of the objects' films in which the object is there in every frame
            (a match of at least :data:`THERE`) and never teleports.
        teleports: Part of the steps that are longer than :data:`TELEPORT_PIXELS`.
        teleporting_films: Part of the objects' films in which there is such a step.
        longest_step: Pixels; mean over the films.
        faded: Part of the frames in which the object's match is below :data:`WHOLE`.
        half_intensity: Part of the object's light in pixels between 1/4 and 3/4.
    """

    sliding_films: float
    teleports: float
    teleporting_films: float
    longest_step: float
    faded: float
    half_intensity: float

    def metrics(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def movement(films: Tensor, stencils: Tensor) -> Movement:
    """Measure the movement of every object in every film.

    Args:
        films: Presence of the objects, ``(films, frames, C, H, W)``. Frames must be so many
            that an object sliding from corner to corner takes steps well below
            :data:`TELEPORT_PIXELS`: 26 positions in 32 frames are steps of 1.1 pixels.
        stencils: ``(C, k, k)``.

    An object that is not to be seen in some frames has no centre there; the step is then
    from where it was seen last to where it is seen again.
    """
    count, frames = films.shape[:2]
    found, match = positions(films.flatten(0, 1), stencils)
    tracks = found.unflatten(0, (count, frames)).transpose(1, 2).flatten(0, 1)
    amounts = match.unflatten(0, (count, frames)).transpose(1, 2).flatten(0, 1)
    steps = torch.stack(
        [_steps(track, seen) for track, seen in zip(tracks, amounts >= VISIBLE, strict=True)]
    )
    teleporting = (steps > TELEPORT_PIXELS).any(1)
    light = films.clamp(0, 1)
    half = light[(light > 0.25) & (light < 0.75)]
    return Movement(
        sliding_films=((amounts >= THERE).all(1) & ~teleporting).double().mean().item(),
        teleports=(steps > TELEPORT_PIXELS).double().mean().item(),
        teleporting_films=teleporting.double().mean().item(),
        longest_step=steps.max(1).values.mean().item(),
        faded=(match < WHOLE).double().mean().item(),
        half_intensity=(half.sum() / light.sum().clamp(min=1e-9)).item(),
    )


def _steps(track: Tensor, visible: Tensor) -> Tensor:
    """Lengths ``(frames - 1,)`` of the steps along centres ``(frames, 2)``; 0 while unseen."""
    last_seen = torch.where(visible, torch.arange(len(track)), -1).cummax(0).values
    held = track[last_seen.clamp(min=0)]
    steps = (held[1:] - held[:-1]).norm(dim=-1)
    return torch.where(last_seen[:-1] >= 0, steps, 0.0)


@dataclass(frozen=True)
class Coverage:
    """How generated pictures fill the space of positions.

    Attributes:
        intact: Part of the objects that are whole and single: match at least
            :data:`WHOLE`, and light that sums to the stencil's within a quarter.
        coverage: Part of the bins of 2 x 2 positions in which an object was seen.
        entropy: Of the positions over these bins, 0 to 1 (all alike).
    """

    intact: float
    coverage: float
    entropy: float

    def metrics(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def coverage(presence: Tensor, stencils: Tensor) -> Coverage:
    """Measure where objects are in pictures ``(N, C, H, W)``; means over the C objects.

    Both figures for positions grow with N: compare with as many real pictures.
    """
    radius = stencils.shape[-1] // 2
    found, match = positions(presence, stencils)
    light = presence.clamp(0, 1).sum((2, 3)) / stencils.sum((1, 2))
    intact = (match >= WHOLE) & ((light - 1).abs() <= 0.25)
    bins = math.ceil((presence.shape[-1] - 2 * radius) / 2)
    cells = ((found - radius).clamp(min=0) / 2).long().clamp(max=bins - 1)
    covered, entropies = [], []
    for of_object, seen in zip(cells.unbind(1), (match >= VISIBLE).unbind(1), strict=True):
        numbers = (of_object[..., 1] * bins + of_object[..., 0])[seen]
        share = torch.bincount(numbers, minlength=bins**2).double() / max(1, len(numbers))
        covered.append((share > 0).double().mean().item())
        entropies.append(torch.special.entr(share).sum().item() / math.log(bins**2))
    return Coverage(
        intact=intact.double().mean().item(),
        coverage=sum(covered) / len(covered),
        entropy=sum(entropies) / len(entropies),
    )


def spherical(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Latents ``(frames, D)`` from one ``(D,)`` to another along a great circle.

    Gaussian latents of a GAN lie near a sphere; the middle of a straight line does not, so
    no generator was ever trained there (White 2016, "Sampling generative networks").
    """
    angle = torch.arccos(F.cosine_similarity(start, end, dim=0).clamp(-1, 1))
    progress = torch.linspace(0, 1, frames)[:, None]
    if angle < 1e-4:
        return torch.lerp(start, end, progress)
    weights = torch.cat([((1 - progress) * angle).sin(), (progress * angle).sin()], 1)
    return weights @ torch.stack([start, end]) / angle.sin()


def straight(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Latents ``(frames, D)`` on the line from one ``(D,)`` to another."""
    return torch.lerp(start, end, torch.linspace(0, 1, frames)[:, None])
