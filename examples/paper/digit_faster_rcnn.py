"""Torchvision's Faster R-CNN, small enough for one CPU core, on the scattered digits."""

from __future__ import annotations

import torch
from region_proposals import ANCHOR_SIDES, Proposals
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

RCNN_SITES = ("backbone.0", "rpn.head.conv.0.0", "rpn.head.bbox_pred")
"""The convolutions that answer to the paper's three: at the input, the RPN's 3x3, and the 1x1 that
moves its boxes."""


def make_faster_rcnn(canvas: int = 64) -> FasterRCNN:
    """Faster R-CNN that finds digits of any kind, its convolutions padded as usual.

    Args:
        canvas: Height and width of the pictures in pixels, kept as they are.
    """
    widths = (16, 32, 32)
    backbone = nn.Sequential()
    before = 1
    for index, width in enumerate(widths):
        stride = 2 if index < 2 else 1
        backbone.append(nn.Conv2d(before, width, 3, stride, padding=1, bias=False))
        backbone.extend([nn.BatchNorm2d(width), nn.ReLU()])
        before = width
    backbone.out_channels = before
    ratios = tuple(sorted({height / width for height in ANCHOR_SIDES for width in ANCHOR_SIDES}))
    return FasterRCNN(
        backbone,
        min_size=canvas,
        max_size=canvas,
        image_mean=[0.0],
        image_std=[1.0],
        rpn_anchor_generator=AnchorGenerator(((20,),), (ratios,)),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=30,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        box_head=TwoMLPHead(before * 5**2, 64),
        box_predictor=FastRCNNPredictor(64, num_classes=2),
        box_batch_size_per_image=32,
        box_score_thresh=0.0,
        box_detections_per_img=10,
    )


def faster_rcnn_loss(model: FasterRCNN, images: Tensor, truth: Tensor, visible: Tensor) -> Tensor:
    """The sum of torchvision's four losses; arguments as those of ``region_proposals.loss``."""
    targets = []
    for boxes, seen in zip(truth, visible, strict=True):
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = boxes[seen & (sides > 0.5).all(1)]
        targets.append({"boxes": kept, "labels": torch.ones(len(kept), dtype=torch.int64)})
    return torch.stack(list(model(list(images), targets).values())).sum()


@torch.no_grad()
def detect(model: FasterRCNN, images: Tensor) -> list[Proposals]:
    """The 10 best-scoring boxes of each picture ``(N, 1, S, S)``, after Faster R-CNN's own NMS."""
    model.eval()
    found = [answer for part in images.split(50) for answer in model(list(part))]
    model.train()
    return [Proposals(answer["boxes"], answer["scores"]) for answer in found]
