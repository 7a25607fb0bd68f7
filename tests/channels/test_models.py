"""Models whose coordinates are blocks: layers, files, exports and compiled graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import channels_reference as reference
import numpy as np
import onnxruntime
import pytest
import reference as conv_reference
import torch
from test_blocks import channels_of
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch import Axes, Coordinates, Fourier, Radius

CONVENTIONS: dict[str, tuple[ccp.ChannelBlock, ...]] = {
    "sky": (Axes("y", (1.0, -1.0)),),
    "ring": (Axes("y"), Fourier("x", octaves=2, centring="edges")),
    "pixels": (Axes("yx", centring="pixels"),),
    "left edges": (Axes(value_range=(0.0, 1.0), centring="left edges"),),
    "face": (Axes("yx"), Radius(normalized=True)),
    "corner": (Radius(center=(-1.0, 1.0), axes="xy"),),
}
SEPARABLE = ["sky", "ring", "pixels", "left edges"]
LOWERINGS = ["channels", "map", "branch", "separable"]

conventions = pytest.mark.parametrize("name", CONVENTIONS)


def grid_of(name: str, size: tuple[int, ...]) -> Tensor:
    channels = [channel for block in CONVENTIONS[name] for channel in channels_of(block, len(size))]
    return torch.from_numpy(reference.grid(channels, size))


class Net(nn.Module):
    """A stem with stride, a padded convolution with another padding mode, a 1x1 head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.body = nn.Conv2d(6, 4, (3, 2), padding=1, padding_mode="replicate")
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).relu())


def patched(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Net().eval(), "all", coords=Coordinates(channels=CONVENTIONS[name]))
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.3)
    return model


def image() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 9, 14)


def concatenated(name: str, model: Any, x: Tensor) -> Tensor:
    """The model's output by convolutions of concatenated coordinates."""
    for layer in (model.stem, model.body, model.head):
        x = conv_reference.concatenating_conv(
            x,
            grid_of(name, tuple(x.shape[2:])),
            layer.weight.double(),
            layer.coord_weight.double(),
            layer.bias.double(),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
        x = x if layer is model.head else x.relu()
    return x


@conventions
def test_patched_at_zero_nothing_changes(name: str) -> None:
    torch.manual_seed(0)
    plain, x = Net().eval(), image()
    model = ccp.patch(plain, "all", coords=Coordinates(channels=CONVENTIONS[name]))
    assert torch.equal(model(x), plain(x))


@conventions
def test_outputs_are_those_of_concatenated_coordinates(name: str) -> None:
    model, x = patched(name), image()
    expected = concatenated(name, model, x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(7,), (1,), (1, 6), (3, 4, 5)])
@pytest.mark.parametrize("channels", [(Axes("x", centring="edges"), Fourier()), (Radius(),)])
def test_layers_of_other_dimensions(
    size: tuple[int, ...], channels: tuple[ccp.ChannelBlock, ...]
) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    layer_class: Any = (ccp.CoordConv1d, ccp.CoordConv2d, ccp.CoordConv3d)[ndim - 1]
    layer = layer_class(2, 3, 3, padding=1, coords=Coordinates(channels=channels)).double()
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    pixel_channels = [channel for block in channels for channel in channels_of(block, ndim)]
    expected = conv_reference.concatenating_conv(
        x,
        torch.from_numpy(reference.grid(pixel_channels, size)),
        layer.weight,
        layer.coord_weight,
        layer.bias,
        stride=(1,) * ndim,
        padding=(1,) * ndim,
        dilation=(1,) * ndim,
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["ring", "face"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_files_have_every_convention_in_every_form(
    name: str, lowering: str, tmp_path: Path
) -> None:
    model, x = patched(name), image()
    options: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "lowering": lowering}
    if lowering == "separable" and name not in SEPARABLE:
        with pytest.raises(ccp.ExportError, match=r"Radius\(.*do not each depend on one axis"):
            ccp.export_onnx(model, tmp_path / "m.onnx", x, **options)
        return
    report = ccp.export_onnx(model, tmp_path / "m.onnx", x, **options)
    assert set(report.lowerings.values()) == {lowering}
    session = onnxruntime.InferenceSession(report.path, providers=options["providers"])
    (values,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = concatenated(name, model, x.double()).detach().numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pixels", "face"])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_files_of_dynamic_sizes(name: str, exporter: str, tmp_path: Path) -> None:
    model, x = patched(name), image()
    options: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "exporter": exporter}
    report = ccp.export_onnx(model, tmp_path / "m.onnx", x, dynamic_size=True, **options)
    session = onnxruntime.InferenceSession(report.path, providers=options["providers"])
    other = torch.randn(2, 3, 12, 7)
    (values,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    expected = concatenated(name, model, other.double()).detach().numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


@conventions
def test_saved_weights_come_back(name: str, tmp_path: Path) -> None:
    model, x = patched(name), image()
    ccp.save_coords(model, tmp_path / "c.safetensors")
    torch.manual_seed(0)
    loaded = ccp.load_coords(Net().eval(), tmp_path / "c.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert ccp.layer_status(loaded)[0].channels == ccp.layer_status(model)[0].channels
    torch.manual_seed(0)
    other = ccp.patch(Net().eval(), "all")
    with pytest.raises(ccp.WeightsError, match=r"uses coordinates \((Axes|Radius)"):
        ccp.load_coords_(other, tmp_path / "c.safetensors")


@conventions
def test_exported_programs_tell_the_blocks(name: str, tmp_path: Path) -> None:
    model, x = patched(name), image()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    restored = ccp.from_exported(torch.export.load(tmp_path / "m.pt2"))
    coords = {status.channels for status in ccp.layer_status(restored)}
    assert coords == {Coordinates(channels=CONVENTIONS[name]).channel_names(2)}
    torch.testing.assert_close(restored(x), model(x), rtol=1e-5, atol=1e-5)


@conventions
def test_compiled_inference_of_one_image(name: str) -> None:
    """Where each channel depends on one axis, the map is summed from lines."""
    model, x = patched(name), image()[:1]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-5, atol=1e-5)
    assert Coordinates(channels=CONVENTIONS[name]).is_separable(2) is (name in SEPARABLE)


def test_windows_are_set_beside_channels() -> None:
    model, x = patched("face"), image()
    window = ccp.Window(offset=(4, 2), size=(9, 14), image_size=(40, 40))
    before = model(x)
    ccp.set_window_(model, window)
    assert not torch.equal(model(x), before)
    ccp.set_window_(model, None)
    assert torch.equal(model(x), before)


def test_a_plan_says_which_channels() -> None:
    coords = Coordinates(channels=CONVENTIONS["ring"])
    plan = ccp.plan(nn.Conv2d(3, 4, 1), "all", coords=coords, example_inputs=torch.ones(1, 3, 1, 1))
    assert "(Axes(axes='y'), Fourier(axes='x', octaves=2, centring='edges'))" in str(plan)
    assert [row.note for row in plan.rows] == ["its input is one pixel"]  # where cos is 1
    assert plan.rows[0].parameters == 5 * 4


def test_axes_that_a_convolution_does_not_have() -> None:
    model, coords = nn.Sequential(nn.Conv2d(3, 4, 1)), Coordinates(channels=(Axes("z"),))
    with pytest.raises(ccp.CoordinatesError, match="0: axes='z' has 'z'"):
        ccp.patch_(model, "all", coords=coords)
    assert type(model[0]) is nn.Conv2d
