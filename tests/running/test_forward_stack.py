"""Which modules' forwards a thread is in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coordconv_patch.running.forward_stack import modules_in_forward


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[type] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [type(module) for module in modules_in_forward()]
        return x


def test_modules_are_named_from_the_innermost_on_each_once() -> None:
    inner = Inner()
    nn.Sequential(nn.Identity(), nn.ModuleList([inner])[0])(torch.ones(1))
    assert inner.seen == [Inner, nn.Sequential]


def test_outside_of_a_forward_there_are_none() -> None:
    assert list(modules_in_forward()) == []
