"""The models that are measured. Weights are random: no time depends on their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

__all__ = ["MODELS", "QUICK", "BenchModel", "images"]


@dataclass(frozen=True)
class BenchModel:
    """A model and the square images that it is measured on.

    Attributes:
        title: What tables and pictures call it.
        make: Makes it, with random weights, in evaluation mode.
        size: Height and width of its images in pixels.
    """

    title: str
    make: Callable[[], nn.Module]
    size: int


class FirstOutput(nn.Module):
    """A model of ultralytics: boxes and class scores, without what training needs beside them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


class BackboneAndHeads(nn.Module):
    """A RetinaNet of torchvision up to its logits: its post-processing takes one image only."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(list(self.backbone(x).values()))
        return found["cls_logits"], found["bbox_regression"]


class Tiny(nn.Module):
    """A stem, a depthwise convolution and a 1x1: for trying the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.point((self.depthwise(x) + x).relu()).mean((2, 3))


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def _yolo11n() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return FirstOutput(DetectionModel("yolo11n.yaml", verbose=False))


def _retinanet() -> nn.Module:
    from torchvision.models.detection import retinanet_resnet50_fpn

    return BackboneAndHeads(retinanet_resnet50_fpn(weights=None, weights_backbone=None))


MODELS = {
    "resnet50": BenchModel("ResNet-50", _timm("resnet50"), 224),
    "mobilenetv3": BenchModel("MobileNetV3-Large", _timm("mobilenetv3_large_100"), 224),
    "lite0": BenchModel("EfficientNet-Lite0", _timm("efficientnet_lite0"), 224),
    "convnext": BenchModel("ConvNeXt-Tiny", _timm("convnext_tiny"), 224),
    "yolo11n": BenchModel("YOLO11n", _yolo11n, 640),
    "retinanet": BenchModel("RetinaNet-R50, without post-processing", _retinanet, 320),
    "tiny": BenchModel("a tiny network", Tiny, 32),
}
QUICK = "tiny"
"""The model of the scripts' quick mode."""


def images(batch: int, size: int) -> Tensor:
    """Random images, (N, 3, H, W), in [0, 1)."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
