"""Pages that are written from records say what the records say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_page_of_benchmarks_is_what_the_records_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = importlib.import_module("benchmarks_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), (
        "run benchmarks/benchmarks_page.py"
    )
    assert "| ResNet-50, batch 1, 2 threads | 1.00 | 1.00 | 1.06 | 1.10 | 1.37 |" in page.render()
