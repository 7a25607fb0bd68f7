"""Half precision and int8: what docs/deployment.md and docs/compression.md promise."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from concat_model import concatenating
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ExportError
from coordconv_patch.export.report import ExportReport

CPU = ["CPUExecutionProvider"]
SIZE = 64


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """A small ResNet whose batch norms have statistics of its own."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10).train()
    with torch.no_grad():
        for seed in range(8):
            model(images(16, seed))
    return model.eval()


@pytest.fixture(scope="module")
def patched(plain: nn.Module) -> nn.Module:
    model = ccp.patch(plain, "all")
    randomise(model, 1)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(std=0.1, generator=generator)


def run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=CPU)
    (output,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(output)


def root_mean_square_error(actual: np.ndarray[Any, Any], expected: Tensor) -> float:
    """Relative to the standard deviation of what is expected."""
    apart = torch.from_numpy(actual.astype(np.float32)) - expected.float()
    return float(apart.square().mean().sqrt() / expected.float().std())


# --- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["auto", "branch", "separable", "map", "channels"])
def test_float16_files_compute_the_concatenating_model(
    patched: nn.Module, lowering: Any, tmp_path: Path
) -> None:
    half = ccp.patch(ccp.unpatch(patched, discard=True), "all")
    half.load_state_dict(patched.state_dict())
    half.half()
    report = ccp.export_onnx(
        half, tmp_path / "half.onnx", images(2, 20).half(), lowering=lowering, providers=CPU
    )
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer]
    floats = [array for array in stored if array.dtype.kind == "f"]
    assert {array.dtype for array in floats} == {np.dtype(np.float16)}
    assert all(np.isfinite(array).all() for array in floats)
    x = images(3, 21)
    expected = concatenating(patched)(x)
    assert root_mean_square_error(run(report.path, x.half().numpy()), expected) < 5e-3


def test_float16_overflows_nowhere_on_large_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 7, stride=2, padding=3)).eval(), "all")
    nn.init.normal_(ccp.coord_parameters(model)[0], std=1.0)
    x = torch.rand(1, 3, 1200, 1600)
    expected = concatenating(model)(x)
    report = ccp.export_onnx(model.half(), tmp_path / "large.onnx", x.half(), providers=CPU)
    assert set(report.lowerings.values()) == {"separable"}
    actual = run(report.path, x.half().numpy())
    assert np.isfinite(actual).all()
    assert root_mean_square_error(actual, expected) < 2e-3


def test_bfloat16_files_are_checked_in_float32_where_the_runtime_has_none(
    patched: nn.Module, tmp_path: Path
) -> None:
    narrow = ccp.patch(ccp.unpatch(patched, discard=True), "all")
    narrow.load_state_dict(patched.state_dict())
    narrow.bfloat16()
    report = ccp.export_onnx(
        narrow, tmp_path / "bf16.onnx", images(2, 22).bfloat16(), providers=CPU
    )
    assert any("bfloat16" in note for note in report.notes)
    assert report.opset >= 22
    assert 0 < report.worst_difference < 0.05
    graph = onnx.load(report.path).graph
    whole = {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
    floating = {t.data_type for t in graph.initializer} - whole
    assert floating == {onnx.TensorProto.BFLOAT16}
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_a_wrong_bfloat16_file_is_found(patched: nn.Module, tmp_path: Path) -> None:
    narrow = ccp.patch(ccp.unpatch(patched, discard=True), "all").bfloat16()
    report = ccp.export_onnx(narrow, tmp_path / "b.onnx", images(2, 23).bfloat16(), providers=CPU)
    with torch.no_grad():
        ccp.coord_parameters(narrow)[0].fill_(1.0)
    with pytest.raises(ExportError, match="differ on"):
        ccp.verify_onnx(narrow, report.path, images(2, 23).bfloat16(), providers=CPU)


# --- int8 ---------------------------------------------------------------------------------------


class Pictures(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self.batches = iter([{name: images(4, seed).numpy()} for seed in range(30, 38)])

    def get_next(self) -> Any:
        return next(self.batches, None)


def quantized(report: ExportReport) -> Path:
    """The file in int8, by the command that docs/compression.md shows."""
    path = report.path.with_suffix(".int8.onnx")
    quantize_static(
        str(report.path),
        str(path),
        Pictures(onnx.load(report.path).graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(report.coordinate_nodes),
    )
    return path


@pytest.fixture(scope="module")
def int8_errors(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Errors of patched models over the plain one's, the median of three sets of coordinates.

    One set alone says little: the ratio is between 0.9 and 1.3 from set to set.
    """
    folder, test = tmp_path_factory.mktemp("int8"), images(16, 40)

    def error(name: str, model: nn.Module, expected: Tensor, lowering: Any = "branch") -> float:
        report = ccp.export_onnx(
            model, folder / f"{name}.onnx", images(2, 39), lowering=lowering, providers=CPU
        )
        return root_mean_square_error(run(quantized(report), test.numpy()), expected)

    with torch.no_grad():
        of_plain = error("plain", plain, plain(test))
        left_out, concatenated = [], []
        for seed in range(1, 4):
            model = ccp.patch(plain, "all")
            randomise(model, seed)
            expected = concatenating(model)(test)
            left_out.append(error(f"left-out-{seed}", model, expected))
            concatenated.append(error(f"concatenated-{seed}", model, expected, "channels"))
    return {
        "plain": of_plain,
        "left out": statistics.median(left_out) / of_plain,
        "concatenated": statistics.median(concatenated) / of_plain,
    }


def test_int8_costs_a_patched_model_at_most_one_more_rounding_of_each_activation(
    int8_errors: dict[str, float],
) -> None:
    assert 0 < int8_errors["plain"] < 0.05
    assert int8_errors["left out"] < 2**0.5  # the convolution's output is rounded, then the sum


def test_int8_with_concatenated_coordinates_is_worse(int8_errors: dict[str, float]) -> None:
    assert int8_errors["concatenated"] > 1.2 * int8_errors["left out"]


def test_coordinate_nodes_are_those_that_no_input_reaches(
    patched: nn.Module, tmp_path: Path
) -> None:
    report = ccp.export_onnx(
        patched, tmp_path / "m.onnx", images(2, 41), lowering="branch", providers=CPU
    )
    graph = onnx.load(report.path).graph
    by_name = {node.name: node for node in graph.node}
    assert len(by_name) == len(graph.node)
    found = [by_name[name] for name in report.coordinate_nodes]
    assert sum(node.op_type == "Conv" for node in found) == len(report.lowerings)
    main = {name for name, _ in patched.named_parameters() if not name.endswith("coord_weight")}
    assert not any(set(node.input) & main for node in found)
