"""FSDP2 (``fully_shard``), and FSDP1: weights spread over two processes train as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError, WeightsError
from tools.ranks import RANKS, Ranks
from tools.steps import (
    STARTS,
    Net,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    loss_of,
    patched_net,
    train,
    train_concatenating,
)

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)


def sharded(
    model: nn.Module, *, each_layer: bool = False, policy: MixedPrecisionPolicy | None = None
) -> nn.Module:
    """The model spread over the ranks, in evaluation mode: batch norms see shards of a batch."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.conv1, model.conv2, model.fc1) if each_layer else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return fully_shard(model.eval(), mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def train_sharded(rank: int, scale: float, each_layer: bool) -> dict[str, Tensor]:
    model = sharded(patched_net(scale), each_layer=each_layer)
    assert all(isinstance(weight, DTensor) for weight in ccp.coord_parameters(model))
    train(model, [(images[rank::RANKS], targets[rank::RANKS]) for images, targets in batches()])
    return whole_state(model)


@pytest.mark.parametrize("each_layer", [False, True], ids=["whole model", "each layer"])
@pytest.mark.parametrize("start", STARTS)
def test_sharded_training_equals_training_in_one_process(
    ranks: Ranks, start: str, each_layer: bool
) -> None:
    first, second = ranks.run(train_sharded, STARTS[start], each_layer)
    before = patched_net(STARTS[start]).eval()
    expected = train_concatenating(before)
    assert_same_state(expected, first)
    assert_same_state(first, second, tolerance=0.0)
    assert_coordinates_trained(expected, before)


def bfloat16_outputs(rank: int, scale: float) -> list[Tensor]:
    """Of the patched model and its plain form, both with convolutions in bfloat16."""
    patched = patched_net(scale)
    plain = ccp.unpatch(patched, discard=True)
    images = batches()[0][0]
    with torch.no_grad():
        return [
            sharded(model, each_layer=True, policy=BFLOAT16)(images) for model in (patched, plain)
        ]


def test_mixed_precision_keeps_the_bits_at_zero(ranks: Ranks) -> None:
    for patched, plain in ranks.run(bfloat16_outputs, 0.0):
        assert torch.equal(patched, plain)
    for patched, plain in ranks.run(bfloat16_outputs, 0.2):
        assert not torch.equal(patched, plain)


def save_and_load(rank: int, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States of a sharded model that was saved, and of another one that loaded the file."""
    saved = sharded(patched_net(0.2), each_layer=True)
    ccp.save_coords(saved, f"{path}.{rank}", include_batch_norm=True)
    loaded = sharded(patched_net(0.0))
    ccp.load_coords_(loaded, f"{path}.{rank}")
    return whole_state(saved), whole_state(loaded)


def test_coordinate_weights_are_gathered_for_the_file_and_spread_from_it(
    ranks: Ranks, tmp_path: Path
) -> None:
    expected = patched_net(0.2)
    for rank, (saved, loaded) in enumerate(ranks.run(save_and_load, str(tmp_path / "coords"))):
        assert_same_state(expected, saved, tolerance=0.0)
        assert_same_state(expected, loaded, tolerance=0.0)
        plain = ccp.unpatch(expected, discard=True)
        fresh = ccp.load_coords(plain, tmp_path / f"coords.{rank}")
        assert_same_state(expected, fresh, tolerance=0.0)


def load_whole_state(rank: int) -> dict[str, Tensor]:
    model = sharded(patched_net(0.2), each_layer=True)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, patched_net(0.0).state_dict(), options=options)
    loss_of(model, batches()[0]).backward()
    return whole_state(model)


def test_whole_state_dict_loads_onto_a_sharded_model(ranks: Ranks) -> None:
    for state in ranks.run(load_whole_state):
        assert_same_state(patched_net(0.0), state, tolerance=0.0)


def patching_error(rank: int) -> tuple[str, list[str]]:
    """What patch_ says about a sharded model, and the parameters that the model has then."""
    model = sharded(Net(), each_layer=True)
    try:
        ccp.patch_(model, "all")
    except SelectionError as error:
        return str(error), [name for name, _ in model.named_parameters()]
    return "", []


def test_sharded_model_is_not_patched(ranks: Ranks) -> None:
    for message, names in ranks.run(patching_error):
        assert "patch the model before sharding it" in message
        assert names == [name for name, _ in Net().named_parameters()]


def train_flattened(rank: int, folder: str) -> dict[str, Tensor]:
    """FSDP1: ``save_coords`` refuses shards of flattened weights, and saves them gathered."""
    model = patched_net(0.2).eval()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    shard = [(images[rank::RANKS], targets[rank::RANKS]) for images, targets in batches()]
    train(wrapped, shard, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    path = Path(folder, f"coords.{rank}")
    with pytest.raises(WeightsError, match="flattened"):
        ccp.save_coords(wrapped, path)
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        ccp.save_coords(wrapped, path)
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_flattened_weights_of_fsdp1_train_and_are_saved_once_gathered(
    ranks: Ranks, tmp_path: Path
) -> None:
    expected = patched_net(0.2).eval()
    train(expected, optimizer=torch.optim.SGD(expected.parameters(), lr=0.1))
    parameters = dict(expected.named_parameters())
    for rank, found in enumerate(ranks.run(train_flattened, str(tmp_path))):
        assert_same_state(parameters, found)
        plain = ccp.unpatch(patched_net(0.0))
        plain.load_state_dict({k: v for k, v in found.items() if "coord" not in k}, strict=False)
        loaded = ccp.load_coords(plain, tmp_path / f"coords.{rank}")
        assert_same_state(found, dict(loaded.named_parameters()), tolerance=0.0)
