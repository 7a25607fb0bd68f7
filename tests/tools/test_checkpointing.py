"""Gradient checkpointing: recomputed activations give the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import SegformerConfig, SegformerForImageClassification

import coordconv_patch as ccp
from tools.steps import (
    STARTS,
    assert_coordinates_trained,
    assert_same_state,
    fill_coords_,
    patched_net,
    train,
    train_concatenating,
)


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.train().zero_grad()
    torch.manual_seed(5)  # dropout
    output = model(images)
    output = output if isinstance(output, Tensor) else output.logits
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["default", "reentrant"])
@pytest.mark.parametrize("start", STARTS)
def test_checkpointed_features_train_the_same(start: str, reentrant: bool) -> None:
    model = patched_net(STARTS[start]).eval()  # or each batch would count twice in the norms
    before = patched_net(STARTS[start])
    expected = train_concatenating(model)
    features = model.features
    model.features = lambda x: checkpoint(
        features, x.requires_grad_(reentrant), use_reentrant=reentrant
    )
    assert_same_state(expected, train(model))
    assert_coordinates_trained(model, before)


def test_checkpoint_wrappers_train_the_same_and_are_seen_through(tmp_path) -> None:
    model = patched_net(0.2)
    expected = train_concatenating(model)
    model.conv1, model.conv2 = checkpoint_wrapper(model.conv1), checkpoint_wrapper(model.conv2)
    train(model)
    assert_same_state(expected, model)  # the wrapper leaves its name out of the state_dict
    ccp.save_coords(model, tmp_path / "coords.safetensors")
    plain = ccp.unpatch(patched_net(0.2), discard=True)
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors", check_base=False)
    assert torch.equal(loaded.conv2.coord_weight, model.conv2.coord_weight)


def timm_model(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=5, drop_rate=0.2)


def segformer() -> nn.Module:
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=5,
    )
    return SegformerForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]] = {
    "resnet10t": (lambda: timm_model("resnet10t"), lambda m: m.set_grad_checkpointing(True)),
    "convnext_atto": (
        lambda: timm_model("convnext_atto"),
        lambda m: m.set_grad_checkpointing(True),
    ),
    "mobilenetv3_small_050": (
        lambda: timm_model("mobilenetv3_small_050"),
        lambda m: m.set_grad_checkpointing(True),
    ),
    "segformer": (segformer, lambda m: m.gradient_checkpointing_enable()),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", MODELS)
def test_models_own_checkpointing_keeps_every_gradient(name: str, start: str) -> None:
    make, enable = MODELS[name]
    torch.manual_seed(0)
    model = fill_coords_(ccp.patch(make(), "all"), STARTS[start])
    images = torch.randn(2, 3, 32, 48)
    expected = gradients(model, images)
    enable(model)
    found = gradients(model, images)
    assert sum(key.endswith("coord_weight") for key in found) == len(ccp.coord_parameters(model))
    assert_same_state(expected, found, tolerance=1e-5)
