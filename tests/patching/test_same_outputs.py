"""patch compares the model with its patched copy on the example inputs, in both modes."""

from __future__ import annotations

import collections
import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from coordconv_patch.layers.conversion import convert_
from coordconv_patch.layers.coord_layer import coord_layers


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Counts its parameters in one of the modes, which patching changes."""

    def __init__(self, counts_in: str = "neither") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.counts_in = counts_in
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.dropout(self.norm(self.a(x)))
        if self.counts_in == ("training" if self.training else "evaluation"):
            x = x * len(list(self.parameters()))
        return {"maps": [self.c(self.b(x))], "size": tuple(x.shape)}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_other_outputs_are_refused_and_nothing_is_changed(
    mode: str, in_place: bool, x: Tensor
) -> None:
    model = Net(mode)
    before = copy.deepcopy(model)
    with pytest.raises(PatchError) as refusal:
        (ccp.patch_ if in_place else ccp.patch)(model, "all", example_inputs=x)
    message = str(refusal.value)
    assert f"in {mode} mode output['maps'][0] is not the same bit for bit" in message
    assert "the first convolution whose input differs is b." in message
    assert "Nothing was changed" in message
    assert [type(module) for module in model.modules()] == [type(m) for m in before.modules()]
    assert model.state_dict().keys() == before.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[key])
    patched = ccp.patch(model, "all", example_inputs=x, check=False)
    assert list(coord_layers(patched)) == ["a", "b", "c"]


def test_a_graph_is_put_back_too(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 1, 1))
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(self.conv(x), self.w)

    def wrong(module: nn.Conv2d, *arguments: Any) -> None:
        convert_(module, *arguments)
        with torch.no_grad():
            module.coord_weight.fill_(0.5)

    monkeypatch.setattr("coordconv_patch.patching.apply.convert_", wrong)
    model = fx.symbolic_trace(Functional())
    code, names = model.code, [name for name, _ in model.named_modules()]
    with pytest.raises(PatchError, match="the first convolution whose input differs is w"):
        ccp.patch_(model, "all", example_inputs=x)
    assert model.code == code
    assert [name for name, _ in model.named_modules()] == names
    assert type(model.conv) is nn.Conv2d


def test_the_model_is_left_as_it_was(x: Tensor) -> None:
    model = Net().train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    image = x.clone()
    patched = ccp.patch(model, "all", example_inputs=image)
    assert torch.equal(image, x)
    assert (model.training, model.norm.training) == (True, False)
    assert (patched.training, patched.norm.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    for each in (model, patched):
        assert all(torch.equal(each.state_dict()[key], value) for key, value in before.items())
        assert all(parameter.grad is None for parameter in each.parameters())


def test_it_takes_two_forward_passes_of_each(x: Tensor) -> None:
    class Counting(Net):
        passes: list[tuple[bool, bool]] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> dict[str, Any]:
            if type(x) is Tensor:  # not while it is traced
                self.passes.append((self.training, type(self.a) is nn.Conv2d))
            return super().forward(x)

    model = Counting()
    ccp.patch(model, "a", example_inputs=x, check=False)
    without = len(Counting.passes)
    Counting.passes.clear()
    ccp.patch(model, "a", example_inputs=x)
    assert sorted(Counting.passes[without:]) == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    Counting.passes.clear()
    ccp.patch(model, "a")
    assert [plain for _, plain in Counting.passes] == []


def test_a_mode_in_which_the_model_itself_fails_is_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    image = torch.randn(1, 3, 8, 8)  # batch norm wants more values than one in training
    patched = ccp.patch(model, "all", example_inputs=image)
    assert torch.equal(patched.eval()(image), model.eval()(image))


def test_a_mode_in_which_the_patched_model_alone_fails_is_told(x: Tensor) -> None:
    class Another(nn.Module):
        """Computes a convolution more in training, which cannot be told from the other."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.w * 2, padding=1)
            return y + F.conv2d(x, self.w * 3, padding=1) if self.training else y

    model = Another()
    with pytest.raises(ccp.PatchError) as refused:
        ccp.patch_(model, "all", example_inputs=x)
    message = str(refused.value)
    assert "would make the model fail in training mode" in message
    assert "by its position among 1 calls" in message
    assert "the model failed" not in message
    assert coord_layers(model) == {}


def test_a_model_that_never_gives_the_same_is_patched_all_the_same(x: Tensor) -> None:
    calls: list[int] = []

    class Drifting(Net):
        def forward(self, x: Tensor) -> dict[str, Any]:
            calls.append(1)
            return super().forward(x + len(calls))

    for patch in (ccp.patch, ccp.patch_):
        with pytest.warns(UserWarning, match="the model gives other outputs each time"):
            patched = patch(Drifting(), "all", example_inputs=x)
        assert list(coord_layers(patched)) == ["a", "b", "c"]


def test_a_copy_whose_last_bits_differ_by_themselves_is_patched(x: Tensor) -> None:
    """As those of weights that a file is mapped to, which lie unaligned in memory."""

    class Unaligned(Net):
        def __deepcopy__(self, memo: dict[int, Any]) -> Unaligned:
            copied = Unaligned(self.counts_in)
            with torch.no_grad():
                copied.c.weight.mul_(1 + 1e-6)
            return copied

    model = Unaligned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched = ccp.patch(model, "all", example_inputs=x)
    assert list(coord_layers(patched)) == ["a", "b", "c"]
    with pytest.raises(PatchError, match="is not the same bit for bit"):
        ccp.patch(Unaligned("evaluation"), "all", example_inputs=x)


def test_values_that_are_not_numbers_are_the_same(x: Tensor) -> None:
    class Dividing(Net):
        def forward(self, x: Tensor) -> dict[str, Any]:
            zero = self.a(x)[:, :1] * 0
            return {"maps": zero / zero, "none": None, "nan": float("nan"), "text": "t"}

    ccp.patch(Dividing(), "a", example_inputs=x)


class Watched(Net):
    """Gives what a function makes of its maps, which depend on whether it is patched."""

    def __init__(self, make: Callable[[Tensor], Any], *, same: bool = False) -> None:
        super().__init__()
        self.make, self.same = make, same

    def forward(self, x: Tensor) -> Any:
        factor = 1 if self.same else len(list(self.parameters()))
        return self.make(self.a(x).detach() * factor)


@pytest.mark.parametrize(
    "make",
    [
        Tensor.numpy,
        Tensor.to_sparse,
        Tensor.to_mkldnn,
        lambda y: torch.nested.nested_tensor([y[0], y[1]]),
        lambda y: collections.deque([y]),
        lambda y: {float(y.sum())},
    ],
)
def test_outputs_of_every_kind_are_compared(make: Callable[[Tensor], Any], x: Tensor) -> None:
    model = Watched(make)
    with pytest.raises(PatchError, match="Nothing was changed"):
        ccp.patch_(model, "all", example_inputs=x)
    assert not coord_layers(model)
    ccp.patch_(Watched(make, same=True), "a", example_inputs=x)


def test_outputs_that_cannot_be_compared_are_warned_of(x: Tensor) -> None:
    with pytest.warns(
        UserWarning, match=r"could not be compared.*output\['a'\] \(generator\)"
    ) as seen:
        ccp.patch(Watched(lambda y: {"a": (each for each in y)}), "a", example_inputs=x)
    assert {each.filename for each in seen} == {__file__}


def test_complex_values_that_are_not_numbers_are_the_same(
    x: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model = Watched(lambda y: torch.complex(y * float("nan"), y), same=True)
    ccp.patch(model, "a", example_inputs=x)
    assert not recwarn.list


class Interrupting(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        if coord_layers(self):
            raise KeyboardInterrupt
        return super().forward(x)


def test_an_interrupt_in_the_comparison_leaves_the_model_plain(x: Tensor) -> None:
    model = Interrupting()
    names = list(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        ccp.patch_(model, "all", example_inputs=x)
    assert not coord_layers(model)
    assert list(model.state_dict()) == names


def test_a_warning_that_is_an_error_leaves_the_model_plain(x: Tensor) -> None:
    model = Watched(iter, same=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="could not be compared"):
            ccp.patch_(model, "a", example_inputs=x)
    assert not coord_layers(model)


# --- sites that are not reached -------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.trained, self.deployed, self.never = (
            nn.Conv2d(3, 3, 1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.trained(x) if self.training else self.deployed(x)


def warning_of(where: Any, x: Tensor, **keywords: Any) -> str:
    with pytest.warns(UserWarning, match="chosen convolutions") as caught:
        ccp.patch(Branches(), where, example_inputs=x, **keywords)
    (only,) = caught
    assert only.filename == __file__
    return str(only.message)


def test_sites_that_do_not_run_or_in_one_mode_only_are_warned_of(x: Tensor) -> None:
    message = warning_of("all", x)
    assert "never run on the example inputs: never" in message
    assert "run in training only, so that evaluation knows nothing of their coord" in message
    assert message.count("always") == 0
    assert "run in evaluation only, so that training knows nothing of their coord" in message
    assert "training only" in warning_of("trained", x)
    assert "never run on the example inputs: never, trained" in warning_of(
        ["never", "trained"], x, check=False
    ).replace("trained, never", "never, trained")


def test_sites_that_run_are_not_warned_of(x: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    ccp.patch(Branches(), "always", example_inputs=x)
    ccp.patch_(Branches(), "always", example_inputs=x)
    ccp.patch(Branches(), "always", example_inputs=x, check=False)
    ccp.patch(Branches(), "all")  # nothing is known without inputs
    assert not recwarn.list
