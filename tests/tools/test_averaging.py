"""Averages of weights: torch's AveragedModel and timm's ModelEmaV3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from concat_model import concatenating
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import coordconv_patch as ccp
from tools.steps import STARTS, Net, batches, fill_coords_, loss_of, patched_net, sgd, train

DECAY = 0.5


def coordinates_step_by_step(model: nn.Module, average: nn.Module) -> list[Tensor]:
    """Train, update the average after each step; the first coordinate weight after each step."""
    optimizer = sgd(model)
    update = average.update if isinstance(average, ModelEmaV3) else average.update_parameters
    seen = []
    for batch in batches():
        train(model, [batch], optimizer)
        update(model)
        seen.append(model.conv1.coord_weight.detach().clone())
    assert float((seen[0] - seen[-1]).abs().max()) > 1e-3
    return seen


def decayed(start: Tensor, values: list[Tensor]) -> Tensor:
    for value in values:
        start = DECAY * start + (1 - DECAY) * value
    return start


@pytest.mark.parametrize("start", STARTS)
def test_averaged_model_averages_coordinates(start: str) -> None:
    model = patched_net(STARTS[start])
    average = AveragedModel(model)
    seen = coordinates_step_by_step(model, average)
    torch.testing.assert_close(average.module.conv1.coord_weight, torch.stack(seen).mean(0))
    update_bn(batches(), average)
    assert average.module.norm1.running_mean.any()


@pytest.mark.parametrize("start", STARTS)
def test_exponential_average_of_torch_includes_coordinates(start: str) -> None:
    model = patched_net(STARTS[start])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    seen = coordinates_step_by_step(model, average)
    expected = decayed(seen[0], seen[1:])  # the first update copies
    torch.testing.assert_close(average.module.conv1.coord_weight, expected)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_timms_average_includes_coordinates(start: str, foreach: bool) -> None:
    model = patched_net(STARTS[start])
    begin = model.conv1.coord_weight.detach().clone()
    average = ModelEmaV3(model, decay=DECAY, foreach=foreach)
    seen = coordinates_step_by_step(model, average)
    expected = decayed(begin, seen)
    torch.testing.assert_close(average.module.conv1.coord_weight, expected)


@torch.no_grad()
@pytest.mark.parametrize("make", [AveragedModel, ModelEmaV3])
def test_outputs_of_an_average_follow_its_updates(make: type[nn.Module]) -> None:
    model = patched_net(0.2)
    average = make(model).eval()
    update = average.update if isinstance(average, ModelEmaV3) else average.update_parameters
    images = batches()[0][0]
    for scale in (0.4, 0.0, 0.6):
        before = average.module(images)  # a layer keeps its map from here
        fill_coords_(model, scale)
        update(model)
        after = average.module(images)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, concatenating(average.module)(images))


@pytest.mark.parametrize("make", [AveragedModel, ModelEmaV3])
def test_coordinates_saved_from_an_average_load_onto_the_bare_model(
    make: type[nn.Module], tmp_path: Path
) -> None:
    model = patched_net(0.2)
    average = make(model)
    coordinates_step_by_step(model, average)
    ccp.save_coords(average, tmp_path / "coords.safetensors")
    plain = ccp.unpatch(average.module, discard=True)
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    assert torch.equal(loaded.conv2.coord_weight, average.module.conv2.coord_weight)


@pytest.mark.parametrize("make", [AveragedModel, ModelEmaV3])
def test_average_made_before_patching_fails_at_its_first_update(make: type[nn.Module]) -> None:
    model = Net()
    average = make(model)
    ccp.patch_(model, "all")
    train(model)
    update = average.update if isinstance(average, ModelEmaV3) else average.update_parameters
    with pytest.raises(RuntimeError, match=r"size of tensor|doesn't match"):
        update(model)


@pytest.mark.parametrize("make", [AveragedModel, ModelEmaV3])
def test_average_made_before_patching_works_once_it_is_patched_too(make: type[nn.Module]) -> None:
    model = Net()
    average = make(model)
    for net in (model, average.module):
        ccp.patch_(net, "all")
    coordinates_step_by_step(model, average)
    assert average.module.conv1.coord_weight.any()
    assert torch.isfinite(loss_of(average.module, batches()[0]))
