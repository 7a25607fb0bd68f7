"""Patched models as plain torch modules that concatenate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import coordconv_ports as ports
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn

import coordconv_patch as ccp

COORDS = {
    "paper": ccp.Coordinates(),
    "edges, y first, r": ccp.Coordinates(
        order="yx", align_corners=False, value_range=(0, 1), radius=True
    ),
    "mkocabas": ccp.Coordinates.preset("mkocabas", radius=True),
    "reference": ccp.Coordinates.preset("reference"),
    "waves": ccp.Coordinates(fourier=3),
    "blocks": ccp.Coordinates(
        channels=(
            ccp.Radius(normalized=True),
            ccp.Axes("y", (0.0, 1.0), "left edges"),
            ccp.Fourier("x", centring="edges"),
        )
    ),
    "a window": ccp.Coordinates(
        window=ccp.Window(offset=(4, 8), size=(16, 16), image_size=(64, 32))
    ),
}


def patched(coords: ccp.Coordinates | str = "paper") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, 2, 1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, bias=False),
        nn.Conv2d(6, 4, (3, 1), dilation=2, padding="same"),
        ScaledStdConv2d(4, 4, 3),
    )
    model = ccp.patch(model.eval(), "all", coords=coords)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    return model


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    with torch.no_grad():
        for size in ((9, 13), (16, 11), (1, 24)):
            x = torch.randn(2, 3, *size) if size[0] > 1 else torch.randn(2, 3, 7, 24)
            expected = model(x)
            assert (plain(x) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", COORDS)
def test_the_outputs_are_the_same(name: str) -> None:
    model = patched(COORDS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_same(model, ccp.to_concatenated(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_modules_are_torchs_and_the_weights_are_concatenated() -> None:
    model = patched()
    plain = ccp.to_concatenated(model)
    assert not any("Coord" in type(module).__mro__[0].__name__ for module in (plain[0].conv,))
    assert type(plain[0].conv) is nn.Conv2d
    assert torch.equal(plain[0].conv.weight, model[0].concatenated_weight())
    assert type(plain[4].conv) is nn.ConvTranspose2d
    assert plain[4].conv.in_channels == 10
    # Neither a grouped convolution nor a standardised weight has that form: a sum of two.
    assert type(plain[2].conv) is nn.Conv2d
    assert plain[2].conv.groups == 4
    assert torch.equal(plain[2].coord_conv.weight, model[2].coord_weight)
    assert type(plain[6].conv) is ScaledStdConv2d
    single = ccp.patch(nn.Conv2d(3, 4, 3), "all")
    assert type(ccp.to_concatenated(single)) is nn.Sequential


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_dtype(dtype: torch.dtype) -> None:
    model = patched().to(dtype)
    plain = ccp.to_concatenated(model)
    x = torch.randn(2, 3, 9, 13).to(dtype)
    with torch.no_grad():
        expected = model(x)
        got = plain(x)
    assert got.dtype is dtype
    tolerance = 1e-6 if dtype is torch.float64 else 5e-2
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


def test_it_is_unpickled_where_this_package_is_not(tmp_path: Path) -> None:
    model = patched()
    x = torch.randn(1, 3, 10, 12)
    with torch.no_grad():
        torch.save((ccp.to_concatenated(model), x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['coordconv_patch'] = None; import torch\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert (model(x) - y).abs().max() < 1e-6 * y.abs().max()\n"
        "bigger = model(torch.randn(2, 3, 20, 14))\n"
        "print(tuple(bigger.shape), [name for name in sys.modules if 'coordconv' in name])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip().endswith("['coordconv_patch']"), ran.stderr


def test_a_graph_that_does_not_give_the_convention_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: plain(x, dim) * 2)
    with pytest.raises(ccp.PatchError, match="cannot be written as plain torch operations"):
        ccp.to_concatenated(ccp.patch(nn.Conv2d(3, 4, 3), "all"))


def test_there_and_back_again() -> None:
    model = patched("mkocabas")
    report = ccp.import_coordconv(ccp.to_concatenated(model), torch.randn(2, 3, 16, 23))
    again = {site.name: site.coords for site in report.sites}
    # The sums of two convolutions are as they were written, and have nothing to import.
    assert again == dict.fromkeys(("0", "4", "5"), ccp.Coordinates.preset("mkocabas"))
    assert torch.equal(report.model[0].coord_weight, model[0].coord_weight)
    assert_same(model, report.model)


def test_a_port_and_its_import_and_its_plain_form() -> None:
    port = nn.Sequential(ports.MkocabasCoordConv(3, 4, True, kernel_size=3)).eval()
    plain = ccp.to_concatenated(ccp.import_coordconv(port).model)
    weight = plain[0].conv.weight
    assert torch.equal(weight, port[0].conv.weight)
    assert_same(port, plain)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def hooked() -> nn.Module:
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3)), "all")
    model[0].register_forward_hook(lambda *_: None)
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    return ccp.patch(model, "all")


REFUSED: dict[str, tuple[Any, str]] = {
    "functions": (
        lambda: ccp.patch(Functional(), "all", example_inputs=torch.zeros(1, 3, 8, 8)),
        "has coordinates at a convolution function",
    ),
    "own padding": (
        lambda: ccp.patch(nn.Sequential(Conv2dSame(3, 4, 3, stride=2)), "all"),
        "0 pads in the forward of Conv2dSame",
    ),
    "hooks": (hooked, "0 has hooks"),
    "parametrized": (parametrized, "0 is parametrized or pruned"),
    "not patched": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "not patched"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_plain_form_is_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ccp.PatchError) as raised:
        ccp.to_concatenated(make())
    assert message in str(raised.value)
