"""What docs/places.md says of the experiment is what its record says."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "places.md").read_text(encoding="utf-8")
RUNS = json.loads((ROOT / "examples/places/results/crops_and_tiles.json").read_text())["runs"]
ROWS = {
    "plain": "plain",
    "patched": "patched",
    "patched, with places": "patched, places",
    "patched, with the place of another sample": "patched, others' places",
}


def values(setting: str, variant: str, metric: str) -> list[float]:
    chosen = [run for run in RUNS if (run["setting"], run["variant"]) == (setting, variant)]
    assert [run["seed"] for run in chosen] == [0, 1, 2]
    return [run["metrics"][metric] for run in chosen]


def span(numbers: list[float], form: Callable[[float], str]) -> str:
    return f"{form(min(numbers))} to {form(max(numbers))}"


@pytest.mark.parametrize(("row", "variant"), ROWS.items())
def test_a_row_is_the_range_over_the_seeds(row: str, variant: str) -> None:
    errors = values("crops", variant, "error on crops, px")
    right = values("tiles", variant, "right, tile by tile")
    expected = f"| {row} | {span(errors, '{:.1f}'.format)} | {span(right, percent)} % |"
    assert expected in PAGE.replace("**", "")


def percent(share: float) -> str:
    return f"{share:.0%}".removesuffix("%")


def test_the_sentences_below_hold() -> None:
    whole = "error on whole canvases, px"
    assert {f"{error:.1f}" for error in values("crops", "patched", whole)} == {"1.4"}
    assert span(values("crops", "patched, places", whole), "{:.1f}".format) == "0.7 to 0.8"
    agree = "tiles and whole agree"
    assert min(values("tiles", "patched, places", agree)) > 0.99
    assert span(values("tiles", "patched", agree), percent) == "29 to 32"


def test_a_run_of_seconds_shows_the_mechanism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "places"))
    experiment = importlib.import_module("crops_and_tiles")
    record = experiment.main(["--quick", "--out", str(tmp_path)])
    right = {
        run.variant: run.metrics["right, tile by tile"]
        for run in record.runs
        if run.setting == "tiles"
    }
    placed = right.pop("patched, places")
    assert placed > 0.55
    assert max(right.values()) < 0.45
    assert (tmp_path / "crops_and_tiles.png").stat().st_size > 10_000
