"""A rectangle that is the middle of a square sees the coordinates of that square."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_detectors import Masked, outputs_of, patched
from torch import Tensor, nn

import coordconv_patch as ccp

# Read when ultralytics is imported: no downloads, no installation of packages on the fly.
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")

from ultralytics import YOLO

PICTURE = torch.rand(2, 3, 384, 640, generator=torch.Generator().manual_seed(0))
SQUARE = F.pad(PICTURE, (0, 0, 128, 128), value=114 / 255)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def middle(output: Tensor) -> Tensor:
    """The rows of the first convolution that see the picture alone, at a stride of 2."""
    rows = output.shape[2]
    skipped = (rows - 192) // 2
    return output[:, :, skipped + 1 : skipped + 191]


def apart(model: nn.Module, first: nn.Module, call: Any = None) -> float:
    run = model if call is None else call
    (square,) = outputs_of(first, lambda: run(SQUARE))
    (rectangle,) = outputs_of(first, lambda: run(PICTURE))
    return float((middle(square) - middle(rectangle)).abs().max() / square.abs().max())


def test_yolo_sees_in_the_rectangle_what_it_sees_in_the_square() -> None:
    yolo = YOLO("yolo11n.yaml")
    plain = yolo.model.eval()
    assert apart(plain, plain.model[0].conv) == 0.0
    model = patched(plain, "model.0.conv")
    first = model.model[0].conv
    today = apart(model, first)
    assert today > 0.05
    assert ccp.follow_letterbox_(model) is model
    assert apart(model, first) < 1e-6
    assert apart(model, first, lambda x: model(x=x)) < 1e-6
    ccp.follow_letterbox_(model, False)
    assert apart(model, first) == today
    yolo.model = model
    ccp.follow_letterbox_(yolo)  # the object is called otherwise, and holds the network
    assert apart(model, first) < 1e-6
    model.fuse(verbose=False)  # as ultralytics' predictor does
    assert apart(model, model.model[0].conv) < 1e-5


def test_at_zero_weights_outputs_are_the_plain_ones() -> None:
    plain = Masked().eval()
    model = ccp.follow_letterbox_(ccp.patch(plain, "all"))
    assert torch.equal(model(PICTURE), plain(PICTURE))
    assert torch.equal(model.train()(PICTURE), plain(PICTURE))


def test_every_layer_equals_a_window_in_the_square() -> None:
    model = patched(Masked())
    windowed = ccp.set_window_(patched(Masked()), ccp.Window((128, 0), (384, 640), (640, 640)))
    windowed.load_state_dict(model.state_dict())
    ccp.follow_letterbox_(model)
    with torch.no_grad():
        torch.testing.assert_close(model(PICTURE), windowed(PICTURE), rtol=0, atol=1e-5)
        wide = PICTURE.mT.contiguous()
        ccp.set_window_(windowed, ccp.Window((0, 128), (640, 384), (640, 640)))
        torch.testing.assert_close(model(wide), windowed(wide), rtol=0, atol=1e-5)


def test_a_side_is_that_of_the_square_in_evaluation() -> None:
    """ultralytics validates a picture of 640 pixels in a rectangle of 672."""
    model = patched(Masked())
    trained = model.train()(SQUARE)
    whole = model.eval()(SQUARE)
    ccp.follow_letterbox_(model, side=640)
    grey = F.pad(PICTURE, (16, 16, 16, 16), value=114 / 255)
    (seen,) = outputs_of(model.first, lambda: model(grey))
    (square,) = outputs_of(model.first, lambda: model(SQUARE))
    torch.testing.assert_close(
        seen[:, :, 9:199, 9:327], square[:, :, 65:255, 1:319], rtol=0, atol=2e-6
    )
    torch.testing.assert_close(model(SQUARE), whole, rtol=0, atol=1e-5)
    larger = F.pad(SQUARE, (16, 16, 16, 16))
    with torch.no_grad():
        followed = model.train()(larger)  # multi-scale training: squares are whole
        expected = ccp.follow_letterbox_(model, False)(larger)
    torch.testing.assert_close(followed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(SQUARE), trained, rtol=0, atol=1e-5)


def test_a_batch_in_a_dict_and_calls_without_pictures() -> None:
    class Trains(Masked):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["img"] if isinstance(batch, dict) else batch)

    model = ccp.follow_letterbox_(patched(Trains()))
    assert torch.equal(model({"img": PICTURE, "cls": torch.zeros(3)}), model(PICTURE))
    with pytest.raises(ccp.PatchError, match=r"this call has none: .*follow_letterbox_\(model, Fa"):
        model(PICTURE[0])


@pytest.mark.parametrize("side", [0, -640, 640.0, "640", True])
def test_other_sides_are_refused(side: Any) -> None:
    with pytest.raises(ccp.ArgumentError, match="side="):
        ccp.follow_letterbox_(patched(Masked()), side=side)
    with pytest.raises(ccp.PatchError, match=r"follow_padding_\(model, False\)"):
        ccp.follow_letterbox_(ccp.follow_padding_(patched(Masked())))
