"""Placements of the literature: found by types and structure, whatever the modules are called."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_detectors import mask_rcnn, retinanet
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FeaturePyramidNetwork
from ultralytics.nn.tasks import DetectionModel, SegmentationModel

import coordconv_patch as ccp
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.select import select
from coordconv_patch.sites.site import SiteMap


def reasons(model: nn.Module | SiteMap, where: Any) -> dict[str, str]:
    """Why each chosen site was, in the plan's order."""
    site_map = model if isinstance(model, SiteMap) else find_sites(model)
    return {choice.site.name: choice.reason for choice in select(site_map, where) if choice.chosen}


def chosen(model: nn.Module | SiteMap, where: Any) -> list[str]:
    return list(reasons(model, where))


class Renamed(nn.Module):
    """A detector whose modules have names that say nothing."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.a = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)])
        self.b = FeaturePyramidNetwork([8, 8], 8)
        self.c = last


class Wrapped(nn.Module):
    """A model under another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@pytest.fixture(scope="module")
def yolo() -> nn.Module:
    return Wrapped(DetectionModel("yolo11n.yaml", nc=3, verbose=False)).eval()


LATERAL = ["b.inner_blocks.0.0", "b.inner_blocks.1.0"]


@pytest.mark.parametrize(
    ("last", "firsts"),
    [
        (RPNHead(8, 3), ["c.conv.0.0"]),
        (FCOSHead(32, 1, 2), ["c.classification_head.conv.0", "c.regression_head.conv.0"]),
        (
            SSDHead([8, 8], [4, 4], 3),
            [
                f"c.{kind}_head.module_list.{at}"
                for kind in ("classification", "regression")
                for at in (0, 1)
            ],
        ),
        (
            SSDLiteHead([8, 8], [4, 4], 3, nn.BatchNorm2d),
            [
                f"c.{kind}_head.module_list.{at}.0.0"
                for kind in ("classification", "regression")
                for at in (0, 1)
            ],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_torchvisions_parts_are_known_by_their_types(last: nn.Module, firsts: list[str]) -> None:
    model = Renamed(last)
    assert chosen(model, "neck") == LATERAL
    assert chosen(model, "head") == firsts
    assert chosen(model, "ppyolo") == [*LATERAL, *firsts]
    where = [name for name in firsts if "classification" not in name]
    assert chosen(model, "solo") == chosen(model, "solov2") == where


def test_the_plan_says_what_was_meant() -> None:
    told = reasons(Renamed(RPNHead(8, 3)), "ppyolo")
    assert told["b.inner_blocks.0.0"] == (
        "matches 'ppyolo': a 1x1 of the neck b, a FeaturePyramidNetwork"
    )
    assert told["c.conv.0.0"] == "matches 'ppyolo': the first of the head RPNHead c"
    assert "the first of the head RPNHead c" in str(ccp.plan(Renamed(RPNHead(8, 3)), "head"))


def test_heads_behind_regions_of_interest_are_heads() -> None:
    assert chosen(mask_rcnn(), "head") == [
        "rpn.head.conv.0.0",
        "roi_heads.box_head.0.0",
        "roi_heads.mask_head.0.0",
    ]
    assert chosen(retinanet(), "solo") == ["head.regression_head.conv.0.0"]


BOXES = [f"net.model.23.cv2.{level}.0.conv" for level in range(3)]
CLASSES = [f"net.model.23.cv3.{level}.0.0.conv" for level in range(3)]


def test_ultralytics_neck_lies_between_upsampling_and_the_head(yolo: nn.Module) -> None:
    sites = find_sites(yolo)
    neck = chosen(sites, "neck")
    for layer in (13, 16, 19, 22):
        assert {f"net.model.{layer}.cv1.conv", f"net.model.{layer}.cv2.conv"} <= set(neck)
    modules = dict(yolo.named_modules())
    for name in neck:
        assert modules[name].kernel_size == (1, 1)
        assert 13 <= int(name.split(".")[2]) <= 22
    every = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    pointwise = [name for name in every if modules[name].kernel_size == (1, 1)]
    assert neck == [name for name in pointwise if 11 <= int(name.split(".")[2]) < 23]
    assert chosen(sites, "head") == [*BOXES, *CLASSES]
    assert chosen(sites, "ppyolo") == [*neck, *BOXES, *CLASSES]
    assert chosen(sites, "solo") == chosen(sites, "solov2") == BOXES


def test_a_1x1_layer_before_the_first_upsampling_belongs_to_the_neck() -> None:
    """As in YOLOv3, from which PP-YOLO comes."""
    spec = {
        "nc": 2,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]],
        "head": [
            [-1, 1, "Conv", [8, 1, 1]],
            [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
            [[-1, 0], 1, "Concat", [1]],
            [-1, 1, "Conv", [8, 1, 1]],
            [[5, 1], 1, "Detect", ["nc"]],
        ],
    }
    model = DetectionModel(spec, verbose=False)
    sites = find_sites(model, torch.rand(1, 3, 32, 32))
    assert chosen(sites, "neck") == ["model.2.conv", "model.5.conv"]
    assert chosen(sites, "stem") == ["model.0.conv"]


def test_masks_are_kernels_and_features() -> None:
    model = Wrapped(SegmentationModel("yolo11n-seg.yaml", nc=3, verbose=False))
    sites = find_sites(model)
    kernels = [f"net.model.23.cv4.{level}.0.conv" for level in range(3)]
    assert sorted(chosen(sites, "solo")) == sorted([*BOXES, *kernels])
    second = set(chosen(sites, "solov2")) - set(chosen(sites, "solo"))
    assert second == {"net.model.23.proto.cv1.conv"}
    told = reasons(sites, "solov2")["net.model.23.proto.cv1.conv"]
    assert told == ("matches 'solov2': the first of the mask features net.model.23.proto, a Proto")


def test_a_patched_detector_keeps_its_outputs(yolo: nn.Module) -> None:
    image = torch.rand(1, 3, 64, 64)
    model = ccp.patch(yolo, "ppyolo")
    with torch.no_grad():
        assert torch.equal(model(image)[0], yolo(image)[0])
        nn.init.ones_(model.get_submodule(BOXES[0]).coord_weight)  # type: ignore[arg-type]
        assert not torch.equal(model(image)[0], yolo(image)[0])


def test_classifiers_have_a_stem_and_no_parts_of_a_detector() -> None:
    model = timm.create_model("resnet18")
    assert reasons(model, "stem") == {"conv1": "matches 'stem': the first convolution that runs"}
    for where in ("neck", "head", "ppyolo", "solo", "solov2"):
        with pytest.raises(ccp.SelectionError, match=f"'{where}' matches no convolution"):
            ccp.plan(model, where)


# --- modules that are no convolutions ------------------------------------------------------------


def test_a_module_means_every_convolution_in_it() -> None:
    model = timm.create_model("resnet18")
    inside = [f"layer1.{block}.conv{at}" for block in (0, 1) for at in (1, 2)]
    assert chosen(model, "layer1") == chosen(model, "layer1.*") == inside
    assert chosen(model, ["layer1.0", "conv1"]) == ["conv1", *inside[:2]]
    assert reasons(model, "layer1")["layer1.0.conv1"] == "matches 'layer1': in the module layer1"
    with pytest.raises(ccp.SelectionError, match=r"'bn1' matches .* a BatchNorm2d, in which there"):
        ccp.plan(model, "bn1")


class Functional(nn.Module):
    """A functional convolution in a module of its own, beside a layer whose name begins alike."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(Scaled(), nn.Conv2d(3, 3, 1))
        self.part2 = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.part2(self.part(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def test_functional_convolutions_in_a_module_count() -> None:
    assert chosen(Functional(), "part") == ["part.0", "part.1"]
    assert chosen(Functional(), "part2") == ["part2"]
