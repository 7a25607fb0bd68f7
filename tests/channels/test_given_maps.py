"""Maps that come with the call: depth, ground resolution, a camera's intrinsics."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers

COORDS = ccp.Coordinates(channels=(ccp.Axes(), ccp.Given("depth"), ccp.Given("camera", 2)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.avg_pool2d(self.first(x).relu(), 2))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def patched(dtype: torch.dtype = torch.float64, **arguments: Any) -> nn.Module:
    model = ccp.patch(Net().to(dtype).eval(), "all", coords=COORDS, **arguments)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    return model


X = torch.rand(3, 3, 12, 16, dtype=torch.float64)
DEPTH = torch.rand(3, 1, 24, 32, dtype=torch.float64)
CAMERA = torch.rand(1, 2, 12, 16, dtype=torch.float64)


def by_concatenation(model: Any, x: Tensor, depth: Tensor, camera: Tensor) -> Tensor:
    """The published form, with the maps as further channels, each pixel a mean over its own."""

    def means(maps: Tensor, size: Any) -> Tensor:
        rows, columns = (n // m for n, m in zip(maps.shape[2:], size, strict=True))
        return F.avg_pool2d(maps, (rows, columns)).expand(len(x), -1, -1, -1)

    def convolve(layer: Any, input: Tensor, **padding: Any) -> Tensor:
        size = input.shape[2:]
        grid = ccp.Coordinates().grid(size, dtype=input.dtype).expand(len(x), -1, -1, -1)
        whole = torch.cat([input, grid, means(depth, size), means(camera, size)], 1)
        if layer.padding_mode == "reflect":
            whole = F.pad(whole, (1, 1, 1, 1), mode="reflect")
        else:
            whole = F.pad(whole, (1, 1, 1, 1))
        weight = torch.cat([layer.weight, layer.coord_weight], 1)
        return F.conv2d(whole, weight, layer.bias, layer.stride)

    first = convolve(model.first, x).relu()
    return convolve(model.second, F.avg_pool2d(first, 2))


def test_layers_see_the_maps_at_their_resolution_beside_coordinates() -> None:
    model = patched()
    expected = by_concatenation(model, X, DEPTH, CAMERA)
    with ccp.maps(model, depth=DEPTH, camera=CAMERA):
        output = model(X)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    parameters = ccp.coord_parameters(model)
    own = torch.autograd.grad(output.square().sum(), parameters)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for gradient, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


def test_contexts_add_up_and_places_leave_maps_alone() -> None:
    model = patched()
    window = ccp.Window((0, 8), (12, 16), (24, 32))
    with ccp.maps(model, depth=DEPTH), ccp.maps(model, camera=CAMERA):
        whole = model(X)
        with ccp.places(model, window):
            placed = model(X)
    with ccp.places(model, window), ccp.maps(model, depth=DEPTH, camera=CAMERA):
        torch.testing.assert_close(model(X), placed, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole, by_concatenation(model, X, DEPTH, CAMERA), rtol=0, atol=1e-12)
    assert (whole - placed).abs().max() > 0.1
    with pytest.raises(ccp.CoordinatesError, match="the maps 'depth' come with the call"):
        model(X)
    with (
        ccp.maps(model, depth=DEPTH),
        pytest.raises(ccp.CoordinatesError, match=r"'camera' .*maps\(model, camera=\.\.\.\)"),
    ):
        model(X)


def test_patching_needs_no_maps_and_keeps_outputs() -> None:
    plain = Net().eval()
    model = ccp.patch(plain, "all", coords=COORDS, example_inputs=X.float())
    with ccp.maps(model, depth=DEPTH.float(), camera=CAMERA.float()):
        assert torch.equal(model(X.float()), plain(X.float()))
    half = ccp.patch(plain, "first", coords=COORDS)
    rows = ccp.plan(half, "second", coords=COORDS, example_inputs=X.float()).rows  # it runs half
    assert [row.choice.site.name for row in rows][-1] == "second"


def test_kinds_and_names_are_saved_and_compared(tmp_path: Path) -> None:
    model = patched(torch.float32)
    ccp.save_coords(model, tmp_path / "c.safetensors")
    plain = Net().eval()
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.endswith("coord_weight")}
    )
    loaded = ccp.load_coords(plain, tmp_path / "c.safetensors")
    inputs = {"depth": DEPTH.float(), "camera": CAMERA.float()}
    with ccp.maps(model, **inputs), ccp.maps(loaded, **inputs):
        assert torch.equal(loaded(X.float()), model(X.float()))
    renamed = ccp.Coordinates(channels=(ccp.Axes(), ccp.Given("height"), ccp.Given("camera", 2)))
    other = ccp.patch(Net(), "all", coords=renamed)
    with pytest.raises(RuntimeError, match="depth"):
        other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copy = torch.load(file, weights_only=False)
    with ccp.maps(copy, **inputs), ccp.maps(model, **inputs):
        assert torch.equal(copy(X.float()), model(X.float()))


def test_other_maps_do_not_compile_again_and_checkpoints_see_them() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = patched()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(10):
        depth = torch.rand_like(DEPTH)
        with torch.no_grad(), ccp.maps(model, depth=depth, camera=CAMERA):
            torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1

    parameters = ccp.coord_parameters(model)
    with ccp.maps(model, depth=DEPTH, camera=CAMERA):
        again = checkpoint(model, X, use_reentrant=False).square().sum()
        expected = torch.autograd.grad(model(X).square().sum(), parameters)
    for own, wanted in zip(torch.autograd.grad(again, parameters), expected, strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": DEPTH}, r"maps 'width': no layer has channels Given\('width'\); .*'camera'"),
        ({"depth": DEPTH[0]}, r"first needs a tensor of floats of shape \(N, 1, H, W\)"),
        ({"camera": DEPTH}, r"camera=a tensor of torch.float64 and shape \(3, 1, 24, 32\)"),
        ({"depth": DEPTH.long()}, "a tensor of torch.int64"),
        ({"depth": 3}, "depth=3: first needs"),
        ({"depth": DEPTH / 0}, "a number in it is not finite"),
    ],
)
def test_other_maps_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ccp.CoordinatesError, match=message):
        ccp.maps(patched(), **given).__enter__()


def test_a_batch_of_another_size_and_onnx_are_refused(tmp_path: Path) -> None:
    model = patched()
    with (
        ccp.maps(model, depth=DEPTH, camera=CAMERA),
        pytest.raises(ccp.PatchError, match="first gets 2 samples, and there are depth for 3"),
    ):
        model(X[:2])
    with pytest.raises(ccp.ExportError, match="come with each call"):
        ccp.export_onnx(model, tmp_path / "m.onnx", X)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [("x y",), ("model",), (3,), ("depth", 0), ("depth", True)])
def test_other_fields_are_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ccp.CoordinatesError, match="write a n"):
        ccp.Given(*fields)


def test_signals_have_maps_too() -> None:
    coords = ccp.Coordinates(channels=(ccp.Given("time"),))
    model: Any = ccp.patch(nn.Conv1d(2, 3, 1).double(), "all", coords=coords)
    nn.init.normal_(*ccp.coord_parameters(model))
    x, time = torch.rand(2, 2, 8).double(), torch.rand(2, 1, 8).double()
    (layer,) = coord_layers(model).values()
    with ccp.maps(model, time=time):
        expected = F.conv1d(
            torch.cat([x, time], 1), torch.cat([layer.weight, layer.coord_weight], 1), layer.bias
        )
        torch.testing.assert_close(model(x), expected)
