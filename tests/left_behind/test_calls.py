"""Coordinates of functional convolutions and of chosen calls are watched as those of modules."""

from __future__ import annotations

import collections
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from watched_models import IMAGES, told

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.bn: Any = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.kernel, padding=1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn: Any = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


def trained(kind: str) -> Any:
    inner, where = (Functional(), "all") if kind == "functional" else (Twice(), "0.conv@1")
    model = nn.Sequential(inner, nn.Conv2d(3, 2, 1)).eval()
    patched = ccp.patch(model, where, example_inputs=IMAGES)
    with torch.no_grad():
        for weight in ccp.coord_parameters(patched):
            weight.normal_(generator=torch.Generator().manual_seed(1))
        patched(IMAGES)
    return patched


KINDS = ["functional", "chosen calls"]
FACTORS = torch.tensor([0.5, 2.0, 3.0]).view(3, 1, 1, 1)


def place_of(model: Any) -> tuple[nn.Module, str]:
    inner = model[0]
    return (inner, "kernel") if isinstance(inner, Functional) else (inner.conv, "weight")


def scale(model: Any, how: str) -> None:
    holder, name = place_of(model)
    weight = getattr(holder, name)
    if how == "through .data":
        weight.data.mul_(FACTORS)
    else:
        setattr(holder, name, nn.Parameter(weight.detach() * FACTORS))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("use", ["forward", "state_dict", "save_coords"])
@pytest.mark.parametrize("how", ["through .data", "by another Parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_weight(kind: str, how: str, use: str, steps: int, tmp_path: Path) -> None:
    model = trained(kind)
    for _ in range(steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(IMAGES).square().mean().backward()
        optimizer.step()
        model(IMAGES)  # the marks keep up with a training
    uses: dict[str, Callable[[], object]] = {
        "forward": lambda: model(IMAGES),
        "state_dict": model.state_dict,
        "save_coords": lambda: ccp.save_coords(model, tmp_path / "coords"),
    }
    scale(model, how)
    error, said = told(uses[use])
    assert error == ""
    assert len(said) == 1
    assert "(by 0.5 to 3)" in said[0]
    assert told(uses[use]) == ("", [])


@pytest.mark.parametrize("how", ["through .data", "by another Parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_norm(kind: str, how: str) -> None:
    model = trained(kind)
    scale(model, how)
    model[0].bn = nn.Identity()
    with pytest.raises(PatchError, match="left behind at 0"):
        model(IMAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_no_alarm(kind: str) -> None:
    model = trained(kind)

    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
        for mode in (True, False, False):
            model.train(mode)(IMAGES).square().mean().backward()
            optimizer.step()
        for other in (model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(IMAGES)
            other.load_state_dict({n: 2 * value for n, value in other.state_dict().items()})
            other(IMAGES)
            other.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
            other(IMAGES)
            for dtype in (torch.float64, torch.bfloat16, torch.float32):
                other.to(dtype)(IMAGES.to(dtype))

    assert told(run) == ("", [])


def clear(model: nn.Module) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


def clear_all(model: nn.Module) -> None:
    clear(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()


def replace(model: nn.Module) -> None:
    for module in model.modules():
        module._forward_hooks = collections.OrderedDict()


class TestHooksTakenAway:
    """Without its hook a branch of chosen calls is there, and does not run."""

    @pytest.mark.parametrize("use", ["forward", "state_dict", "save_coords", "fold", "export"])
    @pytest.mark.parametrize("change", [clear, clear_all, replace])
    def test_is_told(self, change: Callable[[nn.Module], None], use: str, tmp_path: Path) -> None:
        model = trained("chosen calls")
        uses: dict[str, Callable[[], object]] = {
            "forward": lambda: model(IMAGES),
            "state_dict": model.state_dict,
            "save_coords": lambda: ccp.save_coords(model, tmp_path / "coords"),
            "fold": lambda: ccp.fold(model),
            "export": lambda: ccp.export_onnx(model, tmp_path / "model.onnx", IMAGES),
        }
        change(model)
        if change is clear_all and use == "forward":
            return  # nothing of the package runs then
        for _ in range(2):
            with pytest.raises(PatchError, match=r"do not run any more at 0\.conv"):
                uses[use]()
        assert not list(tmp_path.iterdir())
        ccp.forget_left_behind_(model)
        assert told(lambda: (model(IMAGES), model.state_dict())) == ("", [])

    def test_of_untrained_coordinates_is_not(self) -> None:
        model = trained("chosen calls")
        with torch.no_grad():
            for weight in ccp.coord_parameters(model):
                weight.zero_()
        clear(model)
        assert told(lambda: (model(IMAGES), model.state_dict())) == ("", [])

    def test_unpatch_takes_the_branch_away(self) -> None:
        model = trained("chosen calls")
        clear(model)
        plain = ccp.unpatch(model, discard=True)
        assert (
            plain.state_dict().keys()
            == nn.Sequential(Twice(), nn.Conv2d(3, 2, 1)).state_dict().keys()
        )
        plain(IMAGES)
