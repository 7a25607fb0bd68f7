"""Tracing one call: graphs of modules that symbolic tracing cannot follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.graphs.tracing import trace, trace_call


class Asking(nn.Module):
    """Asks its input for everything that a proxy cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 4, 3)
        self.narrow = nn.Conv2d(4, 4, 1)
        self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)])
        self.never = nn.Conv2d(4, 4, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.kept: dict[str, Any] = {}

    def forward(self, images: list[Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
        if len(images) != 2 or images[0].shape[1] != 3:
            raise ValueError("two images of three channels")
        assert isinstance(images[0], Tensor)
        x = self.stem(torch.cat([image * options["scale"] for image in images]))
        self.kept["x"] = x
        self.seen += 1
        x = self.wide(x) if x.size(-1) > 8 else self.narrow(x)
        if x.mean() > 1e9:
            x = self.never(x)
        x[:, 0] = 0
        parts = {}
        for index, part in enumerate(x.split(1)):
            parts[str(index)] = self.heads[index](part)
        top, index = x.flatten(1).max(dim=1)
        return {**parts, "top": top[: int(index[0] * 0 + 1)]}


def modules_called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def images(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 8, width, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("width", "chosen"), [(12, "wide"), (8, "narrow")])
def test_one_call_is_traced_along_the_way_that_it_took(width: int, chosen: str) -> None:
    model = Asking().eval()
    with pytest.raises(Exception, match=r"len|Proxy|iterated"):
        trace(model)
    graph = trace_call(model, (images(width),), {"options": {"scale": 2.0}})
    assert modules_called(graph) == ["stem", chosen, "heads.0", "heads.1"]
    graph.lint()
    assert len([node for node in graph.nodes if node.op == "placeholder"]) == 2
    first = next(node for node in graph.nodes if node.target == chosen)
    assert {str(user.target) for user in first.users} >= {"mean", "split"}


def test_model_and_arguments_are_left_as_they_were() -> None:
    model = Asking().eval()
    given = images(12)
    before = [image.clone() for image in given]
    expected = model(given, {"scale": 2.0})
    seen, kept = model.seen.clone(), model.kept["x"]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trace_call(model, (given,), {"options": {"scale": 2.0}})
    assert model.kept["x"] is kept
    assert torch.equal(model.seen, seen)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    for image, copy in zip(given, before, strict=True):
        assert torch.equal(image, copy)
    again = model(given, {"scale": 2.0})
    assert all(torch.equal(expected[name], again[name]) for name in expected)


class Shifting(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x.mul_(0)
        return self.conv(x)


def test_inputs_that_the_module_writes_into_are_copies() -> None:
    x = torch.ones(2, 3, 4, 4)
    graph = trace_call(Shifting().eval(), (x,), {})
    assert "mul_" in [node.target for node in graph.nodes]
    assert torch.equal(x, torch.ones(2, 3, 4, 4))


class Nested(nn.Module):
    """A leaf whose own code calls modules, and a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("not a number")
        x = F.conv2d(x, self.weight)
        tokens = x.flatten(2).transpose(1, 2)
        out, _ = self.attention(tokens, tokens, tokens)
        return out


def test_leaves_run_without_being_traced() -> None:
    graph = trace_call(Nested().eval(), (torch.randn(1, 4, 3, 3),), {})
    assert modules_called(graph) == ["attention"]
    convs = [node for node in graph.nodes if node.target is F.conv2d]
    assert [node.args[1].target for node in convs] == ["weight"]


def test_what_fails_is_raised() -> None:
    model = Asking().eval()
    with pytest.raises(ValueError, match="two images"):
        trace_call(model, (images(12)[:1],), {"options": {"scale": 1.0}})
    assert not model.kept


class Particular(nn.Module):
    """Takes another way for what is not a tensor, and for what is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return self.a(x[0])
        if isinstance(x, nn.Parameter):
            return self.b(x)
        x = F.relu(self.c(x) + 1)
        return self.d(x) if torch.is_tensor(x) else self.a(x)


def test_a_traced_value_passes_for_a_tensor() -> None:
    """Or "first" would choose a convolution that never runs."""
    model = Particular()
    assert [row.site.name for row in ccp.plan(model, "first").rows if row.chosen] == ["c"]
    calls = [node.target for node in trace(model).nodes if node.op == "call_module"]
    assert calls == ["c", "d"]
    image = torch.randn(1, 3, 4, 4)
    assert ccp.plan(model, "first", example_inputs=image).chosen[0].name == "c"


def test_results_that_may_be_several_tensors_do_not_pass_for_one() -> None:
    class Splitting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool2d(2, return_indices=True)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pool(x)
            first = pooled if isinstance(pooled, Tensor) else pooled[0]
            parts = first.split(1)
            return self.conv(parts if isinstance(parts, Tensor) else parts[0])

    targets = [str(node.target) for node in trace(Splitting()).nodes if node.op != "output"]
    assert sum("getitem" in target for target in targets) == 2


class Swish(torch.autograd.Function):
    """C++ looks at its arguments, without asking whether they are stand-ins for tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("knows_values", [False, True])
def test_autograd_functions_never_take_a_proxy_for_a_tensor(knows_values: bool) -> None:
    """They would read its memory as that of a tensor, and the process would die."""

    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                return x
            return self.b(Swish.apply(self.a(x)))

    model, x = Activated(), torch.randn(1, 3, 4, 4)
    graph = trace_call(model, (x,), {}) if knows_values else trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["a", "b"]
    patched = ccp.patch(model, "all", example_inputs=x)
    assert torch.equal(patched(x), model(x))
