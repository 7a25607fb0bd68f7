"""The pages on rankings say what the records say, and their code runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "where.md").read_text(encoding="utf-8")
README = (ROOT / "examples" / "ranking" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("paper", "ranking"):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / folder))
    return importlib.import_module("report")


def test_the_tables_are_the_records(report: Any) -> None:
    runs = report.load()
    assert report.task_table(runs) in README
    assert report.table(runs) in README


def test_the_sentences_of_the_page_hold(report: Any) -> None:
    runs = report.load()
    default, first, last = (
        report.judge(runs, method) for method in (report.DEFAULT, report.FIRST, report.LAST)
    )
    flat = " ".join(PAGE.split())
    assert f"({len(runs)} runs, {default.gaining} of them with a gain)" in flat
    assert f"among the best two in {default.best_two} of {default.gaining}, and" in flat
    assert f"reached {default.reached:.0%} of the".replace("%", " %") in flat
    assert f"in {default.nowhere} of {default.others} runs without a gain" in flat
    assert f"said in {default.gaining - default.helped} of {default.gaining} with one" in flat
    low, high = default.interval
    assert f"is {default.correlation:.2f} ({low:.2f} to {high:.2f})" in flat
    assert (
        f"in {first.best_two} of {first.gaining} runs and reached {first.reached:.0%}".replace(
            "%", " %"
        )
        in flat
    )
    assert f"the last reached {last.reached:.0%}".replace("%", " %") in flat
    assert default.cost <= 100
    ceiling = report.judge(runs, report.CEILING)
    assert f"correlate by {ceiling.correlation:.2f} with those of a run" in flat
    assert f"among its best two in {ceiling.best_two} of {ceiling.gaining}" in flat
    assert f"correlate by {ceiling.correlation:.2f}, and their top" in " ".join(README.split())


def metric(file: str, setting: str, variant: str, name: str) -> float:
    runs = json.loads((ROOT / f"examples/paper/results/{file}.json").read_text())["runs"]
    chosen = [run for run in runs if (run["setting"], run["variant"]) == (setting, variant)]
    assert chosen
    return mean(run["metrics"][name] for run in chosen)


NARROW, PATCHED = "narrow view, unpadded", "patched: first"
ROWS: dict[str, tuple[str, str, str, tuple[str, ...], str]] = {
    "a digit's box, 15": (
        *("finetune", NARROW, "IOU"),
        ("plain, kept on", PATCHED, f"{PATCHED}, scrambled", "patched: all"),
        ".3f",
    ),
    "the same at places": (
        *("finetune", f"{NARROW}, new places", "IOU"),
        ("plain, kept on", PATCHED, f"{PATCHED}, scrambled", "patched: all"),
        ".3f",
    ),
    "a digit's box, 31": (
        *("finetune", "wide view, unpadded", "IOU"),
        ("plain, kept on", PATCHED, f"{PATCHED}, scrambled", "patched: all"),
        ".3f",
    ),
    "a cup, EfficientNet": (
        *("finetune", "EfficientNet-Lite0", "median error, px"),
        ("plain, kept on", "patched: all", "patched: all, scrambled", PATCHED),
        ".1f",
    ),
    "boxes that say where": (
        *("detection", "absolute boxes", "IOU of best boxes"),
        ("plain", "patched", "scrambled", "patched: input only", "patched: RPN only"),
        ".3f",
    ),
    "boxes that move": (
        *("detection", "sampled by anchors", "IOU of best boxes"),
        ("plain", "patched"),
        ".3f",
    ),
    "torchvision's Faster": (
        *("detection", "Faster R-CNN", "IOU of best boxes"),
        ("plain", "patched"),
        ".3f",
    ),
    "classification, ResNet-50": (
        *("image_classification", "resnet50, digits", "accuracy"),
        ("plain", "patched", "scrambled"),
        ".3f",
    ),
    "an agent that sees": (
        *("reinforcement_learning", "A2C, pooled", "success"),
        ("plain", "patched", "scrambled"),
        ".2f",
    ),
    "painting at a place": (
        "vae",
        "tiled",
        "sliding_films",
        ("plain", "patched", "scrambled"),
        ".2f",
    ),
    "VAE with transposed": ("vae", "deconv", "sliding_films", ("plain", "patched"), ".2f"),
    "Ms. Pac-Man": (
        *("ms_pacman", "240,000 steps", "return after 240,000 steps"),
        ("patched",),
        ".0f",
    ),
    "Ms. Pac-Man, A2C": (
        *("ms_pacman", "1.2 million steps", "return after 240,000 steps"),
        ("plain",),
        ".0f",
    ),
}


@pytest.mark.parametrize("start", ROWS)
def test_a_row_of_the_page_is_the_records(start: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    file, setting, name, variants, form = ROWS[start]
    for variant in variants:
        value = format(metric(file, setting, variant, name), form)
        assert value in row.replace("**", ""), (variant, value)


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for part in PAGE.split("```python\n")[1:]:
        exec(part.split("```")[0], names)
    ranking = names["ranking"]
    assert names["sites"]
    assert [row.worthwhile for row in ranking.rows] == [True, False]
    assert ranking.scrambled is not None
    assert "scrambled coordinates at 0 gain" in ranking.verdict()
