"""The rule of ``lowering="auto"``: which form a site gets, for which axes and provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_graphs import CPU, optimized_operators
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError
from coordconv_patch.export.auto_lowering import MAX_GROWTH, Chooser, check_lowering
from coordconv_patch.lowering.lower import lower_
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite, lowering_sites

GPU = "CUDAExecutionProvider"
RADIUS = ccp.Coordinates(radius=True)


def site_of(
    conv: nn.Module, size: tuple[int, int] = (32, 48), coords: ccp.Coordinates | None = None
) -> LoweringSite:
    model = ccp.patch(nn.Sequential(conv).eval(), "all", coords=coords or ccp.Coordinates())
    (site,) = lowering_sites(model, torch.zeros(1, conv.in_channels, *size))
    return site


def chosen(site: LoweringSite, provider: str = CPU[0], **options: Any) -> str:
    return Chooser(provider, **({"dynamic_size": False} | options))(site)


@pytest.mark.parametrize(
    ("conv", "numbers", "form"),
    [
        (nn.Conv2d(2, 4, 1), (2, 2), "branch"),
        (nn.Conv2d(2, 4, 3, padding=1), (18, 7), "separable"),
        (nn.Conv2d(2, 4, 3, padding=1, stride=2), (18, 5), "separable"),
        (nn.Conv2d(2, 4, 5, padding=2), (50, 12), "separable"),
        (nn.Conv2d(2, 4, 7, padding=3, stride=2), (98, 10), "separable"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (18, 7), "separable"),
        (nn.ConvTranspose2d(2, 4, 2, stride=2), (8, 8), "branch"),
        (nn.ConvTranspose2d(2, 4, 4, stride=2, padding=1), (32, 32), "branch"),
    ],
)
def test_on_the_cpu_the_form_with_fewer_multiplications(
    conv: nn.Module, numbers: tuple[int, int], form: str
) -> None:
    site = site_of(conv)
    assert (site.num_taps, site.num_images) == numbers
    assert chosen(site) == form


def test_on_the_cpu_a_radius_is_a_branch() -> None:
    assert chosen(site_of(nn.Conv2d(2, 4, 3), coords=RADIUS)) == "branch"


@pytest.mark.parametrize("provider", [CPU[0], GPU])
def test_dynamic_sizes_are_computed_everywhere(provider: str) -> None:
    assert chosen(site_of(nn.Conv2d(2, 4, 3)), provider, dynamic_size=True) == "computed"


def test_a_map_that_is_stored_as_vectors_costs_no_budget() -> None:
    site = site_of(nn.Conv2d(2, 4, 3))
    choose = Chooser(GPU, False, map_budget=0)
    assert choose(site) == "map"
    assert choose.map_budget == 0


def test_whole_maps_are_stored_until_the_budget_is_spent() -> None:
    site = site_of(nn.Conv2d(2, 4, 3, padding=1), (8, 10), RADIUS)
    assert site.map_bytes == 4 * 8 * 10 * 4
    choose = Chooser(GPU, False, map_budget=2.5 * site.map_bytes)
    assert [choose(site) for _ in range(4)] == ["map", "map", "branch", "branch"]
    assert choose.map_budget == pytest.approx(0.5 * site.map_bytes)


def test_a_large_map_leaves_the_budget_to_smaller_ones() -> None:
    small, large = (site_of(nn.Conv2d(2, 4, 1), (n, n), RADIUS) for n in (4, 16))
    choose = Chooser(GPU, False, map_budget=small.map_bytes)
    assert [choose(large), choose(small)] == ["branch", "map"]


def test_a_map_of_several_sizes_counts_them_all() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = nn.functional.avg_pool2d(x, 2)
            return self.conv(x).mean((2, 3)) + self.conv(small).mean((2, 3))

    model = ccp.patch(Pyramid().eval(), "all")
    (site,) = lowering_sites(model, torch.zeros(1, 3, 8, 12))
    assert site.map_bytes == 3 * (8 * 12 + 4 * 6) * 4
    assert site.num_images == 8  # at 4 x 6; 7 at 8 x 12


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_auto_adds_at_most_its_share_to_the_file(dynamic_batch: bool, tmp_path: Path) -> None:
    """Many pixels in a model of few weights: whole maps would be most of the file."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    plain = nn.Sequential(*layers).eval()
    model = ccp.patch(plain, "all", coords=ccp.Coordinates())
    weights = sum(t.numel() * t.element_size() for t in model.parameters())
    report = ccp.export_onnx(
        model,
        tmp_path / "m.onnx",
        torch.randn(1, 3, 64, 64),
        dynamic_batch=dynamic_batch,
        exporter="torchscript",
        providers=CPU,
    )
    maps = 2 * 64 * 64 * 64 * 4
    assert maps > 10 * weights
    # Vectors and weights of maps; nothing like a map.
    assert report.coord_constant_bytes < 0.1 * weights
    stored = [len(t.raw_data) for t in onnx.load(report.path).graph.initializer]
    assert max(stored) <= max(t.numel() * t.element_size() for t in model.parameters())
    assert MAX_GROWTH == 0.01


# --- inputs of one pixel ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1])
def test_on_one_pixel_the_papers_coordinates_are_zero_and_the_branch_is_left_out(
    padding: int, mode: str
) -> None:
    kernel = 1 + 2 * padding
    conv = nn.Conv2d(2, 4, kernel, padding=padding, padding_mode=mode)
    assert site_of(conv, (1, 1)).is_zero
    assert not site_of(conv, (1, 2)).is_zero
    model = ccp.patch(nn.Sequential(conv).eval(), "all")
    with torch.no_grad():
        model[0].coord_weight.normal_()
    x = torch.randn(2, 2, 1, 1)
    expected = model(x)
    result = lower_(model, x, lambda site: "branch")
    assert result.lowerings == {"0": "none"}
    assert result.constants == ()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "coords",
    [
        ccp.Coordinates(value_range=(0.0, 1.0)),  # one half
        ccp.Coordinates(radius=True, radius_center=0.5),
        ccp.Coordinates(fourier=1),  # cos(0) = 1
        ccp.Coordinates(window=ccp.Window((3, 4), (1, 1), (8, 8))),
    ],
)
def test_coordinates_of_one_pixel_that_are_not_zero_are_kept(coords: ccp.Coordinates) -> None:
    conv = nn.Conv2d(2, 4, 1)
    assert not site_of(conv, (1, 1), coords).is_zero
    model = ccp.patch(nn.Sequential(conv).eval(), "all", coords=coords)
    with torch.no_grad():
        model[0].coord_weight.normal_()
    x = torch.randn(2, 2, 1, 1)
    expected = model(x)
    result = lower_(model, x, lambda site: "branch")
    assert result.lowerings == {"0": "branch"}
    torch.testing.assert_close(model(x), expected)
    assert not torch.equal(model(x), nn.functional.conv2d(x, conv.weight, conv.bias))


class OnePixel(nn.Module):
    """A functional convolution of pooled features, as in a squeeze-excite block."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x.mean((2, 3), keepdim=True), self.kernel).sigmoid()


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_functional_convolution_on_one_pixel_is_the_plain_one(
    exporter: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = ccp.patch(OnePixel().eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    report = ccp.export_onnx(
        model, tmp_path / "m.onnx", torch.randn(2, 3, 4, 5), exporter=exporter, providers=CPU
    )
    assert set(report.lowerings.values()) == {"none"}
    assert report.nodes["Conv"] == 1
    assert "Add" not in optimized_operators(report.path)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dynamic_size", [False, True])
def test_each_lowering_has_its_axes(lowering: str, dynamic_size: bool) -> None:
    if (lowering == "computed") == dynamic_size:
        check_lowering(lowering, dynamic_size)
    else:
        hint = "computed" if dynamic_size else "dynamic_size=True"
        with pytest.raises(ArgumentError, match=hint):
            check_lowering(lowering, dynamic_size)


def test_a_name_that_is_none_is_answered_with_all_of_them() -> None:
    with pytest.raises(ArgumentError) as caught:
        check_lowering("maps", False)
    assert all(repr(name) in str(caught.value) for name in ("auto", *LOWERINGS))
