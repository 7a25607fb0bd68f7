from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from coordconv_patch import (
    Coordinates,
    coord_parameters,
    layer_status,
    patch,
    patch_,
    train_only_coords_,
)


def test_it_tells_of_every_layer_what_state_it_is_in() -> None:
    model = patch(timm.create_model("resnet10t"), "layer1.*", coords=Coordinates(radius=True))
    weights = dict(zip([s.name for s in layer_status(model)], coord_parameters(model), strict=True))
    name = next(iter(weights))
    with torch.no_grad():
        weights[name].fill_(0.5)
    weights[name].requires_grad_(False)
    first, *others = layer_status(model)
    assert (first.name, first.is_zero, first.is_trainable) == (name, False, False)
    assert first.norm == pytest.approx(0.5 * math.sqrt(weights[name].numel()))
    assert first.shape == tuple(weights[name].shape)
    assert first.channels == ("x", "y", "r")
    assert first.kind == "CoordConv2d"
    assert all(status.is_zero and status.is_trainable and status.norm == 0 for status in others)


def test_it_names_dtype_device_and_chosen_calls() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared).half()
    x = torch.zeros(1, 3, 8, 8, dtype=torch.half)
    (status,) = layer_status(patch(model, "0@1", example_inputs=x))
    assert status.kind == "CoordBranch"
    assert status.calls is not None
    assert status.calls.indices == (1,)
    assert status.dtype is torch.half
    assert status.device == torch.device("cpu")


def test_a_model_on_the_meta_device_has_no_norm() -> None:
    with torch.device("meta"):
        model = patch_(nn.Sequential(nn.Conv2d(3, 8, 3)), "all")
    (status,) = layer_status(model)
    assert math.isnan(status.norm)
    assert not status.is_zero


def test_a_plain_model_has_none_and_frozen_ones_keep_theirs() -> None:
    assert layer_status(nn.Conv2d(3, 3, 3)) == ()
    model = patch(nn.Sequential(nn.Conv2d(3, 8, 3)), "all")
    train_only_coords_(model)
    assert [status.is_trainable for status in layer_status(model)] == [True]
