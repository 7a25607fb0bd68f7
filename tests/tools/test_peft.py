"""PEFT: LoRA on linear layers and convolutions beside, on and under coordinates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from concat_model import concatenating
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError
from tools.steps import (
    STARTS,
    Net,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    fill_coords_,
    patched_net,
    train,
)

IMAGES = batches()[0][0]


def with_lora(model: nn.Module, *targets: str, **options: object) -> PeftModel:
    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), **options))


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def train_adapters(model: nn.Module) -> nn.Module:
    """In evaluation mode: neither PEFT nor the coordinates' file keep batch statistics."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return train(model.eval(), optimizer=torch.optim.SGD(parameters, lr=0.3))


def thaw_coordinates_(model: nn.Module) -> None:
    for weight in ccp.coord_parameters(model):
        weight.requires_grad_(True)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(IMAGES)


@pytest.mark.parametrize("start", STARTS)
def test_lora_on_linear_layers_trains_beside_coordinates(start: str) -> None:
    models = [patched_net(STARTS[start]), concatenating(patched_net(STARTS[start]))]
    adapted = [with_lora(model, "fc1") for model in models]
    assert not any("coord" in name for name in trainable(adapted[0]))  # PEFT froze them
    thaw_coordinates_(adapted[0])
    for conv in (models[1].conv1, models[1].conv2):
        conv.coord_weight.requires_grad_(True)
    for model in adapted:
        train_adapters(model)
    assert_same_state(adapted[1], adapted[0])
    before = outputs(adapted[0])
    merged = adapted[0].merge_and_unload()
    assert type(merged) is Net
    torch.testing.assert_close(outputs(merged), before)
    assert_coordinates_trained(merged, patched_net(STARTS[start]))


def test_lora_on_a_patched_convolution_adds_no_coordinates_of_its_own() -> None:
    adapted = with_lora(patched_net(0.2), "conv1")
    layer = adapted.base_model.model.conv1
    assert isinstance(layer.base_layer, ccp.CoordConv2d)
    assert type(layer.lora_A["default"]) is nn.Conv2d
    assert type(layer.lora_B["default"]) is nn.Conv2d
    assert len(ccp.coord_parameters(adapted)) == 2


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
def test_merging_lora_into_a_patched_convolution_keeps_the_outputs(safe: bool) -> None:
    adapted = with_lora(patched_net(0.2), "conv1", "fc1")
    thaw_coordinates_(adapted)
    train_adapters(adapted)
    before = outputs(adapted)
    assert float((before - outputs(patched_net(0.2))).abs().max()) > 1e-2
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(outputs(adapted), before)
    adapted.unmerge_adapter()
    torch.testing.assert_close(outputs(adapted), before)
    merged = adapted.merge_and_unload(safe_merge=safe)
    assert type(merged.conv1) is type(patched_net(0.2).conv1)
    torch.testing.assert_close(outputs(merged), before)
    torch.testing.assert_close(outputs(concatenating(merged)), before)


def test_dora_merges_beside_coordinates_but_not_into_a_convolution_that_has_them() -> None:
    """A limit that the documentation names: unmerged, DoRA scales the whole output of a layer.

    Merged, it scales the weight alone.
    """
    for target, agrees in (("fc1", True), ("conv1", False)):
        adapted = with_lora(patched_net(0.2), target, use_dora=True)
        thaw_coordinates_(adapted)
        train_adapters(adapted)
        before = outputs(adapted)
        merged = adapted.merge_and_unload()
        assert torch.allclose(outputs(merged), before, atol=1e-5) is agrees


def test_lora_on_a_patched_convolution_computes_what_it_says() -> None:
    adapted = with_lora(patched_net(0.2), "conv1", init_lora_weights=False, lora_alpha=6).eval()
    layer = adapted.base_model.model.conv1
    low = F.conv2d(IMAGES, layer.lora_A["default"].weight, stride=2, padding=1)
    update = F.conv2d(low, layer.lora_B["default"].weight) * 3  # alpha / r
    expected = concatenating(patched_net(0.2)).conv1(IMAGES) + update
    torch.testing.assert_close(layer(IMAGES), expected)


def test_lora_on_a_grouped_convolution_is_not_merged_patched_or_not() -> None:
    for model in (Net(), patched_net(0.2)):
        adapted = with_lora(model, "conv2")
        with pytest.raises(NotImplementedError, match="groups > 1"):
            adapted.merge_and_unload()


def test_modules_to_save_train_and_travel_with_the_adapter(tmp_path: Path) -> None:
    adapted = with_lora(patched_net(0.2), "fc1", modules_to_save=["conv1", "conv2"])
    coords = [name for name in trainable(adapted) if name.endswith("coord_weight")]
    assert len(coords) == 2
    train_adapters(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(patched_net(0.2), tmp_path)
    assert torch.equal(outputs(loaded), outputs(adapted))
    merged = loaded.merge_and_unload()
    assert_coordinates_trained(merged, patched_net(0.2))
    torch.testing.assert_close(outputs(merged), outputs(adapted))


def test_adapter_and_coordinate_files_together_restore_the_model(tmp_path: Path) -> None:
    adapted = with_lora(patched_net(0.0), "conv1", "fc1")
    thaw_coordinates_(adapted)
    train_adapters(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    ccp.save_coords(adapted, tmp_path / "coords.safetensors")
    base = ccp.unpatch(patched_net(0.0))
    for model in (patched_net(0.0), base):  # patched before, or by the file
        loaded = PeftModel.from_pretrained(model, tmp_path / "adapter")
        ccp.load_coords_(loaded, tmp_path / "coords.safetensors")
        assert torch.equal(outputs(loaded), outputs(adapted))


def test_merged_model_saves_its_coordinates_for_its_merged_weights(tmp_path: Path) -> None:
    adapted = with_lora(patched_net(0.2), "conv1")
    thaw_coordinates_(adapted)
    merged = train_adapters(adapted).merge_and_unload()
    ccp.save_coords(merged, tmp_path / "coords.safetensors")
    plain = ccp.unpatch(merged, discard=True)
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    assert_same_state(merged, loaded, tolerance=0.0)


@pytest.mark.parametrize("start", STARTS)
def test_model_with_lora_is_patched_at_its_base_layers(start: str) -> None:
    torch.manual_seed(0)
    adapted = with_lora(Net(), "conv1", "fc1", init_lora_weights=False)
    patched = ccp.patch(adapted, ["*.base_layer", "*.conv2"])
    assert torch.equal(outputs(patched), outputs(adapted))
    fill_coords_(patched, STARTS[start])
    train_adapters(patched)
    before = outputs(patched)
    merged = patched.merge_and_unload()
    assert isinstance(merged.conv1, ccp.CoordConv2d)
    torch.testing.assert_close(outputs(merged), before)
    torch.testing.assert_close(outputs(concatenating(merged)), before)
    assert merged.conv1.coord_weight.any()


def test_adapters_convolutions_are_not_patched() -> None:
    adapted = with_lora(Net(), "conv1")
    with pytest.warns(UserWarning, match=r"lora_A.default: it is part of a PEFT adapter"):
        patched = ccp.patch(adapted, "all")
    assert len(ccp.coord_parameters(patched)) == 2
    assert isinstance(patched.base_model.model.conv1.base_layer, ccp.CoordConv2d)
    with pytest.raises(SelectionError, match="whose merging would drop the coordinates"):
        ccp.patch(adapted, "*.lora_A.default")
