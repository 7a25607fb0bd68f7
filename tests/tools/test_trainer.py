"""Hugging Face transformers: Trainer, save_pretrained and from_pretrained of a patched model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import coordconv_patch as ccp
from tools.steps import STARTS, assert_coordinates_trained, assert_same_state, batches, fill_coords_

CONFIG = ResNetConfig(
    num_channels=3,
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    layer_type="basic",
    num_labels=2,
    problem_type="regression",
)
IMAGES = batches()[0][0]
FIRST = "resnet.embedder.embedder.convolution"


def plain_resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNetForImageClassification(CONFIG)


def patched_resnet(scale: float) -> nn.Module:
    return fill_coords_(ccp.patch(plain_resnet(), "all"), scale)


class Spots(Dataset):
    """The batches' samples, one by one."""

    def __init__(self) -> None:
        self.samples = [sample for batch in batches() for sample in zip(*batch, strict=True)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images, targets = self.samples[index]
        return {"pixel_values": images, "labels": targets}


def trained(model: nn.Module, folder: Path, resume: Path | None = None, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{"save_strategy": "no", "weight_decay": 0.1, "learning_rate": 0.01, **options},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Spots())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("start", STARTS)
def test_trainer_trains_like_on_the_published_form(start: str, tmp_path: Path) -> None:
    model = patched_resnet(STARTS[start])
    before = copy.deepcopy(model)
    reference = concatenating(model)
    trained(model, tmp_path, optim="sgd", learning_rate=0.3)
    trained(reference, tmp_path, optim="sgd", learning_rate=0.3)
    assert_same_state(reference, model)
    assert_coordinates_trained(model, before)


def test_parameter_groups_go_to_the_trainer_with_the_optimizer(tmp_path: Path) -> None:
    model = patched_resnet(0.2)
    groups = ccp.param_groups(model, lr=0.0, coord_lr=0.01)
    optimizer = torch.optim.AdamW(groups)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    before = copy.deepcopy(model)
    trainer = Trainer(model, arguments, train_dataset=Spots(), optimizers=(optimizer, None))
    trainer.train()
    assert_coordinates_trained(model, before)
    assert torch.equal(model.classifier[1].weight, before.classifier[1].weight)


def test_trainer_decays_coordinate_weights_as_it_does_convolutions(tmp_path: Path) -> None:
    trainer = trained(patched_resnet(0.2), tmp_path)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert {f"{FIRST}.weight", f"{FIRST}.coord_weight"} <= decayed


def test_bfloat16_and_compilation_run_through_the_coordinates(tmp_path: Path) -> None:
    model = patched_resnet(0.0)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trained(model, tmp_path, bf16=True, **options)
    assert_coordinates_trained(model, patched_resnet(0.0))


def test_checkpoints_of_the_trainer_resume_with_coordinates(tmp_path: Path) -> None:
    whole = patched_resnet(0.2)
    trained(whole, tmp_path, save_strategy="steps", save_steps=2)
    resumed = patched_resnet(0.0)
    trained(resumed, tmp_path, resume=tmp_path / "checkpoint-2")
    assert_same_state(whole, resumed)


def test_saved_model_comes_back_by_patching_and_loading_the_coordinates(tmp_path: Path) -> None:
    """The documented recipe: from_pretrained knows the plain class only."""
    model = patched_resnet(0.2)
    model.save_pretrained(tmp_path)
    ccp.save_coords(model, tmp_path / "coords.safetensors")
    plain, report = ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    ignored = {f"{name}.coord_weight" for name in _coord_names(model)}
    assert set(report["unexpected_keys"]) == ignored  # and it says so
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    assert_same_state(model, loaded, tolerance=0.0)
    assert torch.equal(loaded.eval()(IMAGES).logits, model.eval()(IMAGES).logits)


def test_unpatched_model_comes_back_by_from_pretrained_alone(tmp_path: Path) -> None:
    model = patched_resnet(0.0)
    model.save_pretrained(tmp_path)
    plain = ResNetForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(plain.eval()(IMAGES).logits, model.eval()(IMAGES).logits)


def _coord_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "coord_weight")]
