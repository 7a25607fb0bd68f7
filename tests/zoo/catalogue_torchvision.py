"""torchvision: classification, segmentation, every detector, optical flow and video."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, image, names_in

__all__ = ["ENTRIES"]

_CLASSIFICATION = names_in("""
    alexnet convnext_tiny efficientnet_b0 googlenet inception_v3
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vgg11_bn
""")

_SEGMENTATION = names_in("""
    deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large
""")

_RESIZING_DETECTORS = names_in("""
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
    fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn
    maskrcnn_resnet50_fpn
""")

_DENSE_DETECTORS = names_in("""
    fcos_resnet50_fpn retinanet_resnet50_fpn retinanet_resnet50_fpn_v2
""")

_VIDEO = names_in("""
    mc3_18 r2plus1d_18 r3d_18 swin3d_t
""")

_SIZES = {"inception_v3": 299}
"""Pixels, height; 64 for the others."""


def _create(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def _classifier(name: str) -> Entry:
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    size = _SIZES.get(name, 64)
    build = functools.partial(_create, name, num_classes=10, **options)
    return Entry(f"torchvision/{name}", build, image(2, 3, size, size + 32))


def _segmenter(name: str) -> Entry:
    build = functools.partial(_create, name, weights_backbone=None, num_classes=5, aux_loss=True)
    if name.startswith("lraspp"):
        build = functools.partial(_create, name, weights_backbone=None, num_classes=5)
    return Entry(f"torchvision/{name}", build, image(2, 3, 64, 96))


def _images(height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, height, width, generator=generator) for _ in range(2)]


def _images_and_targets(
    height: int, width: int, *, masks: bool = False, keypoints: bool = False
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1 if keypoints else 3])}
    if masks:
        masked = torch.zeros(2, height, width, dtype=torch.uint8)
        masked[0, 6:50, 4:40] = 1
        masked[1, 10:60, 20:60] = 1
        target["masks"] = masked
    if keypoints:
        spread = torch.linspace(0.1, 0.9, 17).view(1, 17, 1)
        points = boxes[:, None, :2] + spread * (boxes[:, None, 2:] - boxes[:, None, :2])
        target["keypoints"] = torch.cat((points, torch.ones(2, 17, 1)), dim=2)
    copies = [{key: value.clone() for key, value in target.items()} for _ in range(2)]
    return _images(height, width), copies


def _detector(name: str, size: tuple[int, int], **options: Any) -> Entry:
    """A detector; thresholds are so low that random weights give boxes."""
    targets = functools.partial(
        _images_and_targets, *size, masks="mask" in name, keypoints="keypoint" in name
    )
    build = functools.partial(_create, name, weights_backbone=None, **options)
    return Entry(f"torchvision/{name}", build, functools.partial(_images, *size), targets)


def _rcnn(name: str) -> Entry:
    classes = 2 if "keypoint" in name else 5
    return _detector(
        name,
        (64, 96),
        num_classes=classes,
        min_size=64,
        max_size=96,
        box_score_thresh=0.0,
        box_detections_per_img=10,
    )


def _dense(name: str) -> Entry:
    return _detector(
        name,
        (64, 96),
        num_classes=5,
        min_size=64,
        max_size=96,
        score_thresh=0.0,
        detections_per_img=10,
    )


def _pair(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    def make() -> tuple[Tensor, Tensor]:
        return image(*shape)(), image(*shape, seed=1)()

    return make


def _small_mvit() -> nn.Module:
    """A video transformer of two blocks, with its pooling convolutions; the named ones are slow."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 16, 32, (3, 3, 3), (3, 3, 3), (1, 2, 2), (1, 2, 2)),
        MSBlockConfig(2, 32, 32, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 2, 2)),
    ]
    options = dict.fromkeys(("residual_pool", "rel_pos_embed", "proj_after_attn"), True)
    return MViT((32, 48), 4, blocks, residual_with_cls_embed=False, **options)


ENTRIES = [
    *(_classifier(name) for name in _CLASSIFICATION),
    Entry(
        "torchvision/vit_b_16",
        functools.partial(_create, "vit_b_16", image_size=64, num_classes=10),
        image(2, 3, 64, 64),
    ),
    Entry(
        "torchvision/maxvit_t",
        functools.partial(_create, "maxvit_t", num_classes=10),
        image(2, 3, 224, 224),
    ),
    Entry("torchvision/mvit", _small_mvit, image(2, 3, 4, 32, 48)),
    *(_segmenter(name) for name in _SEGMENTATION),
    *(_rcnn(name) for name in _RESIZING_DETECTORS),
    *(_dense(name) for name in _DENSE_DETECTORS),
    _detector("ssd300_vgg16", (80, 96), num_classes=5, score_thresh=0.0, detections_per_img=10),
    _detector(
        "ssdlite320_mobilenet_v3_large",
        (80, 96),
        num_classes=5,
        score_thresh=0.0,
        detections_per_img=10,
    ),
    *(
        Entry(
            f"torchvision/{name}",
            functools.partial(_create, name),
            _pair(1, 3, 128, 136),
        )
        for name in ("raft_small", "raft_large")
    ),
    *(
        Entry(
            f"torchvision/{name}",
            functools.partial(_create, name, num_classes=10),
            image(2, 3, 4, 64, 80),
        )
        for name in _VIDEO
    ),
    *(
        Entry(
            f"torchvision/{name}",
            functools.partial(_create, name, num_classes=10),
            image(1, 3, 16, 224, 224),
        )
        for name in ("s3d",)
    ),
]
