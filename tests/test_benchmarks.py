"""The scripts in benchmarks/: they run, resume, and compare what they say they compare."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.runtime.providers import CPU, make_session

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("onnx_runtime", "scaling", "export_cost", "training_and_eager")


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when a script runs: its folder stands first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in list(sys.modules):
        if name in SCRIPTS or name.split(".")[0] == "shared":
            del sys.modules[name]


def load(name: str) -> Any:
    return importlib.import_module(name)


def run(script: str, out: Path, *options: str) -> dict[str, Any]:
    load(script).main(["--quick", "--out", str(out), *options])
    return json.loads(out.read_text())


EXPECTED = {
    "onnx_runtime": {
        "tiny, onnxruntime, batch 2, threads 1": {
            *("plain", "plain again", "plain, by export_onnx", "all, port, run time"),
            *("all", "all, floor", "all, port, buffer"),
        }
    },
    "scaling": {
        f"tiny, {axis}": {"plain", "patched", "port, buffer"}
        for axis in ("convolutions, 3", "size, 32", "batch, 1")
    },
    "export_cost": {"tiny": {"plain, torch.onnx.export and one load", "all"}},
    "training_and_eager": {
        "tiny, training step, batch 8, 32 px": {
            *("plain", "first", "all", "all, port, buffer", "all, port, run time"),
        },
        "tiny, eager, batch 1, 32 px": {
            *("plain", "first", "all", "all, port, buffer", "all, port, run time"),
            *("all, floor", "all, folded"),
        },
        "tiny, making": {"forward", "deepcopy", "patch all", "plan all"},
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_mode_measures_all_variants_and_a_second_run_none(
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"{script}.json"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--quick"])
    options = ("--engines", "onnxruntime") if script == "onnx_runtime" else ()
    record = run(script, out, *options)
    variants = {key: set(found["variants"]) for key, found in record["results"].items()}
    assert variants == EXPECTED[script]
    for found in record["results"].values():
        for variant in found["variants"].values():
            assert variant["ratio"] > 0
    assert record["commands"] == [f"python benchmarks/{script}.py --quick"]
    assert record["machine"]["versions"]["torch"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| ratio of medians" in capsys.readouterr().out
    assert run(script, out, *options) == record


def tiny() -> nn.Module:
    models = load("shared.models")
    return load("shared.variants").seeded(models.MODELS["tiny"].make)


def example(batch: int = 2) -> Tensor:
    return load("shared.models").images(batch, 32)


def test_results_of_another_machine_are_not_continued(tmp_path: Path) -> None:
    record = load("shared.record")
    out = tmp_path / "r.json"
    record.Record(out, "a").measure("x", lambda: 1)
    assert record.Record(out, "b").commands == ["a", "b"]
    content = json.loads(out.read_text())
    content["machine"]["processor"] = "another"
    out.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"measured on another machine.*--fresh"):
        record.Record(out, "a")
    assert record.Record(out, "a", fresh=True).results == {}


def test_a_failure_keeps_what_was_measured(tmp_path: Path) -> None:
    record = load("shared.record")
    out = tmp_path / "r.json"
    made = record.Record(out, "a")
    made.measure("x", lambda value: value, 1)

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        made.measure("y", fail)
    assert json.loads(out.read_text())["results"] == {"x": 1}
    again = record.Record(out, "a")
    again.measure("x", fail)
    assert again.results == {"x": 1}


def test_of_several_sessions_each_variant_s_median_stands() -> None:
    def session(rounds: int, **ratios: float) -> dict[str, Any]:
        variants = {
            name: {"seconds": 2 * ratio, "ratio": ratio, "ratio_95": [ratio - 1, ratio + 1]}
            for name, ratio in ratios.items()
        }
        return {"rounds": rounds, "variants": variants}

    sessions = [session(5, a=3.0, b=7.0), session(6, a=1.0, b=9.0), session(7, a=2.0, b=8.0)]
    found = load("shared.record").median_session(sessions)
    assert found["rounds"] == 18
    assert found["variants"]["a"] == {
        **{"seconds": 4.0, "ratio": 2.0, "ratio_95": [1.0, 3.0]},
        "ratio_by_session": [3.0, 1.0, 2.0],
    }
    assert found["variants"]["b"]["ratio"] == 8.0


@pytest.mark.parametrize("kind", ["BufferCoords", "RuntimeCoords"])
def test_a_port_computes_the_published_function(kind: str) -> None:
    """Against a concatenation written for other tests, with the port's weights."""
    ports, variants = load("shared.ports"), load("shared.variants")
    plain = tiny()
    oblong = torch.rand(2, 3, 24, 36, generator=torch.Generator().manual_seed(4))
    made = variants.patched(plain, "all", oblong)
    with torch.no_grad():
        for weight in ccp.coord_parameters(made):
            weight.fill_(1e-3)  # the same for x and y: their order differs between ports
    names = variants.patched_names(made)
    port = ports.ported(plain, names, getattr(ports, kind), oblong)
    assert len(names) == 3
    torch.testing.assert_close(port(oblong), concatenating(made)(oblong))
    wide = sum(isinstance(module, ports.PortedConv2d) for module in port.modules())
    assert wide == 3


@pytest.mark.parametrize(("selection", "count"), [("first", 1), ("k>1", 2), ("all", 3)])
def test_the_floor_is_the_plain_model_and_constants(
    selection: str, count: int, tmp_path: Path
) -> None:
    graphs, floor = load("shared.graphs"), load("shared.floor")
    plain = tiny()
    graphs.write_plainly(plain, example(), tmp_path / "plain.onnx")
    path = tmp_path / "floor.optimised"
    assert floor.write_floor(tmp_path / "plain.onnx", path, example(), selection) == count
    model = onnx.load(path)
    expected = plain(example()).detach().numpy()
    assert np.abs(_outputs(model) - expected).max() > 1e-6
    for constant in model.graph.initializer:
        if constant.name.startswith("floor_constant_"):
            values = np.zeros(tuple(constant.dims), np.float32)
            constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
    np.testing.assert_allclose(_outputs(model), expected, atol=1e-6)


def _outputs(model: onnx.ModelProto) -> Any:
    session = make_session(model.SerializeToString(), [CPU], graph_optimization=False)
    return session.run(None, {session.get_inputs()[0].name: example().numpy()})[0]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_runs_the_file(engine: str, tmp_path: Path) -> None:
    graphs, engines = load("shared.graphs"), load("shared.engines")
    plain = tiny()
    graphs.write_verified(plain, example(), tmp_path / "n.onnx")
    run = engines.ENGINES[engine](tmp_path / "n.onnx", example(3), 1)
    found = run()
    output = run.outputs()[0] if engine == "onnxruntime" else found[0]
    np.testing.assert_allclose(output, plain(example(3)).detach().numpy(), atol=1e-5)
