"""The page of the paper's experiments says what the records say."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAPER = Path(__file__).parents[2] / "examples" / "paper"
EXPERIMENTS = sorted(record.stem for record in (PAPER / "results").glob("*.json"))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module("results_page")


def test_the_page_is_what_the_records_give(page: Any) -> None:
    assert page.PAGE.read_text() == page.render(), "run python examples/paper/results_page.py"


def test_every_record_has_a_row_and_a_picture(page: Any) -> None:
    text = page.PAGE.read_text()
    for record in (PAPER / "results").glob("*.json"):
        assert f"[`{record.stem}.py`](../examples/paper/{record.stem}.py)" in text
        assert f"![{record.stem}](../examples/paper/results/{record.stem}." in text


def test_a_figure_is_the_mean_over_the_seeds(page: Any) -> None:
    record = json.loads((PAPER / "results" / "finetune.json").read_text())
    values = [
        run["metrics"]["IOU"]
        for run in record["runs"]
        if run["setting"] == "wide view, unpadded" and run["variant"] == "patched: all"
    ]
    assert len(values) == 3
    expected = f"| all patched | **{sum(values) / 3:.3f}** ± {statistics.stdev(values):.3f} | 3 | "
    assert expected in page.render()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_record_holds_exactly_the_runs_of_its_script(
    name: str, page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its picture can be drawn from it: nothing else is kept."""
    experiment = importlib.import_module("experiment")
    shutil.copy(PAPER / "results" / f"{name}.json", tmp_path)
    asked: set[tuple[str, str, int]] = set()
    run = experiment.Record.run

    def kept(record: Any, setting: str, variant: str, seed: int, train: Callable[[], Any]) -> Any:
        asked.add((setting, variant, seed))
        return run(
            record,
            setting,
            variant,
            seed,
            lambda: pytest.fail(f"no run {seed} of {setting}, {variant}"),
        )

    monkeypatch.setattr(experiment.Record, "run", kept)
    record = importlib.import_module(name).main(["--seeds", "3", "--out", str(tmp_path)])
    assert {(run.setting, run.variant, run.seed) for run in record.runs} == asked
    assert len(record.runs) == len(asked)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


# --- the verdicts ---------------------------------------------------------------------------


def values(page: Any, record: str, setting: str, variant: str, metric: str) -> list[float]:
    """A metric of every seed."""
    figure = importlib.import_module("claims").Figure("", setting, variant, metric)
    runs = page.runs_of(page.load(record), figure).runs
    return [run["metrics"][metric] for run in runs]


def test_verdicts_on_detection_tell_gains_and_losses_alike(page: Any) -> None:
    claims = importlib.import_module("claims")
    seen = set()
    for claim in (claim for claim in claims.CLAIMS if claim.experiment == "detection"):
        (gain,) = (figure for figure in claim.figures if isinstance(figure, claims.Gain))
        found = page.gains(page.load("detection"), gain)
        assert len(found) == 3
        better, worse = all(value > 0 for value in found), all(value < 0 for value in found)
        assert claim.verdict.startswith("a gain in every seed") == better, (claim.claim, found)
        assert ("worse in every seed" in claim.verdict) == worse, (claim.claim, found)
        assert claim.verdict.startswith(("a gain in every seed", "no")), claim.verdict
        seen.add((better, worse))
    assert len(seen) == 3


def test_verdicts_on_absolute_boxes(page: Any) -> None:
    def iou(setting: str, variant: str) -> list[float]:
        return values(page, "detection", setting, variant, "IOU of best boxes")

    absolute = {name: iou("absolute boxes", name) for name in ("plain", "patched", "scrambled")}
    assert statistics.mean(absolute["patched"]) > 2 * statistics.mean(absolute["plain"])
    assert statistics.mean(absolute["scrambled"]) < 1.25 * statistics.mean(absolute["plain"])
    assert statistics.mean(absolute["patched"]) < min(iou("sampled by anchors", "plain"))


def test_verdicts_on_fine_tuning_say_what_scrambled_coordinates_do(page: Any) -> None:
    branches = importlib.import_module("branches")

    def gains(setting: str, control: bool) -> list[float]:
        """True coordinates against scrambled ones, or against the plain net."""
        pairs = [(branches.FIRST, branches.SCRAMBLED), (branches.ALL, branches.ALL_SCRAMBLED)]
        found = []
        for true, scrambled in pairs:
            other = branches.KEPT_ON if control else scrambled
            first, second = (
                values(page, "finetune", setting, name, "IOU") for name in (true, other)
            )
            found += [a - b for a, b in zip(first, second, strict=True)]
        return found

    settings = (branches.NARROW, branches.NARROW_PADDED, branches.WIDE, branches.WIDE_PADDED)
    for setting in settings:  # "helps", "scrambled coordinates a little more"
        assert min(gains(setting, control=True)) > 0.05
        assert -0.04 < statistics.mean(gains(setting, control=False)) < 0
    for setting in settings[2:]:  # "with every seed"
        assert max(gains(setting, control=False)) < 0
    # New places: "scrambled coordinates much less", "from scratch it does better still".
    assert min(gains(branches.NEW_PLACES, control=False)) > 0.09
    scratch, first = (
        values(page, "finetune", branches.NEW_PLACES, name, "IOU")
        for name in (branches.SCRATCH, branches.FIRST)
    )
    assert all(a > b for a, b in zip(scratch, first, strict=True))


def test_verdicts_on_what_was_learnt_to_the_end(page: Any) -> None:
    for split in ("uniform", "quadrant"):
        for half in ("train", "test"):
            accuracy = values(page, "classification", split, "patched", f"{half} accuracy")
            assert accuracy == [1.0] * 3
            error = values(page, "regression", split, "patched", f"{half} error, px")
            assert max(error) < 0.01
        least = {"uniform": 0.99, "quadrant": 0.95}[split]
        for variant in ("patched", "patched, narrower"):
            assert min(values(page, "rendering", split, variant, "test IOU")) > least
    (training,) = values(
        page, "classification", "uniform", "the same transposed convs, *", "train accuracy"
    )
    assert training == pytest.approx(0.88, abs=0.005)


def test_verdicts_on_films_of_transposed_convolutions(page: Any) -> None:
    def slides(model: str, setting: str, variant: str) -> list[float]:
        return values(page, model, setting, variant, "sliding_films")

    assert statistics.mean(slides("vae", "deconv", "patched")) < statistics.mean(
        slides("vae", "deconv", "plain")
    )
    longer = zip(
        slides("gan", "deconv, longer", "patched"),
        slides("gan", "deconv, longer", "plain"),
        strict=True,
    )
    assert sorted(patched > plain for patched, plain in longer) == [False, True, True]
    for variant in ("plain", "patched"):  # "a third of the squares are still not whole"
        for whole in values(page, "gan", "deconv, longer", variant, "intact"):
            assert 0.6 < whole < 0.72


# --- the page -------------------------------------------------------------------------------


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
    assert page.note({"experiment": "e", "runs": runs}, comparison) == (
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
    text = page.note({"experiment": "e", "runs": runs}, comparison)
    assert "none, as the plain net's test score stayed 0" in text
