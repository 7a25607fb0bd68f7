"""The checks of benchmarks/on_gpu.py: on the CPU always, on a GPU by ``pytest -m cuda``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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


def test_the_checks_see_weights_that_patching_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ccp.patch

    def wrong(*args: Any, **kwargs: Any) -> nn.Module:
        model = right(*args, **kwargs)
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.data.add_(1e-2)
        return model

    monkeypatch.setattr(ccp, "patch", wrong)
    for name in ("zero weights", "autocast", "channels last", "places"):
        with pytest.raises(AssertionError, match="not equal"):
            CHECKS[name](torch.device("cpu"))


def test_the_checks_see_coordinates_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ccp.CoordConv2d, "forward", nn.Conv2d.forward)
    for name in ("concatenation", "autocast", "places", "moves", "lowerings"):
        with pytest.raises(AssertionError):
            CHECKS[name](torch.device("cpu"))


def test_the_checks_see_files_folded_and_compiled_models_of_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = torch.compile

    def without(model: nn.Module, *args: Any) -> nn.Module:
        model = copy.deepcopy(model)
        model = model if args == () else ccp.patch(model, "all")
        for weight in ccp.coord_parameters(model):
            weight.data.zero_()
        return model

    def of_a_copy(model: nn.Module, **options: Any) -> Any:
        return compiled(copy.deepcopy(model), **options)

    monkeypatch.setattr(ccp, "fold", without)
    monkeypatch.setattr(ccp, "load_coords", without)
    monkeypatch.setattr(torch, "compile", of_a_copy)
    said = {"fold": "outputs", "files": "of a file", "compile": "after the weights changed"}
    for name, message in said.items():
        with pytest.raises(AssertionError, match=message):
            CHECKS[name](torch.device("cpu"))
