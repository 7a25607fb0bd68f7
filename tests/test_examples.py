"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch

import coordconv_patch as ccp

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    """An example as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_leaves_a_verified_graph_and_trained_coordinates(tmp_path: Path) -> None:
    quickstart = load("quickstart")
    arguments = ["--model", "resnet10t", "--steps", "2", "--size", "32", "--out", str(tmp_path)]
    report = quickstart.main(arguments)
    assert report.path == tmp_path / "model.onnx"
    assert list(report.lowerings) == ["conv1.0"]
    assert report.worst_difference < 1e-4
    fresh = timm.create_model("resnet10t", num_classes=4)
    loaded = ccp.load_coords(fresh, tmp_path / "coords.safetensors", check_base=False)
    assert all(torch.count_nonzero(weight) for weight in ccp.coord_parameters(loaded))


def test_quickstart_labels_are_the_squares_quadrants() -> None:
    quickstart = load("quickstart")
    images, labels = quickstart.quadrant_batch(64, 32, torch.Generator().manual_seed(1))
    bright = (images.mean(1) > 0.7).double()
    rows = torch.arange(32.0).double()
    mass = bright.sum((1, 2))
    below = (bright.sum(2) @ rows) / mass + 0.5 >= 16
    right = (bright.sum(1) @ rows) / mass + 0.5 >= 16
    assert torch.equal(labels, 2 * below.long() + right.long())
    assert set(labels.tolist()) == {0, 1, 2, 3}
