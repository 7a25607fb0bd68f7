"""Weights that a module keeps as mere attributes, neither Parameters nor buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from function_owners import Owner, concatenated, fill_
from torch import Tensor, nn
from torch.nn.utils import prune

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError
from coordconv_patch.layers.coord_layer import coord_layers


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))


def attribute() -> nn.Module:
    owner = Owner()
    weight = owner.w.detach()
    del owner.w
    owner.w = weight
    return owner


def pruned() -> nn.Module:
    return prune.l1_unstructured(Owner(), "w", 0.5)


def normed() -> nn.Module:
    return nn.utils.weight_norm(Owner(), "w")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:a trace never reads")
@pytest.mark.parametrize("make", [attribute, pruned, normed])
@pytest.mark.parametrize("example_inputs", [False, True], ids=["trace", "run"])
def test_one_convolution_is_one_site(
    make: Callable[[], nn.Module], example_inputs: bool, x: Tensor
) -> None:
    model = make()
    plain = model(x)
    ccp.patch_(model, "all", example_inputs=x if example_inputs else None)
    assert torch.equal(model(x), plain)
    (weight,) = ccp.coord_parameters(fill_(model))
    torch.testing.assert_close(model(x), concatenated(x, model.w, weight))


@pytest.mark.parametrize("check", [True, False])
def test_it_is_not_patched_twice_by_two_names(check: bool, x: Tensor) -> None:
    patched = ccp.patch(attribute(), "all")
    assert list(coord_layers(patched)) == ["w"]
    with pytest.raises(SelectionError, match="already patched: w"):
        ccp.patch(patched, "all", example_inputs=x, check=check)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "prepare",
    [lambda conv: prune.l1_unstructured(conv, "weight", 0.5), nn.utils.weight_norm],
    ids=["pruned", "normed"],
)
def test_a_convolution_module_s_own_is_not_counted(prepare: Any, x: Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.w = nn.Parameter(torch.randn(3, 3, 3, 3) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), self.w * 2, padding=1)

    model = Both()
    prepare(model.conv)
    plain = model(x)
    ccp.patch_(model, "all", example_inputs=x)
    assert torch.equal(model(x), plain)
    assert set(coord_layers(model)) == {"conv", "conv2d"}
    output = fill_(model)(x)
    of_conv, of_call = (coord_layers(model)[name].coord_weight for name in ("conv", "conv2d"))
    inner = concatenated(x, model.conv.weight, of_conv) + model.conv.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(output, concatenated(inner, model.w * 2, of_call))
