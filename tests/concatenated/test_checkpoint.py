"""Checkpoints whose convolutions have image and coordinate channels, in patched models."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

import coordconv_patch as ccp


class Port(nn.Module):
    """A model that concatenates before its first convolution and before a transposed one."""

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.stem = nn.Conv2d(channels + 2, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(8, 4, 3, bias=False)
        self.head = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(self.join(x))).relu()
        return self.head(self.up(self.join(x)))

    def join(self, x: Tensor) -> Tensor:
        grid = reference.paper_grid(tuple(x.shape[2:])).to(x).expand(len(x), -1, -1, -1)
        return torch.cat((grid, x) if self.first else (x, grid), dim=1)


def plain(channels: int = 3) -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.up = nn.ConvTranspose2d(6, 4, 3, bias=False)
            self.head = nn.Conv2d(4, 4, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(self.norm(self.stem(x)).relu()))

    return Plain().eval()


@pytest.mark.parametrize("channels", [3, 6])  # an image, or two frames: 5 or 8 inputs
@pytest.mark.parametrize("side", ["last", "first"])
def test_a_checkpoint_gives_the_outputs_of_its_own_model(channels: int, side: Any) -> None:
    torch.manual_seed(0)
    port = Port(channels, side == "first").eval()
    patched = ccp.patch(plain(channels), ["stem", "up", "head"])
    before = {key: value.clone() for key, value in patched.state_dict().items()}
    loaded = ccp.load_concatenated(patched, port.state_dict(), coordinates=side)
    assert all(torch.equal(before[key], value) for key, value in patched.state_dict().items())
    for size in ((9, 14), (12, 7)):
        x = torch.randn(2, channels, *size)
        with torch.no_grad():
            expected = port(x)
            assert (loaded(x) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert loaded.stem.coord_weight.abs().max() > 0
    assert not loaded.head.coord_weight.any()  # its weight has the plain shape
    assert ccp.load_concatenated_(patched, port.state_dict(), coordinates=side) is patched
    assert all(
        torch.equal(value, loaded.state_dict()[key]) for key, value in patched.state_dict().items()
    )


WRONG = {
    "a missing name": (lambda state: state.pop("norm.bias"), "missing: norm.bias"),
    "an unknown name": (lambda state: state.update(more=torch.zeros(1)), "unknown: more"),
    "another number of channels": (
        lambda state: state.update({"stem.weight": torch.zeros(6, 6, 3, 3)}),
        "stem.weight has shape (6, 6, 3, 3), the model needs (6, 3, 3, 3)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_does_not_fit_changes_nothing(what: str) -> None:
    change, message = WRONG[what]
    patched = ccp.patch(plain(), ["stem", "up"])
    state = dict(Port(3, False).state_dict())
    change(state)
    before = {key: value.clone() for key, value in patched.state_dict().items()}
    with pytest.raises(ccp.WeightsError) as raised:
        ccp.load_concatenated_(patched, state)
    assert message in str(raised.value)
    assert all(torch.equal(before[key], value) for key, value in patched.state_dict().items())


def test_wrong_arguments_are_named() -> None:
    state = Port(3, False).state_dict()
    with pytest.raises(ccp.PatchError, match="patch"):
        ccp.load_concatenated(plain(), state)
    patched: Any = ccp.patch(plain(), "stem")
    wrong: Any = "behind"
    with pytest.raises(ccp.ArgumentError, match="coordinates='behind' is a str: write 'last' or"):
        ccp.load_concatenated(patched, state, coordinates=wrong)
    with pytest.raises(ccp.ArgumentError, match=r"state_dict=.* pass a state_dict"):
        ccp.load_concatenated_(patched, wrong)
    with pytest.raises(ccp.WeightsError, match=r"up.weight has shape \(8, 4, 3, 3\)"):
        ccp.load_concatenated(patched, state)  # up is not patched
