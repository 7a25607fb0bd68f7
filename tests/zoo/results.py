"""Rows of the sweep: kept one file a model and stage, judged, gathered into docs/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

from zoo.torch_stage import FINDINGS

__all__ = [
    "EXPECTED_FAILURES",
    "RESULTS",
    "STAGES",
    "Stage",
    "Verdict",
    "expected_failures",
    "judge",
    "load",
    "load_all",
    "store",
]

Stage = Literal["torch", "onnx"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Verdict = Literal["passes", "plain fails", "fails"]

_ROWS = Path(__file__).parent / "rows"
"""Working files, not checked in: a sweep can be interrupted and resumed."""

RESULTS = Path(__file__).parents[2] / "docs" / "zoo_results.json"
EXPECTED_FAILURES = Path(__file__).parent / "expected_failures.json"

MAX_RATIO = 3.0
"""Of the patched export's difference from torch to the plain model's, or to float64's."""


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


def load_all(names: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of these entries, by name and stage."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        rows = {stage: row for stage in STAGES if (row := load(name, stage)) is not None}
        if rows:
            found[name] = rows
    return found


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
    return MAX_RATIO * max(row["plain_difference"], row["plain_noise"], row["noise"])
