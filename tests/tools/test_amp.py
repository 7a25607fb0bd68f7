"""Mixed precision: autocast and GradScaler, in bfloat16 and float16, on the CPU."""

from __future__ import annotations

import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn

import coordconv_patch as ccp
from tools.steps import (
    STARTS,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    loss_of,
    patched_net,
    sgd,
)

LOW_PRECISION = [torch.bfloat16, torch.float16]
IDS = ["bfloat16", "float16"]


def train_low(
    model: nn.Module, dtype: torch.dtype, *, scaled: bool = True, initial_scale: float = 2.0**10
) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=initial_scale)
    for batch in batches():
        optimizer.zero_grad()
        if dtype == torch.float64:
            loss = loss_of(model, (batch[0].double(), batch[1].double()))
        else:
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model


def distance(left: nn.Module, right: nn.Module) -> float:
    """Euclidean distance of two models' parameters, by name."""
    others = dict(right.named_parameters())
    squares = [(p - others[name]).detach().square().sum() for name, p in left.named_parameters()]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=IDS)
def test_autocast_keeps_the_bits_at_zero(dtype: torch.dtype, training: bool) -> None:
    patched = patched_net(0.0).train(training)
    plain = ccp.unpatch(patched)
    images = batches()[0][0]
    with torch.autocast("cpu", dtype=dtype):
        assert patched.conv1(images).dtype == dtype
        assert torch.equal(patched(images), plain(images))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=IDS)
@pytest.mark.parametrize("start", STARTS)
def test_low_precision_training_stays_near_exact_training(start: str, dtype: torch.dtype) -> None:
    before = patched_net(STARTS[start])
    exact = train_low(concatenating(before).double(), torch.float64)
    trained = train_low(patched_net(STARTS[start]), dtype)
    assert all(weight.dtype == torch.float32 for weight in ccp.coord_parameters(trained))
    assert_coordinates_trained(trained, before)
    # The plain model is as far off: rounding decides which side of a ReLU a pixel falls on.
    assert distance(trained, exact) < 0.1 * distance(before, exact)


def layer_results(layer: nn.Module, images: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and both weights' gradients of one convolution."""
    layer.zero_grad()
    output = layer(images)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), layer.weight.grad, layer.coord_weight.grad]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=IDS)
@pytest.mark.parametrize("start", STARTS)
def test_a_layers_rounding_is_that_of_the_published_form(start: str, dtype: torch.dtype) -> None:
    model = patched_net(STARTS[start])
    published = concatenating(model)
    images = batches()[0][0]
    upstream = torch.randn(model.conv1(images).shape, generator=torch.Generator().manual_seed(0))
    exact = layer_results(concatenating(model).double().conv1, images.double(), upstream)
    with torch.autocast("cpu", dtype=dtype):
        ours = layer_results(model.conv1, images, upstream)
        theirs = layer_results(published.conv1, images, upstream)
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert float((our - true).norm()) < 1.5 * float((their - true).norm())


@pytest.mark.parametrize("start", STARTS)
def test_gradient_scaling_by_powers_of_two_changes_nothing(start: str) -> None:
    scaled = train_low(patched_net(STARTS[start]), torch.bfloat16)
    unscaled = train_low(patched_net(STARTS[start]), torch.bfloat16, scaled=False)
    assert_same_state(unscaled, scaled, tolerance=1e-6)


def test_steps_with_infinite_gradients_are_skipped() -> None:
    before = patched_net(0.2)
    trained = train_low(patched_net(0.2), torch.float16, initial_scale=2.0**60)
    for weight, old in zip(
        ccp.coord_parameters(trained), ccp.coord_parameters(before), strict=True
    ):
        assert torch.equal(weight, old)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=IDS)
def test_whole_model_in_low_precision_trains(dtype: torch.dtype) -> None:
    patched = patched_net(0.0).to(dtype)
    plain = ccp.unpatch(patched)
    images, targets = batches()[0]
    batch = (images.to(dtype), targets.to(dtype))
    assert torch.equal(patched(batch[0]), plain(batch[0]))
    optimizer = sgd(patched)
    before = patched_net(0.0).to(dtype)
    loss_of(patched, batch).backward()
    optimizer.step()
    assert all(weight.dtype == dtype for weight in ccp.coord_parameters(patched))
    assert_coordinates_trained(patched, before)
