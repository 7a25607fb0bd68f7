"""A layer whose weight loses output channels, as pruning tools take them away."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError

LAYERS: dict[str, tuple[Any, int]] = {
    # name: a layer of 6 output channels, and the dimension of its weight that they are
    "strided": (lambda: ccp.CoordConv2d(4, 6, 3, stride=2, padding=1), 0),
    "grouped": (lambda: ccp.CoordConv2d(4, 6, 3, groups=2, padding=1), 0),
    "depthwise": (lambda: ccp.CoordConv2d(6, 6, 3, groups=6, padding=1), 0),
    "one dimension": (lambda: ccp.CoordConv1d(4, 6, 3), 0),
    "transposed": (lambda: ccp.CoordConvTranspose2d(4, 6, 3, stride=2), 1),
    "transposed, depthwise": (lambda: ccp.CoordConvTranspose2d(6, 6, 3, groups=6), 0),
}
KEPT = [0, 2, 3, 5]  # as many of each of two groups


def layer_of(name: str, scale: float) -> Any:
    torch.manual_seed(0)
    layer = LAYERS[name][0]().eval()
    nn.init.normal_(layer.coord_weight, std=scale)
    return layer


def inputs_of(layer: Any) -> Tensor:
    return torch.rand(2, layer.in_channels, *(9, 7)[: len(layer.kernel_size)])


@torch.no_grad()
def drop_channels_(layer: Any, dim: int, kept: list[int]) -> None:
    """As Torch-Pruning does: numbers first, then weight and bias, as new Parameters."""
    layer.out_channels = len(kept)
    if layer.groups == layer.in_channels == 6:
        layer.in_channels = layer.groups = len(kept)
    layer.weight = nn.Parameter(layer.weight.index_select(dim, torch.tensor(kept)))
    layer.bias = nn.Parameter(layer.bias[kept])


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_coordinates_go_with_their_output_channels(name: str, scale: float) -> None:
    layer, dim = layer_of(name, scale), LAYERS[name][1]
    x = inputs_of(layer)
    with torch.no_grad():
        before = layer(x)[:, KEPT]  # and the map of the old size is kept from here
    layer.coord_weight.grad = 2 * layer.coord_weight.detach()
    drop_channels_(layer, dim, KEPT)
    x = x[:, KEPT] if "depthwise" in name else x
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.coord_weight.grad, 2 * layer.coord_weight.detach())
    layer(x).sum().backward()
    assert layer.coord_weight.shape == layer.coord_weight.grad.shape


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_pruned_layers_fold_and_are_watched_as_others(scale: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6))
    model: Any = ccp.patch(plain.eval(), "all")
    nn.init.normal_(model[0].coord_weight, std=scale)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = inputs_of(model[0])
    expected = model(x)[:, KEPT]
    drop_channels_(model[0], 0, KEPT)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(model[1], name)
        value = tensor.detach()[KEPT]
        setattr(model[1], name, nn.Parameter(value) if tensor.requires_grad else value)
    model[1].num_features = len(KEPT)
    torch.testing.assert_close(ccp.fold(model)(x), expected)
    if scale:  # another library's folding is seen in the new weight too
        model[0].weight.data.mul_(torch.tensor([2.0, 3.0, 4.0, 5.0]).view(-1, 1, 1, 1))
        with pytest.warns(UserWarning, match=r"were scaled .* at 0 \(by 2 to 5\)"):
            model(x)


def test_channels_that_cannot_be_told_apart_are_refused() -> None:
    layer = layer_of("strided", 0.3)
    with torch.no_grad():
        layer.weight[3] = layer.weight[2]
    before = layer.weight
    with pytest.raises(PatchError, match=r"equal weights and different coordinates"):
        layer.weight = nn.Parameter(before.detach()[[0, 2, 5]])
    assert layer.weight is before
    layer.weight = nn.Parameter(before.detach()[[0, 2, 3, 5]])  # both of them stay
    assert layer.coord_weight.shape[0] == 4


def test_channels_that_were_zeroed_before_they_go() -> None:
    layer = layer_of("strided", 0.3)
    kept = layer.coord_weight.detach()[KEPT]
    with torch.no_grad():
        layer.weight[[1, 4]] = 0
    drop_channels_(layer, 0, KEPT)
    assert torch.equal(layer.coord_weight, kept)


def test_zero_coordinates_fit_any_number_of_output_channels() -> None:
    layer = layer_of("strided", 0.0)
    layer.out_channels = 9
    layer.weight, layer.bias = nn.Parameter(torch.randn(9, 4, 3, 3)), None
    x = inputs_of(layer)
    expected = nn.functional.conv2d(x, layer.weight, stride=2, padding=1)
    assert torch.equal(layer(x), expected)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv(x.relu())


@pytest.mark.parametrize("where", ["conv", "conv@0"])
def test_what_the_layer_is_not_told_of_is_refused_when_it_runs(where: str) -> None:
    x = torch.rand(1, 4, 6, 5)
    model: Any = ccp.patch(Twice().eval(), where, example_inputs=x)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    with torch.no_grad():
        model(x)
        model.conv.weight.data = model.conv.weight.data[:3]
        model.conv.bias.data = model.conv.bias.data[:3]
        with pytest.raises(PatchError, match=r"conv.* gives 3 channels, .* is for 4"):
            model(x)


def test_a_trace_is_not_warned_of_the_check() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3))
    model = ccp.patch(plain.eval(), "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(model, torch.rand(2, 3, 8, 8))  # type: ignore[no-untyped-call]
