"""What a repository has beside its code: whole, and in agreement with it."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

import coordconv_patch as ccp
from documentation.code_blocks import ROOT

TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert set(jobs) == {"tests", "checks", "wheels", "publish"}
    ran = {step["run"] for step in jobs["checks"]["steps"] if "run" in step}
    for command in ("ruff check .", "ruff format --check .", "mypy", "pytest -m docs"):
        assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert command in ran
    assert "mkdocs build --strict" in ran
    assert set(jobs["publish"]["needs"]) == {"tests", "checks", "wheels"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_the_workflow_tests_the_oldest_versions_that_the_package_takes() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    (torch,) = re.findall(r'^    "torch>=([\d.]+)"', project, re.MULTILINE)
    rows = read(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert {"python": python, "torch": f"{torch}.*"} in rows


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_whole(path: Any) -> None:
    form = read(str(path.relative_to(ROOT)))
    if path.stem != "config":
        assert {"name", "description", "body"} <= set(form)
        assert all({"label"} <= set(part["attributes"]) for part in form["body"])


def test_a_bug_report_asks_for_the_environment() -> None:
    labels = [
        part["attributes"]["label"] for part in read(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    ]
    assert "Output of `coordconv-patch env`" in labels


def test_the_citation_names_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == ccp.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_pre_commit_has_the_checks_of_ci() -> None:
    hooks = [
        hook["id"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert {"ruff-check", "ruff-format", "mypy"} <= set(hooks)


def test_the_address_of_the_project_stands_in_one_line() -> None:
    (address,) = re.findall(
        r'^Repository = "https://(.+)"$',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    command = ["git", "grep", "--untracked", "-nF", address]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert lines.count("\n") == 1, lines
