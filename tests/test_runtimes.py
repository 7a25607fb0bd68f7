"""Files of their targets, run in the runtimes that the [test] extra has, at batch 1 and 2."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_graphs import CPU
from torch import Tensor, nn

import coordconv_patch as ccp

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in list(sys.modules):
        if name == "runtimes" or name.split(".")[0] == "shared":
            del sys.modules[name]


class Network(nn.Module):
    """A strided, a depthwise, a 1x1 convolution behind a stride, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shortcut = nn.Conv2d(8, 8, 1, 2)
        self.head = nn.Conv2d(8, 5, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.depthwise(x) + x).relu()
        return self.shortcut(x).mean((2, 3))[:, :5] + self.head(x).mean((2, 3))


def images(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize(
    ("target", "runners", "size"),
    [
        ("openvino", ("openvino", "openvino_dynamic"), None),
        ("openvino", ("openvino", "openvino_dynamic"), (20, 28)),
        ("portable", ("onnxruntime", "openvino_dynamic", "opencv", "opencv_classic"), None),
        ("opencv", ("opencv", "opencv_classic"), None),
    ],
)
def test_a_targets_file_computes_what_torch_does(
    target: str, runners: tuple[str, ...], size: tuple[int, int] | None, std: float, tmp_path: Path
) -> None:
    run_in = importlib.import_module("shared.runners").RUNNERS
    torch.manual_seed(0)
    model = ccp.patch(Network().eval(), "all")
    plain = Network().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=std)
    options: dict[str, Any] = {"exporter": "torchscript", "dynamic_size": size is not None}
    path = tmp_path / "m.onnx"
    ccp.export_onnx(model, path, images(2, (16, 12)), target=target, providers=CPU, **options)
    for batch in (1, 2):
        x = images(batch, size or (16, 12))
        expected, without = model(x).detach().numpy(), plain(x).detach().numpy()
        assert (np.abs(expected - without).max() > 0.01) == (std > 0)
        for name in runners:
            actual = run_in[name](path, x.numpy())()
            assert actual.shape == expected.shape, name
            np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6, err_msg=name)


def test_a_runtime_that_is_missing_is_named_with_its_commands(tmp_path: Path) -> None:
    script = importlib.import_module("runtimes")
    with pytest.raises(script.MissingRuntimeError, match=r"MNN is not installed .* install numpy"):
        script.python_of("mnn", tmp_path)
    with pytest.raises(SystemExit, match="--environments FOLDER --install"):
        script.main(["--runtimes", "ncnn", "--environments", str(tmp_path)])
    assert script.python_of("openvino", None) == sys.executable


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["--quick"], {"rounds": 2, "seconds": 0.0}),
        (["--rounds", "2", "--seconds", "0.5"], {"rounds": 2, "seconds": 0.5}),
        (["--rounds", "0"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_script_times_by_its_options_and_measures_nothing_twice(
    options: list[str],
    least: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = importlib.import_module("runtimes")
    measured, calls = script.measured, []

    def two_forms(*arguments: Any, **settings: Any) -> dict[str, Any]:
        calls.append((arguments[0], arguments[3], settings))
        return measured(*arguments, forms=("plain", "target"), **settings)

    monkeypatch.setattr(script, "measured", two_forms)
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    script.PAGE.write_text("before\n<!-- matrix -->\nold\n<!-- end -->\nafter\n")
    command = [*options, "--out", str(tmp_path / "record.json")]
    command += ["--models", "tiny", "--runtimes", "onnxruntime"]
    script.main(command)
    assert calls == [("onnxruntime", 1, least), ("onnxruntime", 2, {})]
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    for batch in (1, 2):
        cells = results[f"onnxruntime tiny {batch}"]
        assert list(cells) == ["plain", "target"]
        assert all(cell["difference"] <= script.TOLERANCE for cell in cells.values())
        assert all(("ratio" in cell) == bool(least and batch == 1) for cell in cells.values())

    script.main(command)
    assert len(calls) == 2
    script.main(["--write-page", "--out", str(tmp_path / "record.json")])
    table = script.page_table(results)
    page = "before\n<!-- matrix -->\n" + table + "\n<!-- end -->\nafter\n"
    assert script.PAGE.read_text() == page
    assert capsys.readouterr().out.count(table) == 3


def test_the_page_says_what_the_record_says() -> None:
    script = importlib.import_module("runtimes")
    record = json.loads((ROOT / "benchmarks" / "results" / "runtimes.json").read_text())
    page = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    assert f"<!-- matrix -->\n{script.page_table(record['results'])}\n<!-- end -->" in page
    wrong = {
        (key, form)
        for key, cells in record["results"].items()
        for form, cell in cells.items()
        if cell.get("difference", 0) > script.TOLERANCE
    }
    # OpenCV computes the plain MobileNetV3 wrongly, too.
    keys = [f"opencv mobilenetv3 {batch}" for batch in (1, 2)]
    assert wrong == {(key, form) for key in keys for form in ("plain", "target")}
