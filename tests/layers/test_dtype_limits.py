"""Coordinates that float16 has no room for are refused: 0 * inf would change what a model gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import coordconv_patch as ccp
from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.channels.registry import BLOCKS
from coordconv_patch.errors import CoordinatesError
from coordconv_patch.layers import dtype_limits
from coordconv_patch.layers.dtype_limits import fitted

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = ccp.Coordinates(channels=(ccp.Axes(centring="pixels"),))
SLIDE = ccp.Window((90_000, 90_000), (8, 8), (100_000, 100_000))
LARGE = {
    "range": ccp.Coordinates(value_range=(0, 1e5)),
    "block range": ccp.Coordinates(channels=(ccp.Axes("y", value_range=(-1e5, 0)),)),
    "far window": ccp.Coordinates(window=ccp.Window((10**6, 0), (4, 4), (8, 8))),
    "pixels of a slide": ccp.Coordinates(channels=PIXELS.channels, window=SLIDE),
    "radius": ccp.Coordinates(radius=True, radius_center=1e6),
    "radius block": ccp.Coordinates(channels=(ccp.Radius(center=(1e5, 0.0)),)),
    "fourier beside": ccp.Coordinates(fourier=2, value_range=(0, 7e4)),
    "scrambled": ccp.Coordinates(channels=(ccp.Axes(value_range=(0.0, 1e5)),), scrambled=3),
}


def one_conv(coords: ccp.Coordinates) -> nn.Module:
    torch.manual_seed(0)
    return ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval(), "all", coords=coords)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("name", LARGE)
def test_half_model_refuses_coordinates_beyond_float16(name: str, image: Tensor) -> None:
    model = one_conv(LARGE[name])
    assert model(image).isfinite().all()
    with pytest.raises(CoordinatesError, match=r"^0 gets an input of 8 x 8 pixels.*float16 ends"):
        copy.deepcopy(model).half()(image.half())


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_is_a_dtype_too(name: str, grad: bool, image: Tensor) -> None:
    model = one_conv(LARGE[name])
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(image).isfinite().all()
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(CoordinatesError, match=r"float16 ends at 65504"),
        ):
            model(image)


def test_long_signals_count_pixels_up_to_the_largest_float16() -> None:
    model = ccp.patch(nn.Sequential(nn.Conv1d(1, 2, 1)), "all", coords=PIXELS)
    plain = ccp.unpatch(model)
    fits, beyond = torch.rand(1, 1, 65_520), torch.rand(1, 1, 65_521)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(model(fits), plain(fits))
        with pytest.raises(CoordinatesError, match="largest coordinate is 65520"):
            model(beyond)


def test_a_functional_convolution_names_its_site(image: Tensor) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.rand(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.w)

    model = ccp.patch(Functional(), "all", coords=LARGE["range"], example_inputs=image)
    with torch.autocast("cpu", torch.float16), pytest.raises(CoordinatesError, match="float16"):
        model(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_dtypes_hold_every_coordinate(dtype: torch.dtype, image: Tensor) -> None:
    coords = ccp.Coordinates(value_range=(-1e18, 1e18), radius=True)
    model = one_conv(coords).to(dtype)
    assert torch.equal(model(image.to(dtype)), ccp.unpatch(model)(image.to(dtype)))


def test_grids_are_refused_by_themselves() -> None:
    assert LARGE["range"].grid((2, 2)).max() == 1e5
    with pytest.raises(CoordinatesError, match="largest coordinate is 100000"):
        LARGE["range"].grid((2, 2), dtype=torch.float16)


@pytest.mark.parametrize("half", [True, False])
def test_placed_samples_are_refused(half: bool, image: Tensor) -> None:
    model = one_conv(PIXELS)
    model, x = (model.half(), image.half()) if half else (model, image)
    with (
        torch.autocast("cpu", torch.float16, enabled=not half),
        ccp.places(model, SLIDE),
        pytest.raises(CoordinatesError, match=r"^0 gets samples with places or maps.*float16 ends"),
    ):
        model(x)


def test_given_maps_are_refused(image: Tensor) -> None:
    model = one_conv(ccp.Coordinates(channels=(ccp.Given("depth"),)))
    with torch.autocast("cpu", torch.float16):
        with ccp.maps(model, depth=torch.full((2, 1, 8, 8), 6e4)):
            assert torch.equal(model(image), ccp.unpatch(model)(image))
        with (
            ccp.maps(model, depth=torch.full((2, 1, 8, 8), 7e4)),
            pytest.raises(CoordinatesError, match="largest coordinate is 70000"),
        ):
            model(image)


def test_what_was_computed_before_autocast_is_looked_at_again(image: Tensor) -> None:
    model = one_conv(PIXELS)
    with ccp.places(model, SLIDE), torch.no_grad():
        assert model(image).isfinite().all()
        with torch.autocast("cpu", torch.float16), pytest.raises(CoordinatesError):
            model(image)


def test_a_block_of_ones_own_is_refused(monkeypatch: pytest.MonkeyPatch, image: Tensor) -> None:
    @dataclass(frozen=True)
    class Bump(ccp.ChannelBlock):
        """Large in the middle only, where no corner tells it."""

        kind: ClassVar[str] = "bump"

        def names(self, ndim: int) -> tuple[str, ...]:
            return ("bump",)

        def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
            return [1e5 * (-(positions[0].index - 4).square() - positions[1].index).exp()]

    monkeypatch.setitem(BLOCKS, "bump", Bump)
    model = one_conv(ccp.Coordinates(channels=(Bump(),))).half()
    with pytest.raises(CoordinatesError, match="largest coordinate is 100000"):
        model(image.half())


def test_the_largest_coordinate_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, image: Tensor
) -> None:
    model = one_conv(ccp.Coordinates(value_range=(-0.25, 0.25))).half()
    computed: list[tuple[int, ...]] = []
    compute = dtype_limits._compute_largest

    def counting(coords: ccp.Coordinates, size: tuple[int, ...]) -> float:
        computed.append(size)
        return compute(coords, size)

    monkeypatch.setattr(dtype_limits, "_compute_largest", counting)
    for _ in range(3):
        model(image.half())
    assert computed == [(8, 8)]


def test_modes_of_torch_do_not_hide_the_coordinates(image: Tensor) -> None:
    model = one_conv(ccp.Coordinates(value_range=(0, 1.5e5))).half()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(CoordinatesError, match="largest coordinate is 150000"),
    ):
        model(torch.empty(1, 3, 8, 8, dtype=torch.float16))
    with pytest.raises(CoordinatesError, match="largest coordinate is 150000"):
        torch.vmap(lambda x: model(x))(image.half().unsqueeze(1))
    with pytest.raises(CoordinatesError, match="largest coordinate is 150000"):
        torch.export.export(model, (image.half(),), strict=False)


@pytest.mark.parametrize("name", ["range", "pixels of a slide"])
def test_compiled_code_keeps_the_outputs_of_zero_weights(name: str, image: Tensor) -> None:
    model = one_conv(LARGE[name])
    plain = ccp.unpatch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(compiled(image), plain(image))
        with ccp.places(one_conv(PIXELS), SLIDE):
            assert compiled(image).isfinite().all()
    half = torch.compile(copy.deepcopy(model).half(), backend="eager", fullgraph=True)
    assert torch.equal(half(image.half()), copy.deepcopy(plain).half()(image.half()))


def test_where_nobody_can_look_values_are_limited() -> None:
    (channel,) = fitted([torch.zeros(2, device="meta")], torch.float16, "conv")
    assert channel.is_meta  # that nothing was read of it
    values = torch.tensor([1e6, -1e6, 3.0])
    assert dtype_limits._within_limits(values, torch.float16).tolist() == [65504, -65504, 3]
