"""A weight that changes beside its trained coordinates: folded into, merged into, or trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from watched_models import FEATURES, IMAGES, ConvBN, Net, fold_in_place, told, trained

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError


def train(model: Any, steps: int = 2, lr: float = 0.01) -> None:
    """Some steps of all that may be trained; the model stays in training mode."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


def scales(block: Any) -> Tensor:
    return (block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()).detach()


@torch.no_grad()
def fold_alike(model: nn.Module, *, through_data: bool) -> None:
    """A correct fold by hand: the coordinate weight is scaled by the same factors."""
    for block in model.modules():
        if isinstance(block, ConvBN):
            scale = scales(block).view(-1, 1, 1, 1)
            bias = block.folded_weight()[1]
            for weight in (block.conv.weight, block.conv.coord_weight):
                (weight.data if through_data else weight).mul_(scale)
            block.conv.bias = nn.Parameter(bias)
            block.bn = nn.Identity()


class TestFoldedNorms:
    """Batch norms that are folded into convolutions that stay."""

    @pytest.mark.parametrize("evaluated", [True, False])
    def test_in_training_mode(self, evaluated: bool) -> None:
        """Whether the coordinates were scaled too cannot be told: a warning."""
        model = trained(Net())
        train(model)
        fold_in_place(model)
        model.train(not evaluated)
        error, said = told(lambda: model(IMAGES))
        assert error == ""
        assert len(said) == 1
        assert "the weight has changed at stem.conv, body.0.conv, body.2.conv" in said[0]
        assert told(lambda: model(IMAGES)) == ("", [])

    def test_in_training_mode_is_told_by_a_save(self, tmp_path: Path) -> None:
        model = trained(Net())
        train(model)
        fold_in_place(model)
        model.eval()
        _, said = told(lambda: ccp.save_coords(model, tmp_path / "coords"))
        assert len(said) == 1
        assert "cannot be told" in said[0]

    @pytest.mark.parametrize("use", ["forward", "save_coords"])
    def test_a_norm_that_is_reset(self, use: str, tmp_path: Path) -> None:
        """The norm stays, and its effect is in the weight and in a new bias."""
        model = trained(Net())
        model(IMAGES)
        with torch.no_grad():
            for block in model.modules():
                if isinstance(block, ConvBN):
                    weight, bias = block.folded_weight()
                    block.conv.weight.copy_(weight)  # autograd is told
                    block.conv.bias = nn.Parameter(bias)
                    block.bn.reset_parameters()
        for _ in range(2):
            with pytest.raises(PatchError, match=r"left behind at stem\.conv \(by"):
                model(IMAGES) if use == "forward" else ccp.save_coords(model, tmp_path / "coords")

    @pytest.mark.parametrize("through_data", [True, False])
    @pytest.mark.parametrize("only_coords", [True, False])
    def test_coordinates_scaled_alike_after_a_training(
        self, only_coords: bool, through_data: bool
    ) -> None:
        model = trained(Net())
        if only_coords:
            ccp.train_only_coords_(model)
        train(model, lr=1.0 if only_coords else 0.01)
        model.eval()
        expected = copy.deepcopy(model)(IMAGES)
        fold_alike(model, through_data=through_data)
        assert told(lambda: torch.testing.assert_close(model(IMAGES), expected)) == ("", [])

    def test_coordinates_not_scaled_after_their_training(self) -> None:
        model = trained(Net())
        ccp.train_only_coords_(model)
        train(model)
        model.eval()
        fold_in_place(model)
        with pytest.raises(PatchError, match=r"left behind at stem\.conv \(by"):
            model(IMAGES)

    def test_of_coordinates_in_training_and_in_the_training_flag(self) -> None:
        """The weight was scaled through .data before eval(): the coordinates are not renewed."""
        model = trained(Net())
        ccp.train_only_coords_(model)
        train(model)
        fold_alike(model, through_data=True)
        model.eval()
        error, said = told(lambda: model(IMAGES))
        assert error == ""
        assert len(said) == 1


class Rep(nn.Module):
    """Branches, an identity among them perhaps, that become one in the first of them."""

    def __init__(self, identity: bool, bias: bool = False) -> None:
        super().__init__()
        self.large: Any = ConvBN(8, 8, 3)
        self.small: Any = ConvBN(8, 8, 1)
        self.identity: Any = nn.BatchNorm2d(8) if identity else None
        if bias:
            self.large.conv.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        for branch in (self.small, self.identity):
            y = y if branch is None else y + branch(x)
        return y

    @torch.no_grad()
    def merge_(self, through_data: bool = True, carry: bool = False) -> None:
        conv, norm, small = self.large.conv, self.large.bn, self.small
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            *norm.parameters(),
        )
        small_weight, small_bias = small.folded_weight()
        weight, bias = weight + F.pad(small_weight, [1] * 4), bias + small_bias
        if self.identity is not None:
            norm = self.identity
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight[range(8), range(8), 1, 1] += scale
            bias += norm.bias - norm.running_mean * scale
        if carry:
            scaled = [
                each.conv.coord_weight * scales(each).view(-1, 1, 1, 1)
                for each in (self.large, small)
            ]
            coords = scaled[0] + F.pad(scaled[1], [1] * 4)
            (conv.coord_weight.data if through_data else conv.coord_weight).copy_(coords)
        (conv.weight.data if through_data else conv.weight).copy_(weight)
        if conv.bias is None:
            conv.bias = nn.Parameter(bias)
        else:
            conv.bias.data.copy_(bias)
        self.large.bn, self.small, self.identity = nn.Identity(), None, None


class TestMergedBranches:
    """Branches that are summed into one that stays."""

    @pytest.mark.parametrize("through_data", [True, False])
    @pytest.mark.parametrize("where", ["all", "*.large.conv", "*.small.conv"])
    @pytest.mark.parametrize("identity", [False, True])
    def test_without_coordinates(self, identity: bool, where: str, through_data: bool) -> None:
        model = trained(nn.Sequential(Rep(identity), Rep(identity)), where)
        model(FEATURES)
        for block in model:
            block.merge_(through_data)
        for _ in range(2):
            with pytest.raises(PatchError, match=r"left behind at 0\."):
                model(FEATURES)
        ccp.forget_left_behind_(model)
        assert told(lambda: model(FEATURES)) == ("", [])

    def test_into_one_that_had_a_bias(self) -> None:
        model = trained(Rep(True, bias=True), "large.conv")
        model(FEATURES)
        model.merge_()
        error, said = told(lambda: model(FEATURES))
        assert error == ""
        assert ["the weight has changed at large.conv" in text for text in said] == [True]

    @pytest.mark.parametrize("through_data", [True, False])
    @pytest.mark.parametrize("identity", [False, True])
    def test_with_coordinates(self, identity: bool, through_data: bool) -> None:
        model = trained(nn.Sequential(Rep(identity), Rep(identity)))
        for block in model:
            block.small.conv.coord_padding = block.large.conv.coord_padding
        model(FEATURES)
        for block in model:
            block.merge_(through_data, carry=True)
        assert told(lambda: model(FEATURES)) == ("", [])


def new_biases(model: Any) -> None:
    """For a training from here on; the norms stay."""
    for block in model.modules():
        if isinstance(block, ConvBN):
            block.conv.bias = nn.Parameter(torch.zeros(8))


def without_norms(model: Any) -> None:
    for block in model.modules():
        if isinstance(block, ConvBN):
            block.bn = nn.Identity()


QUIET: dict[str, list[Callable[[Any], object]]] = {
    "new biases that are trained": [new_biases, train],
    "norms taken out, then a training": [without_norms, train],
    "a training, then norms taken out": [train, without_norms],
    "norms and biases, then a training": [without_norms, new_biases, train],
    "other norms, and a checkpoint": [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda model: model.load_state_dict(trained(Net()).state_dict(), strict=False),
    ],
    "values swapped through .data": [
        lambda model: [p.data.copy_(1.5 * p.data + 0.1) for p in model.parameters()],
        without_norms,
    ],
}


@pytest.mark.parametrize("what", QUIET)
@pytest.mark.parametrize("evaluated", [True, False])
def test_no_alarm_of(what: str, evaluated: bool) -> None:
    model = trained(Net())
    model(IMAGES)

    def run() -> None:
        for step in QUIET[what]:
            step(model)
        model.train(not evaluated)
        for used in (model, copy.deepcopy(model)):
            used(IMAGES)
            used.state_dict()
        model.eval()(IMAGES)

    assert told(run) == ("", [])
