"""Flips at test time: a mirrored picture at a mirrored place has the picture's coordinates."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

import coordconv_patch as ccp

FLIPS = {
    (3,): [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    (2,): [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]],
    (2, 3): [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]],
}
"""Places by the dimensions that ``Tensor.flip`` turns round."""


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dims", FLIPS)
def test_a_flipped_picture_sees_its_own_coordinates(
    dims: tuple[int, ...], align_corners: bool, weight: float
) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, stride=2, padding=1)
    coords = ccp.Coordinates(align_corners=align_corners)
    model = ccp.patch(nn.Sequential(first, nn.ReLU(), second).double().eval(), "all", coords=coords)
    weights = [torch.randn_like(each) * weight for each in ccp.coord_parameters(model)]
    for parameter, value in zip(ccp.coord_parameters(model), weights, strict=True):
        parameter.data.copy_(value)
    images = torch.randn(2, 3, 13, 18, dtype=torch.float64)
    expected = images.flip(dims)
    for conv, own in zip((first, second), weights, strict=True):
        grid = reference.paper_grid(expected.shape[2:], align_corners=align_corners)
        # The second layer's input is that of the flipped picture, so the flip is of its grid.
        grid = grid.flip([dim - 4 for dim in dims])
        both = torch.cat([expected, grid.expand(2, -1, -1, -1)], dim=1)
        kernel = torch.cat([conv.weight.detach(), own], dim=1).double()
        bias = conv.bias.detach().double() if conv.bias is not None else None
        expected = F.conv2d(both, kernel, bias, conv.stride, conv.padding)
        expected = expected.relu() if conv is first else expected
    with torch.no_grad(), ccp.places(model, torch.tensor(FLIPS[dims])):
        output = model(images.flip(dims))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        is_other = (model(images.flip(dims)) - expected).abs().max() > 0.1
    assert bool(is_other) == bool(weight)


def test_the_mean_over_flips_reads_positions_out() -> None:
    """A network that says where a pixel is: each view, turned back, says the same."""
    model = ccp.patch(
        nn.Sequential(nn.Conv2d(1, 2, 1)).eval(), coords=ccp.Coordinates(align_corners=False)
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    (weight,) = ccp.coord_parameters(model)
    weight.data.copy_(torch.eye(2)[:, :, None, None])
    images = torch.randn(1, 1, 6, 8)
    with torch.no_grad():
        expected = model(images)
        for dims, theta in FLIPS.items():
            with ccp.places(model, torch.tensor(theta)):
                view = model(images.flip(dims)).flip(dims)
            torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)
