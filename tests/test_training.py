"""Coordinate parameters, parameter groups, freezing, optimizers that exist already."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError


class Net(nn.Module):
    """Registered in another order than executed."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 5, 3, groups=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(3, 4, 3)
        self.alias = self.second
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu())
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def patched() -> nn.Module:
    torch.manual_seed(0)
    return ccp.patch(Net(), "all")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 10, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def ids(parameters: list[nn.Parameter]) -> list[int]:
    return [id(parameter) for parameter in parameters]


def test_coord_parameters_come_in_order_of_registration_each_once(patched: nn.Module) -> None:
    expected = [patched.second.coord_weight, patched.first.coord_weight]
    assert ids(ccp.coord_parameters(patched)) == ids(expected)


def test_coord_parameters_of_a_graph_module_include_its_branches() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            kernel = self.second.weight
            return nn.functional.conv2d(self.first(x), kernel).mean((2, 3))

    patched = ccp.patch(fx.symbolic_trace(Functional()), "all")
    named = {id(p): name for name, p in patched.named_parameters()}
    names = [named[id(weight)] for weight in ccp.coord_parameters(patched)]
    assert names == [name for name in named.values() if name.endswith("coord_weight")]
    assert len(names) == 2


def test_coord_parameters_of_a_plain_model_is_an_error() -> None:
    with pytest.raises(PatchError, match="no coordinate layers: patch it first"):
        ccp.coord_parameters(Net())


def test_param_groups_cover_every_parameter_once(patched: nn.Module) -> None:
    groups = ccp.param_groups(patched, lr=1e-3, coord_lr=1e-2)
    assert [group["name"] for group in groups] == ["base", "coords"]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in patched.parameters()}
    assert ids(groups[1]["params"]) == ids(ccp.coord_parameters(patched))


def test_param_groups_leave_weight_decay_off_for_coordinates(patched: nn.Module) -> None:
    groups = ccp.param_groups(patched, lr=1e-3, coord_lr=1e-2, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_param_groups_take_the_optimizers_defaults_for_what_is_not_given(
    patched: nn.Module,
) -> None:
    optimizer = torch.optim.AdamW(ccp.param_groups(patched), lr=0.25, weight_decay=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_coordinate_learning_rate_is_the_others_unless_given(patched: nn.Module) -> None:
    groups = ccp.param_groups(patched, lr=0.125, coord_weight_decay=0.75)
    assert groups[1]["lr"] == 0.125
    assert groups[1]["weight_decay"] == 0.75


def test_param_groups_leave_out_frozen_parameters_and_empty_groups(patched: nn.Module) -> None:
    patched.first.weight.requires_grad_(False)
    base, _ = ccp.param_groups(patched)
    assert id(patched.first.weight) not in ids(base["params"])
    ccp.train_only_coords_(patched)
    groups = ccp.param_groups(patched, lr=1.0)
    assert [group["name"] for group in groups] == ["coords"]


def test_param_groups_of_a_plain_model_is_an_error() -> None:
    with pytest.raises(PatchError, match="patch it first"):
        ccp.param_groups(Net())


def test_train_only_coords_leaves_every_other_weight_bit_unchanged(
    patched: nn.Module, x: Tensor
) -> None:
    assert ccp.train_only_coords_(patched) is patched
    before = copy.deepcopy(dict(patched.named_parameters()))
    optimizer = torch.optim.AdamW(patched.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        step(patched, optimizer, x)
    for name, parameter in patched.named_parameters():
        is_coordinate = name.endswith("coord_weight")
        assert torch.equal(parameter, before[name]) is not is_coordinate, name


def test_train_only_coords_thaws_coordinates_that_were_frozen(patched: nn.Module) -> None:
    patched.requires_grad_(False)
    ccp.train_only_coords_(patched)
    trainable = [name for name, p in patched.named_parameters() if p.requires_grad]
    assert trainable == ["second.coord_weight", "first.coord_weight"]


def test_train_only_coords_of_a_plain_model_freezes_nothing() -> None:
    model = Net()
    with pytest.raises(PatchError, match="patch it first"):
        ccp.train_only_coords_(model)
    assert all(p.requires_grad for p in model.parameters())


def test_built_optimizer_takes_the_coordinates_of_a_model_patched_in_place(x: Tensor) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    step(model, optimizer, x)
    ccp.patch_(model, "all")
    ccp.add_to_optimizer_(optimizer, model, lr=0.5)
    group = optimizer.param_groups[-1]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("coords", 0.5, 0.0)
    assert group["momentum"] == 0.9
    step(model, optimizer, x)
    assert all(weight.any() for weight in ccp.coord_parameters(model))


def test_added_group_has_the_first_groups_learning_rate_by_default(patched: nn.Module) -> None:
    optimizer = torch.optim.Adagrad([patched.fc.weight], lr=0.375)
    ccp.add_to_optimizer_(optimizer, patched, weight_decay=0.25)
    assert optimizer.param_groups[-1]["lr"] == 0.375
    assert optimizer.param_groups[-1]["weight_decay"] == 0.25


def test_optimizer_without_weight_decay_takes_the_coordinates(patched: nn.Module) -> None:
    rprop = torch.optim.Rprop([patched.fc.weight], lr=0.1)
    ccp.add_to_optimizer_(rprop, patched)
    assert "weight_decay" not in rprop.param_groups[-1]


def test_optimizer_gets_only_the_coordinates_that_it_lacks(patched: nn.Module) -> None:
    optimizer = torch.optim.SGD([patched.first.coord_weight], lr=0.1)
    ccp.add_to_optimizer_(optimizer, patched)
    assert ids(optimizer.param_groups[-1]["params"]) == ids([patched.second.coord_weight])


def test_optimizer_that_has_the_coordinates_already_is_refused(patched: nn.Module) -> None:
    optimizer = torch.optim.SGD(ccp.param_groups(patched), lr=0.1)
    with pytest.raises(PatchError, match="has the coordinate weights already"):
        ccp.add_to_optimizer_(optimizer, patched)
    assert len(optimizer.param_groups) == 2


def test_adding_a_plain_model_is_an_error() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PatchError, match="patch it first"):
        ccp.add_to_optimizer_(optimizer, model)
