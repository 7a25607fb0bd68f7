"""Torchvision's detectors to ONNX, post-processing included, on real pictures.

Their weights are random here, so each detector is calibrated: batch norms see the
pictures, and the last classifying layer is scaled until scores differ. The reference
is the concatenating model; boxes are matched here by label, box and score.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from concat_model import concatenating
from reference import paper_grid
from skimage import data
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.verification.verify import verify_onnx

CPU = ["CPUExecutionProvider"]


def picture(name: str, height: int, width: int) -> Tensor:
    """A photograph, (3, H, W) in [0, 1]."""
    photo = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(photo, size=(height, width), mode="area")[0]


class Backbone(nn.Module):
    """A small backbone: features at strides 8, 16 and 32."""

    out_channels: Any = (16, 24, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8))
        widths = (8, 16, 24, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o))
            for i, o in pairwise(widths)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, features = self.stem(x).relu(), OrderedDict()
        for index, stage in enumerate(self.stages):
            x = features[str(index)] = stage(x).relu()
        return features


class Pyramid(nn.Module):
    """The backbone with torchvision's feature pyramid."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = Backbone()
        self.fpn = FeaturePyramidNetwork([16, 24, 32], 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


SIZE = {"min_size": 64, "max_size": 160}
LEVELS = ["0", "1", "2"]
ONE_RATIO = AnchorGenerator(((12,), (24,), (48,)), ((1.0,),) * 3)
RATIOS = AnchorGenerator(((12,), (24,), (48,)), ((0.5, 1.0, 2.0),) * 3)


def two_stage(kind: str, classes: int = 5, **kwargs: Any) -> nn.Module:
    """A detector of the R-CNN family; ``kind`` is torchvision's class."""
    settings: dict[str, Any] = {
        "rpn_anchor_generator": RATIOS,
        "rpn_post_nms_top_n_test": 60,
        "box_roi_pool": MultiScaleRoIAlign(LEVELS, output_size=5, sampling_ratio=2),
        "box_head": TwoMLPHead(32 * 5**2, 64),
        "box_predictor": FastRCNNPredictor(64, classes),
        "box_score_thresh": 0.3,
        "box_detections_per_img": 40,
    }
    return getattr(detection, kind)(Pyramid(), **SIZE, **(settings | kwargs))


def mask_rcnn() -> nn.Module:
    return two_stage(
        "MaskRCNN",
        mask_roi_pool=MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2),
        mask_head=MaskRCNNHeads(32, (16, 16), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, 5),
    )


def keypoint_rcnn() -> nn.Module:
    return two_stage(
        "KeypointRCNN",
        classes=2,
        keypoint_roi_pool=MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2),
        keypoint_head=KeypointRCNNHeads(32, (16, 16)),
        keypoint_predictor=KeypointRCNNPredictor(16, 4),
    )


def one_stage(kind: str, anchors: AnchorGenerator) -> nn.Module:
    build = getattr(detection, kind)
    return build(
        Pyramid(), 5, anchor_generator=anchors, score_thresh=0.4, topk_candidates=60, **SIZE
    )


def ssd() -> nn.Module:
    boxes = DefaultBoxGenerator([[2], [2, 3], [2]])
    return SSD(Backbone(), boxes, (96, 96), 5, score_thresh=0.3, topk_candidates=60)


def ssdlite() -> nn.Module:
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, score_thresh=0.4, topk_candidates=40
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "faster_rcnn": lambda: two_stage("FasterRCNN"),
    "mask_rcnn": mask_rcnn,
    "keypoint_rcnn": keypoint_rcnn,
    "retinanet": lambda: one_stage("RetinaNet", RATIOS),
    "fcos": lambda: one_stage("FCOS", ONE_RATIO),
    "ssd": ssd,
    "ssdlite": ssdlite,
}


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers whose outputs become the scores of classes, and of masks' pixels."""
    if hasattr(model, "roi_heads"):
        masks = model.roi_heads.mask_predictor
        scores = model.roi_heads.box_predictor.cls_score
        return [scores] if masks is None else [scores, masks.mask_fcn_logits]
    head = model.head.classification_head
    if hasattr(head, "cls_logits"):
        return [
            head.cls_logits,
            *([model.head.regression_head.bbox_ctrness] if _fcos(model) else []),
        ]
    return [stage if isinstance(stage, nn.Conv2d) else stage[-1] for stage in head.module_list]


def _fcos(model: nn.Module) -> bool:
    return isinstance(model, detection.FCOS)


@torch.no_grad()
def calibrate_(model: nn.Module, pictures: list[Tensor], spread: float) -> None:
    """Batch norms get the pictures' statistics; logits of the last layers get a spread."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    model(pictures)
    model.eval()
    for layer in classifiers(model):
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(
            lambda _, args, output, kept=outputs: kept.append(output)
        )
        model(pictures)
        hook.remove()
        found = torch.cat([output.flatten() for output in outputs]).std()
        for parameter in (layer.weight, getattr(layer, "coord_weight", None)):
            if parameter is not None:
                parameter.mul_(spread / found)
        layer.bias.zero_()


def patched(
    kind: str, where: Any, size: tuple[int, int] = (64, 96), spread: float = 1.5
) -> nn.Module:
    """A calibrated detector with coordinate weights as large as its own weights."""
    torch.manual_seed(0)
    pictures = [picture(name, *size) for name in ("chelsea", "coffee", "astronaut")]
    model = ccp.patch(MAKERS[kind]().eval(), where, example_inputs=(pictures[:1],))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "coord_weight"):
                module.coord_weight.normal_(std=float(module.weight.std()))
    calibrate_(model, pictures, spread)
    return model


Found = dict[str, np.ndarray]


def run(path: Path, pictures: Sequence[Tensor], fields: Sequence[str]) -> list[Found]:
    """What the file finds in each picture, in ONNX Runtime as a user calls it."""
    session = ort.InferenceSession(str(path), providers=CPU)
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {n: p.numpy() for n, p in zip(names, pictures, strict=True)})
    assert len(outputs) == len(fields) * len(pictures)
    count = len(fields)
    return [
        dict(zip(fields, outputs[index : index + count], strict=True))
        for index in range(0, len(outputs), count)
    ]


class ConcatTransposed(nn.Module):
    """A transposed convolution of [x ; c] with [W ; W_c], as the mask head's last but one."""

    def __init__(self, layer: ccp.CoordConvTranspose2d) -> None:
        super().__init__()
        self.weights = torch.cat((layer.weight, layer.coord_weight))
        self.bias, self.stride, self.padding = layer.bias, layer.stride, layer.padding
        assert layer.groups == 1
        assert layer.output_padding == (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        grid = paper_grid(tuple(x.shape[2:])).to(x).expand(len(x), -1, -1, -1)
        inputs = torch.cat((x, grid), dim=1)
        return F.conv_transpose2d(inputs, self.weights, self.bias, self.stride, self.padding)


def reference(model: nn.Module, pictures: Sequence[Tensor]) -> list[Found]:
    """What the concatenating model finds."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.ConvTranspose2d) and hasattr(child, "coord_weight"):
                    setattr(parent, name, ConcatTransposed(child))
        found = concatenating(model)(list(pictures))
    return [{name: tensor.numpy() for name, tensor in each.items()} for each in found]


def assert_same_detections(actual: Sequence[Found], expected: Sequence[Found]) -> None:
    """Each detection has its own counterpart: same label, box within 0.1 px, score within 1e-3."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert len(ours["scores"]) == len(theirs["scores"])
        free = set(range(len(ours["scores"])))
        for row in range(len(theirs["scores"])):
            apart = {
                candidate: float(np.abs(ours["boxes"][candidate] - theirs["boxes"][row]).max())
                for candidate in free
                if ours["labels"][candidate] == theirs["labels"][row]
                and abs(ours["scores"][candidate] - theirs["scores"][row]) < 1e-3
            }
            nearest = min(apart, key=apart.__getitem__, default=None)
            assert nearest is not None, (row, theirs["boxes"][row], theirs["scores"][row])
            assert apart[nearest] < 0.1, (row, theirs["boxes"][row], ours["boxes"][nearest])
            free.remove(nearest)
            if "masks" in theirs:
                close = np.abs(ours["masks"][nearest] - theirs["masks"][row]) < 1e-3
                assert close.mean() > 0.995
            if "keypoints" in theirs:
                assert np.abs(ours["keypoints"][nearest] - theirs["keypoints"][row]).max() < 0.1
                sure, reference = ours["keypoints_scores"][nearest], theirs["keypoints_scores"][row]
                assert np.abs(sure - reference).max() < 1e-3 * np.abs(reference).max()


def assert_found_by_one_of(actual: Sequence[Found], *references: Callable[[], Any]) -> None:
    """The reference in float32 finds the same, or the one in float64.

    Of a hundred boxes in order of their scores, rounding decides which one is the last.
    """
    reasons = []
    for compute in references:
        try:
            assert_same_detections(actual, compute())
        except AssertionError as error:
            reasons.append(str(error))
        else:
            return
    raise AssertionError(reasons)


def assert_means_something(expected: Sequence[Found], dozens: int = 2) -> None:
    for found in expected:
        scores = found["scores"]
        assert len(scores) >= 12 * dozens
        assert len(np.unique(scores.round(4))) > 0.8 * len(scores)
        assert scores.max() - scores.min() > 0.05


def export(
    model: nn.Module, path: Path, pictures: list[Tensor], **options: Any
) -> ccp.ExportReport:
    settings: dict[str, Any] = {"dynamic_batch": False, "exporter": "torchscript"}
    return ccp.export_onnx(model, path, pictures, providers=CPU, **(settings | options))


ASTRONAUT = picture("astronaut", 64, 96)
COFFEE = picture("coffee", 64, 96)

# --- every detector ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *((kind, "all") for kind in sorted(MAKERS)),
        ("faster_rcnn", "first"),
        ("faster_rcnn", ["neck", "head"]),
        ("retinanet", ["neck", "head"]),
        ("ssd", "first"),
    ],
    ids=str,
)
def test_a_detector_exports_with_its_post_processing(kind: str, where: Any, tmp_path: Path) -> None:
    model = patched(kind, where)
    report = export(model, tmp_path / "detector.onnx", [ASTRONAUT])
    expected = reference(model, [COFFEE])
    assert_means_something(expected)
    assert_same_detections(run(report.path, [COFFEE], tuple(expected[0])), expected)
    own, mirrored = report.checks
    assert own.detections == len(reference(model, [ASTRONAUT])[0]["scores"])
    assert mirrored.detections
    assert f"{own.detections} detections" in str(report)


def test_auto_falls_back_to_torchscript_and_says_so(tmp_path: Path) -> None:
    model = patched("ssd", "all")
    report = export(model, tmp_path / "detector.onnx", [ASTRONAUT], exporter="auto")
    assert report.exporter == "torchscript"
    (note,) = report.notes
    assert "torch.export could not export it" in note
    assert "the TorchScript exporter did" in note
    expected = reference(model, [COFFEE])
    assert_same_detections(run(report.path, [COFFEE], tuple(expected[0])), expected)
    with torch.no_grad():  # the failed attempt has left nothing in the model
        assert len(model([COFFEE])[0]["boxes"]) == len(expected[0]["boxes"])


def test_the_coordinates_count(tmp_path: Path) -> None:
    """What the other tests compare would be other boxes without coordinates."""
    model = patched("retinanet", "first")
    path = export(model, tmp_path / "detector.onnx", [ASTRONAUT]).path
    plain = ccp.unpatch(model, discard=True)
    with pytest.raises(ExportError, match=r"in what they detect: picture 0: torch finds box \("):
        verify_onnx(plain, path, [ASTRONAUT], providers=CPU)


# --- lists of images -----------------------------------------------------------------------------


def test_two_images_of_different_sizes(tmp_path: Path) -> None:
    model = patched("faster_rcnn", "all")
    shapes = ((64, 96), (80, 72))
    path = export(
        model,
        tmp_path / "two.onnx",
        [picture("astronaut", *shapes[0]), picture("chelsea", *shapes[1])],
    ).path
    others = [picture("coffee", *shapes[0]), picture("rocket", *shapes[1])]
    expected = reference(model, others)
    assert_means_something(expected, dozens=1)
    assert_same_detections(run(path, others, tuple(expected[0])), expected)
    with pytest.raises(
        ExportError, match=r"has inputs .*images_1.* example has 1 .*number of images"
    ):
        verify_onnx(model, path, others[:1], providers=CPU)


def test_a_dynamic_number_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"list of images, .*dynamic_batch=False"):
        ccp.export_onnx(patched("ssd", "first"), tmp_path / "n.onnx", [ASTRONAUT])


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "ssd"])
def test_images_of_any_size(kind: str, tmp_path: Path) -> None:
    model = patched(kind, "all")
    report = export(model, tmp_path / "any.onnx", [ASTRONAUT], dynamic_size=True)
    assert report.dynamic_axes == {"images": {1: "height", 2: "width"}}
    assert len(report.checks) == 3
    for size in ((72, 100), (110, 70)):
        other = [picture("coffee", *size)]
        expected = reference(model, other)
        assert_means_something(expected, dozens=1)
        assert_same_detections(run(report.path, other, tuple(expected[0])), expected)


def test_another_size_than_the_files_is_an_error_with_the_sizes(tmp_path: Path) -> None:
    model = patched("ssd", "first")
    path = export(model, tmp_path / "fixed.onnx", [ASTRONAUT]).path
    with pytest.raises(ExportError, match=r"cannot run the graph on .*\(3, 72, 96\)"):
        verify_onnx(model, path, [picture("coffee", 72, 96)], providers=CPU)


# --- a wrong file is never accepted --------------------------------------------------------------


def negative(constant: Tensor, layer: nn.Module, call: Any, site: nn.Module) -> Tensor:
    return -constant


def stale_level(constant: Tensor, layer: nn.Module, call: Any, site: nn.Module) -> Tensor:
    return constant.flip(-1) if call.input_size == (4, 6) else constant


def dropped_site(constant: Tensor, layer: nn.Module, call: Any, site: nn.Module) -> Tensor:
    return torch.zeros_like(constant) if layer is site else constant


@pytest.mark.parametrize("fault", [negative, stale_level, dropped_site])
def test_a_wrong_lowering_is_not_put_in_place(
    fault: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched("retinanet", "head" if fault is not dropped_site else "all")
    form, layers = LOWERINGS["map"], []
    right = form.constant

    def wrong(site: LoweringSite, call: Any) -> CoordConstant:
        layers.append(site.layer)
        tensor = right(site, call).tensor
        return CoordConstant(fault(tensor, site.layer, call, layers[0]))

    monkeypatch.setattr(form, "constant", wrong)
    with pytest.raises(ExportError, match=r"differ on .* in what they detect: picture 0: "):
        export(model, tmp_path / "wrong.onnx", [ASTRONAUT], lowering="map")
    assert not list(tmp_path.iterdir())


def lowest_score(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model([ASTRONAUT])[0]["scores"].min())


@pytest.fixture(scope="module")
def retinanet_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = patched("retinanet", "all")
    path = tmp_path_factory.mktemp("retinanet") / "detector.onnx"
    return model, export(model, path, [ASTRONAUT]).path


@pytest.mark.parametrize(
    ("setting", "change", "reason"),
    [
        ("score_thresh", lambda model: lowest_score(model) + 1e-4, r"the file finds box"),
        ("score_thresh", lambda model: 0.38, r"torch finds box .*the file does not"),
        ("nms_thresh", lambda model: 0.4, r"the file finds box"),
        ("detections_per_img", lambda model: 100, r"the file finds box"),
    ],
)
def test_other_post_processing_than_torchs_is_an_error(
    setting: str,
    change: Callable[[nn.Module], Any],
    reason: str,
    retinanet_file: tuple[nn.Module, Path],
) -> None:
    model, path = retinanet_file
    other = copy.deepcopy(model)
    assert hasattr(other, setting)
    setattr(other, setting, change(model))
    with pytest.raises(ExportError, match=reason):
        verify_onnx(other, path, [ASTRONAUT], providers=CPU)
    assert verify_onnx(model, path, [ASTRONAUT], providers=CPU).unstable == 0


def test_a_box_whose_score_is_the_threshold_is_no_difference(tmp_path: Path) -> None:
    """Rounding decides about it in torch too."""
    model = patched("retinanet", "first")
    with torch.no_grad():
        score = model([ASTRONAUT])[0]["scores"][-5]
    model.score_thresh = score.item()
    without = export(model, tmp_path / "without.onnx", [ASTRONAUT]).path
    other = copy.deepcopy(model)
    other.score_thresh = torch.nextafter(score, torch.tensor(0.0)).item()
    found = [len(each([ASTRONAUT])[0]["scores"]) for each in (model, other)]
    assert found[1] == found[0] + 1
    checks = [verify_onnx(each, without, [ASTRONAUT], providers=CPU) for each in (model, other)]
    assert {check.unstable for check in checks} == {0, 1}
    assert all(check.detections == found[0] for check in checks if check.unstable)


def test_a_detector_that_finds_nothing_is_noted(tmp_path: Path) -> None:
    model = patched("ssd", "first")
    model.score_thresh = 1.0
    report = export(model, tmp_path / "nothing.onnx", [ASTRONAUT])
    assert [check.detections for check in report.checks] == [0, 0]
    assert "detects nothing on the example inputs" in report.notes[-1]
    assert "detects nothing" in str(report)


# --- the pretrained MTCNN face detector ----------------------------------------------------------


@pytest.fixture(scope="module")
def mtcnn() -> Iterator[types.ModuleType]:
    """facenet_pytorch.models.mtcnn, without the package's __init__: that one needs requests."""
    spec = importlib.util.find_spec("facenet_pytorch")
    assert spec is not None, "pip install --no-deps facenet-pytorch==2.6.0"
    package = types.ModuleType("facenet_pytorch")
    package.__path__ = list(spec.submodule_search_locations or ())
    before = {name for name in sys.modules if name.startswith("facenet_pytorch")}
    sys.modules["facenet_pytorch"] = package
    yield importlib.import_module("facenet_pytorch.models.mtcnn")
    for name in [name for name in sys.modules if name.startswith("facenet_pytorch")]:
        if name not in before:
            del sys.modules[name]


def with_small_coordinates(model: nn.Module) -> nn.Module:
    """Coordinates that move the pretrained net's answers and leave it a face detector."""
    model = ccp.patch(model.eval(), "all")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(std=0.02)
    return model


def face_pixels(size: tuple[int, int]) -> Tensor:
    """The astronaut's picture as MTCNN wants it, (1, 3, H, W) in [-1, 1]."""
    return picture("astronaut", *size)[None] * 2 - 1


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_the_pretrained_proposal_net_at_any_size(
    exporter: Any, mtcnn: types.ModuleType, tmp_path: Path
) -> None:
    model = with_small_coordinates(mtcnn.PNet())
    path = tmp_path / "pnet.onnx"
    ccp.export_onnx(
        model, path, face_pixels((96, 96)), dynamic_size=True, exporter=exporter, providers=CPU
    )
    session = ort.InferenceSession(str(path), providers=CPU)
    for size in ((120, 157), (83, 64), (300, 301)):
        pixels = face_pixels(size)
        with torch.no_grad():
            offsets, faces = (tensor.numpy() for tensor in concatenating(model)(pixels))
        name = session.get_inputs()[0].name
        ours = session.run(None, {name: pixels.numpy()})
        assert ours[1].shape == faces.shape
        assert np.abs(ours[0] - offsets).max() < 1e-5
        assert np.abs(ours[1] - faces).max() < 1e-5
        if size == (120, 157):
            assert faces[:, 1].max() > 0.9  # it sees the face
            with torch.no_grad():
                plain = mtcnn.PNet()(pixels)[1].numpy()
            assert np.abs(plain - faces).max() > 1e-3


@pytest.mark.parametrize(("net", "side"), [("RNet", 24), ("ONet", 48)])
def test_the_pretrained_refining_nets(
    net: str, side: int, mtcnn: types.ModuleType, tmp_path: Path
) -> None:
    model = with_small_coordinates(getattr(mtcnn, net)())
    crops = face_pixels((512, 512))[..., 0:300, 100:400]
    windows = [crops[..., top : top + 150, 50:190] for top in (0, 60, 140)]
    x = torch.cat([F.interpolate(window, size=(side, side), mode="area") for window in windows])
    path = tmp_path / f"{net}.onnx"
    ccp.export_onnx(model, path, x[:1], providers=CPU)
    session = ort.InferenceSession(str(path), providers=CPU)
    ours = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        theirs = concatenating(model)(x)
    assert theirs[-1][:, 1].max() > 0.7  # it sees the face
    for actual, expected in zip(ours, theirs, strict=True):
        assert np.abs(actual - expected.numpy()).max() < 1e-5


# --- torchvision's own builders, at their own widths ---------------------------------------------

BUILDERS = [
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]


SPREADS = {"retinanet_resnet50_fpn_v2": 0.5}
"""Of its logits' long tails with the usual 1.5, too many scores would be 0.997."""


def built(name: str) -> nn.Module:
    family = name.split("_")[0]
    sizes = {} if family.startswith("ssd") else {"min_size": 320, "max_size": 480}
    cut = {"score_thresh": 0.4, "topk_candidates": 100}
    if "rcnn" in family:
        cut = {"box_score_thresh": 0.3, "box_detections_per_img": 60}
    classes = 2 if family == "keypointrcnn" else 5
    build = getattr(detection, name)
    return build(weights=None, weights_backbone=None, num_classes=classes, **sizes, **cut)


@pytest.mark.zoo
@pytest.mark.parametrize("where", ["first", "all"])
@pytest.mark.parametrize("name", BUILDERS)
def test_torchvisions_own_detectors(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAKERS, name, lambda: built(name))
    model = patched(name, where, (240, 320), SPREADS.get(name, 1.5))
    report = export(
        model, tmp_path / "detector.onnx", [picture("astronaut", 240, 320)], exporter="auto"
    )
    assert report.exporter == "torchscript"
    other = [picture("coffee", 240, 320)]
    expected = reference(model, other)
    assert_means_something(expected, dozens=1)  # key points know one class only
    print(
        f"| {name} | {where} | {len(expected[0]['scores'])} | {report.worst_difference:.1g} | "
        f"{report.file_size / 1e6:.0f} |"
    )
    assert_found_by_one_of(
        run(report.path, other, tuple(expected[0])),
        lambda: expected,
        lambda: reference(copy.deepcopy(model).double(), [other[0].double()]),
    )
