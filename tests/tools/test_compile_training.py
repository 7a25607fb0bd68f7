"""torch.compile: compiled training steps equal eager ones, in whole graphs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from tools.steps import (
    STARTS,
    Net,
    assert_coordinates_trained,
    assert_same_state,
    batches,
    fill_coords_,
    patched_net,
    sgd,
    train,
    train_concatenating,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_and_reference(start: str, backend: str) -> tuple[nn.Module, nn.Module]:
    """A model trained under torch.compile as one graph, and its paper's form trained eagerly."""
    model = patched_net(STARTS[start])
    reference = train_concatenating(model)
    before = patched_net(STARTS[start])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    train(compiled, optimizer=sgd(model))
    assert_coordinates_trained(model, before)
    return compiled, reference


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(batches()[0][0])


@pytest.mark.parametrize("start", STARTS)
def test_compiled_training_equals_eager_training(start: str) -> None:
    compiled, reference = compiled_and_reference(start, "aot_eager")
    assert_same_state(reference, compiled._orig_mod)
    torch.testing.assert_close(outputs(compiled), outputs(reference))


class OneConvolution(nn.Module):
    """Small, because the code that inductor generates takes seconds to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


def test_inductor_trains_as_eager_does() -> None:
    torch.manual_seed(0)
    model = fill_coords_(ccp.patch(OneConvolution(), "all"), 0.2)
    before = copy.deepcopy(model)
    reference = train_concatenating(model)
    train(torch.compile(model, backend="inductor", fullgraph=True), optimizer=sgd(model))
    assert_same_state(reference, model)
    assert_coordinates_trained(model, before)


@pytest.mark.parametrize("is_placed", [False, True], ids=["whole", "placed"])
def test_inductor_trains_at_other_sizes(is_placed: bool) -> None:
    """The second size makes all of them symbolic, on which views kept for backward passes fail."""
    torch.manual_seed(0)
    theta = torch.tensor([[[0.5, 0.0, 0.1], [0.0, 0.4, -0.2]], [[0.9, 0.1, 0.0], [0.0, 0.8, 0.1]]])
    layer: Any = ccp.patch(nn.Conv2d(3, 2, 3, stride=2, padding=1), "all")
    fill_coords_(layer, 0.2)
    weights = (layer.weight, layer.coord_weight, layer.bias)
    geometry = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    compiled = torch.compile(layer, fullgraph=True)
    for size in ((8, 10), (12, 6), (10, 14)):
        images = torch.randn(2, 3, *size)
        grids = [reference.paper_grid(size)] * 2
        if is_placed:
            grids = [reference.placed_grid(place, size) for place in theta]
        expected = torch.cat(
            [
                reference.concatenating_conv(image[None], grid, *weights, **geometry)
                for image, grid in zip(images, grids, strict=True)
            ]
        )
        with ccp.places(layer, theta) if is_placed else contextlib.nullcontext():
            outputs = compiled(images)
        torch.testing.assert_close(outputs, expected)
        actual, wanted = (
            torch.autograd.grad(each.square().sum(), weights) for each in (outputs, expected)
        )
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_model_follows_weights_and_modes_that_change_afterwards() -> None:
    compiled, reference = compiled_and_reference("zero", "aot_eager")
    outputs(compiled)
    outputs(reference)
    compiled.train()
    reference.train()
    train(compiled, optimizer=torch.optim.SGD(compiled.parameters(), lr=0.1))
    train(reference, optimizer=torch.optim.SGD(reference.parameters(), lr=0.1))
    assert_same_state(reference, compiled._orig_mod)
    torch.testing.assert_close(outputs(compiled), outputs(reference))
    fill_coords_(compiled._orig_mod, 0.5)
    eager = compiled._orig_mod(batches()[0][0]).detach()
    torch.testing.assert_close(outputs(compiled), eager)


def test_patched_layers_break_no_graph_and_follow_dynamic_sizes() -> None:
    model = patched_net(0.2).eval()
    explained = torch._dynamo.explain(model)(batches()[0][0])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for size in ((10, 14), (16, 8), (7, 21)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("of_layers", [False, True], ids=["model", "layers"])
def test_module_compile_trains_as_eager_does(of_layers: bool) -> None:
    model = patched_net(0.2)
    reference = train_concatenating(model)
    for module in (model.conv1, model.conv2) if of_layers else (model,):
        module.compile(backend="aot_eager", fullgraph=True)
    assert_same_state(reference, train(model))


def test_compiled_model_is_patched_and_recompiles() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(Net().eval(), backend="aot_eager", fullgraph=True)
    plain = outputs(compiled)
    patched = ccp.patch_(compiled, "all")
    assert patched is compiled
    assert torch.equal(outputs(compiled), plain)
    fill_coords_(compiled, 0.2)
    eager = outputs(compiled._orig_mod)
    assert not torch.allclose(eager, plain)
    torch.testing.assert_close(outputs(compiled), eager)


def test_coordinates_saved_from_a_compiled_model_load_onto_the_plain_one(tmp_path: Path) -> None:
    model = patched_net(0.2)
    compiled = torch.compile(model, backend="aot_eager")
    outputs(compiled)
    ccp.save_coords(compiled, tmp_path / "coords.safetensors")
    plain = ccp.unpatch(model, discard=True)
    loaded = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    assert_same_state(model, loaded, tolerance=0.0)
