"""Weights that are computed: weight and spectral norm, old and new, orthogonality, pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError, WeightsError
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

Apply = Callable[[nn.Module], object]
TOOLS: dict[str, tuple[Apply, Apply]] = {
    # name: what makes a convolution's weight a computed one, and what undoes it
    "weight_norm": (
        parametrizations.weight_norm,
        lambda conv: parametrize.remove_parametrizations(conv, "weight"),
    ),
    "spectral_norm": (
        parametrizations.spectral_norm,
        lambda conv: parametrize.remove_parametrizations(conv, "weight"),
    ),
    "orthogonal": (
        parametrizations.orthogonal,
        lambda conv: parametrize.remove_parametrizations(conv, "weight"),
    ),
    "weight_norm by hooks": (weight_norm, remove_weight_norm),
    "spectral_norm by hooks": (spectral_norm, remove_spectral_norm),
    "pruning": (
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
        lambda conv: prune.remove(conv, "weight"),
    ),
    "structured pruning": (
        lambda conv: prune.ln_structured(conv, "weight", 0.3, n=2, dim=0),
        lambda conv: prune.remove(conv, "weight"),
    ),
}
BY_HOOKS = [name for name in TOOLS if "hooks" in name or "pruning" in name]


def with_tool(model: nn.Module, tool: str) -> nn.Module:
    """Apply a tool to both convolutions, in place."""
    torch.manual_seed(3)  # spectral_norm starts from a random vector
    for conv in (model.conv1, model.conv2):
        TOOLS[tool][0](conv)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(batches()[0][0])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("tool", TOOLS)
def test_tool_on_a_patched_model_trains_like_on_the_published_form(tool: str, start: str) -> None:
    before = patched_net(STARTS[start])
    reference = with_tool(concatenating(before), tool)
    model = with_tool(patched_net(STARTS[start]), tool)
    train(reference, optimizer=sgd(reference))
    train(model, optimizer=sgd(model))
    assert_same_state(reference, model)
    assert_coordinates_trained(model, before)


@pytest.mark.parametrize("tool", TOOLS)
def test_undoing_the_tool_keeps_the_layer_and_its_coordinates(tool: str) -> None:
    model = with_tool(patched_net(0.2), tool)
    train(model, optimizer=sgd(model))
    before = outputs(model)
    for conv in (model.conv1, model.conv2):
        TOOLS[tool][1](conv)
        assert isinstance(conv, ccp.CoordConv2d)
    torch.testing.assert_close(outputs(model), before)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("tool", TOOLS)
def test_model_with_the_tool_is_patched_in_place(tool: str, training: bool) -> None:
    torch.manual_seed(0)
    model = with_tool(Net(), tool).train(training)
    torch.manual_seed(0)
    twin = with_tool(Net(), tool).train(training)
    ccp.patch_(model, "all")
    assert_same_state(twin, {name: model.state_dict()[name] for name in twin.state_dict()})
    images = batches()[0][0]
    assert torch.equal(model(images), twin(images))
    fill_coords_(model, 0.2)
    reference = with_tool(concatenating(patched_net(0.2)), tool)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(model), outputs(reference))
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer=sgd(model))
    train(reference, optimizer=sgd(reference))
    assert_same_state(reference, model)
    assert not torch.equal(before["conv1.coord_weight"], model.conv1.coord_weight)


@pytest.mark.parametrize("tool", BY_HOOKS)
def test_hooks_that_forbid_copies_are_named_with_the_way_out(tool: str) -> None:
    model = with_tool(Net(), tool).train()
    model(batches()[0][0])
    names = list(model.state_dict())
    with pytest.raises(PatchError, match=r"cannot be deep-copied.*use the in-place form"):
        ccp.patch(model, "all")
    assert list(model.state_dict()) == names


def test_planning_and_patching_do_not_iterate_a_spectral_norm() -> None:
    model = with_tool(Net(), "spectral_norm").train()
    before = copy.deepcopy(model.state_dict())
    ccp.plan(model, "all", example_inputs=batches()[0][0])
    patched = ccp.patch(model, "all")
    assert_same_state(before, model, tolerance=0.0)
    assert torch.equal(outputs(patched), outputs(model))


COORD_TOOLS: dict[str, Apply] = {
    "weight_norm": lambda conv: parametrizations.weight_norm(conv, "coord_weight"),
    "spectral_norm": lambda conv: parametrizations.spectral_norm(conv, "coord_weight"),
    "weight_norm by hooks": lambda conv: weight_norm(conv, "coord_weight"),
    "pruning": lambda conv: prune.l1_unstructured(conv, "coord_weight", 0.3),
}


@pytest.mark.parametrize("tool", COORD_TOOLS)
def test_computed_coordinate_weights_train_like_in_the_published_form(tool: str) -> None:
    model, reference = patched_net(0.2), concatenating(patched_net(0.2))
    for net in (model, reference):
        torch.manual_seed(3)
        COORD_TOOLS[tool](net.conv1)
        COORD_TOOLS[tool](net.conv2)
    train(model, optimizer=sgd(model))
    train(reference, optimizer=sgd(reference))
    assert_same_state(reference, model)
    torch.testing.assert_close(outputs(model), outputs(reference))


@pytest.mark.parametrize("tool", COORD_TOOLS)
def test_parameters_behind_computed_coordinate_weights_are_found(tool: str) -> None:
    model = patched_net(0.2)
    COORD_TOOLS[tool](model.conv1)
    ccp.train_only_coords_(model)
    coords = ccp.coord_parameters(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("coord_weight" in name for name in trainable)
    assert {id(p) for p in coords} == {id(p) for p in trainable.values()}
    base = torch.optim.SGD([model.fc1.weight], lr=0.1)
    ccp.add_to_optimizer_(base, model, lr=1.0)
    before = model.conv1.coord_weight.detach().clone()
    train(model, optimizer=base)
    model(batches()[0][0])  # hooks compute the weight in the forward pass
    assert float((model.conv1.coord_weight - before).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("tool", COORD_TOOLS)
def test_computed_coordinate_weights_are_saved_as_they_are(tool: str, tmp_path: Path) -> None:
    model = patched_net(0.2)
    plain = ccp.unpatch(model, discard=True)
    COORD_TOOLS[tool](model.conv1)
    ccp.save_coords(model, tmp_path / "coords.safetensors")
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    torch.testing.assert_close(outputs(loaded), outputs(model))


@pytest.mark.parametrize("tool", COORD_TOOLS)
def test_file_is_not_loaded_onto_computed_coordinate_weights(tool: str, tmp_path: Path) -> None:
    path = ccp.save_coords(patched_net(0.2), tmp_path / "coords.safetensors")
    model = patched_net(0.1)
    COORD_TOOLS[tool](model.conv2)
    before = outputs(model)
    with pytest.raises(WeightsError, match=r"conv2 is computed .*load the file first"):
        ccp.load_coords_(model, path)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("tool", COORD_TOOLS)
def test_computed_coordinate_weights_are_not_unpatched(tool: str) -> None:
    model = patched_net(0.2)
    COORD_TOOLS[tool](model.conv2)
    before = outputs(model)
    with pytest.raises(PatchError, match="conv2"):
        ccp.unpatch_(model, discard=True)
    assert isinstance(model.conv1, ccp.CoordConv2d)
    assert torch.equal(outputs(model), before)
