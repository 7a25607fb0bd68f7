"""Models patched, copied, used and saved in inference mode, whose tensors have no version."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Two convolutions, one of which calls its padding a subclass's own."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), OwnConv(4, 2, 3)).eval()


class OwnConv(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(input, [1] * 4)
        return self._conv_forward(padded, self.weight, self.bias)


def trained() -> Any:
    model = ccp.patch(net(), "all")
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def saved_and_loaded(model: Any, folder: Path) -> Any:
    ccp.save_coords(model, folder / "coords.safetensors")
    return ccp.load_coords_(ccp.unpatch(model, discard=True), folder / "coords.safetensors")


USES: dict[str, Callable[[Any, Path], Any]] = {
    "the model": lambda model, _: model,
    "a copy": lambda model, _: copy.deepcopy(model),
    "a copy of a copy": lambda model, _: copy.deepcopy(copy.deepcopy(model)),
    "pickled": lambda model, _: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "folded": lambda model, _: ccp.fold(copy.deepcopy(model)),
    "saved": lambda model, folder: saved_and_loaded(copy.deepcopy(model), folder),
    "trained and evaluated": lambda model, _: copy.deepcopy(model).train().eval(),
}


@pytest.mark.parametrize("use", USES)
def test_uses_inside(use: str, tmp_path: Path) -> None:
    model = trained()
    expected = model(IMAGES).detach()
    with torch.inference_mode():
        used = USES[use](model, tmp_path)
        for _ in range(2):
            torch.testing.assert_close(used(IMAGES), expected)
        assert used.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(used(IMAGES), expected)


@pytest.mark.parametrize("made_inside", [True, False])
def test_patching_inside(made_inside: bool) -> None:
    outside = net()
    with torch.inference_mode():
        plain = net() if made_inside else outside
        patched = ccp.patch(plain, "all")
        assert torch.equal(patched(IMAGES), plain(IMAGES))
        assert torch.equal(ccp.unpatch(patched)(IMAGES), plain(IMAGES))


def test_coordinates_left_behind_inside_are_told() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(trained())
        model(IMAGES)
        model[0].weight.mul_(torch.rand(4, 1, 1, 1) + 0.5)
        model[1] = nn.Identity()
        with pytest.raises(PatchError, match="left behind at 0"):
            model(IMAGES)
