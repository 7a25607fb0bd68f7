"""The scripts in benchmarks/: they run, resume, and compare what they say they compare."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
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
SCRIPTS = ("onnx_runtime", "scaling", "export_cost", "places", "training_and_eager", "functional")


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when a script runs: its folder stands first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in list(sys.modules):
        if name in (*SCRIPTS, "on_gpu", "benchmarks_page") or name.split(".")[0] == "shared":
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
    "places": {
        "tiny, batch 2, 1 thread": {
            *("plain", "plain again", "first", "first, places", "all", "all, places"),
        }
    },
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
    "functional": {key: {"plain", "plain again", "all", "floor"} for key in ("eager", "compiled")},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_mode_measures_all_variants_and_a_second_run_none(
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"{script}.json"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--quick", "--out", str(out)])
    options = ("--engines", "onnxruntime") if script == "onnx_runtime" else ()
    record = run(script, out, *options)
    variants = {key: set(found["variants"]) for key, found in record["results"].items()}
    assert variants == EXPECTED[script]
    for found in record["results"].values():
        for variant in found["variants"].values():
            assert variant["ratio"] > 0
    assert record["commands"] == [f"python benchmarks/{script}.py --quick --out {out.name}"]
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


PORT = "all, port, buffer"
ON_GPU = {
    "training step, batch 2, float32": {"plain", "first", "all", PORT},
    "eager, batch 2, AMP bfloat16, channels_last": {
        *("plain", "first", "all", "all, floor", "all, folded", PORT),
    },
    "compiled, batch 2, float32": {"plain", "all"},
    "lowerings, batch 2, float16": {
        *("plain", PORT, "channels", "map", "branch", "separable", "computed"),
    },
    "CPUExecutionProvider, batch 2": {"plain", "plain again", "map", "naive concat"},
}
"""Some of the parts of benchmarks/on_gpu.py, and their variants."""


def test_the_parts_for_a_gpu_run_on_the_cpu_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    out = tmp_path / "on_gpu.json"
    record = run("on_gpu", out, "--device", "cpu")
    results = record["results"]
    checks = {key: result for key, result in results.items() if key.startswith("check, ")}
    assert len(checks) == len(load("shared.device_checks").CHECKS)
    assert list(results)[: len(checks)] == list(checks), "the checks come first"
    assert all(result["passed"] is True for result in checks.values()), checks
    for what, variants in ON_GPU.items():
        assert set(results[f"tiny, {what}"]["variants"]) == variants
    (missing,) = (key for key, result in results.items() if "not_run" in result)
    assert missing == "tiny, TensorrtExecutionProvider, batch 2"
    assert "none of providers=['TensorrtExecutionProvider']" in results[missing]["not_run"] or (
        "has no TensorrtExecutionProvider" in results[missing]["not_run"]
    )
    printed = capsys.readouterr().out
    assert "check, zero weights: passed" in printed
    assert f"{missing}: not run: " in printed
    section = load("benchmarks_page").on_gpu(results)
    assert f"{len(checks)} of {len(checks)} checks passed.\n" in section
    ratio = results["tiny, training step, batch 2, float32"]["variants"]["first"]["ratio"]
    assert f"| tiny, training step, batch 2, float32 | {ratio:.2f} |" in section
    assert f"- not run: {missing}: " in section


def test_the_page_says_that_nothing_was_run_on_a_gpu_or_what_failed() -> None:
    page = load("benchmarks_page")
    assert "Nothing on this page was run on a GPU" in page.on_gpu(None)
    results = {"check, fold": {"passed": False, "reason": "x"}, "check, a": {"passed": True}}
    assert "1 of 2 checks passed; **failed**: fold." in page.on_gpu(results)


FEW_PACKAGES = """
import runpy, sys
from importlib.machinery import PathFinder

class Some(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Some if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, "benchmarks")
sys.argv = ["benchmarks/on_gpu.py"]
runpy.run_path("benchmarks/on_gpu.py", run_name="__main__")
"""


def test_without_a_gpu_it_says_so_and_needs_few_packages() -> None:
    """As on a machine with few packages: the package itself comes from the working directory."""
    hidden = {"pytest", "matplotlib", "onnx_ir", "onnxscript", "ultralytics", "openvino"}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(
        [sys.executable, "-c", FEW_PACKAGES.format(hidden=hidden)],
        **{"cwd": BENCHMARKS.parent, "env": environment},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert ended.returncode == 1, ended.stderr
    assert "There is no GPU here" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (BENCHMARKS / "results" / "on_gpu.partial").exists()


def test_the_cpu_is_for_trying_the_script_out_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("on_gpu").main(["--device", "cpu"])
    assert "add --quick" in capsys.readouterr().err


def test_a_failed_check_is_recorded_and_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: torch.device) -> None:
        raise AssertionError(f"wrong on {device}")

    script = load("on_gpu")
    monkeypatch.setattr(script, "CHECKS", {"a": fails, "b": lambda device: None})
    monkeypatch.setattr(script, "_parts_of", lambda *_: [])
    with pytest.raises(SystemExit) as ended:
        run("on_gpu", tmp_path / "r.json", "--device", "cpu")
    assert ended.value.code == 1
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["check, a"] == {"passed": False, "reason": "AssertionError: wrong on cpu"}
    assert results["check, b"]["passed"] is True


def test_parts_that_fail_or_no_longer_fit_are_recorded_and_measured_by_the_next_run(
    tmp_path: Path,
) -> None:
    parts, records = load("shared.parts"), load("shared.record")

    def fail() -> dict[str, Any]:
        raise ValueError("too\n  large")

    def wait() -> dict[str, Any]:
        time.sleep(30)
        return {}

    asked = [
        parts.Part("fails", 0, fail),
        parts.Part("long", 1e6, fail),
        parts.Part("good", 0, lambda: {"variants": {}}),
        parts.Part("too slow", 0, wait),
        parts.Part("late", 0.1, wait),
    ]
    record = records.Record(tmp_path / "r.json", "a")
    parts.measure_parts(record, asked, parts.TimeLeft(1.0))
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["fails"] == {"not_run": "ValueError: too large"}
    assert results["long"] == {"not_run": "1 s were left, and it takes about 1000000 s"}
    assert results["good"] == {"variants": {}}
    assert results["too slow"]["not_run"].startswith("it was not done in the ")
    assert results["late"]["not_run"].startswith("0 s were left")
    again = records.Record(tmp_path / "r.json", "a")
    better = [parts.Part(part.key, 0, lambda: {"variants": {"new": {}}}) for part in asked]
    parts.measure_parts(again, better, parts.TimeLeft(60))
    assert again.results.pop("good") == {"variants": {}}
    assert all(result == {"variants": {"new": {}}} for result in again.results.values())


def test_files_with_places_are_timed_at_other_places_than_the_whole_picture(tmp_path: Path) -> None:
    """The input has a default: a place that did not arrive would be that of whole pictures."""
    places = load("places")
    plain = tiny()
    made = load("shared.variants").patched(plain, "all", example())
    load("shared.graphs").write_verified(made, example(), tmp_path / "m.onnx", places=True)
    session = make_session(tmp_path / "m.onnx", [CPU])
    feeds = {session.get_inputs()[0].name: example().numpy()}
    (whole,) = session.run(None, feeds)
    (crop,) = session.run(None, {**feeds, "places": places.crops(2).numpy()})
    with torch.no_grad(), ccp.places(made, places.crops(2)):
        expected = made(example()).numpy()
    np.testing.assert_allclose(crop, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(crop - whole).max() > 1e-4
