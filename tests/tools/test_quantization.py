"""Quantization of a folded model: int8 weights and activations, and coordinates still right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import coordconv_patch as ccp


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def patched(images: Tensor) -> nn.Module:
    """A ResNet-18 with statistics of these images and non-zero coordinate weights."""
    torch.manual_seed(0)
    model = ccp.patch(timm.create_model("resnet18", num_classes=50), "all")
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(0, 0.05)
        model.train()
        for _ in range(30):
            model(images)
    return model.eval()


def static_int8(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Weights and activations in int8, calibrated on the images (PyTorch 2 export)."""
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    prepared(images)
    converted: nn.Module = convert_pt2e(prepared)
    assert any("quantize" in str(node.target) for node in converted.graph.nodes)  # type: ignore[union-attr]
    return converted


def weight_only_int8(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """torchao's own: linear layers' weights in int8; convolutions stay as they are."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8WeightOnlyConfig())
    return quantized


@pytest.mark.parametrize("quantized", [static_int8, weight_only_int8])
@torch.no_grad()
def test_coordinates_do_in_int8_what_they_do_in_float(
    quantized: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]],
    patched: nn.Module,
    images: Tensor,
) -> None:
    folded, plain = ccp.fold(patched), ccp.fold(ccp.unpatch(patched, discard=True))
    exact, without = folded(images), plain(images)
    effect = exact - without
    assert float(effect.norm()) > 0.2 * float(exact.norm())
    in_int8 = quantized(folded, images)(images)
    error = float((in_int8 - exact).norm() / exact.norm())
    plain_error = float((quantized(plain, images)(images) - without).norm() / without.norm())
    assert 0 < error < max(2 * plain_error, 0.02)
    assert error < 0.2 * float(effect.norm() / exact.norm())


class Small(nn.Module):
    """A strided stem, a residual of a depthwise and a 1 x 1 convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 24, 3)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.pointwise(self.depthwise(x).relu())).relu()
        return self.fc(self.head(x).relu().mean((2, 3)))


def quantizer_of_the_page() -> Any:
    page = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
    (block,) = [part for part in page.split("```python")[1:] if "class FloatCoordinates" in part]
    names: dict[str, Any] = {"torch": torch}
    exec(block.split("\nquantizer = ")[0], names)
    return names["Quantizer"]()


def quantized_convs(graph: torch.fx.Graph) -> tuple[list[bool], list[bool]]:
    """Whether each convolution is quantized: the main ones, and those of coordinates."""
    main: list[bool] = []
    coords: list[bool] = []
    reached: set[Any] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
        if node.target is torch.ops.aten.conv2d.default:
            operands = ["dequantize" in str(each.target) for each in node.args[:2]]
            if node.args[0] in reached:
                main.append(all(operands))
            else:
                coords.append(any(operands))
    return main, coords


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_the_pages_quantizer_quantizes_the_main_convolutions_only(strict: bool) -> None:
    torch.manual_seed(0)
    patched, x = ccp.patch(Small(), "all"), torch.rand(8, 3, 24, 20)
    for weight in ccp.coord_parameters(patched):
        weight.normal_(0, 0.2)
    for _ in range(30):
        patched(x)
    plain = ccp.unpatch(patched.eval(), discard=True)
    errors = []
    for model in (plain, ccp.fold(patched)):
        exported = torch.export.export(model, (x,), strict=strict).module()
        quantizer = quantizer_of_the_page()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        prepared(x)
        converted: Any = convert_pt2e(prepared)
        main, coords = quantized_convs(converted.graph)
        assert main == [True] * 4
        assert coords == [False] * (0 if model is plain else 4)
        expected = model(x)
        errors.append(float((converted(x) - expected).norm() / expected.norm()))
    assert 0 < errors[1] < 3 * errors[0]
    assert float((patched(x) - plain(x)).norm() / patched(x).norm()) > 10 * errors[1]
