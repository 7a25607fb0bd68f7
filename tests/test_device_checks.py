"""The checks of benchmarks/on_gpu.py: on the CPU always, on a GPU by ``pytest -m cuda``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    from shared.device_checks import CHECKS

    for name in [name for name in sys.modules if name.split(".")[0] == "shared"]:
        del sys.modules[name]  # tests of the benchmarks import them anew


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_on_the_device(device: str, check: Callable[[torch.device], None]) -> None:
    check(torch.device(device))


def forward_with_an_error(layer: ccp.CoordConv2d, x: Tensor) -> Tensor:
    """The convolution and a constant: wrong at zero and at non-zero weights."""
    return nn.Conv2d.forward(layer, x) + 1e-3
