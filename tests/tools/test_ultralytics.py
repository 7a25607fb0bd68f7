"""The recipe of docs/ultralytics.md: train, reload, predict, validate and export by ultralytics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import coordconv_patch as ccp

# Read when ultralytics is imported: no downloads, no installation of packages on the fly.
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

SIZE = 64


class CoordTrainer(DetectionTrainer):
    """As in docs/ultralytics.md."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model = ccp.patch_(super().get_model(cfg, None, verbose), "all")
        if weights is not None:
            model.load(weights)
        return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of noise with a red square each, in ultralytics' format."""
    root = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(8):
            picture = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            x, y = random.integers(4, SIZE - 20, 2)
            picture[y : y + 16, x : x + 16] = (255, 0, 0)
            Image.fromarray(picture).save(images / f"{index}.png")
            box = f"0 {(x + 8) / SIZE} {(y + 8) / SIZE} {16 / SIZE} {16 / SIZE}\n"
            (labels / f"{index}.txt").write_text(box)
    description = root / "data.yaml"
    description.write_text(
        f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n  0: square\n"
    )
    return description


def trained_checkpoint(name: str, data: Path, **options: Any) -> Path:
    """The last checkpoint of two epochs by ultralytics' own trainer."""
    model = YOLO(name)
    model.train(
        trainer=CoordTrainer,
        data=str(data),
        project=str(data.parent / "runs"),
        epochs=2,
        imgsz=SIZE,
        batch=4,
        optimizer="SGD",
        lr0=0.02,
        warmup_epochs=0,
        workers=0,
        device="cpu",
        plots=False,
        amp=False,
        verbose=False,
        **options,
    )
    return Path(model.trainer.last)


@pytest.fixture(scope="module", params=["yolo11n", "yolo26n"])
def checkpoint(request: pytest.FixtureRequest, data: Path) -> Iterator[Path]:
    threads = torch.get_num_threads()
    yield trained_checkpoint(f"{request.param}.yaml", data)
    torch.set_num_threads(threads)  # ultralytics sets its own


def reloaded(checkpoint: Path) -> YOLO:
    """The checkpoint, with coordinate weights as after a long training."""
    model = YOLO(checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model.model):
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    model.model.float().eval()
    return model


@torch.no_grad()
def boxes(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model(images)[0]
    return output


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) < 1e-5 * float(a.abs().max())


def test_training_moves_the_coordinate_weights_and_the_checkpoint_holds_them(
    checkpoint: Path,
) -> None:
    model = YOLO(checkpoint).model
    assert type(model) is DetectionModel
    weights = ccp.coord_parameters(model)
    assert len(weights) > 80
    moved = sum(bool(weight.any()) for weight in weights)
    assert moved > 0.8 * len(weights)


def test_fuse_keeps_the_outputs(checkpoint: Path) -> None:
    model = reloaded(checkpoint).model
    images = torch.rand(1, 3, SIZE, SIZE)
    before = boxes(model, images)
    without = boxes(ccp.unpatch(model, discard=True), images)
    assert float((before - without).abs().max()) > 1e-3 * float(before.abs().max())
    fused = model.fuse()
    assert fused is model
    assert fused.is_fused()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert_close(before, boxes(fused, images))


@pytest.mark.parametrize("checkpoint", ["yolo26n"], indirect=True)
def test_export_by_ultralytics_equals_torch(checkpoint: Path) -> None:
    model = reloaded(checkpoint)
    images = torch.rand(1, 3, SIZE, SIZE)
    expected = boxes(model.model, images)
    path = model.export(format="onnx", imgsz=SIZE, device="cpu", simplify=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_close(expected, torch.from_numpy(found))


def test_predict_and_val_see_the_coordinates(checkpoint: Path, data: Path) -> None:
    picture = data.parent / "images" / "val" / "0.png"
    project = str(data.parent / "runs")
    options: dict[str, Any] = {"imgsz": SIZE, "device": "cpu", "project": project}
    model = reloaded(checkpoint)
    image = torch.from_numpy(np.asarray(Image.open(picture)).copy()).permute(2, 0, 1)[None] / 255
    unfused = boxes(model.model, image)
    (result,) = model.predict(picture, conf=1e-6, iou=1.0, **options)
    unpatched = reloaded(checkpoint)
    ccp.unpatch_(unpatched.model, discard=True)
    (plain,) = unpatched.predict(picture, conf=1e-6, iou=1.0, **options)
    assert len(result.boxes) > 0
    # The best box: ultralytics' predictor fuses the model before it runs it.
    if unfused.shape[1] == 5:  # (1, 4 + classes, anchors), before suppression
        assert float(result.boxes.conf.max()) == pytest.approx(float(unfused[0, 4].max()), rel=1e-4)
    else:  # (1, boxes, 6), of the end-to-end model
        assert float(result.boxes.conf.max()) == pytest.approx(float(unfused[0, :, 4].max()), 1e-4)
    assert float(plain.boxes.conf.max()) != pytest.approx(float(result.boxes.conf.max()), rel=1e-3)
    metrics = model.val(data=str(data), workers=0, plots=False, **options)
    assert 0 <= metrics.box.map <= 1
    assert len(ccp.coord_parameters(model.model)) > 80


@pytest.mark.parametrize("checkpoint", ["yolo26n"], indirect=True)
def test_a_checkpoint_can_be_trained_on(checkpoint: Path, data: Path) -> None:
    """Its coordinate weights are where training goes on from, not zero."""
    seen: list[dict[str, Tensor]] = []

    class Recorder(CoordTrainer):
        def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            model = super().get_model(*args, **kwargs)
            seen.append({key: value.clone() for key, value in model.state_dict().items()})
            return model

    options = {"epochs": 1, "imgsz": SIZE, "batch": 8, "workers": 0, "device": "cpu"}
    model = YOLO(checkpoint)
    start = {key: value.float() for key, value in model.model.state_dict().items()}
    project = str(data.parent / "again")
    model.train(
        trainer=Recorder, data=str(data), project=project, plots=False, amp=False, **options
    )
    names = [name for name in start if name.endswith("coord_weight")]
    assert names
    assert all(torch.equal(seen[0][name], start[name]) for name in names)


@pytest.mark.parametrize(
    "name",
    [
        "yolov3-tiny",
        "yolov5n",
        "yolov6n",
        "yolov8n-seg",  # transposed convolutions
        "yolov9t",  # RepConv: two branches become one
        "yolov10n",  # RepVGGDW: depthwise branches; half of the head is dropped
        "yolo11n-pose",
        "yolo12n",
        "yolo26n-obb",
    ],
)
def test_every_architecture_fuses_with_its_coordinates(name: str) -> None:
    model = ccp.patch(YOLO(f"{name}.yaml").model, "all").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        for weight in ccp.coord_parameters(model):
            weight.normal_(0, 0.1, generator=generator)
    images = torch.rand(1, 3, SIZE, SIZE)
    before = boxes(model, images)
    without = boxes(ccp.unpatch(model, discard=True), images)
    before, without = (b[0] if isinstance(b, tuple) else b for b in (before, without))
    assert float((before - without).abs().max()) > 1e-3 * float(before.abs().max())
    after = boxes(model.fuse(verbose=False), images)
    assert_close(before, after[0] if isinstance(after, tuple) else after)
