"""Small detectors of torchvision, and a model with a pixel mask, with random weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

import coordconv_patch as ccp

ANCHORS = AnchorGenerator(((12,), (24,)), ((0.5, 1.0, 2.0),) * 2)


class Backbone(nn.Module):
    """Features at strides 4 and 8."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, 2, 2)
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.third = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.second(self.first(x).relu()).relu()
        return OrderedDict([("0", x), ("1", self.third(x).relu())])


def retinanet(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 160} | options
    return detection.RetinaNet(
        Backbone(), 3, anchor_generator=ANCHORS, score_thresh=0.0, topk_candidates=20, **sizes
    )


def mask_rcnn() -> nn.Module:
    return detection.MaskRCNN(
        Backbone(),
        min_size=64,
        max_size=160,
        rpn_anchor_generator=ANCHORS,
        rpn_post_nms_top_n_test=20,
        rpn_post_nms_top_n_train=20,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2, canonical_scale=32),
        box_head=FastRCNNConvFCHead((8, 7, 7), [8], [16]),
        box_predictor=FastRCNNPredictor(16, 3),
        box_score_thresh=0.0,
        box_detections_per_img=10,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 6, 2, canonical_scale=32),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, 3),
    )


class Masked(nn.Module):
    """Takes a mask of the pixels that are not padding, as Hugging Face's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 4, 3, 1, 1)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(pixel_values).relu())


def patched(model: nn.Module, where: Any = "all", **arguments: Any) -> nn.Module:
    """In evaluation mode, with coordinate weights that are not zero."""
    ready = ccp.patch(model.eval(), where, **arguments)
    for weight in ccp.coord_parameters(ready):
        nn.init.normal_(weight, std=0.1)
    return ready


def outputs_of(layer: nn.Module, run: Any) -> list[Tensor]:
    """What a layer gives while something runs, without gradients."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return kept
