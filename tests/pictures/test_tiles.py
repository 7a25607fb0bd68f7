"""Tiles that other libraries cut: no seam where the plain model has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from torch import Tensor, nn

import coordconv_patch as ccp

REACH = 3
"""Pixels beyond which an output does not depend on the input of :class:`Net`."""


class Net(nn.Module):
    def __init__(self, ndim: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        up = nn.ConvTranspose2d if ndim == 2 else nn.ConvTranspose3d
        self.first = conv(1, 6, 3, padding=1)
        self.down = conv(6, 6, 3, stride=2, padding=1)
        self.up = up(6, 6, 2, stride=2)
        self.last = conv(6, 2, 1)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return self.last(self.up(self.down(self.first(x).relu()).relu()).relu()) * gain


def patched(ndim: int = 2, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Net(ndim).eval(), "all", **arguments)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.3)
    return model


def border_ignored(*size: int) -> Tensor:
    """Weights of a window's pixels: next to none along an axis whose zero padding they see."""
    weights = torch.ones(size)
    for dim, length in enumerate(size):
        line = torch.full((length,), 1e-8)
        line[REACH:-REACH] = 1.0
        weights *= line.reshape([-1 if at == dim else 1 for at in range(len(size))])
    return weights


def difference(model: nn.Module, predictor: Any, images: Tensor, roi: Any, **options: Any) -> float:
    """Tiled less whole, the largest."""
    with torch.no_grad():
        tiled = sliding_window_inference(
            images, roi, 3, predictor, overlap=0.5, roi_weight_map=border_ignored(*roi), **options
        )
        return float((tiled - model(images)).abs().max())


@pytest.mark.parametrize("radius", [False, True])
def test_sliding_windows_equal_the_whole_picture(radius: bool) -> None:
    images = torch.randn(2, 1, 72, 104)
    model, roi = patched(coords=ccp.Coordinates(radius=radius)), (32, 40)
    plain = ccp.unpatch(model, discard=True)
    assert difference(plain, plain, images, roi) < 1e-5
    assert difference(model, model, images, roi) > 0.1  # each window as if it were a picture
    predictor = ccp.tile_predictor(model, images.shape[2:])
    assert difference(model, predictor, images, roi, with_coord=True) < 1e-5
    options = {"with_coord": True, "buffer_steps": 2, "buffer_dim": -1}
    assert difference(model, predictor, images, roi, **options) < 1e-5


def test_windows_of_volumes_equal_the_whole_volume() -> None:
    images, model = torch.randn(1, 1, 20, 24, 40), patched(3)
    predictor = ccp.tile_predictor(model, images.shape[2:])
    assert difference(model, model, images, (16, 24, 20)) > 0.1
    assert difference(model, predictor, images, (16, 24, 20), with_coord=True) < 1e-5


def test_pictures_smaller_than_a_window_are_where_the_padding_puts_them() -> None:
    """And further arguments reach the model."""
    images, model = torch.randn(2, 1, 19, 48), patched()
    inferer = SlidingWindowInferer((32, 48), sw_batch_size=2, with_coord=True)
    with torch.no_grad():
        output = inferer(images, ccp.tile_predictor(model, (19, 48)), 2.0)
        with ccp.places(model, ccp.Window((-6, 0), (32, 48), (19, 48))):
            expected = model(F.pad(images, (0, 0, 6, 7)), 2.0)[:, :, 6:25]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    images, model = torch.randn(1, 1, 64, 64), patched()
    predictor = ccp.tile_predictor(model, (64, 64))
    with pytest.raises(ccp.CoordinatesError, match=r"slices=None: .*with_coord=True\), which"):
        sliding_window_inference(images, (32, 32), 2, predictor)
    with pytest.raises(ccp.CoordinatesError, match="a window ends at 64 of 60 pixels: give the"):
        sliding_window_inference(
            images, (32, 32), 2, ccp.tile_predictor(model, (60, 64)), with_coord=True
        )
    with pytest.raises(ccp.CoordinatesError, match=r"of 2 dimensions in images of size \(64,\)"):
        sliding_window_inference(
            images, (32, 32), 2, ccp.tile_predictor(model, (64,)), with_coord=True
        )
    with pytest.raises(ccp.CoordinatesError, match="above 0"):
        ccp.tile_predictor(model, (0, 64))
    with pytest.raises(ccp.CoordinatesError, match=r"image_size=64: give images.shape\[2:\]"):
        ccp.tile_predictor(model, 64)  # type: ignore[arg-type]
    with pytest.raises(ccp.PatchError, match="is not patched"):
        ccp.tile_predictor(Net(), (64, 64))


@pytest.mark.parametrize("slices", [1, [0, 0, 0, 0], [slice(None)] * 4, "abcd"])
def test_what_is_not_slices_is_refused(slices: Any) -> None:
    predictor = ccp.tile_predictor(patched(), (16, 16))
    with pytest.raises(ccp.CoordinatesError, match=r"slices=.*with_coord=True"):
        predictor(torch.zeros(1, 1, 8, 8), [slices])
