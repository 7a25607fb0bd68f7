"""A detector that is a region proposal network alone, as in the authors' detection experiment.

Ren et al. 2015, https://arxiv.org/abs/1506.01497. Sizes, anchors, sampling and metric follow the
released code (uber-research/CoordConv, ``model_builder_faster_rcnn.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, nms

PAPER_SITES = ("features.0", "rpn.0", "box_regression.2")
"""The three convolutions that see coordinates in the released code: the one at the input, the
RPN's 3x3, and the 1x1 that moves the boxes."""

ANCHOR_SIDES = (15.0, 20.0, 25.0)
"""In pixels: anchors have each of these heights with each of these widths."""

_CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))

Padding = Literal["none", "released", "zeros"]
"""Zero padding: nowhere; where the released code has it, around the 13 x 13 map; everywhere."""


class RegionProposals(nn.Module):
    """Two 5x5 convolutions with max-pools, a 3x3, and heads that score and move anchors.

    Args:
        padding: Where to pad.
        widths: Channels of the two 5x5 convolutions; 32 and 64 in the released code.
        hidden: Channels of the 3x3 convolutions; 32 in the released code.
        canvas: Height and width of the pictures in pixels.
        cut: Whether moved boxes are cut off at the canvas.
        absolute: Whether a move starts from the same box in the middle of the canvas at every
            place, so that it says where on the canvas the digit is, and not where from the anchor.

    Attributes:
        anchors: Shape ``(A, 4)``: x0, y0, x1, y1 in pixels; the anchors of one place together,
            places row by row.
        origins: The boxes that moves start from, ``(A, 4)``: the anchors, unless ``absolute``.
    """

    anchors: Tensor
    origins: Tensor

    def __init__(
        self,
        padding: Padding = "released",
        widths: tuple[int, int] = (32, 64),
        hidden: int = 32,
        canvas: int = 64,
        *,
        cut: bool = True,
        absolute: bool = False,
    ) -> None:
        super().__init__()
        self.cut = cut
        per_place = len(ANCHOR_SIDES) ** 2
        wide = 2 if padding == "zeros" else 0
        narrow = 0 if padding == "none" else 1
        self.features = nn.Sequential(
            *(nn.Conv2d(1, widths[0], 5, padding=wide), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(widths[0], widths[1], 5, padding=wide), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.rpn = nn.Sequential(nn.Conv2d(widths[1], hidden, 3, padding=narrow), nn.ReLU())
        self.box_regression = nn.Sequential(
            *(nn.Conv2d(hidden, hidden, 3, padding=narrow), nn.ReLU()),
            nn.Conv2d(hidden, 4 * per_place, 1),
        )
        # Without padding the map of moved boxes is smaller by one place on each side.
        self.score = nn.Conv2d(hidden, per_place, 3 if padding == "none" else 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.box_regression[-1].weight)
        with torch.no_grad():
            places = self.score(self.rpn(self.features(torch.zeros(1, 1, canvas, canvas))))
        anchors = centred_anchors(places.shape[-1], canvas)
        # Of a map of one place, the middle one: the square of 20 pixels in the canvas's middle.
        middle = centred_anchors(1, canvas)[per_place // 2]
        self.register_buffer("anchors", anchors)
        self.register_buffer("origins", middle.repeat(len(anchors), 1) if absolute else anchors)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and moves of the anchors.

        Args:
            images: Shape ``(N, 1, S, S)``.

        Returns:
            Logits that there is a digit, ``(N, A)``; moves as in Faster R-CNN, ``(N, A, 4)``:
            of the centre in sizes of the box of origin, of the size in its logarithm.
        """
        shared = self.rpn(self.features(images))
        scores, moves = self.score(shared), self.box_regression(shared)
        count, _, height, width = moves.shape
        moves = moves.reshape(count, -1, 4, height, width).permute(0, 3, 4, 1, 2)
        return scores.permute(0, 2, 3, 1).flatten(1), moves.reshape(count, -1, 4)

    def boxes(self, moves: Tensor, canvas: int) -> Tensor:
        """The origins moved, cut off at the canvas if the detector does that, ``(N, A, 4)``."""
        moved = _CODER.decode_single(moves.flatten(0, 1), self.origins.repeat(len(moves), 1))
        if self.cut:
            moved = clip_boxes_to_image(moved, (canvas, canvas))
        return moved.reshape(moves.shape)


def centred_anchors(places: int, canvas: int, stride: int = 4) -> Tensor:
    """Anchors of every place of a square map that looks at the middle of the canvas.

    Each anchor is centred on what its place looks at, with padding and without.

    Args:
        places: Height and width of the map.
        canvas: Height and width of the picture in pixels.
        stride: Pixels from one place to the next.

    Returns:
        Shape ``(9 * places ** 2, 4)``: x0, y0, x1, y1 in pixels.
    """
    centres = canvas / 2 + stride * (torch.arange(places) - (places - 1) / 2)
    sides = torch.tensor(ANCHOR_SIDES)
    y, x, height, width = torch.meshgrid(centres, centres, sides, sides, indexing="ij")
    return box_convert(torch.stack([x, y, width, height], dim=-1), "cxcywh", "xyxy").reshape(-1, 4)


@dataclass(frozen=True)
class Sampling:
    """Which boxes a step learns from.

    Attributes:
        by: What is compared with the digits' boxes: the boxes as the net has ``"moved"`` them
            (the released code), or the ``"anchors"`` (Faster R-CNN).
        positive: Least IOU of a positive; the best box of each digit is one in any case.
        negative: A negative's IOU with every digit is below this.
        each: Positives, and negatives, per picture.
        within: Pixels of a canvas; a box that reaches beyond it is a positive only as the best
            of a digit, and never a negative. ``None``: it may be either.
    """

    by: Literal["moved", "anchors"] = "moved"
    positive: float = 0.5
    negative: float = 0.1
    each: int = 6
    within: int | None = None


def loss(
    model: RegionProposals, images: Tensor, truth: Tensor, visible: Tensor, sampling: Sampling
) -> Tensor:
    """Cross-entropy of the sampled scores plus smooth L1 of the sampled positives' moves.

    Args:
        model: The detector.
        images: Shape ``(N, 1, S, S)``.
        truth: The digits' boxes, ``(N, D, 4)``.
        visible: Which of them count, ``(N, D)``.
        sampling: Which boxes to learn from.
    """
    scores, moves = model(images)
    with torch.no_grad():
        compared = model.boxes(moves, images.shape[-1])
        if sampling.by == "anchors":
            compared = model.anchors.expand(len(images), -1, -1)
        positive, negative, digit = sample(compared, truth, visible, sampling)
    picture = torch.arange(len(images))[:, None].expand_as(positive)[positive]
    anchor = positive.nonzero()[:, 1]
    target = _CODER.encode_single(truth[picture, digit[positive]], model.origins[anchor])
    sampled = torch.cat([scores[positive], scores[negative]])
    labels = torch.cat([torch.ones(len(anchor)), torch.zeros(len(sampled) - len(anchor))])
    moving = F.smooth_l1_loss(moves[positive], target, reduction="none").sum(1).mean()
    return F.binary_cross_entropy_with_logits(sampled, labels) + moving


def sample(
    boxes: Tensor, truth: Tensor, visible: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positives and negatives.

    Args:
        boxes: Shape ``(N, A, 4)``.
        truth: Shape ``(N, D, 4)``.
        visible: Shape ``(N, D)``.
        sampling: How.

    Returns:
        Whether a box is a sampled positive, ``(N, A)``; a sampled negative, ``(N, A)``; the
        index of the digit that it overlaps most, ``(N, A)``.
    """
    overlap = torch.stack([box_iou(b, t) for b, t in zip(boxes, truth, strict=True)])
    overlap = overlap.masked_fill(~visible[:, None], -1.0)
    best, digit = overlap.max(2)
    closest = torch.zeros_like(overlap, dtype=torch.bool)
    # The first box of all is the best of a digit that none overlaps, as in the released code.
    closest.scatter_(1, overlap.argmax(1, keepdim=True), visible[:, None])
    digit = torch.where(closest.any(2), closest.int().argmax(2), digit)
    allowed = torch.ones_like(best, dtype=torch.bool)
    if sampling.within is not None:
        allowed = ((boxes >= 0) & (boxes <= sampling.within)).all(2)
    positive = closest.any(2) | (allowed & (best > sampling.positive))
    negative = allowed & (best < sampling.negative) & ~positive
    return _some(positive, sampling.each), _some(negative, sampling.each), digit


def _some(candidates: Tensor, count: int) -> Tensor:
    """At most ``count`` of the true values in each row ``(N, A)``, at random."""
    order = torch.rand(candidates.shape).masked_fill(~candidates, -1.0)
    chosen = torch.zeros_like(candidates)
    chosen.scatter_(1, order.topk(count, dim=1).indices, True)
    return chosen & candidates


@dataclass(frozen=True)
class Proposals:
    """The boxes that a detector keeps of one picture, best score first.

    Attributes:
        boxes: Shape ``(M, 4)``: x0, y0, x1, y1 in pixels.
        scores: Shape ``(M,)``.
    """

    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def candidates(model: RegionProposals, images: Tensor) -> list[Proposals]:
    """The 300 best-scoring boxes of each picture ``(N, 1, S, S)``, before any suppression."""
    found = []
    for part in images.split(100):
        scores, moves = model(part)
        best = scores.topk(min(300, scores.shape[1]), dim=1)
        boxes = model.boxes(moves, part.shape[-1])
        boxes = boxes.gather(1, best.indices[:, :, None].expand(-1, -1, 4))
        found += map(Proposals, boxes, best.values.sigmoid())
    return found


def suppress(found: list[Proposals], *, most: int, threshold: float) -> list[Proposals]:
    """Non-maximum suppression, picture by picture.

    Args:
        found: Boxes of each picture.
        most: How many boxes to keep of a picture.
        threshold: IOU from which the lower-scoring box is dropped.
    """
    kept = []
    for one in found:
        chosen = nms(one.boxes, one.scores, threshold)[:most]
        kept.append(Proposals(one.boxes[chosen], one.scores[chosen]))
    return kept
