"""Lightning: a patched model in a LightningModule, and a LightningModule that is patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import coordconv_patch as ccp
from tools.steps import (
    STARTS,
    Batch,
    Net,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    fill_coords_,
    loss_of,
    patched_net,
    sgd,
    train,
    train_concatenating,
)


class LitNet(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return loss_of(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


def fit(module: LitNet, folder: Path, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    return trainer


@pytest.mark.parametrize("start", STARTS)
def test_lightning_trains_what_plain_steps_train(start: str, tmp_path: Path) -> None:
    module = LitNet(patched_net(STARTS[start]))
    before = patched_net(STARTS[start])
    fit(module, tmp_path)
    assert_same_state(train_concatenating(before), module.model)
    assert_coordinates_trained(module.model, before)


def test_checkpoint_holds_the_coordinates_and_resumes(tmp_path: Path) -> None:
    module = LitNet(patched_net(0.2))
    fit(module, tmp_path).save_checkpoint(tmp_path / "net.ckpt")
    loaded = LitNet.load_from_checkpoint(tmp_path / "net.ckpt", model=patched_net(0.0))
    assert_same_state(module, loaded, tolerance=0.0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv1\.coord_weight"):
        LitNet.load_from_checkpoint(tmp_path / "net.ckpt", model=Net())


def test_coordinates_of_the_inner_model_load_onto_the_plain_one(tmp_path: Path) -> None:
    module = LitNet(patched_net(0.2))
    fit(module, tmp_path)
    path = ccp.save_coords(module.model, tmp_path / "coords.safetensors")
    plain = ccp.unpatch(module.model, discard=True)
    assert_same_state(module.model, ccp.load_coords(plain, path), tolerance=0.0)


def test_patched_lightning_module_keeps_its_class_and_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = LitNet(Net())
    patched = ccp.patch(module, "model.*")
    assert type(patched) is LitNet
    images = batches()[0][0]
    assert torch.equal(patched.eval()(images), module.eval()(images))
    fill_coords_(patched, 0.2).train()
    fit(patched, tmp_path)
    assert_same_state(train(patched_net(0.2)), patched.model)


def test_mixed_precision_and_accumulation_run_through_the_coordinates(tmp_path: Path) -> None:
    module = LitNet(patched_net(0.2))
    fit(module, tmp_path, precision="bf16-mixed", accumulate_grad_batches=3)
    assert_coordinates_trained(module.model, patched_net(0.2))
    assert module.model.conv1.coord_weight.dtype == torch.float32
