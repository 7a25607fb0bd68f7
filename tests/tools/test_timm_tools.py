"""timm's training tools on patched timm models."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from concat_model import concatenating
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, freeze, unfreeze
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import coordconv_patch as ccp
from tools.steps import STARTS, assert_same_state, fill_coords_

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
NODES = {"layer1": "early", "layer3": "late"}


def patched_timm(name: str = "resnet10t", scale: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    return fill_coords_(ccp.patch(model, "all"), scale)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(IMAGES.roll(step, dims=-1)).square().mean().backward()
        optimizer.step()


def groups_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The parameter group of every parameter; each parameter in exactly one."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: groups[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=["plain", "layer decay"])
def test_timms_optimizer_trains_like_on_the_published_form(options: dict, start: str) -> None:
    models = [patched_timm(scale=STARTS[start])]
    models.append(concatenating(models[0]))
    before = models[0].conv1[0].coord_weight.detach().clone()
    for model in models:
        # With layer decay only timm's own scheduler applies a group's lr_scale.
        optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=0.05, **options)
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        train(model.eval(), optimizer)
    assert_same_state(models[1], models[0], tolerance=1e-4)
    assert not torch.equal(models[0].conv1[0].coord_weight, before)


def test_coordinate_weights_share_the_layer_decay_of_their_convolution() -> None:
    model = patched_timm("convnext_atto")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    groups = groups_by_name(model, optimizer)
    coords = [name for name in groups if name.endswith("coord_weight")]
    assert len(coords) == len(ccp.coord_parameters(model))
    for name in coords:
        assert groups[name] is groups[name.replace("coord_weight", "weight")], name
        assert groups[name]["weight_decay"] == 0.05


def test_coordinate_weights_get_their_own_group_after_layer_decay() -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=5)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    ccp.patch_(model, "all")
    ccp.add_to_optimizer_(optimizer, model, lr=1e-2)
    groups = groups_by_name(model, optimizer)
    for name, group in groups.items():
        assert (group.get("name") == "coords") is name.endswith("coord_weight"), name
    assert groups["stem.0.coord_weight"]["weight_decay"] == 0.0
    assert groups["stem.0.coord_weight"]["lr"] == 1e-2
    train(model, optimizer)
    assert model.stem[0].coord_weight.any()


def test_param_groups_go_into_timms_optimizers() -> None:
    model = patched_timm()
    groups = ccp.param_groups(model, lr=1e-3, coord_lr=1e-2, weight_decay=0.05)
    optimizer = create_optimizer_v2(groups, "lamb", lr=1e-3)
    found = groups_by_name(model, optimizer)
    assert found["conv1.0.coord_weight"]["lr"] == 1e-2
    assert found["conv1.0.coord_weight"]["weight_decay"] == 0.0
    assert found["conv1.0.weight"]["weight_decay"] == 0.05


def test_reset_classifier_keeps_coordinates_and_trains() -> None:
    model = patched_timm()
    with torch.no_grad():
        before = model.eval().forward_features(IMAGES)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7
    with torch.no_grad():
        assert torch.equal(model.forward_features(IMAGES), before)
    reference = concatenating(model)
    for net in (model, reference):
        train(net, torch.optim.SGD(net.parameters(), lr=0.05))
    assert_same_state(reference, model, tolerance=1e-4)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A trained patched model, and the checkpoint that timm wrote of it."""
    model = patched_timm()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05)
    train(model, optimizer)
    folder = str(tmp_path)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, metric=1.0)
    return model, tmp_path / "last.pth.tar"


def test_timms_checkpoint_loads_onto_a_patched_model(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    other = patched_timm(scale=0.0)
    load_checkpoint(other, str(path))
    assert_same_state(model, other, tolerance=0.0)
    resumed = patched_timm(scale=0.0)
    optimizer = create_optimizer_v2(resumed, "sgd", lr=0.05)
    timm.models.resume_checkpoint(resumed, str(path), optimizer)
    assert_same_state(model, resumed, tolerance=0.0)
    assert len(optimizer.state) == len(list(resumed.parameters()))


def test_patched_checkpoint_does_not_load_onto_a_plain_model(
    saved: tuple[nn.Module, Path],
) -> None:
    plain = timm.create_model("resnet10t", num_classes=5)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv1\.0\.coord_weight"):
        load_checkpoint(plain, str(saved[1]))


def test_plain_checkpoint_takes_the_coordinates_to_zero(tmp_path: Path) -> None:
    plain = timm.create_model("resnet10t", num_classes=5)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = patched_timm()
    load_checkpoint(model, str(tmp_path / "plain.pth"))
    assert not any(weight.any() for weight in ccp.coord_parameters(model))
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))


@torch.no_grad()
def assert_same_features(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 1
    for our, their in zip(ours, theirs, strict=True):
        assert float((our - their).abs().max()) <= tolerance * float(their.abs().max())


def test_features_only_models_are_patched() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", features_only=True).eval()
    patched = ccp.patch(plain, "all")
    assert type(patched) is type(plain)
    assert patched.feature_info.channels() == plain.feature_info.channels()
    assert_same_features(patched(IMAGES), plain(IMAGES), 0.0)
    fill_coords_(patched, 0.2)
    assert_same_features(patched(IMAGES), concatenating(patched)(IMAGES), 1e-5)


def test_intermediate_features_see_coordinates() -> None:
    model = patched_timm().eval()
    expected = concatenating(model).forward_intermediates(IMAGES, intermediates_only=True)
    found = model.forward_intermediates(IMAGES, intermediates_only=True)
    assert_same_features(found, expected, 1e-5)


@torch.no_grad()
def features_at_nodes(model: nn.Module) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    for name in NODES:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: seen.update({name: output})
        )
    model(IMAGES)
    return [seen[name] for name in NODES]


@torch.no_grad()
@pytest.mark.parametrize("order", ["patched before", "patched after"])
def test_torchvisions_feature_extractor_sees_coordinates(order: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t").eval()
    if order == "patched before":
        extractor = create_feature_extractor(ccp.patch(plain, "all"), NODES).eval()
    else:
        extractor = ccp.patch(create_feature_extractor(plain, NODES), "all").eval()
    assert_same_features(list(extractor(IMAGES).values()), features_at_nodes(plain), 0.0)
    fill_coords_(extractor, 0.2)
    patched = ccp.patch(plain, "all")
    patched.load_state_dict(extractor.state_dict(), strict=False)
    found = list(extractor(IMAGES).values())
    assert_same_features(found, features_at_nodes(concatenating(patched)), 1e-5)
    assert not torch.allclose(found[0], features_at_nodes(plain)[0])


def test_freezing_by_timm_freezes_coordinates_too() -> None:
    model = patched_timm()
    freeze(model, ["conv1"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert "conv1.0.coord_weight" in frozen
    assert "layer1.0.conv1.coord_weight" not in frozen
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1)
    before = model.conv1[0].coord_weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(model.conv1[0].coord_weight, before)
    unfreeze(model, ["conv1"])
    assert model.conv1[0].coord_weight.requires_grad
