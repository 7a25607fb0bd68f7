"""unpatch_ takes coordinates away as a whole or, if it is interrupted, not at all."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers

X = torch.randn(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution module, one whose calls are chosen among, and a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.twice(self.twice(self.first(x))), self.weight)

    def fuse(self) -> None:
        """Has to be guarded."""


def _module() -> nn.Module:
    return ccp.patch(Net().eval(), ["first", "twice@1", "weight"], example_inputs=X)


def _graph() -> nn.Module:
    return ccp.patch(fx.symbolic_trace(Net().eval()), "all", example_inputs=X)


def _state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": list(coord_layers(model))}
    for name, module in model.named_modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks)
        own = {key: value for key, value in vars(module).items() if key != "_graph"}
        found[name] = (type(module), [list(each) for each in hooks], sorted(own))
        if isinstance(module, fx.GraphModule):
            found[name] += ([str(node) for node in module.graph.nodes], module.code)
            found[name] += (len(getattr(module, "_deepcopy_hooks", ())),)
    return found


def _interrupted(model: nn.Module, after: int) -> bool:
    """Interrupt unpatch_ after so many calls of our functions; whether it was that long."""
    left = after

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event != "call" or "/coordconv_patch/" not in frame.f_code.co_filename:
            return
        if frame.f_code.co_filename.endswith("rollback.py"):
            return  # an interrupt while it restores cannot be helped
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # where one is thrown away, python would only print it
        left -= 1
        if left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        ccp.unpatch_(model)
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("build", [_module, _graph])
def test_it_is_all_or_nothing(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    before, outputs = _state(model), model(X)
    assert len(coord_layers(model)) >= 3
    after = 0
    while _interrupted(model, after := after + 1):
        assert _state(model) == before
    assert after > 20
    assert not coord_layers(model)
    assert torch.equal(model(X), outputs)
