"""A lowering that is added from outside is taken wherever the package's own are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn
from typer.testing import CliRunner

import coordconv_patch as ccp
from coordconv_patch.bench.bench import bench_onnx
from coordconv_patch.cli.commands import app
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export import autotune as autotune_module
from coordconv_patch.export.auto_lowering import accepted_lowerings, check_lowering
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.lowering import Lowering, Stored
from coordconv_patch.lowering.registry import LOWERINGS, register_lowering
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.lowering.sums import Sum
from coordconv_patch.lowering.unstored import Computed

CPU = ["CPUExecutionProvider"]


class MatMul(Sum):
    """W_c @ c, which is what a 1x1 convolution of the coordinates is."""

    name = "matmul"

    def obstacle(self, site: LoweringSite) -> str:
        geometry = site.geometry
        if {*geometry.kernel_size, *geometry.stride} == {1} and not geometry.transposed:
            return ""
        return f"is not a 1x1 convolution of stride 1, but {geometry}"

    def constant(self, site: LoweringSite, call: Any) -> CoordConstant:
        return site.channels(call)

    def branch(self, layer: Any, stored: Stored, input: Tensor) -> Tensor:
        grid = stored.constant.tensor
        product = layer.coord_weight.flatten(1) @ grid.flatten(2)
        return product.reshape(1, -1, *stored.call.output_size)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(LOWERINGS)
    register_lowering(MatMul())
    yield
    LOWERINGS.clear()
    LOWERINGS.update(before)


def patched(kernel: int = 1) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, kernel), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = ccp.patch(plain.eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_file_has_its_form_and_computes_the_concatenating_model(
    exporter: str, tmp_path: Path
) -> None:
    model, example = patched(), torch.randn(2, 3, 9, 12)
    options: dict[str, Any] = {"exporter": exporter, "providers": CPU}
    report = ccp.export_onnx(model, tmp_path / "m.onnx", example, lowering="matmul", **options)
    assert report.lowerings == {"0": "matmul", "2": "matmul"}
    assert report.nodes["Conv"] == 2
    x = torch.randn(5, 3, 9, 12, generator=torch.Generator().manual_seed(4))
    session = onnxruntime.InferenceSession(report.path, providers=CPU)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = concatenating(model)(x)
    assert (expected - ccp.unpatch(model, discard=True)(x)).abs().max() > 0.1
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-5, rtol=1e-5)


def test_its_obstacle_is_the_error_of_a_site_that_cannot_take_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^0 is not a 1x1 convolution of stride 1, but 3→8 3×3"):
        ccp.export_onnx(
            patched(3), tmp_path / "m.onnx", torch.randn(1, 3, 9, 12), lowering="matmul"
        )
    assert not list(tmp_path.iterdir())


def test_autotuning_tries_it_where_a_group_can_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune_module, "_SECONDS", 0.01)
    report = ccp.export_onnx(
        *(patched(3), tmp_path / "m.onnx", torch.randn(1, 3, 9, 12)),
        lowering="autotune",
        providers=CPU,
    )
    tried = {(trial.group, trial.lowering) for trial in report.trials}
    assert ("1x1", "matmul") in tried
    assert ("3x3 on the image", "matmul") not in tried


def test_the_benchmark_times_it() -> None:
    report = bench_onnx(
        *(patched(), torch.randn(1, 3, 9, 12)),
        lowerings=["map", "matmul"],
        naive=False,
        providers=CPU,
        repeats=1,
    )
    assert [row.name for row in report.groups[0].rows][2:] == ["map", "matmul"]


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text("from torch import nn\n\ndef net():\n    return nn.Conv2d(3, 4, 1)\n")
    out = tmp_path / "m.onnx"
    options = ("--out", str(out), "--input", "1,3,8,8", "--where", "all", "--lowering", "matmul")
    result = CliRunner().invoke(app, ["export", f"{source}:net", *options])
    assert result.exit_code == 0, result.output
    assert "1 as matmul" in result.output


def test_errors_list_it() -> None:
    assert accepted_lowerings()[-1] == "matmul"
    with pytest.raises(ArgumentError, match=r"write 'auto', .*'computed', 'matmul'$"):
        check_lowering("maps", False)
    register_lowering(AnySize())
    with pytest.raises(ArgumentError, match="write lowering='computed', 'any_size' or 'auto'"):
        check_lowering("matmul", True)
    check_lowering("any_size", True)
    with pytest.raises(ArgumentError, match=r"'any_size' derives .* write dynamic_size=True"):
        check_lowering("any_size", False)


class AnySize(Computed):
    name = "any_size"


class Nameless(Computed):
    name = ""


class Taken(Computed):
    name = "map"


@pytest.mark.parametrize(
    ("lowering", "message"),
    [
        (MatMul, "lowering=<class .*MatMul'>: write an instance of a subclass of Lowering"),
        (Nameless(), "name='': write an identifier other than 'auto', "),
        (Taken(), "name='map': write an identifier other than .*'map'"),
    ],
)
def test_what_is_not_a_lowering_is_refused(lowering: Lowering, message: str) -> None:
    before = dict(LOWERINGS)
    with pytest.raises(ArgumentError, match=message):
        register_lowering(lowering)
    assert before == LOWERINGS


def test_one_of_the_same_name_takes_its_place() -> None:
    second = MatMul()
    register_lowering(second)
    assert LOWERINGS["matmul"] is second
