"""Real models: the same bits after patching, and the paper's layer once coordinates count."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from concat_model import concatenating
from PIL import Image
from skimage import data
from torch import Tensor, nn

import coordconv_patch as ccp

TIMM_MODELS = [
    "resnet50",
    "nf_resnet26",
    "resnetv2_50x1_bit",
    "tf_efficientnet_b0",
    "mobilenetv3_small_050",
    "convnext_atto",
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fill_coords_(model: nn.Module, scale: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(std=scale)
    return model


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same_bits(left: Any, right: Any) -> None:
    left, right = leaves(left), leaves(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def make_timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm_model_keeps_its_bits_in_evaluation(name: str) -> None:
    model = make_timm(name).eval()
    patched = ccp.patch(model, "all")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(ccp.coord_parameters(patched)) == len(convs) > 10
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0
        assert_same_bits(patched(x), expected)  # makes the coordinate maps
        assert_same_bits(patched(x), expected)  # uses them
    assert_same_bits(patched(x), model(x))


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm_model_keeps_its_bits_in_training(name: str) -> None:
    model = timm.create_model(name, num_classes=10, drop_rate=0.3).train()
    patched = ccp.patch(model, "all")
    x = torch.randn(2, 3, 64, 96)
    outputs = []
    for each in (model, patched):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert_same_bits(*outputs)
    torch.manual_seed(2)
    assert not torch.equal(patched(x), outputs[0])  # dropout is alive
    model(x)
    state = patched.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", ["resnet50", "tf_efficientnet_b0", "nf_resnet26"])
def test_timm_model_keeps_its_bits_in_bfloat16(name: str) -> None:
    model = make_timm(name).eval().to(torch.bfloat16)
    x = torch.randn(1, 3, 64, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_same_bits(ccp.patch(model, "all")(x), model(x))


DETECTORS: dict[str, dict[str, Any]] = {
    "retinanet_resnet50_fpn": {
        "min_size": 96,
        "max_size": 160,
        "score_thresh": 0.0,
        "topk_candidates": 50,
    },
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "min_size": 160,
        "max_size": 240,
        "box_score_thresh": 0.0,
    },
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "topk_candidates": 50},
}


def make_detector(name: str) -> nn.Module:
    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=5, **DETECTORS[name])


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_torchvision_detector_keeps_its_boxes(name: str) -> None:
    model = make_detector(name).eval()
    patched = ccp.patch(model, "all")
    assert type(patched) is type(model)
    images = [torch.rand(3, 80, 120), torch.rand(3, 100, 90)]
    with torch.no_grad():
        expected = model(images)
        assert all(len(found["boxes"]) > 0 for found in expected)
        assert_same_bits(patched(images), expected)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_torchvision_detector_keeps_its_losses(name: str) -> None:
    model = make_detector(name).train()
    patched = ccp.patch(model, "all")
    images = [torch.rand(3, 80, 120), torch.rand(3, 100, 90)]
    targets = [
        {"boxes": torch.tensor([[10.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
        for _ in images
    ]
    losses = []
    for each in (model, patched):
        torch.manual_seed(1)
        losses.append(each(images, targets))
    assert_same_bits(*losses)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_segmentation_model_keeps_its_bits(training: bool) -> None:
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    ).train(training)
    patched = ccp.patch(model, "all")
    x = torch.randn(2, 3, 64, 97)
    outputs = []
    for each in (model, patched):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert set(outputs[0]) == {"out", "aux"}
    assert_same_bits(*outputs)


# --- the pretrained MTCNN nets, on a photograph --------------------------------------------------


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


@pytest.fixture(scope="module")
def astronaut() -> Tensor:
    """The astronaut photo, shape (1, 3, 512, 512), normalised as MTCNN wants it."""
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float()
    return (photo - 127.5) * 0.0078125


def mtcnn_input(net: str, photo: Tensor) -> Tensor:
    if net == "PNet":
        return F.interpolate(photo[..., :400], size=(200, 157), mode="area")
    side = {"RNet": 24, "ONet": 48}[net]
    crops = [photo[..., top : top + 150, 150:290] for top in (0, 60, 200)]
    return torch.cat([F.interpolate(crop, size=(side, side), mode="area") for crop in crops])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("net", ["PNet", "RNet", "ONet"])
def test_pretrained_mtcnn_net_keeps_its_bits(
    net: str, dtype: torch.dtype, mtcnn: types.ModuleType, astronaut: Tensor
) -> None:
    model = getattr(mtcnn, net)().to(dtype)
    patched = ccp.patch(model, "all")
    x = mtcnn_input(net, astronaut).to(dtype)
    with torch.no_grad():
        assert_same_bits(patched(x), model(x))
    assert_same_bits(patched(x), model(x))


def test_pretrained_mtcnn_finds_the_same_face(mtcnn: types.ModuleType, astronaut: Tensor) -> None:
    detect_face = sys.modules["facenet_pytorch.models.utils.detect_face"].detect_face
    nets = [getattr(mtcnn, name)() for name in ("PNet", "RNet", "ONet")]
    photo = Image.fromarray(data.astronaut())
    arguments = {"threshold": [0.6, 0.7, 0.7], "factor": 0.709, "device": "cpu"}
    with torch.no_grad():
        boxes, points = detect_face(photo, 40, *nets, **arguments)
        patched = [ccp.patch(net, "all") for net in nets]
        same_boxes, same_points = detect_face(photo, 40, *patched, **arguments)
    assert boxes[0][0][4] > 0.99  # a face, and the network is sure of it
    assert (boxes == same_boxes).all()
    assert (points == same_points).all()


# --- coordinates that count ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (64, 96)),
        ("mobilenetv3_small_050", (65, 94)),
        ("nf_resnet26", (64, 90)),
        ("tf_efficientnet_b0", (65, 94)),
    ],
)
def test_trained_coordinates_equal_the_concatenating_model(
    name: str, size: tuple[int, int]
) -> None:
    model = make_timm(name).eval().double()
    patched = fill_coords_(ccp.patch(model, "all"))
    reference = concatenating(patched)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(x)
        assert not torch.allclose(expected, model(x), rtol=1e-3, atol=0)
        torch.testing.assert_close(patched(x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(patched(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(patched(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_gradients_equal_the_concatenating_model(name: str) -> None:
    patched = fill_coords_(ccp.patch(make_timm(name).eval().double(), "all"))
    reference = concatenating(patched)
    x = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    for model in (patched, reference):
        model(x).square().sum().backward()
    expected = dict(reference.named_parameters())
    for parameter_name, parameter in patched.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[parameter_name].grad, rtol=1e-8, atol=1e-8
        )
