"""The page of the paper's experiments says what the records say."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

PAPER = Path(__file__).parents[1] / "examples" / "paper"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module("results_page")


def test_the_page_is_what_the_records_give(page: Any) -> None:
    assert page.PAGE.read_text() == page.render(), "run python examples/paper/results_page.py"


def test_every_record_has_a_row_and_a_picture(page: Any) -> None:
    text = page.PAGE.read_text()
    for record in (PAPER / "results").glob("*.json"):
        assert f"[`{record.stem}.py`]({record.stem}.py)" in text
        assert f"![{record.stem}](results/{record.stem}." in text


def test_a_figure_is_the_mean_over_the_seeds(page: Any) -> None:
    record = json.loads((PAPER / "results" / "finetune.json").read_text())
    values = [
        run["metrics"]["IOU"]
        for run in record["runs"]
        if run["setting"] == "wide view, unpadded" and run["variant"] == "patched: all"
    ]
    assert len(values) == 3
    expected = f"all patched **{sum(values) / 3:.3f}** ± {statistics.stdev(values):.3f} (3 seeds, "
    assert expected in page.render()


def test_records_are_whole_runs_and_not_quick_ones() -> None:
    for record in (PAPER / "results").glob("*.json"):
        content = json.loads(record.read_text())
        assert not content["quick"]
        assert content["budget"] == 1.0
        assert content["runs"]


def test_a_claim_without_a_run_is_an_error(page: Any) -> None:
    claims = importlib.import_module("claims")
    figure = claims.Figure("nothing", "no such split", "patched", "test IOU")
    with pytest.raises(KeyError, match="no run of no such split, patched"):
        page.runs_of(page.load("rendering"), figure)


def test_a_comparison_tells_time_and_parameters_from_the_record(page: Any) -> None:
    def run(variant: str, seed: int, test: list[float], parameters: int) -> dict[str, Any]:
        curves = {"CPU seconds": [2.0, 4.0, 12.0], "test": test}
        metrics = {"test IOU": test[-1]}
        return {
            **{"setting": "uniform", "variant": variant, "seed": seed, "metrics": metrics},
            **{"parameters": parameters, "curves": curves},
        }

    claims = importlib.import_module("claims")
    comparison = claims.Comparison("the deconvs", "uniform", "deconv*", "test IOU")
    runs = [
        run("deconv a", 1, [0.1, 0.2, 0.3], 300),  # seeds are paired, whatever their order
        run("deconv a", 0, [0.1, 0.2, 0.8], 300),
        run("deconv b", 0, [0.1, 0.2, 0.9], 600),  # better, but it lacks a seed
        run("patched", 0, [0.1, 0.9, 1.0], 100),
        run("patched", 1, [0.1, 0.2, 0.2], 100),
    ]
    assert page.cell({"experiment": "e", "runs": runs}, comparison) == (
        "best test score of the deconvs: reached **3, never** times sooner, by seed; "
        "**3.0** times fewer parameters"
    )


def test_a_plain_net_that_scored_nothing_has_no_best_to_be_reached(page: Any) -> None:
    claims = importlib.import_module("claims")
    comparison = claims.Comparison("the deconvs", "quadrant", "deconv*", "test accuracy")
    run = {
        **{"setting": "quadrant", "seed": 0, "metrics": {"test accuracy": 0.0}, "parameters": 10},
        "curves": {"CPU seconds": [1.0], "test": [0.0]},
    }
    runs = [run | {"variant": "patched"}, run | {"variant": "deconv a"}]
    text = page.cell({"experiment": "e", "runs": runs}, comparison)
    assert "none, as the plain net's test score stayed 0" in text
