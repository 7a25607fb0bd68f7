"""Quantization of a folded model: int8 weights and activations, and coordinates still right."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
