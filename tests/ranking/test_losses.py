"""Rank: losses, batches and models that it cannot work with are told by their names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.ranking.parts import reached_sites


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model(torch.rand(2, 3, 8, 8))  # the batch norm has statistics
    return model


def images(count: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.rand(2, 3, 8, 8) for _ in range(count)]


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def rank(model: nn.Module | None = None, **changed: Any) -> ccp.Ranking:
    arguments = {"batches": images(), "loss_fn": square, "steps": 2} | changed
    return ccp.rank(model or net(), **arguments)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, lambda: torch.set_grad_enabled(False), torch.inference_mode]
)
def test_it_trains_wherever_it_is_called(
    mode: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    model, batches, expected = net(), images(), rank().to_dict()
    with mode():
        found = rank(model, batches=batches)
        assert not torch.is_grad_enabled()
    assert found.to_dict() == expected


def fails(model: nn.Module, batch: Tensor) -> Tensor:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda m, b: square(m, b).detach(), ccp.ArgumentError, "loss without a gradient"),
        (torch.no_grad()(square), ccp.ArgumentError, "loss without a gradient"),
        (lambda m, b: square(m, b).item(), ccp.ArgumentError, "is a float: return the loss"),
        (lambda m, b: (square(m, b),), ccp.ArgumentError, "loss_fn=.* is a tuple"),
        (lambda m, b: square(m, b).long(), ccp.ArgumentError, "loss_fn=.* is a Tensor"),
        (lambda m, b: square(m, b) * 1j, ccp.ArgumentError, "torch.complex64: return a real"),
        (nn.MSELoss, ccp.ArgumentError, "loss_fn=MSELoss is a class: .*lambda model, batch"),
        (nn.MSELoss(), ccp.PatchError, r"loss_fn failed .* called as loss_fn\(model, batch\)"),
        (lambda model: square(model, images()[0]), ccp.PatchError, "loss_fn failed.*TypeError"),
        (fails, ccp.PatchError, r"loss_fn failed .*\(2, 3, 8, 8\).*KeyError: 'labels'"),
        (lambda m, b: square(m, b) * math.nan, ccp.PatchError, "nan before any .*loss_fn"),
    ],
)
def test_a_bad_loss_is_named(loss_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rank(loss_fn=loss_fn)


def with_nan(where: int) -> list[Tensor]:
    batches = images()
    batches[where][0, 0, 0, 0] = math.nan
    return batches


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (torch.rand(8, 3, 8, 8), ccp.ArgumentError, "batches=... is a Tensor: pass a list"),
        (np.zeros((8, 3, 8, 8)), ccp.ArgumentError, "batches=... is a ndarray: pass a list"),
        ("abcdefgh", ccp.ArgumentError, "batches='abcdefgh' is a str: pass a list"),
        (dict.fromkeys(range(8), images()[0]), ccp.ArgumentError, "is a dict: pass a list"),
        (["image"] * 8, ccp.PatchError, "one of the batches.*TypeError"),
        (
            [image[:, :2] for image in images()],
            ccp.PatchError,
            r"batches.*\(2, 2, 8, 8\).*channels",
        ),
        ([image.double() for image in images()], ccp.PatchError, "batches .*torch.float64"),
        (with_nan(3), ccp.PatchError, "batches hold NaN"),  # held out
        (with_nan(0), ccp.PatchError, "batches hold NaN"),  # trained on
    ],
)
def test_bad_batches_are_named(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rank(batches=batches, steps=6)  # all are drawn


def test_an_error_of_the_users_dataset_stays_as_it_is() -> None:
    def broken() -> Any:
        yield images()[0]
        raise TypeError("a label is missing")

    with pytest.raises(TypeError, match="a label is missing"):
        rank(batches=broken())


def test_infinite_masks_are_not_blamed_for_the_learning_rate() -> None:
    mask = torch.tensor([0.0, -math.inf])
    batches = [(image, mask) for image in images()]

    def masked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return square(model, batch[0]) + (batch[1] + 1).exp().mean()

    with pytest.raises(ccp.PatchError, match=r"with lr=1e\+30: write a smaller one"):
        rank(batches=batches, loss_fn=masked, lr=1e30)


def test_weights_that_cannot_be_trained_are_told() -> None:
    with pytest.raises(ccp.PatchError, match=r"0\.weight is in float16.*model\.float\(\)"):
        rank(net().half(), batches=[image.half() for image in images()])
    with pytest.raises(ccp.PatchError, match=r"0\.weight is on the meta device"):
        rank(net().to("meta"), batches=[image.to("meta") for image in images()])


def test_by_is_a_word() -> None:
    with pytest.raises(ccp.ArgumentError, match=r"by=.* write 'site' or 'stage'"):
        rank(by=np.array(["site", "stage"]))


def test_the_first_look_leaves_batch_norms_alone() -> None:
    model = net()
    patched = ccp.patch(model, "all")
    before = {name: buffer.clone() for name, buffer in patched.named_buffers()}
    reached_sites(patched, coord_layers(patched), square, images()[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in patched.named_buffers())
