"""channels_last: patched layers keep the memory format, and train the same in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from tools.steps import (
    STARTS,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    patched_net,
    train,
    train_concatenating,
)

CHANNELS_LAST = torch.channels_last


def is_channels_last(tensor: Tensor) -> bool:
    contiguous = tensor.is_contiguous(memory_format=CHANNELS_LAST)
    return contiguous and not tensor.is_contiguous()


def channels_last_batches() -> list[tuple[Tensor, Tensor]]:
    return [(images.to(memory_format=CHANNELS_LAST), targets) for images, targets in batches()]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("start", STARTS)
def test_outputs_keep_the_format(start: str, training: bool) -> None:
    model = patched_net(STARTS[start]).to(memory_format=CHANNELS_LAST).train(training)
    images = channels_last_batches()[0][0]
    for _ in range(2):  # in evaluation the second call uses a map that was kept
        with torch.set_grad_enabled(training):
            assert is_channels_last(model.conv1(images))
            assert is_channels_last(model.features(images))


@pytest.mark.parametrize("patched_after", [False, True], ids=["patched before", "patched after"])
def test_same_bits_as_the_plain_model_in_that_format(patched_after: bool) -> None:
    plain = ccp.unpatch(patched_net(0.0)).to(memory_format=CHANNELS_LAST)
    if patched_after:
        patched = ccp.patch(plain, "all")
    else:
        patched = patched_net(0.0).to(memory_format=CHANNELS_LAST)
    assert is_channels_last(patched.conv1.weight)
    images = channels_last_batches()[0][0]
    assert torch.equal(patched(images), plain(images))
    assert torch.equal(patched.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("start", STARTS)
def test_training_in_channels_last_equals_training_in_channels_first(start: str) -> None:
    before = patched_net(STARTS[start])
    expected = train_concatenating(before)
    trained = train(before.to(memory_format=CHANNELS_LAST), channels_last_batches())
    assert is_channels_last(trained.conv2.coord_weight)
    assert_same_state(expected, trained)
    assert_coordinates_trained(trained, patched_net(STARTS[start]))


def test_saved_coordinates_are_the_same_in_either_format(tmp_path: Path) -> None:
    model: nn.Module = patched_net(0.2)
    first = ccp.save_coords(model, tmp_path / "first").read_bytes()
    last = ccp.save_coords(model.to(memory_format=CHANNELS_LAST), tmp_path / "last").read_bytes()
    assert first == last
