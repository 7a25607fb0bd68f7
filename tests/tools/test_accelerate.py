"""Hugging Face Accelerate on patched models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError, WeightsError
from tools.steps import (
    STARTS,
    Net,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    fill_coords_,
    loss_of,
    patched_net,
    sgd,
    train_concatenating,
)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """An accelerator's settings are the process's: none are left over."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def train_accelerated(accelerator: Accelerator, net: nn.Module) -> tuple[nn.Module, object]:
    model, optimizer = accelerator.prepare(net, sgd(net))
    for batch in batches():
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, batch))
            accelerator.clip_grad_norm_(model.parameters(), 1e3)
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("start", STARTS)
def test_prepared_model_trains_what_plain_steps_train(start: str) -> None:
    accelerator = Accelerator(cpu=True)
    model, _ = train_accelerated(accelerator, patched_net(STARTS[start]))
    before = patched_net(STARTS[start])
    bare = accelerator.unwrap_model(model)
    assert type(bare) is Net
    assert_same_state(train_concatenating(before), bare)
    assert_coordinates_trained(bare, before)


def test_state_is_saved_and_loaded_with_coordinates(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = train_accelerated(accelerator, patched_net(0.2))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path / "model"))
    fill_coords_(model, 0.7)
    optimizer.state.clear()
    accelerator.load_state(str(tmp_path / "state"))
    assert_same_state(expected, model, tolerance=0.0)
    coords = ccp.coord_parameters(model)
    assert all(optimizer.state[weight]["momentum_buffer"].any() for weight in coords)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert_same_state(expected, stored, tolerance=0.0)


def test_coordinates_saved_from_a_prepared_model_load_onto_the_plain_one(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, _ = train_accelerated(accelerator, patched_net(0.2))
    assert model(batches()[0][0]).dtype == torch.float32
    path = ccp.save_coords(model, tmp_path / "coords.safetensors")
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    plain = ccp.unpatch(bare, discard=True)
    assert_same_state(bare, ccp.load_coords(plain, path), tolerance=0.0)


def test_model_patched_after_prepare_sees_coordinates() -> None:
    torch.manual_seed(0)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(Net())
    plain = model(batches()[0][0])
    ccp.patch_(model, "all")
    assert torch.equal(model(batches()[0][0]), plain)
    fill_coords_(model, 0.2)
    assert not torch.allclose(model(batches()[0][0]), plain)


def test_offloaded_model_runs_but_is_not_saved_without_its_values(tmp_path: Path) -> None:
    model = patched_net(0.2).eval()
    with torch.no_grad():
        expected = model(batches()[0][0])
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.conv1.coord_weight.is_meta
        assert torch.equal(model(batches()[0][0]), expected)
    with pytest.raises(WeightsError, match=r"conv1 has no values here.*remove_hook"):
        ccp.save_coords(model, tmp_path / "coords.safetensors")
    assert not list(tmp_path.iterdir())
    remove_hook_from_submodules(model)
    ccp.save_coords(model, tmp_path / "coords.safetensors")


def test_offloaded_model_is_not_patched() -> None:
    model = cpu_offload(Net(), execution_device=torch.device("cpu"))
    with pytest.raises(SelectionError, match=r"conv1: its forward is replaced.*patch the model"):
        ccp.patch_(model, "all")
