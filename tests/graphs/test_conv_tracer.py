"""Symbolic tracing: what stands in for tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError
from coordconv_patch.graphs.conv_tracer import trace


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
    """Or a convolution that never runs would come first."""
    model = Particular()
    assert ccp.plan(model, "all").rows[0].site.name == "c"
    with pytest.raises(SelectionError, match="never calls a, b"):  # which is not known for sure
        ccp.plan(model, "first")
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


def test_autograd_functions_never_take_a_proxy_for_a_tensor() -> None:
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
    assert [node.target for node in trace(model).nodes if node.op == "call_module"] == ["a", "b"]
    patched = ccp.patch(model, "all", example_inputs=x)
    assert torch.equal(patched(x), model(x))
