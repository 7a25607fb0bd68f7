"""Handwritten digits scattered on a canvas, with the box of each.

The digits are the 1,797 real ones of 8 x 8 pixels that scikit-learn carries (Alpaydin and
Kaynak 1998), cut down to their ink, stretched to the size that is wanted, and added up, as in the
released code's field of MNIST. Test pictures are made of digits that no training picture has.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes

TEST_SHARE = 0.25
"""Of the 1,797 digits."""


@dataclass(frozen=True)
class Digits:
    """Single digits.

    Attributes:
        images: Shape ``(N, 1, 8, 8)``, values 0 to 1.
        labels: Shape ``(N,)``, 0 to 9.
        ink: Shape ``(N, 4)``: the box around the ink, x0, y0, x1, y1 in pixel edges, 0 to 8.
    """

    images: Tensor
    labels: Tensor
    ink: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def of(self, chosen: Tensor) -> Digits:
        """The digits with these indices, shape ``(M,)``."""
        return Digits(self.images[chosen], self.labels[chosen], self.ink[chosen])


@cache
def training_and_test_digits() -> tuple[Digits, Digits]:
    """All 1,797 digits, always split alike: 1,347 to train with, 450 to test with."""
    stored = load_digits()
    images = torch.from_numpy(stored.images).float()[:, None] / 16
    labels = torch.from_numpy(stored.target)
    edges = masks_to_boxes(images[:, 0] > 0)
    ink = edges + torch.tensor([0.0, 0.0, 1.0, 1.0])  # from pixel indices to pixel edges
    digits = Digits(images, labels, ink)
    training, test = train_test_split(
        torch.arange(len(digits)), test_size=TEST_SHARE, random_state=0, stratify=labels
    )
    return digits.of(training), digits.of(test)


@dataclass(frozen=True)
class Layout:
    """How digits are scattered.

    Attributes:
        canvas: Height and width of a picture in pixels.
        digits: How many there are in a picture.
        sizes: Least and greatest height, and width, of a digit's ink in pixels.
        margin: How far beyond the canvas the field goes that digits are scattered on, in
            pixels; the canvas is cut out of the field's middle, through digits that lie there.
    """

    canvas: int = 64
    digits: int = 5
    sizes: tuple[float, float] = (15.0, 25.0)
    margin: int = 0


@dataclass(frozen=True)
class Scenes:
    """Pictures with digits in them.

    Attributes:
        images: Shape ``(N, 1, S, S)``, values 0 to 1.
        boxes: Shape ``(N, D, 4)``: x0, y0, x1, y1 of each digit in pixel edges, the first
            pixel reaching from 0 to 1; cut off at the canvas.
        whole: The same, not cut off.
        labels: Shape ``(N, D)``: which digit, 0 to 9.
        visible: Shape ``(N, D)``: whether any of the digit's box lies on the canvas.
    """

    images: Tensor
    boxes: Tensor
    whole: Tensor
    labels: Tensor
    visible: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def of(self, chosen: Tensor) -> Scenes:
        """The pictures for which ``chosen``, shape ``(N,)``, is true."""
        return Scenes(*(getattr(self, field.name)[chosen] for field in fields(self)))


def scatter(digits: Digits, count: int, layout: Layout, generator: torch.Generator) -> Scenes:
    """Draw pictures: each digit anywhere on the field, in any size, the whole of it on the field.

    Args:
        digits: What to draw from.
        count: Number of pictures, N.
        layout: How.
        generator: Of everything random.
    """
    total = count * layout.digits
    chosen = digits.of(torch.randint(len(digits), (total,), generator=generator))
    low, high = layout.sizes
    extent = low + (high - low) * torch.rand(total, 2, generator=generator)
    field = layout.canvas + 2 * layout.margin
    corner = torch.rand(total, 2, generator=generator) * (field - extent) - layout.margin
    boxes = torch.cat([corner, corner + extent], dim=1)
    images = torch.zeros(count, 1, layout.canvas, layout.canvas)
    which = torch.arange(total) // layout.digits
    for part in torch.arange(total).split(4096):  # as much as fits the processor's caches
        images.index_add_(0, which[part], draw(chosen.of(part), boxes[part], layout.canvas))
    on_canvas = clip_boxes_to_image(boxes, (layout.canvas, layout.canvas))
    sides = on_canvas[:, 2:] - on_canvas[:, :2]
    shape = (count, layout.digits)
    return Scenes(
        images=images.clamp(max=1),
        boxes=on_canvas.reshape(*shape, 4),
        whole=boxes.reshape(*shape, 4),
        labels=chosen.labels.reshape(shape),
        visible=(sides > 0).all(1).reshape(shape),
    )


def draw(digits: Digits, boxes: Tensor, canvas: int) -> Tensor:
    """Each digit on a canvas of its own, its ink stretched to its box.

    Args:
        digits: N digits.
        boxes: Shape ``(N, 4)``: x0, y0, x1, y1 in pixel edges.
        canvas: Height and width S in pixels.

    Returns:
        Shape ``(N, 1, S, S)``.
    """
    side = digits.images.shape[-1]
    target, source = (box_convert(b, "xyxy", "cxcywh") for b in (boxes, digits.ink))
    # affine_grid maps canvas to digit, both from -1 to 1 between the outer pixel edges.
    scale = source[:, 2:] / target[:, 2:]
    offset = (2 * source[:, :2] - side) / side - scale * (2 * target[:, :2] - canvas) / side
    affine = torch.cat([torch.diag_embed(scale * canvas / side), offset[:, :, None]], dim=2)
    grid = F.affine_grid(affine, [len(boxes), 1, canvas, canvas], align_corners=False)
    return F.grid_sample(digits.images, grid, align_corners=False)
