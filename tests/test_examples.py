"""The examples run, and do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from scripts import load_script

import coordconv_patch as ccp

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module; the folder is not a package."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return load_script(EXAMPLES / "quickstart.py")


@pytest.mark.usefixtures("one_thread")
def test_quickstart_leaves_verified_graphs_and_trained_coordinates(
    quickstart: Any, tmp_path: Path
) -> None:
    errors = quickstart.main(tmp_path, steps=2)
    assert set(errors) == {"plain", "patched"}
    for name in errors:
        onnx.checker.check_model(onnx.load(tmp_path / f"{name}.onnx"))
    assert (tmp_path / "where_is_the_square.png").stat().st_size > 10_000
    fresh = timm.create_model("test_resnet", num_classes=2)
    loaded = ccp.load_coords(fresh, tmp_path / "coords.safetensors", check_base=False)
    # A fresh ResNet's residual branches end in batch norms of weight zero, frozen here.
    trained = {status.name for status in ccp.layer_status(loaded) if not status.is_zero}
    assert "conv1.0" in trained


def test_quickstart_targets_are_the_squares_centres(quickstart: Any) -> None:
    images, targets = quickstart.batch(64, seed=1)
    assert images.shape == (64, 3, 64, 64)
    bright = (images.mean(1) > 0.7).double()
    places = torch.arange(64.0).double() + 0.5
    mass = bright.sum((1, 2))
    x = (bright.sum(1) @ places) / mass / 64
    y = (bright.sum(2) @ places) / mass / 64
    torch.testing.assert_close(targets.double(), torch.stack([x, y], 1), rtol=0, atol=0.02)


def test_quickstart_is_as_short_as_it_says() -> None:
    text = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    assert "in 70 lines" in text
    assert len(text.splitlines()) <= 70
