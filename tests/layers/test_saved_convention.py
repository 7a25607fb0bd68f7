"""The convention travels in a state_dict's metadata, and another one is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.utils import parametrize

import coordconv_patch as ccp
from coordconv_patch import Axes, Coordinates

YX = Coordinates(order="yx")


def patched(coords: Coordinates | None = None, fill: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    ccp.patch_(model, "all", coords=coords)
    for weight in ccp.coord_parameters(model):
        nn.init.constant_(weight, fill)
    return model


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [lambda state: state, copy.deepcopy, through_a_file])
def test_another_convention_is_refused(way: Any) -> None:
    state = way(patched(YX).state_dict())
    model = patched(fill=0.25)
    with pytest.raises(
        RuntimeError, match=r"0\.coord_weight was trained with coordinates \(y, x\)"
    ):
        model.load_state_dict(state)
    assert [weight.unique().tolist() for weight in ccp.coord_parameters(model)] == [[0.25]] * 2
    for strict in (True, False):
        assert str(patched(YX, fill=0.0).load_state_dict(state, strict=strict)) == (
            "<All keys matched successfully>"
        )


def test_the_refusal_says_what_to_write() -> None:
    state = patched(Coordinates(channels=(Axes("y"), Axes("x", centring="edges")))).state_dict()
    with pytest.raises(RuntimeError) as error:
        patched().load_state_dict(state)
    wanted = str(error.value).split("patch it with coords=")[1].split("\n")[0]
    coords = eval(wanted, {"Coordinates": Coordinates})
    patched(coords).load_state_dict(state)


def test_blocks_of_a_kind_that_is_not_known_here_are_refused() -> None:
    state = patched(Coordinates(channels=(Axes("xy"),))).state_dict()
    state._metadata["0"]["coordconv_patch"]["channels"] = [{"kind": "solar"}]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="no kind of channel block 'solar' is known here"):
        patched().load_state_dict(state)


def test_there_are_no_new_keys() -> None:
    model = patched(YX)
    names = [name for name, _ in model.named_parameters()]
    assert list(model.state_dict()) == names
    assert list(model[0].state_dict(prefix="a.")) == [
        "a.weight",
        "a.bias",
        "a.coord_weight",
    ]
    into: dict[str, Any] = {}
    model.state_dict(destination=into)
    assert list(into) == names


def test_a_plain_dictionary_loads_unchecked() -> None:
    """As weight averages and old checkpoints are."""
    state = dict(patched(YX).state_dict())
    model = patched(fill=0.0)
    model.load_state_dict(state)
    assert all(weight.eq(0.5).all() for weight in ccp.coord_parameters(model))


def test_a_state_without_coordinate_weights_loads_whatever_it_tells() -> None:
    state = patched(YX).state_dict()
    for name in [name for name in state if "coord_weight" in name]:
        del state[name]
    model = patched()
    model.load_state_dict(state)
    assert not any(weight.any() for weight in ccp.coord_parameters(model))


def test_a_window_is_not_part_of_what_weights_mean() -> None:
    window = ccp.Window(offset=(0, 0), size=(8, 8), image_size=(16, 16))
    tile: Any = patched()
    ccp.set_window_(tile, window)
    assert str(patched().load_state_dict(tile.state_dict())).startswith("<All keys")
    tile.load_state_dict(patched().state_dict())
    assert [tile[at].coords.window for at in (0, 2)] == [window] * 2


def test_the_prefix_of_wrappers() -> None:
    state = nn.DataParallel(patched(YX)).state_dict()
    with pytest.raises(RuntimeError, match=r"module\.0\.coord_weight was trained with"):
        nn.DataParallel(patched()).load_state_dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    with pytest.raises(RuntimeError, match=r" 0\.coord_weight was trained with|\t0\.coord_weight"):
        patched().load_state_dict(state)
    compiled = torch.compile(patched(YX), backend="eager").state_dict()
    with pytest.raises(RuntimeError, match=r"_orig_mod\.0\.coord_weight was trained with"):
        torch.compile(patched(), backend="eager").load_state_dict(compiled)


def test_parametrized_coordinate_weights_are_checked_too() -> None:
    models = [patched(YX), patched()]
    for model in models:
        parametrize.register_parametrization(model[0], "coord_weight", nn.Identity())
    with pytest.raises(RuntimeError, match=r"0\.coord_weight was trained with"):
        models[1].load_state_dict(models[0].state_dict())


def test_branches_beside_functional_convolutions_tell_theirs() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, self.weight)

    x = torch.randn(1, 3, 5, 5)
    models = [ccp.patch(Functional(), "all", coords=c, example_inputs=x) for c in (YX, None)]
    with pytest.raises(RuntimeError, match=r"coord_weight was trained with coordinates \(y, x\)"):
        models[1].load_state_dict(models[0].state_dict())
