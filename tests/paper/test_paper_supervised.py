"""The paper's supervised coordinate experiments: data, scores, nets, and a quick run of each."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scripts import load_script
from torch import nn

import coordconv_patch as ccp

PAPER = Path(__file__).parents[2] / "examples" / "paper"
if str(PAPER) not in sys.path:
    sys.path.insert(0, str(PAPER))  # the scripts import their neighbours

import experiment  # noqa: E402
import not_so_clevr as data  # noqa: E402
import not_so_clevr_deconv as deconv  # noqa: E402
import not_so_clevr_experiment as supervised  # noqa: E402
import not_so_clevr_nets as nets  # noqa: E402
import not_so_clevr_packing as packing  # noqa: E402
import not_so_clevr_training as training  # noqa: E402
import training_times  # noqa: E402
import variants  # noqa: E402

SPLITS = {name: make() for name, make in data.SPLITS.items()}
SOME = torch.tensor([[4, 59], [33, 32], [59, 4], [20, 41]])


def pairs(centers: torch.Tensor) -> set[tuple[int, int]]:
    return {(x, y) for x, y in centers.tolist()}


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "counts"), [("uniform", (2368, 768)), ("quadrant", (2407, 729))])
def test_a_split_shares_out_every_position_once(name: str, counts: tuple[int, int]) -> None:
    split = SPLITS[name]
    assert (len(split.train), len(split.test)) == counts
    train, test = pairs(split.train), pairs(split.test)
    assert not train & test
    assert train | test == {(x, y) for x in range(4, 60) for y in range(4, 60)}
    assert len(train) + len(test) == 3136


def test_the_quadrant_split_holds_out_what_is_beyond_the_middle_on_both_axes() -> None:
    assert all(x / 64 > 0.5 and y / 64 > 0.5 for x, y in pairs(SPLITS["quadrant"].test))
    assert not any(x / 64 > 0.5 and y / 64 > 0.5 for x, y in pairs(SPLITS["quadrant"].train))


def test_the_uniform_split_leaves_no_large_part_of_the_canvas_out() -> None:
    for axis in (0, 1):
        assert set(SPLITS["uniform"].test[:, axis].tolist()) == set(range(4, 60))


def test_a_square_covers_the_81_pixels_around_its_center() -> None:
    for canvas, (x, y) in zip(data.squares(SOME), SOME.tolist(), strict=True):
        expected = torch.zeros(1, 64, 64)
        for row in range(64):
            for column in range(64):
                if max(abs(row - y), abs(column - x)) <= 4:
                    expected[0, row, column] = 1.0
        assert torch.equal(canvas, expected)
        assert canvas.sum() == 81


def test_a_one_hot_canvas_is_bright_at_column_x_of_row_y() -> None:
    canvases = data.one_hot(SOME)
    assert canvases.sum((1, 2, 3)).tolist() == [1.0] * 4
    assert [canvas[0, y, x].item() for canvas, (x, y) in zip(canvases, SOME, strict=True)] == [
        1
    ] * 4
    assert torch.equal(canvases.flatten(1).argmax(1), data.pixel_index(SOME))


def test_scaled_centers_are_the_packages_coordinates_of_that_pixel() -> None:
    grid = ccp.Coordinates().grid((64, 64))
    expected = torch.stack([grid[:, y, x] for x, y in SOME.tolist()])
    torch.testing.assert_close(data.scaled(SOME), expected)


# --- scores ---------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_peaks_at_the_right_pixel() -> None:
    logits = data.one_hot(SOME).flatten(1)
    assert data.accuracy(logits, SOME) == 1
    assert data.accuracy(logits[[0, 1, 3, 2]], SOME) == 0.5
    assert data.accuracy(logits, SOME.flip(1)) == 0  # x and y mixed up


def test_iou_agrees_with_sets_of_pixels() -> None:
    torch.manual_seed(0)
    drawn = data.squares(SOME)
    logits = torch.where(torch.rand_like(drawn) < 0.8, drawn - 0.5, torch.randn_like(drawn))
    expected = []
    for painted, true in zip(torch.sigmoid(logits).round(), drawn, strict=True):
        first, second = (
            {tuple(i) for i in canvas.nonzero().tolist()} for canvas in (painted, true)
        )
        expected.append(len(first & second) / len(first | second))
    assert data.mean_iou(logits, drawn) == pytest.approx(sum(expected) / len(expected))
    assert data.mean_iou(drawn - 0.5, drawn) == 1
    assert data.mean_iou(drawn - 2, drawn) == 0  # nothing painted


def test_distances_are_euclidean() -> None:
    found = SOME + torch.tensor([[3.0, -4.0], [0.0, 0.0], [0.5, 0.0], [-6.0, 8.0]])
    assert data.distances(found, SOME).tolist() == pytest.approx([5, 0, 0.5, 10])


# --- nets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "plain", "patched"),
    [
        (nets.tiled_net, 7489, 7553),
        (nets.renderer, 11786, 11850),
        (nets.linear_net, 890, 906),
        (nets.pooling_net, 72850, None),
        (nets.strided_net, 12978, None),
        (deconv.DeconvSetting(2, 1, 0.01).net(1).build, 46465, None),
        (deconv.DeconvSetting(4, 3, 0.01).net(1).build, 1632001, None),
    ],
)
def test_the_nets_have_the_released_codes_sizes(net: Any, plain: int, patched: int | None) -> None:
    assert experiment.count_parameters(net()) == plain
    if patched is not None:
        assert experiment.count_parameters(ccp.patch(net(), "first")) == patched


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_every_deconv_stack_paints_the_whole_canvas(kernel: int) -> None:
    assert nets.deconv_stack(kernel, 1)(data.scaled(SOME)).shape == (4, 1, 64, 64)


def test_pixels_are_alike_to_the_plain_tiled_net_and_not_to_the_patched_one() -> None:
    torch.manual_seed(0)
    plain = nets.tiled_net()
    patched = ccp.patch(plain, "first")
    inputs = data.scaled(SOME)
    assert torch.equal(plain(inputs), patched(inputs))
    assert torch.equal(plain(inputs).amax((2, 3)), plain(inputs).amin((2, 3)))
    with torch.no_grad():
        for weight in ccp.coord_parameters(patched):
            weight.normal_()
    assert (patched(inputs).flatten(1).std(1) > 1e-3).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_fresh_linear_net_has_its_maximum_around_the_bright_pixel(seed: int) -> None:
    torch.manual_seed(seed)
    convolutions = nets.linear_net()[:-2]
    highest = convolutions(data.one_hot(SOME)).flatten(2).argmax(2)  # (N, 2)
    found = torch.stack((highest % 64, highest // 64), -1)
    assert ((found - SOME[:, None]).abs() <= 2).all()  # as far as two 3x3 kernels reach


def test_the_pixel_softmax_has_mean_one_and_keeps_the_order() -> None:
    logits = torch.randn(3, 1, 8, 8)
    shares = nets.PixelSoftmax()(logits)
    torch.testing.assert_close(shares.mean((1, 2, 3)), torch.ones(3))
    assert torch.equal(shares.flatten(1).argsort(1), logits.flatten(1).argsort(1))


def test_the_variants_of_a_net_are_itself_and_one_with_each_kind_of_coordinates() -> None:
    plain = nn.Conv2d(1, 2, 1, bias=False)
    assert variants.as_variant(plain, "plain") is plain
    conventions = {"patched": ccp.Coordinates(), "scrambled": ccp.scrambled()}
    for variant, coords in conventions.items():
        layer: Any = variants.as_variant(plain, variant)
        with torch.no_grad():
            layer.coord_weight.copy_(torch.eye(2)[:, :, None, None])
        seen = layer(torch.zeros(1, 1, 64, 64))[0]
        torch.testing.assert_close(seen, coords.grid((64, 64)))


# --- the options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ([], (0, 1, 2)),
        (["--quick"], (0,)),
        (["--seeds", "2"], (0, 1)),
        (["--quick", "--seeds", "2"], (0, 1)),
    ],
)
def test_a_quick_run_has_one_seed_unless_told_otherwise(
    given: list[str], seeds: tuple[int, ...], tmp_path: Path
) -> None:
    options = experiment.parse_options("A script.", [*given, "--out", str(tmp_path)])
    assert (options.seeds, options.quick, options.budget) == (seeds, "--quick" in given, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seeds", "0"], "--seeds 0: write a number of 1 or more"),
        (["--budget", "0"], "--budget 0.0: write a positive factor"),
        (["--budget", "inf"], "--budget inf: write a positive factor"),
    ],
)
def test_options_that_leave_nothing_to_run_are_refused(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        experiment.parse_options("A script.", [*given, "--out", str(tmp_path / "new")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_try_leaves_the_recorded_runs_alone() -> None:
    for given in (["--quick"], ["--budget", "0.5"]):
        assert experiment.parse_options("A script.", given).out == experiment.TRIES
    assert experiment.parse_options("A script.", []).out == experiment.RESULTS


# --- the record -----------------------------------------------------------------------------


def test_a_record_of_other_lengths_is_refused_and_stays(tmp_path: Path) -> None:
    options = experiment.Options((0,), 1.0, False, tmp_path)
    experiment.Record("some", options).run("s", "v", 0, lambda: experiment.Run(1, 1, 1.0, {}))
    before = (tmp_path / "some.json").read_text()
    for other in (
        experiment.Options((0,), 1.0, True, tmp_path),
        experiment.Options((0,), 2.0, False, tmp_path),
    ):
        with pytest.raises(SystemExit, match=r"some\.json holds runs of other lengths .*--out"):
            experiment.Record("some", other)
    assert (tmp_path / "some.json").read_text() == before
    assert len(experiment.Record("some", options).runs) == 1


def test_packed_pictures_and_positions_come_back() -> None:
    torch.manual_seed(0)
    levels, positions = torch.rand(2, 5, 7), 60 * torch.rand(9, 2) - 10
    unpacked = packing.unpack_levels(packing.pack_levels(levels), 2, 5, 7)
    torch.testing.assert_close(unpacked, levels, rtol=0, atol=0.5 / 255 + 1e-6)
    unpacked = packing.unpack_positions(packing.pack_positions(positions))
    torch.testing.assert_close(unpacked, positions, rtol=0, atol=0.001 + 1e-5)


def test_times_sooner_compares_the_moments_of_the_plain_nets_best() -> None:
    def curves(seconds: list[float], test: list[float]) -> training_times.Curves:
        return {"CPU seconds": seconds, "test": test}

    def sooner(ours: training_times.Curves, other: training_times.Curves) -> float | None:
        return training_times.times_sooner(ours, other, higher_is_better=True)

    plain = curves([10.0, 20.0, 30.0], [0.2, 0.6, 0.5])
    patched = curves([1.0, 2.0, 4.0], [0.1, 0.6, 1.0])
    assert sooner(patched, plain) == 20 / 2
    assert sooner(plain, patched) is None
    errors = curves([1.0, 3.0], [0.4, 0.1])
    assert training_times.times_sooner(errors, plain, higher_is_better=False) == 10 / 3
    with pytest.raises(ValueError, match="nothing to reach"):
        sooner(patched, curves([1.0], [0.0]))


@pytest.mark.parametrize("split", ["uniform", "quadrant"])
def test_the_best_setting_is_one_of_the_splits_finalists_trained_to_the_end(
    tmp_path: Path, split: str
) -> None:
    options = experiment.Options((0,), 1.0, False, tmp_path)
    record = experiment.Record("deconv", options)
    task = training.Task(data.scaled, nn.MSELoss(), data.accuracy, "x")
    briefly = {0.1: 0.9, 0.2: 0.7, 0.3: 0.8}
    fully = {0.1: 0.91, 0.3: 0.95}  # the second is no finalist

    class Scored(supervised.Supervised):
        def train(self, net: supervised.Net, where: str, label: str) -> experiment.Run:
            assert where == split
            scores = briefly if net.recipe.epochs == 1 else fully
            return experiment.Run(1, 1, 1.0, {"test x": scores[net.recipe.rate]})

    settings = tuple(deconv.DeconvSetting(2, 1, rate) for rate in (0.1, 0.2, 0.3))
    sweep = deconv.Sweep(settings, epochs=3, brief_epochs=1)
    assert sweep.best(Scored(record, options, task, {}), split) == settings[2]
    assert [run.setting for run in record.runs] == [f"sweep, {split}"] * 3 + [split] * 2


def test_all_nets_are_run_with_every_seed_and_the_controls_with_one(tmp_path: Path) -> None:
    options = experiment.Options((0, 1), 1.0, False, tmp_path)
    record = experiment.Record("all", options)
    task = training.Task(data.scaled, nn.MSELoss(), data.accuracy, "x")

    class Untrained(supervised.Supervised):
        def train(self, net: supervised.Net, split: str, label: str) -> experiment.Run:
            return experiment.Run(experiment.count_parameters(net.build()), 1, 1.0, {})

    tiled = supervised.Net(nets.tiled_net, training.Recipe(1, 0.1))
    plain = supervised.Net(nets.linear_net, training.Recipe(1, 0.1))
    untrained = Untrained(record, options, task, {})
    untrained.compare(tiled, {split: {"other": plain} for split in data.SPLITS}, untrained.splits)
    assert {(run.variant, run.parameters) for run in record.runs} == {
        ("patched", 7553),
        ("other", 890),
        ("plain", 7489),
        ("scrambled", 7553),
    }
    for split in data.SPLITS:
        seeds = {name: len(record.of(split, name)) for name in ("patched", "other", "scrambled")}
        assert seeds == {"patched": 2, "other": 2, "scrambled": 1}


def test_training_takes_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    module = load_script(PAPER / "regression.py")
    options = experiment.Options((0,), 0.5, False, tmp_path)
    recipe = training.Recipe(epochs=2, rate=0.01, batch=5, points=4)
    split = data.Split(SPLITS["uniform"].train[:23], SPLITS["uniform"].test[:7])
    seen: list[tuple[int, int]] = []
    task = training.Task(
        lambda centers: seen.extend(map(tuple, centers.tolist())) or data.one_hot(centers),
        module.TASK.loss,
        lambda found, centers: 0.0,
        "zero",
    )
    training_net = ccp.patch(nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(64), nn.Flatten()))
    run = training.fit(training_net, split, task, recipe, options, "")
    assert run.steps == math.ceil(23 / 5)  # half of two epochs
    assert run.curves["step"] == [2, 3, 4, 5]
    assert pairs(split.train) <= set(seen)
    assert run.metrics.keys() == {"train zero", "test zero", "coordinate weights"}
    assert run.metrics["coordinate weights"] > 0


# --- the experiments ------------------------------------------------------------------------


def quick(name: str, out: Path, patcher: pytest.MonkeyPatch) -> experiment.Record:
    """A quick run, after which a second one only draws."""
    module = load_script(PAPER / f"{name}.py")
    arguments = ["--quick", "--out", str(out)]
    record = module.main(arguments)
    stored = json.loads((out / f"{name}.json").read_text())
    assert len(stored["runs"]) == len(record.runs)
    (out / f"{name}.png").unlink()
    patcher.setattr(supervised, "fit", None)  # would fail if anything were trained again
    module.main(arguments)
    with Image.open(out / f"{name}.png") as picture:
        assert picture.width > 1000
    for variant in ("patched", "plain"):
        (run,) = record.of("uniform", variant)
        assert (run.metrics["coordinate weights"] > 0) == (variant == "patched")
    return record


def scores(record: experiment.Record, metric: str) -> dict[str, float]:
    """A metric by variant."""
    return {run.variant: run.metrics[metric] for run in record.runs}


def test_classification_names_pixels_by_patched_coordinates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = quick("classification", tmp_path, monkeypatch)
    found = scores(record, "test accuracy")
    assert len(found) == 3
    patched = found.pop("patched")
    assert patched > 0.5
    assert max(found.values()) < 0.1 * patched


def test_rendering_learns_by_patched_coordinates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few steps paint no square yet, but every pixel's loss tells.
    record = quick("rendering", tmp_path, monkeypatch)
    losses = {run.variant: run.curves["loss"][-1] for run in record.runs}
    assert len(losses) == 3
    assert losses.pop("patched") < 0.6 * min(losses.values())


def test_regression_reads_positions_off_patched_coordinates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = quick("regression", tmp_path, monkeypatch)
    found = scores(record, "test error, px")
    assert len(found) == 4
    assert found.pop("patched") < 0.01
    assert found.pop("plain") > 10
    assert min(found.values()) > 1
