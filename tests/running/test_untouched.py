"""A look at a model leaves the model, its inputs and all random states as they were."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.running.tensor_values import same_bits
from coordconv_patch.running.untouched import state_restored


class Net(nn.Module):
    """Does something to itself or to its input each time that it runs."""

    def __init__(self, act: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3)
        self.plain = torch.ones(2)
        self.in_list = [torch.ones(2), {"a": torch.ones(2)}]
        self.act = act
        self.register_buffer("grown", torch.ones(2))
        self.register_buffer("broken", torch.tensor([float("nan"), 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        return self.conv(x)


def backward(net: Net, x: Tensor) -> None:
    if torch.is_grad_enabled():
        net.conv(x).sum().backward()


@torch.no_grad()
def in_place(net: Net, x: Tensor) -> None:
    net.conv.weight.mul_(2)


def resized(net: Net, x: Tensor) -> None:
    net.grown.resize_(5).fill_(3)


def drawn(net: Net, x: Tensor) -> None:
    random.random(), np.random.rand(), torch.rand(1)


ACTS: dict[str, Callable[[Net, Tensor], Any]] = {
    "memory of a weight": lambda n, x: setattr(
        n.conv.weight, "data", torch.renorm(n.conv.weight.data, 2, 0, 0.1)
    ),
    "values of a weight, uncounted": lambda n, x: n.conv.weight.data.clamp_(-0.01, 0.01),
    "values of a weight": in_place,
    "a weight": lambda n, x: setattr(n.conv, "weight", nn.Parameter(torch.zeros(3, 3, 3, 3))),
    "a flag": lambda n, x: n.conv.weight.requires_grad_(False),
    "a gradient": backward,
    "a tensor attribute": lambda n, x: n.plain.add_(1),
    "tensors in containers": lambda n, x: (n.in_list[0].add_(1), n.in_list[1]["a"].add_(1)),
    "a buffer's size": resized,
    "a buffer that was not a number": lambda n, x: n.broken.zero_(),
    "random states": drawn,
}


def everything_of(net: Net) -> dict[str, Any]:
    tensors = {
        **net.state_dict(keep_vars=True),
        "plain": net.plain,
        "in list": net.in_list[0],
        "in dict": net.in_list[1]["a"],
    }
    return {
        "tensors": {
            name: (id(t), t.untyped_storage()._cdata, t.stride(), t.requires_grad)
            for name, t in tensors.items()
        },
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "gradients": [(p.grad, p.grad is None or p.grad.clone()) for p in net.parameters()],
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "numpy": np.random.get_state()[1].tolist(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("tensors", "random", "numpy"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert same_bits(value, after["values"][name]), name
    for (one, value), (other, now) in zip(before["gradients"], after["gradients"], strict=True):
        assert one is other
        assert one is None or torch.equal(value, now)


LOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "plan": lambda m, x: ccp.plan(m, example_inputs=x),
    "patch": lambda m, x: ccp.patch(m, example_inputs=x),
    "trace": lambda m, x: ccp.plan(m),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_what_a_forward_pass_changes_is_put_back(
    act: str, has_gradients: bool, look: str, x: Tensor
) -> None:
    model = Net(ACTS[act])
    if has_gradients:
        model.conv(x).sum().backward()
    before = everything_of(model)
    LOOKS[look](model, x)
    assert_same(before, everything_of(model))


@pytest.mark.parametrize("act", [act for act in ACTS if act not in ("a weight", "a flag")])
def test_so_it_is_in_a_model_patched_in_place(act: str, x: Tensor) -> None:
    model = Net(ACTS[act])
    before = everything_of(model)
    ccp.patch_(model, example_inputs=x)
    after = everything_of(model)
    added = [name for name in after["tensors"] if name not in before["tensors"]]
    assert added == ["conv.coord_weight"]
    assert not after["values"].pop("conv.coord_weight").any()
    after["tensors"].pop("conv.coord_weight")
    after["gradients"] = after["gradients"][: len(before["gradients"])]
    assert_same(before, after)


def test_what_has_not_changed_is_not_written_to(x: Tensor) -> None:
    model = Net(lambda n, x: None)
    before = [tensor._version for tensor in model.state_dict(keep_vars=True).values()]
    with state_restored(model, runs=True):
        model(x)
    assert [tensor._version for tensor in model.state_dict(keep_vars=True).values()] == before


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


# --- example inputs -------------------------------------------------------------------------------

Named = collections.namedtuple("Named", "image")


class Sample:
    __slots__ = ("image",)

    def __init__(self, image: Tensor) -> None:
        self.image = image


HELD: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda given: given),
    "list": (lambda x: ([x], {}), lambda given: given[0]),
    "ordered dict": (
        lambda x: (collections.OrderedDict(image=x), {}),
        lambda given: given["image"],
    ),
    "named tuple": (lambda x: (Named(x), {}), lambda given: given.image),
    "object": (lambda x: (Sample(x), {}), lambda given: given.image),
}


@pytest.mark.parametrize("look", [look for look in LOOKS if look != "trace"])
@pytest.mark.parametrize("held", HELD)
def test_example_inputs_are_not_written_into(
    held: str, look: str, x: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    hold, take = HELD[held]

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, given: Any) -> Tensor:
            return self.conv(take(given).mul_(2))

    given = x.clone()
    LOOKS[look](Doubling(), hold(given))
    assert torch.equal(given, x)
    assert not recwarn.list


def test_other_reports_leave_example_inputs_alone(x: Tensor, tmp_path: Any) -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mul_(2))

    given = x.clone()
    model = ccp.patch(Doubling(), example_inputs=given)
    ccp.export_onnx(model, tmp_path / "m.onnx", given)
    assert torch.equal(given, x)
    assert torch.equal(copy.deepcopy(model)(x.clone()), model(x.clone()))
