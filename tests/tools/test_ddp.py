"""DistributedDataParallel: two processes train what one process trains on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from tools.ranks import RANKS, Ranks
from tools.steps import (
    STARTS,
    Batch,
    Net,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    loss_of,
    patched_net,
    sgd,
    train,
    train_concatenating,
)


def shard(rank: int) -> list[Batch]:
    """Every second sample of each batch."""
    return [(images[rank::RANKS], targets[rank::RANKS]) for images, targets in batches()]


def train_ddp(rank: int, scale: float, options: dict[str, Any]) -> dict[str, Tensor]:
    model = patched_net(scale).eval()  # a shard has other batch statistics than the batch
    train(DistributedDataParallel(model, **options), shard(rank), sgd(model))
    return model.state_dict()


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", STARTS)
def test_two_ranks_train_what_one_process_trains(ranks: Ranks, start: str, options: str) -> None:
    first, second = ranks.run(train_ddp, STARTS[start], OPTIONS[options])
    before = patched_net(STARTS[start]).eval()
    expected = train_concatenating(before)
    assert_same_state(expected, first)
    assert_same_state(first, second, tolerance=0.0)
    assert_coordinates_trained(expected, before)


def test_synchronised_batch_norm_is_converted_beside_patched_layers() -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(patched_net(0.2))
    assert isinstance(converted.norm1, nn.SyncBatchNorm)
    assert isinstance(converted.conv1, ccp.CoordConv2d)
    # On the CPU it trains in evaluation mode only.
    expected = train_concatenating(patched_net(0.2).eval())
    assert_same_state(expected, train(converted.eval()))


class Branching(Net):
    """Its second convolution is not reached."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.norm1(self.conv1(x)).mean((2, 3))).relu())


def train_branching(rank: int, find_unused: bool) -> str | dict[str, Tensor]:
    torch.manual_seed(0)
    model = ccp.patch(Branching(), "all").eval()
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    try:
        train(wrapped, shard(rank), sgd(model))
    except RuntimeError as error:
        return str(error)
    return model.state_dict()


def test_coordinates_that_are_not_reached_follow_ddps_own_rule(ranks: Ranks) -> None:
    for message in ranks.run(train_branching, False):
        assert "find_unused_parameters=True" in message
    torch.manual_seed(0)
    expected = train_concatenating(ccp.patch(Branching(), "all").eval())
    for state in ranks.run(train_branching, True):
        assert_same_state(expected, state)
        assert not state["conv2.coord_weight"].any()


def save_from_wrapper(rank: int, folder: str) -> dict[str, Tensor]:
    """Rank 0 saves, as is usual; its file then goes onto the wrapped models of both."""
    model = patched_net(0.2).eval()
    wrapped = DistributedDataParallel(model)
    train(wrapped, shard(rank), sgd(model))
    path = Path(folder, "coords.safetensors")
    if rank == 0:
        ccp.save_coords(wrapped, path)
    torch.distributed.barrier()
    trained = model.conv1.coord_weight.detach().clone()
    with torch.no_grad():
        model.conv1.coord_weight.zero_()
    ccp.load_coords_(wrapped, path)
    assert torch.equal(model.conv1.coord_weight, trained)
    return model.state_dict()


def test_coordinates_saved_from_the_wrapper_load_onto_the_bare_model(
    ranks: Ranks, tmp_path: Path
) -> None:
    state, _ = ranks.run(save_from_wrapper, str(tmp_path))
    plain = Net()
    plain.load_state_dict({k: v for k, v in state.items() if not k.endswith("coord_weight")})
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    assert_same_state(state, loaded, tolerance=0.0)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    nn.modules.utils.consume_prefix_in_state_dict_if_present(prefixed, "module.")
    patched = patched_net(0.0)
    patched.load_state_dict(prefixed)
    assert_same_state(state, patched, tolerance=0.0)


def patch_wrapped(rank: int, path: str) -> list[str]:
    """What the package says about changing a wrapped model, and which parameters it has then."""
    wrapped = DistributedDataParallel(Net())
    patched = DistributedDataParallel(patched_net(0.0))
    messages = []
    for attempt in (
        lambda: ccp.patch(wrapped, "all"),
        lambda: ccp.patch_(wrapped, "all"),
        lambda: ccp.load_coords_(wrapped, path, check_base=False),
        lambda: ccp.unpatch_(patched),
    ):
        try:
            attempt()
        except PatchError as error:
            messages.append(str(error))
        else:
            messages.append("no error")
    assert [name for name, _ in wrapped.module.named_parameters()] == [
        name for name, _ in Net().named_parameters()
    ]
    loss_of(patched, batches()[0]).backward()
    assert patched.module.conv1.coord_weight.grad is not None
    return messages


def test_wrapped_model_is_not_patched_because_ranks_would_drift_apart(
    ranks: Ranks, tmp_path: Path
) -> None:
    path = ccp.save_coords(patched_net(0.2), tmp_path / "coords.safetensors")
    for messages in ranks.run(patch_wrapped, str(path)):
        assert len(messages) == 4
        for message in messages:
            assert "DistributedDataParallel" in message
            assert "before" in message
