"""Rows of the sweep: kept one file a model and stage, judged, gathered into docs/.

The gathered file lists the sets of package versions that its rows were made with, each
once; a row names its own by number, so that rows of several runs can stand side by side.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, Literal, get_args

from zoo.torch_stage import FINDINGS

__all__ = [
    "EXPECTED_FAILURES",
    "RESULTS",
    "STAGES",
    "Rows",
    "Stage",
    "Verdict",
    "checked_in",
    "expected_failures",
    "gather",
    "judge",
    "load",
    "store",
    "versions_here",
]

Stage = Literal["torch", "onnx"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Verdict = Literal["passes", "plain fails", "fails"]

_ROWS = Path(__file__).parent / "rows"
"""Working files, not checked in: a sweep can be interrupted and resumed."""

RESULTS = Path(__file__).parents[2] / "docs" / "zoo_results.json"
EXPECTED_FAILURES = Path(__file__).parent / "expected_failures.json"

_PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "ultralytics", "onnxscript"),
    *("segmentation_models_pytorch", "effdet", "stable_baselines3", "diffusers", "spandrel"),
)

Rows = dict[str, dict[str, dict[str, Any]]]
"""By entry and stage."""

MAX_RATIO = 3.0
"""Of the patched export's difference from torch to the plain model's, or to float64's."""

MAX_DIFFERENCE = 2e-2
"""More than this is another decision (which boxes are the best) and no rounding."""


def _path(name: str, stage: Stage) -> Path:
    return _ROWS / stage / (name.replace("/", "__") + ".json")


def store(name: str, stage: Stage, row: dict[str, Any]) -> None:
    """Keep a row, replacing an older one."""
    path = _path(name, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(path)


def load(name: str, stage: Stage) -> dict[str, Any] | None:
    """The row kept, if there is one."""
    path = _path(name, stage)
    return json.loads(path.read_text()) if path.exists() else None


def _gathered() -> dict[str, Any]:
    """The checked-in results."""
    if not RESULTS.exists():
        return {"versions": [], "rows": {}}
    return json.loads(RESULTS.read_text())


def checked_in() -> set[tuple[str, str]]:
    """The entries and stages that the checked-in results have."""
    return {(name, stage) for name, rows in _gathered()["rows"].items() for stage in rows}


def gather(names: list[str]) -> dict[str, Any]:
    """The checked-in results of these entries, with the rows kept since put in their places."""
    found = _gathered()
    known: list[dict[str, str]] = found["versions"]
    rows: Rows = found["rows"]
    for name in names:
        for stage in STAGES:
            row = load(name, stage)
            if row is None:
                continue
            made_with = row.pop("versions")
            if made_with not in known:
                known.append(made_with)
            rows.setdefault(name, {})[stage] = {"versions": known.index(made_with), **row}
    return _without_unused_versions(known, {name: rows[name] for name in names if name in rows})


def _without_unused_versions(known: list[dict[str, str]], rows: Rows) -> dict[str, Any]:
    every = [row for stages in rows.values() for row in stages.values()]
    used = sorted({row["versions"] for row in every})
    for row in every:
        row["versions"] = used.index(row["versions"])
    return {"versions": [known[number] for number in used], "rows": rows}


def versions_here() -> dict[str, str]:
    """The versions of Python and of those installed among the packages that rows depend on."""
    import onnxruntime  # two packages install it, so no distribution's name is sure

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"onnxruntime": onnxruntime.__version__}


def expected_failures() -> dict[tuple[str, str], str]:
    """Reason by (entry, stage)."""
    listed = json.loads(EXPECTED_FAILURES.read_text())
    found = {(item["entry"], item["stage"]): item["reason"] for item in listed}
    assert len(found) == len(listed), "an expected failure is listed twice"
    return found


def judge(stage: Stage, row: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """Whether a row passes, and what is wrong with it.

    ``"plain fails"`` where everything that goes wrong goes wrong for the plain model too.
    """
    return _judge_torch(row) if stage == "torch" else _judge_onnx(row)


def _judge_torch(row: dict[str, Any]) -> tuple[Verdict, list[str]]:
    if "error" in row:
        return "fails", [row["error"]]
    if "plain" in row:
        return "plain fails", [f"the plain model: {row['plain']}"]
    if "patch" in row:
        return "fails", [f"patch: {row['patch']}"]
    # What the plain model cannot do either, such as being pickled, is not asked for.
    problems = [
        f"{name}: {row[name]}"
        for name in FINDINGS
        if row[name] != "ok" and not row[name].startswith("plain: ")
    ]
    return ("fails" if problems else "passes"), problems


def _judge_onnx(row: dict[str, Any]) -> tuple[Verdict, list[str]]:
    if "error" in row:
        return "fails", [row["error"]]
    if "plain" in row:
        return "plain fails", [row["plain"]]
    if "patched" in row:
        return "fails", [f"patched: {row['patched']}"]
    difference, allowed = row["difference"], allowed_difference(row)
    if difference > allowed:
        return "fails", [f"differs by {difference:.2g}, allowed are {allowed:.2g}"]
    return "passes", []


def allowed_difference(row: dict[str, Any]) -> float:
    """Three times the plain export's difference from torch, or float32's from float64."""
    floor = max(row["plain_difference"], row["plain_noise"], row["noise"])
    return min(MAX_RATIO * floor, MAX_DIFFERENCE)
