"""Files of a fixed batch: they compute, and ONNX Runtime fuses, what those of any batch do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from concat_model import concatenating
from onnx_graphs import CPU
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ExportError
from coordconv_patch.lowering.unknown_zero import ZERO

FORMS = ("auto", "branch", "separable")


class Network(nn.Module):
    """A strided, a depthwise and two 1x1 convolutions, a residual, and a number beside the image.

    Two of the layers see coordinates of one size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.stem(x).relu()
        x = (self.point(self.depthwise(x).relu()) + x).relu()
        x = self.head(x).mean((2, 3))
        return x if scale is None else x * scale


def network(std: float = 0.3, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Network().eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=std)
    return model.to(dtype)


def images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(batch))
    return made.to(dtype)


def export(model: nn.Module, path: Path, example: Any, **options: Any) -> Path:
    return ccp.export_onnx(model, path, example, providers=CPU, **options).path


def optimised(path: Path) -> onnx.GraphProto:
    """A file as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of saving what suits this processor
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    ort.InferenceSession(path, options, providers=CPU)
    return onnx.load(path.with_suffix(".optimised"), load_external_data=False).graph


def fused_sums(graph: onnx.GraphProto) -> int:
    """Convolutions that add their output to another one, which is their fourth input."""
    return sum(node.op_type == "Conv" and len(node.input) == 4 for node in graph.node)


def run(path: Path, *inputs: Tensor) -> np.ndarray:
    session = ort.InferenceSession(path, providers=CPU)
    names = [value.name for value in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return session.run(None, feeds)[0]


@pytest.mark.parametrize(("form", "std"), [("auto", 0.0), *((form, 0.3) for form in FORMS)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_it_computes_to_the_last_bit_what_that_of_any_batch_does(
    exporter: str, form: str, batch: int, std: float, tmp_path: Path
) -> None:
    model, options = network(std), {"exporter": exporter, "lowering": form}
    x = images(batch)
    any_batch = export(model, tmp_path / "any.onnx", images(2), **options)
    fixed = export(model, tmp_path / "fixed.onnx", x, dynamic_batch=False, **options)
    (given,) = onnx.load(fixed).graph.input
    assert [dim.dim_value for dim in given.type.tensor_type.shape.dim] == [batch, 3, 16, 24]
    np.testing.assert_array_equal(run(fixed, x), run(any_batch, x))
    expected = concatenating(model)(x).detach().numpy()
    np.testing.assert_allclose(run(fixed, x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_onnx_runtime_folds_and_fuses_as_much_as_with_any_batch(
    exporter: str, batch: int, tmp_path: Path
) -> None:
    model = network()
    any_batch = export(model, tmp_path / "any.onnx", images(2), exporter=exporter)
    fixed = export(
        model, tmp_path / "fixed.onnx", images(batch), exporter=exporter, dynamic_batch=False
    )
    stored = export(
        model, tmp_path / "map.onnx", images(batch), lowering="map", dynamic_batch=False
    )
    sums = [fused_sums(optimised(path)) for path in (fixed, any_batch, stored)]
    assert sums[0] == sums[1] == 5  # one for each layer, and the residual
    assert sums[2] == 0  # a map is no convolution, and parts the residual from its own


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_in_half_precision(exporter: str, tmp_path: Path) -> None:
    model, x = network(dtype=torch.float16), images(2, torch.float16)
    options: dict[str, Any] = {"exporter": exporter, "tolerance": 1e-2}
    path = export(model, tmp_path / "m.onnx", x, dynamic_batch=False, **options)
    expected = concatenating(network())(x.float()).detach().numpy()
    assert run(path, x).dtype == np.float16
    np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=2e-2)


def test_with_more_inputs_and_names(tmp_path: Path) -> None:
    model, x, scale = network(), images(2), torch.tensor([[2.0], [3.0]])
    path = export(
        model,
        tmp_path / "m.onnx",
        (x, {"scale": scale}),
        dynamic_batch=False,
        input_names=["image", "factor"],
        output_names=["result"],
    )
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["image", "factor"]
    assert [value.name for value in graph.output] == ["result"]
    expected = concatenating(model)(x, scale).detach().numpy()
    np.testing.assert_allclose(run(path, x, scale), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_coordinates_are_expanded_once_for_all_layers_of_a_size(
    exporter: str, batch: int, tmp_path: Path
) -> None:
    options = {"exporter": exporter, "lowering": "branch", "dynamic_batch": False}
    path = export(network(), tmp_path / "m.onnx", images(batch), **options)
    nodes = onnx.load(path).graph.node
    # 16 x 24 for the stem, 8 x 12 for the three others.
    assert sum(node.op_type == "Expand" for node in nodes) == 2
    assert not [node for node in nodes if ZERO in node.input]


class TakesTheName(Network):
    def forward(self, x: Tensor, coordinate_zero: Tensor) -> Tensor:
        return super().forward(x) + coordinate_zero


def test_a_model_with_an_argument_of_this_name_is_told(tmp_path: Path) -> None:
    model = ccp.patch(TakesTheName().eval(), "all")
    inputs = (images(2), torch.zeros(()))
    with pytest.raises(ExportError, match=r"has an argument 'coordinate_zero' of its own"):
        export(model, tmp_path / "m.onnx", inputs, dynamic_batch=False)
    assert not list(tmp_path.iterdir())
