"""``where="first"`` without example inputs, where a trace goes another way than a forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError
from coordconv_patch.sites.find import find_sites


class Two(nn.Module):
    """One of two convolutions runs."""

    def __init__(self, choose: Callable[[Two, Any], Any], *, swapped: bool = False) -> None:
        super().__init__()
        for name in "ba" if swapped else "ab":
            setattr(self, name, nn.Conv2d(3, 4, 1))
        self.after = nn.Conv2d(4, 4, 1)
        self.choose = choose

    def forward(self, x: Any) -> Tensor:
        return self.after(self.choose(self, x))


def matched(net: Two, x: Any) -> Any:
    match x:
        case Tensor():
            return net.a(x)
        case _:
            return net.b(x)


def tried(net: Two, x: Any) -> Any:
    try:
        if x.shape[0] > 0:
            return net.a(x)
    except Exception:
        return net.b(x)


OTHER_WAYS: dict[str, Callable[[Two, Any], Any]] = {
    "type": lambda n, x: n.a(x) if type(x) is Tensor else n.b(x),
    "hasattr": lambda n, x: n.b(x.image) if hasattr(x, "image") else n.a(x),
    "callable": lambda n, x: n.b(x) if callable(x) else n.a(x),
    "dtype": lambda n, x: n.a(x) if x.dtype is torch.float32 else n.b(x),
    "table": lambda n, x: {torch.float32: n.a}.get(x.dtype, n.b)(x),
    "shape": lambda n, x: n.a(x) if isinstance(x.shape, tuple) else n.b(x),
    "match": matched,
    "try": tried,
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("where", ["first", "stem"])
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_first_is_refused_where_another_convolution_may_run(
    way: str, where: str, swapped: bool
) -> None:
    model, x = Two(OTHER_WAYS[way], swapped=swapped), torch.randn(2, 3, 4, 4)
    with pytest.raises(SelectionError) as refusal:
        ccp.patch(model, where)
    assert "a trace calls 'b' first, and never calls a." in str(refusal.value)
    assert "Pass example_inputs=..., or name the site" in str(refusal.value)
    (chosen,) = ccp.plan(model, where, example_inputs=x).chosen
    assert chosen.name == "a"
    assert [site.name for site in ccp.plan(model, "b").chosen] == ["b"]


class Skipped(nn.Module):
    """The trace leaves out what runs first, which takes other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Any) -> Tensor:
        return self.body(self.embed(x) if type(x) is Tensor else x)


def test_first_is_refused_where_one_that_is_registered_before_is_never_called() -> None:
    with pytest.raises(SelectionError, match="never calls embed"):
        ccp.patch(Skipped(), "first")


class Unused(nn.Module):
    """An auxiliary head and a leftover, which really never run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.leftover, self.head = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.conv2(self.conv1(x))
        return (x, self.head(x)) if self.training else x


@pytest.mark.parametrize("training", [False, True])
def test_first_is_chosen_where_what_never_runs_lies_behind(training: bool) -> None:
    (chosen,) = ccp.plan(Unused().train(training), "first").chosen
    assert chosen.name == "conv1"


def test_a_graph_runs_as_it_is() -> None:
    """Its trace has gone another way before, and so does its forward pass."""
    model = fx.symbolic_trace(Skipped())
    model.add_module("embed", nn.Conv2d(3, 4, 1))
    (chosen,) = ccp.plan(model, "first").chosen
    assert chosen.name == "body"


class Functional(nn.Module):
    def __init__(self, *, spare: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, 1, 1))
        if spare:
            self.v = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Any) -> Tensor:
        return F.conv2d(x, self.w if type(x) is not Tensor or not hasattr(self, "v") else self.v)


def test_weights_that_a_trace_never_reads_are_refused_or_warned_of() -> None:
    with pytest.raises(SelectionError, match="calls 'w' first, and never calls v"):
        ccp.patch(Functional(), "first")
    for patch in (ccp.patch, ccp.patch_):
        with pytest.warns(UserWarning, match="a trace never reads v") as caught:
            patch(Functional(), "all")
        assert {each.filename for each in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ccp.patch(Functional(spare=False), "all")
        ccp.patch(Functional(), "v", example_inputs=torch.randn(2, 3, 4, 4))
        ccp.patch(nn.Sequential(Functional(spare=False), nn.Conv2d(3, 3, 1)), "first")


class TrainedOtherwise(nn.Module):
    """Computes a convolution in training alone, in an owner that has none else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.stored = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stored(x)
        return y + F.conv2d(x, self.w * 2) if self.training else y


@pytest.mark.parametrize("example_inputs", [None, torch.ones(1, 3, 8, 8)], ids=["trace", "run"])
def test_what_is_asked_for_is_not_what_was_given(example_inputs: Any) -> None:
    sites = find_sites(TrainedOtherwise(), example_inputs).sites
    (obstacle,) = (site.obstacle for site in sites if site.name == "conv2d")
    given = example_inputs is not None
    assert ("pass example_inputs" in obstacle) is not given
    assert ("on the example inputs, it does not run" in obstacle) is given
