"""The notebooks run as they stand, and show what their code prints today."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest
from scripts import load_script

from documentation.code_blocks import ROOT, without_numbers

notebooks = load_script(ROOT / "docs/_site/notebooks.py")


def _printed(cell: Any) -> list[str]:
    """What a cell prints, but for numbers and warnings."""
    streams = [out.text for out in cell.get("outputs", []) if out.get("name") == "stdout"]
    return [without_numbers(text) for text in streams]


def _shown(cell: Any) -> Counter[str]:
    """The kinds of what a cell shows: pictures, tables."""
    return Counter(kind for out in cell.get("outputs", []) for kind in out.get("data", {}))


@pytest.mark.docs
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    stored = nbformat.read(path, as_version=4)
    now = notebooks.run(path, tmp_path)
    assert [_printed(cell) for cell in now.cells] == [_printed(cell) for cell in stored.cells]
    assert [_shown(cell) for cell in now.cells] == [_shown(cell) for cell in stored.cells]


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_has_its_pictures_and_nothing_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    shown = sum((_shown(cell) for cell in notebook.cells), Counter())
    assert shown["image/jpeg"] >= 3
    assert shown["text/html"] >= 1  # a plan or a report
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(out.get("name") == "stderr" for cell in code for out in cell.outputs)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)
