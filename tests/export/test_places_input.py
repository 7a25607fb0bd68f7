"""Files with places: one more input, and coordinates of the part that each sample is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp

CPU = ["CPUExecutionProvider"]


class Net(nn.Module):
    """A convolution, a functional one and a residual sum, with a batch norm that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + F.conv2d(x, self.weight, padding=1)).relu())


COORDS = {
    "affine": ccp.Coordinates(),
    "not affine": ccp.Coordinates(radius=True, fourier=1, align_corners=False),
}


def patched(coords: ccp.Coordinates | None = None) -> Any:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    model = ccp.patch(model, "all", coords=coords)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.3)
    return model


def images(batch: int, height: int = 18, width: int = 22) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def turned(batch: int) -> Tensor:
    """Places that no example of the exporter has."""
    theta = torch.rand(batch, 2, 3, generator=torch.Generator().manual_seed(2)) - 0.5
    return theta + torch.tensor([[0.6, 0, 0], [0, -0.7, 0]])


def expected(model: Any, x: Tensor, theta: Tensor, coords: ccp.Coordinates) -> np.ndarray:
    """By concatenation, sample by sample, in float64."""
    fields = {k: v for k, v in coords.to_dict().items() if k != "window"}
    model = ccp.fold(model)  # its batch norm is in the convolution, as in the file
    model = model.double()
    branch = model.weight_coord_branch

    def convolve(x: Tensor, place: Tensor, weight: Tensor, coord: Tensor, **how: Any) -> Tensor:
        grid = reference.placed_grid(place, x.shape[2:], **fields)[None]
        return F.conv2d(torch.cat([x, grid], 1), torch.cat([weight, coord], 1), **how)

    outputs = []
    with torch.no_grad():
        for sample, place in zip(x.double(), theta.double(), strict=True):
            stem, head = model.stem, model.head
            y = convolve(
                *(sample[None], place, stem.weight, stem.coord_weight),
                bias=stem.bias,
                stride=2,
                padding=1,
            ).relu()
            z = convolve(y, place, model.weight, branch.coord_weight, padding=1)
            z = (y + z).relu()
            outputs.append(convolve(z, place, head.weight, head.coord_weight, bias=head.bias))
    return torch.cat(outputs).numpy()


def near(output: np.ndarray, wanted: np.ndarray) -> None:
    assert output.shape == wanted.shape
    assert np.abs(output - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", COORDS)
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_file_serves_all_places_and_batches(exporter: Any, kind: str, tmp_path: Path) -> None:
    coords = COORDS[kind]
    model, path = patched(coords), tmp_path / "model.onnx"
    report = ccp.export_onnx(model, path, images(2), places=True, exporter=exporter, providers=CPU)
    assert report.exporter == exporter
    assert not report.notes
    assert set(report.lowerings.values()) == {"computed"}
    assert report.dynamic_axes["x"] == {0: "batch"}
    # The example at places of its own and as whole pictures, and two other batch sizes.
    assert len(report.checks) == 4
    session = ort.InferenceSession(path, providers=CPU)
    for batch in (1, 4):
        x, theta = images(batch), turned(batch)
        (output,) = session.run(None, {"x": x.numpy(), "places": theta.numpy()})
        near(output, expected(model, x, theta, coords))
        (output,) = session.run(None, {"x": x.numpy(), "places": theta[:1].numpy()})
        near(output, expected(model, x, theta[:1].expand(batch, -1, -1), coords))
        (output,) = session.run(None, {"x": x.numpy()})
        near(output, expected(model, x, torch.eye(2, 3).expand(batch, -1, -1), coords))
    assert ccp.verify_onnx(model, path, images(3), places=turned(3)).agrees
    assert ccp.verify_onnx(model, path, images(3)).agrees
    window = ccp.Window((-2, 3.5), (9, 11), (36, 40))
    assert ccp.verify_onnx(model, path, images(3), places=window).agrees


def test_sizes_may_be_dynamic_too(tmp_path: Path) -> None:
    model, path = patched(), tmp_path / "model.onnx"
    ccp.export_onnx(model, path, images(2), places=True, dynamic_size=True, providers=CPU)
    session = ort.InferenceSession(path, providers=CPU)
    x, theta = images(3, 30, 26), turned(3)
    (output,) = session.run(None, {"x": x.numpy(), "places": theta.numpy()})
    near(output, expected(model, x, theta, ccp.Coordinates()))


def test_a_fixed_batch_and_names(tmp_path: Path) -> None:
    model, path = patched(), tmp_path / "model.onnx"
    ccp.export_onnx(
        model,
        path,
        images(2),
        places=True,
        dynamic_batch=False,
        input_names=["picture"],
        providers=CPU,
    )
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["picture", "places"]
    assert {"stem.weight", "head.weight"} <= {value.name for value in graph.initializer}
    session = ort.InferenceSession(path, providers=CPU)
    x, theta = images(2), turned(2)
    (output,) = session.run(None, {"picture": x.numpy(), "places": theta.numpy()})
    near(output, expected(model, x, theta, ccp.Coordinates()))
    (output,) = session.run(None, {"picture": x.numpy()})
    near(output, expected(model, x, torch.eye(2, 3).expand(2, -1, -1), ccp.Coordinates()))


def test_coordinates_are_constants_and_sums_are_fused(tmp_path: Path) -> None:
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    report = ccp.export_onnx(patched(), path, images(2), places=True, providers=CPU)
    assert not {"Range", "ConstantOfShape", "NonZero"} & set(report.nodes)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    ort.InferenceSession(path, options, providers=CPU)
    nodes = onnx.load(optimized).graph.node
    convolved = {node.output[0] for node in nodes if "Conv" in node.op_type}
    sums = [node.name for node in nodes if node.op_type == "Add" and convolved & {*node.input}]
    assert not sums  # convolutions add what was added to them


def test_what_a_file_without_places_would_leave_out_is_refused(tmp_path: Path) -> None:
    model, path = patched(), tmp_path / "model.onnx"
    ccp.set_places_(model, turned(2))
    with pytest.raises(ccp.ExportError, match=r"places hold for stem, .*export with places=True"):
        ccp.export_onnx(model, path, images(2), providers=CPU)
    with pytest.raises(ccp.ArgumentError, match="lowering='map' with places=True"):
        ccp.export_onnx(model, path, images(2), places=True, lowering="map", providers=CPU)
    with pytest.raises(ccp.ArgumentError, match="places=1 is an int"):
        ccp.export_onnx(model, path, images(2), places=1, providers=CPU)  # type: ignore[arg-type]
    with pytest.raises(ccp.PatchError, match="has no coordinate"):
        ccp.export_onnx(Net(), path, images(2), places=True, providers=CPU)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_noticed(tmp_path: Path) -> None:
    model, path = patched(), tmp_path / "model.onnx"
    ccp.export_onnx(model, path, images(2), places=True, providers=CPU)
    nn.init.zeros_(model.stem.coord_weight)
    with pytest.raises(ccp.ExportError, match="differ on"):
        ccp.verify_onnx(model, path, images(2), places=turned(2))
