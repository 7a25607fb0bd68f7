"""Strides and the like as one integer for all dimensions, which torch convolves by as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.layers.geometry import ConvGeometry

NUMBERS: list[tuple[str, Any]] = [
    *(("stride", 2), ("stride", np.int64(2)), ("stride", (np.int32(2), 1)), ("stride", [2])),
    *(("dilation", 2), ("padding", 1), ("padding", np.int64(2)), ("kernel_size", 3)),
]


def conv(kind: type[nn.Module] = nn.Conv2d) -> Any:
    torch.manual_seed(0)
    return kind(2, 4, 3, padding=1)


def filled(model: nn.Module) -> Any:
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_()
    return model


def assert_right(model: Any, x: Tensor) -> None:
    """The layer convolves image and grid, both in one, by the numbers that it has."""
    layer = model[0]
    joined = torch.cat((x, reference.paper_grid(x.shape[2:]).to(x)[None].expand(2, -1, -1, -1)), 1)
    geometry = ConvGeometry.of(layer)
    numbers = (geometry.stride, geometry.padding)
    if layer.transposed:
        weight = torch.cat((layer.weight, layer.coord_weight))
        more = (geometry.output_padding, 1, geometry.dilation)
        want = F.conv_transpose2d(joined, weight, layer.bias, *numbers, *more)
    else:
        weight = torch.cat((layer.weight, layer.coord_weight), 1)
        want = F.conv2d(joined, weight, layer.bias, *numbers, geometry.dilation)  # type: ignore[arg-type]
    for with_gradients in (True, False, False):
        with torch.set_grad_enabled(with_gradients):
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_before_patching(name: str, value: Any, tmp_path: Path) -> None:
    plain, x = nn.Sequential(conv()), torch.randn(2, 2, 9, 10)
    setattr(plain[0], name, value)
    want = plain(x)
    assert "1 of 1 sites" in ccp.plan(plain, "all", example_inputs=x).summary()
    model = ccp.patch(plain, "all", example_inputs=x)
    assert torch.equal(model(x), want)
    assert_right(filled(model), x)
    file = ccp.save_coords(model, tmp_path / "coords.safetensors")
    assert torch.equal(ccp.load_coords(plain, file)(x), model(x))
    assert torch.equal(ccp.unpatch(model, discard=True)(x), want)


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_after_patching(name: str, value: Any) -> None:
    model, x = filled(ccp.patch(nn.Sequential(conv()), "all")), torch.randn(2, 2, 9, 10)
    assert_right(model, x)
    setattr(model[0], name, value)
    assert_right(model, x)
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("after", [False, True])
def test_transposed_convolutions(after: bool) -> None:
    plain, x = nn.Sequential(conv(nn.ConvTranspose2d)), torch.randn(2, 2, 5, 6)
    model: Any = filled(ccp.patch(plain, "all")) if after else plain
    for name, value in (("stride", 3), ("dilation", 2), ("padding", np.int64(0))):
        setattr(model[0], name, value)
    model[0].output_padding = 1
    assert_right(model if after else filled(ccp.patch(model, "all")), x)


def test_other_modes_and_chosen_calls() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"))
    plain[0].stride = plain[0].padding = 1  # type: ignore[assignment]
    x = torch.randn(1, 2, 6, 6)
    model = filled(ccp.patch(plain, "all"))
    grid = reference.paper_grid((6, 6)).to(x)[None]
    joined = F.pad(torch.cat((x, grid), 1), (1, 1, 1, 1), mode="circular")
    weight = torch.cat((model[0].weight, model[0].coord_weight), 1)
    torch.testing.assert_close(model(x), F.conv2d(joined, weight, model[0].bias))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.conv.stride = self.conv.kernel_size = 1  # type: ignore[assignment]
            self.conv.kernel_size = 3  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    twice = Twice()
    chosen = ccp.patch(twice, "conv@1", example_inputs=x)
    assert torch.equal(chosen(x), twice(x))
