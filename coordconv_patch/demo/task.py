"""A task where position matters: where in the picture is the cup?

A photographed cup of espresso on its saucer is cut out and pasted at a random
place, size and angle onto crops of other photographs. The answer is the cup's
centre. Training and held-out pictures are made from different photographs.

All photographs lie in scikit-image's wheel; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "HELD_OUT_PHOTOGRAPHS",
    "TRAINING_PHOTOGRAPHS",
    "CupTask",
    "Pictures",
    "photograph",
    "to_pixels",
    "to_unit",
]

TRAINING_PHOTOGRAPHS = (
    *("astronaut", "camera", "stereo_motorcycle", "hubble_deep_field"),
    *("brick", "grass", "gravel", "retina"),
)
HELD_OUT_PHOTOGRAPHS = ("chelsea", "rocket")

CUP_PHOTOGRAPH = "coffee"
CUP_CENTER = (278, 205)
"""Of the ellipse around cup and saucer: x, y in pixels of the photograph."""
CUP_AXES = (201, 187)
"""Half of its width and of its height, in pixels of the photograph."""

RADIUS = (0.14, 0.21)
"""Least and greatest half width of a pasted cup, as a part of the picture's side."""
MARGIN = 0.16
"""Least distance of a pasted cup's centre from the border, as a part of the picture's side."""
ANGLE = 0.4
"""Greatest rotation either way, in radians."""


def photograph(name: str) -> Tensor:
    """A photograph of ``skimage.data`` as a tensor; of a stereo pair, the left picture.

    Shape ``(3, H, W)``, values -1 to 1; the three channels of a grey one are equal.
    """
    import skimage.data

    loaded = getattr(skimage.data, name)()
    pixels = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    channels_first = np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))
    return torch.from_numpy(channels_first).float() / 127.5 - 1


def to_unit(pixels: Tensor, size: int) -> Tensor:
    """Pixel positions, 0 to size - 1, as coordinates from -1 to 1 (the paper's convention)."""
    return 2 * pixels / (size - 1) - 1


def to_pixels(unit: Tensor, size: int) -> Tensor:
    """Inverse of :func:`to_unit`."""
    return (unit + 1) * (size - 1) / 2


@dataclass(frozen=True)
class Pictures:
    """Composed pictures ``(N, 3, S, S)``, values -1 to 1, and the cup's centres in them.

    The centres ``(N, 2)`` are x, y in pixels; (0, 0) is the centre of the first pixel.
    """

    images: Tensor
    centers: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Placement:
    """Where and how a cut-out is pasted into each of N pictures.

    Centres ``(N, 2)``, x and y, and half widths ``(N,)`` are in pixels, angles ``(N,)`` in radians;
    flips ``(N,)`` are -1 for mirrored, 1 for not.
    """

    centers: Tensor
    radii: Tensor
    angles: Tensor
    flips: Tensor

    @classmethod
    def random(cls, count: int, size: int, generator: torch.Generator) -> Placement:
        """Draw placements; the centre is uniform over the picture without its margin."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator)

        margin = MARGIN * size
        return cls(
            centers=uniform(margin, size - 1 - margin, count, 2),
            radii=uniform(RADIUS[0] * size, RADIUS[1] * size, count),
            angles=uniform(-ANGLE, ANGLE, count),
            flips=torch.where(uniform(0, 1, count) < 0.5, -1.0, 1.0),
        )


class CupTask:
    """Pictures with a cup in them, made as they are needed.

    The stream of training pictures depends on the seed alone. Held-out ones are on photographs
    that training never shows.

    Args:
        size: Height and width of the pictures, S, in pixels.
        held_out: Number of held-out pictures.
        backgrounds: Number of crops that training pictures are made from.
    """

    def __init__(self, size: int, *, held_out: int, backgrounds: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._cup = cut_out_cup(round(0.36 * size))
        self._backgrounds = self._crops(TRAINING_PHOTOGRAPHS, backgrounds)
        self.held_out = self._composed(self._crops(HELD_OUT_PHOTOGRAPHS, held_out))

    def batch(self, count: int) -> Pictures:
        """The next training pictures."""
        chosen = torch.randint(len(self._backgrounds), (count,), generator=self._generator)
        return self._composed(self._backgrounds[chosen])

    def _composed(self, backgrounds: Tensor) -> Pictures:
        placement = Placement.random(len(backgrounds), self.size, self._generator)
        return Pictures(paste(backgrounds, self._cup, placement), placement.centers)

    def _crops(self, names: tuple[str, ...], count: int) -> Tensor:
        """Random square crops, the photographs in turn, shape ``(count, 3, S, S)``."""
        photographs = [photograph(name) for name in names]
        return torch.stack([self._crop(photographs[i % len(names)]) for i in range(count)])

    def _crop(self, source: Tensor) -> Tensor:
        height, width = source.shape[1:]
        side = self._integer(int(1.3 * self.size), min(height, width))
        top, left = self._integer(0, height - side), self._integer(0, width - side)
        crop = source[None, :, top : top + side, left : left + side]
        if self._integer(0, 1):
            crop = crop.flip(-1)
        return _resized(crop, self.size)[0]

    def _integer(self, low: int, high: int) -> int:
        """A random integer, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))


def cut_out_cup(size: int) -> Tensor:
    """The cup and its saucer, stretched to a disc that touches all four sides.

    Shape ``(4, size, size)``: the colours, -1 to 1, and the opacity, 0 to 1.
    """
    (x, y), (half_width, half_height) = CUP_CENTER, CUP_AXES
    source = photograph(CUP_PHOTOGRAPH)
    box = source[None, :, y - half_height : y + half_height, x - half_width : x + half_width]
    colours = _resized(box, size)[0]
    position = (2 * torch.arange(size) + 1 - size) / size
    radius = (position[:, None].square() + position.square()).sqrt()
    opacity = ((1 - radius) * size / 3).clamp(0, 1)
    return torch.cat([colours, opacity[None]])


def paste(backgrounds: Tensor, cut_out: Tensor, placement: Placement) -> Tensor:
    """Lay a cut-out ``(4, s, s)``, colours and opacity, over each background ``(N, 3, S, S)``."""
    count, _, size, _ = backgrounds.shape
    cosine, sine = placement.angles.cos(), placement.angles.sin()
    rows = [cosine * placement.flips, sine * placement.flips, -sine, cosine]
    rotation = torch.stack(rows, dim=1).view(count, 2, 2)
    # affine_grid maps picture to cut-out, both from -1 to 1 between the outer pixel edges.
    scaled = rotation * (size / (2 * placement.radii))[:, None, None]
    centers = ((2 * placement.centers + 1 - size) / size)[:, :, None]
    affine = torch.cat([scaled, -scaled @ centers], dim=2)
    grid = F.affine_grid(affine, [count, 4, size, size], align_corners=False)
    laid = F.grid_sample(cut_out.expand(count, -1, -1, -1), grid, align_corners=False)
    colours, opacity = laid[:, :3], laid[:, 3:]
    return backgrounds * (1 - opacity) + colours * opacity


def _resized(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
