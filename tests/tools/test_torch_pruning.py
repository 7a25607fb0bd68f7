"""Torch-Pruning on patched models: ``pytest -m compression``, see docs/compression.md."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from concat_model import concatenating
from torch import Tensor, nn

import coordconv_patch as ccp

pytestmark = pytest.mark.compression


class Small(nn.Module):
    """A strided stem, a residual of a depthwise and a 1 x 1 convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.narrow = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.narrow(self.depthwise(self.wide(x).relu()).relu())
        return self.fc(x.relu().mean((2, 3)))


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=5)


def patched(make: Any, scale: float) -> Any:
    torch.manual_seed(0)
    model = ccp.patch(make().eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=scale)
    return model


def groups(model: Any, images: Tensor) -> Iterator[Any]:
    """Half of the output channels of every convolution, by Torch-Pruning's own choice."""
    import torch_pruning

    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, images, importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc]
    )
    return iter(pruner.step(interactive=True))


@torch.no_grad()
def forget_inputs_(reference: nn.Module, model: nn.Module, group: Any) -> None:
    """What the reference has for a pruned channel: nobody reads it, so its weights are zero."""
    names = {module: name for name, module in model.named_modules()}
    for dep, indices in group:
        layer = dep.target.module
        if "prune_in_channels" not in dep.handler.__name__ or layer not in names:
            continue
        if isinstance(layer, nn.Linear) or getattr(layer, "groups", 0) == 1:
            reference.get_submodule(names[layer]).weight[:, indices] = 0


@pytest.mark.parametrize("scale", [0.0, 0.1])
@pytest.mark.parametrize("make", [Small, resnet])
def test_a_pruned_model_is_the_published_form_without_those_channels(
    make: Any, scale: float, tmp_path: Path
) -> None:
    model, images = patched(make, scale), torch.rand(2, 3, 33, 40)
    reference, whole = concatenating(model), copy.deepcopy(model)
    pruned = 0
    for group in groups(model, images):
        forget_inputs_(reference, model, group)
        group.prune()
        pruned += 1
    assert pruned >= 2
    for name, layer in model.named_modules():
        if isinstance(layer, ccp.CoordConv2d):
            assert layer.out_channels == whole.get_submodule(name).out_channels // 2
    model.eval()
    with torch.no_grad():
        expected = reference(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert (expected - whole(images)).abs().max() > 1e-3
        torch.testing.assert_close(ccp.fold(model)(images), expected, rtol=1e-4, atol=1e-4)
    ccp.export_onnx(model, tmp_path / "m.onnx", images, providers=["CPUExecutionProvider"])
    ccp.save_coords(model, tmp_path / "c.safetensors")
    plain = ccp.unpatch(model, discard=True)
    loaded = ccp.load_coords(plain, tmp_path / "c.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    model.train()(images).sum().backward()
    assert all(weight.grad is not None for weight in ccp.coord_parameters(model))
