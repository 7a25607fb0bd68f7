"""The list of core tests, the record of versions, and what else names the oldest torch."""

from __future__ import annotations

import json
import re

import pytest
import versions

from coordconv_patch.running.torch_versions import OLDEST


@pytest.mark.parametrize("name", [*versions.CORE, *versions.SHORT, *versions.NEEDS_MORE])
def test_core_tests_are_there(name: str) -> None:
    path, _, test = name.partition("::")
    file = versions.ROOT / "tests" / path
    assert file.exists()
    assert not test or f"def {test}(" in file.read_text(encoding="utf-8")


def test_the_short_list_is_a_part_of_the_core() -> None:
    assert {name.partition("/")[0] for name in versions.SHORT} <= set(versions.CORE)


def test_the_page_shows_the_record() -> None:
    rows = json.loads(versions.RECORD.read_text(encoding="utf-8"))
    shown = versions.PAGE.read_text(encoding="utf-8")
    assert f"{versions.BEGIN}\n{versions.table(rows)}\n{versions.END}" in shown
    assert not [row["torch"] for row in rows if row["failed"] != len(row["failures"])]


def test_the_oldest_torch_is_the_one_that_is_asked_for_and_tested() -> None:
    project = (versions.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"torch>=([\d.]+)"', project) == [OLDEST]
    ci = (versions.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"tests/versions\.py ([\d.]+)\.0 --short", ci) == [OLDEST]
    rows = json.loads(versions.RECORD.read_text(encoding="utf-8"))
    assert rows[0]["torch"].startswith(f"{OLDEST}.")
