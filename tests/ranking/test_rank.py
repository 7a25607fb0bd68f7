"""Rankings of small models whose answer is known, and what they leave of the model."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.ranking.batches import split
from coordconv_patch.ranking.probe import Probe, Recipe

Batch = tuple[Tensor, Tensor]


class Blind(nn.Module):
    """Sees each pixel alone and takes the maximum, so it cannot know of places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(images)).relu()).relu().amax((2, 3)))


def pixels(count: int = 12) -> list[Batch]:
    """One bright spot of some brightness, and where it is, -1 to 1."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        places = torch.randint(8, (16, 2), generator=generator)
        brightness = 4 + 4 * torch.rand(16, generator=generator)
        images = torch.zeros(16, 1, 8, 8)
        images[torch.arange(16), 0, places[:, 1], places[:, 0]] = brightness
        batches.append((images, places / 3.5 - 1))
    return batches


def position_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(10 * model(batch[0]), batch[1])


def brightness_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of something that no place tells."""
    brightness = batch[0].sum((1, 2, 3))
    return F.mse_loss(model(batch[0])[:, 0], brightness / 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Blind()


@pytest.fixture(scope="module")
def ranking(model: nn.Module) -> ccp.Ranking:
    return ccp.rank(model, pixels(32), position_loss, lr=1e-2, coord_lr=3e-2)


def test_it_names_the_sites_that_help_and_patch_takes_them(
    model: nn.Module, ranking: ccp.Ranking
) -> None:
    assert {row.part.name for row in ranking.rows} == {"first", "second"}
    assert ranking.unreached == ("unused",)
    helpful = ranking.worthwhile()
    assert helpful
    assert set(coord_layers(ccp.patch(model, where=helpful))) == set(helpful)
    assert ranking.top(2) == [row.part.name for row in ranking.rows]
    assert ranking.rows[0].gain.value > 0.1 * ranking.plain[1]
    assert "worthwhile: " in str(ranking)


def test_scrambled_coordinates_are_the_control(ranking: ccp.Ranking) -> None:
    assert ranking.scrambled is not None
    assert ranking.scrambled.value < ranking.rows[0].gain.value
    assert "scrambled coordinates at" in ranking.verdict()


def test_it_says_nowhere_where_places_do_not_matter(model: nn.Module) -> None:
    model = copy.deepcopy(model)  # an untrained one learns faster with any more weights
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in pixels(200):
        optimizer.zero_grad()
        brightness_loss(model, batch).backward()
        optimizer.step()
    ranking = ccp.rank(model, pixels(32), brightness_loss, lr=1e-2, coord_lr=3e-2)
    assert ranking.worthwhile() == []
    assert ranking.scrambled is None
    assert str(ranking).count("nowhere: no gain lies above 0") == 1
    with pytest.raises(ccp.SelectionError, match="selects nothing"):
        ccp.patch(model, where=ranking.worthwhile())


def test_it_costs_no_more_than_it_says(model: nn.Module) -> None:
    trained = measured = 0

    def counted(copy: nn.Module, batch: Batch) -> Tensor:
        nonlocal trained, measured
        trained += torch.is_grad_enabled()
        measured += not torch.is_grad_enabled()
        return position_loss(copy, batch)

    ranking = ccp.rank(model, pixels(), counted, lr=1e-2)
    beside = 1 + 3  # the first look, and the loss before training
    assert trained + (measured - beside) / 3 <= ranking.cost + 1e-6
    assert ranking.cost <= 100 * len(ranking.rows)


def test_nothing_of_the_model_changes() -> None:
    torch.manual_seed(1)
    model = Blind()
    model.norm.eval()
    model.second.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.first.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model)
    hooks = dict(model.first._forward_hooks)
    tensors = [*model.parameters(), *model.buffers()]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)

    def noisy(copy: nn.Module, batch: Batch) -> Tensor:
        scale = 1 + 0.01 * (torch.rand(()) + random.random() + np.random.rand())
        return position_loss(copy, batch) * scale

    ccp.rank(model, pixels(8), noisy, steps=3)
    drawn = (torch.rand(()).item(), random.random(), np.random.rand())
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert dict(model.first._forward_hooks) == hooks
    assert model.head.weight.grad is not None
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight"]


class Shared(nn.Module):
    """Calls a functional convolution, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 1, 1))
        self.shared = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.conv2d(images, self.weight).relu()
        return self.head(self.shared(self.shared(x).relu()).relu().amax((2, 3)))


def test_functional_and_shared_sites_count() -> None:
    torch.manual_seed(0)
    model = Shared()
    ranking = ccp.rank(model, pixels(32), position_loss, lr=1e-2, coord_lr=3e-2)
    assert [row.part.name for row in sorted(ranking.rows, key=lambda row: row.depth)] == [
        "weight",
        "shared",
    ]
    assert all(row.gain.value > 0 for row in ranking.rows)
    assert set(coord_layers(ccp.patch(model, where=ranking.top(2)))) == {"weight", "shared"}


def test_a_run_is_that_of_a_model_patched_there_alone(model: nn.Module) -> None:
    """Against a loop of its own, with no other site's zero weights beside it."""
    batches = split(pixels())
    recipe = Recipe(5, 1e-2, {"first": 2e-2, "second": 3e-3})
    probe = Probe(
        ccp.patch(model, ["first", "second"]), ("first", "second"), position_loss, *batches, recipe
    )
    for where, rate in (("first", 2e-2), ("second", 3e-3), (None, 0.0)):
        alone = copy.deepcopy(model) if where is None else ccp.patch(model, where)
        alone.norm.eval()
        groups: list[Any] = [{"params": list(alone.parameters()), "lr": 1e-2}]
        if where is not None:
            groups = ccp.param_groups(alone, lr=1e-2, coord_lr=rate)
        optimizer = torch.optim.Adam(groups)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(7))[:5]
        for step, index in enumerate(order):
            for group, rate_now in zip(optimizer.param_groups, (1e-2, rate), strict=False):
                group["lr"] = rate_now * (1 - step / 4 * (1 - 1 / 5))
            loss = position_loss(alone, batches.training[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            expected = [float(position_loss(alone, batch)) for batch in batches.held_out]
        found = probe.losses(() if where is None else (where,), seed=7)
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


def test_a_picture_names_the_stages_along_the_depth(ranking: ccp.Ranking, tmp_path: Path) -> None:
    path = tmp_path / "ranking.svg"
    ranking.plot(path)
    drawn = path.read_text(encoding="utf-8")
    assert "Coordinates help at" in drawn
    assert drawn.index("<!-- first") < drawn.index("<!-- second")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batches": pixels(7)}, "7 of them are too few"),
        ({"batches": 5}, "pass a list of batches"),
        ({"loss_fn": None}, "pass a function"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, "a tensor of one number"),
        ({"by": "layer"}, "write 'site' or 'stage'"),
        ({"seeds": 1}, "a whole number, 2 or more"),
        ({"steps": 0}, "a whole number, 1 or more"),
        ({"lr": math.nan}, "a finite number"),
    ],
)
def test_bad_arguments_are_named(model: nn.Module, changed: Any, message: str) -> None:
    arguments = {"batches": pixels(8), "loss_fn": position_loss} | changed
    with pytest.raises(ccp.ArgumentError, match=message):
        ccp.rank(model, **arguments)


def test_a_loss_of_another_model_is_told(model: nn.Module) -> None:
    with pytest.raises(ccp.PatchError, match="it must call the model that it is given"):
        ccp.rank(model, pixels(8), lambda _, batch: position_loss(model, batch))


def test_a_loss_that_explodes_is_told(model: nn.Module) -> None:
    with pytest.raises(ccp.PatchError, match="the held-out loss became nan after 3 steps"):
        ccp.rank(model, pixels(8), position_loss, lr=1e30, steps=3)


def test_top_refuses_more_rows_than_there_are(ranking: ccp.Ranking) -> None:
    for count in (0, 3, True):
        with pytest.raises(ccp.ArgumentError, match="write 1 to 2"):
            ranking.top(count)
