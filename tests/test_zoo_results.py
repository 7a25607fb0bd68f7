"""The bookkeeping of the zoo sweep: which rows are missing, and what made those there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from zoo import report, results, sweep
from zoo.results import Stage, checked_in, gather, store, versions_here

OLD = {"python": "3.0", "torch": "2.1"}
NEW = {"python": "3.0", "torch": "2.2"}
UNUSED = {"python": "2.0", "torch": "1.0"}


def onnx_row(difference: float) -> dict[str, Any]:
    noise = {"plain_difference": 1e-6, "plain_noise": 1e-6, "noise": 1e-6}
    return {**noise, "difference": difference, "exporter": "dynamo", "plain_exporter": "dynamo"}


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results of two models in ONNX, one set of versions each, instead of the real ones."""
    found = {
        "versions": [UNUSED, OLD, NEW],
        "rows": {
            "sb3/dqn": {"onnx": {"versions": 2, **onnx_row(1e-6)}},
            "sb3/sac": {"onnx": {"versions": 1, **onnx_row(2e-6)}},
        },
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found))
    for module in (results, report):
        monkeypatch.setattr(module, "RESULTS", path)
    monkeypatch.setattr(results, "_ROWS", tmp_path / "rows")
    return found


def jobs_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, Stage]]:
    """What the command line would run."""
    ran: list[tuple[str, Stage]] = []
    monkeypatch.setattr(sweep, "_run", lambda jobs, workers: ran.extend(jobs) or 0)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    assert sweep.main() == 0
    return ran


@pytest.mark.usefixtures("earlier")
def test_a_sweep_runs_what_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    store("sb3/actor_critic", "onnx", {"versions": NEW, **onnx_row(1e-6)})
    assert checked_in() == {("sb3/dqn", "onnx"), ("sb3/sac", "onnx")}
    names = ["sb3/dqn", "sb3/sac", "sb3/actor_critic", "smp/Unet"]
    assert jobs_of(monkeypatch, "--stage", "onnx", *names) == [("smp/Unet", "onnx")]
    assert jobs_of(monkeypatch, "sb3/dqn") == [("sb3/dqn", "torch")]
    again = jobs_of(monkeypatch, "--stage", "onnx", "--again", "sb3/*")
    assert {"sb3/dqn", "sb3/sac", "sb3/actor_critic"} < {name for name, _ in again}


@pytest.mark.usefixtures("earlier")
def test_the_time_limit_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[Stage, float] = {"torch": 1.0, "onnx": 2.0}
    monkeypatch.setattr(sweep, "TIME_LIMITS", limits)
    jobs_of(monkeypatch, "sb3/dqn")
    assert limits == {"torch": 1.0, "onnx": 2.0}
    jobs_of(monkeypatch, "--limit", "3", "sb3/dqn")
    assert limits == {"torch": 3.0, "onnx": 3.0}


def test_rows_keep_the_versions_that_made_them(earlier: dict[str, Any]) -> None:
    store("sb3/actor_critic", "onnx", {"versions": NEW, **onnx_row(3e-6)})
    store("smp/Unet", "onnx", {"versions": versions_here(), **onnx_row(3e-6)})
    found = gather(["smp/Unet", "sb3/actor_critic", "sb3/dqn", "sb3/sac"])
    assert found["versions"] == [OLD, NEW, versions_here()]
    made_with = {name: row["onnx"].pop("versions") for name, row in found["rows"].items()}
    assert made_with == {"smp/Unet": 2, "sb3/actor_critic": 1, "sb3/dqn": 1, "sb3/sac": 0}
    assert found["rows"]["smp/Unet"] == {"onnx": onnx_row(3e-6)}
    assert found["rows"]["sb3/sac"] == {"onnx": onnx_row(2e-6)}


def test_a_row_that_is_run_again_replaces_the_old_one(earlier: dict[str, Any]) -> None:
    store("sb3/sac", "onnx", {"versions": NEW, **onnx_row(3e-6)})
    found = gather(["sb3/dqn", "sb3/sac"])
    assert found["versions"] == [NEW]
    assert found["rows"]["sb3/sac"]["onnx"] == {"versions": 0, **onnx_row(3e-6)}
    assert found["rows"]["sb3/dqn"]["onnx"] == {"versions": 0, **onnx_row(1e-6)}


def test_the_page_says_which_versions_made_how_many_rows(earlier: dict[str, Any]) -> None:
    page = report.render(gather(["sb3/dqn", "sb3/sac"]))
    assert "- 0 (0 rows in torch, 1 rows in ONNX Runtime): python 3.0, torch 2.1\n" in page
    assert "- 1 (0 rows in torch, 1 rows in ONNX Runtime): python 3.0, torch 2.2\n" in page
    assert "torch 1.0" not in page


def test_report_writes_both_files_and_a_second_one_changes_nothing(
    earlier: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "TABLE", tmp_path / "zoo.md")
    store("sb3/sac", "torch", {"versions": NEW, "plain": "no"})
    report.main()
    first = (results.RESULTS.read_text(), report.TABLE.read_text())
    written = json.loads(first[0])
    assert written["rows"]["sb3/sac"]["torch"] == {"versions": 1, "plain": "no"}
    assert "python 3.0, torch 2.2" in first[1]
    (tmp_path / "rows" / "torch" / "sb3__sac.json").unlink()
    report.main()
    assert (results.RESULTS.read_text(), report.TABLE.read_text()) == first


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_PACKAGES", (*results._PACKAGES, "no-such-package"))
    import onnxruntime
    import torch

    found = versions_here()
    assert "no-such-package" not in found
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
