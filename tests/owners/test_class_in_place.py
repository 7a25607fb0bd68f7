"""Two kinds of classes that are put in a module's place lie upon each other, in either order."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp


class Head(nn.Module):
    """Concatenates coordinates in its own code, and calls a convolution function in it too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(2, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        lines = [torch.linspace(-1, 1, length) for length in x.shape[2:]]
        y, grid = torch.meshgrid(*lines, indexing="ij")
        x = torch.cat([x, torch.stack([grid, y]).expand(len(x), -1, -1, -1)], 1)
        return F.conv2d(self.conv(x).relu(), self.weight)


X = torch.randn(2, 3, 8, 11, generator=torch.Generator().manual_seed(0))


def imported(model: nn.Module) -> nn.Module:
    return ccp.import_coordconv(model, X).model


def patched(model: nn.Module) -> nn.Module:
    model = ccp.patch(model, "weight", example_inputs=X)
    nn.init.normal_(model.get_parameter("weight_coord_branch.coord_weight"))
    return model


@pytest.fixture
def head() -> nn.Module:
    torch.manual_seed(0)
    return Head().eval()


ORDERS = {"imported first": (imported, patched), "patched first": (patched, imported)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_and_pickles_have_both(
    order: str, again: Callable[[nn.Module], nn.Module], head: nn.Module
) -> None:
    model = head
    for step in ORDERS[order]:
        model = step(model)
    other = again(model)
    assert type(other) is type(model)
    assert torch.equal(other(X), model(X))
    with torch.no_grad():
        other.get_parameter("weight_coord_branch.coord_weight").zero_()
    torch.testing.assert_close(other(X), head(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_taking_the_calls_away_leaves_the_other(order: str, head: nn.Module) -> None:
    model = head
    for step in ORDERS[order]:
        model = step(model)
    weight = model.get_parameter("conv.coord_weight").detach().clone()
    assert weight.any()
    with pytest.raises(ccp.PatchError, match="not zero at"):
        ccp.unpatch(model)
    plain = ccp.unpatch(model, discard=True)
    assert type(plain).__name__ == "Head"
    assert not hasattr(plain, "_coord_sites") or not plain._coord_sites
    # Of the imported convolution the image's channels are left, and the image alone comes.
    expected = F.conv2d(
        F.conv2d(X, plain.conv.weight, plain.conv.bias, padding=1).relu(), head.weight
    )
    torch.testing.assert_close(plain(X), expected, rtol=1e-5, atol=1e-5)


def test_an_owner_that_lets_nobody_set_attributes_is_patched_and_unpatched() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 3, 3))
            self.__dict__["is_frozen"] = True

        def __setattr__(self, name: str, value: Any) -> None:
            if self.__dict__.get("is_frozen") and name != "training":
                raise RuntimeError(f"frozen: {name}")
            super().__setattr__(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, padding=1)

    plain, x = Frozen().eval(), torch.randn(1, 3, 6, 6)
    model = ccp.patch(plain, "all", example_inputs=x)
    assert torch.equal(model(x), plain(x))
    assert type(ccp.unpatch_(model)) is Frozen
