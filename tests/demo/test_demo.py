"""The demo, on the real weights and photographs that it ships with."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coordconv_patch.demo.backbone import load_pretrained, to_input, top_classes
from coordconv_patch.demo.finetune import Errors, Phase, Settings, distances, fine_tune, predict
from coordconv_patch.demo.report import compare
from coordconv_patch.demo.run import FILES, WHERE, run_demo
from coordconv_patch.demo.task import (
    CupTask,
    Pictures,
    Placement,
    cut_out_cup,
    paste,
    photograph,
    to_pixels,
    to_unit,
)
from coordconv_patch.errors import CoordConvPatchError, MissingPackageError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.patching.patch import patch
from coordconv_patch.runtime.providers import CPU, make_session
from coordconv_patch.weights.save_load import load_coords


@pytest.fixture(scope="module")
def classifier():
    return load_pretrained()


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    random_state = torch.get_rng_state()
    report = run_demo(out, quick=True, threads=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    return report, out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chelsea", "Egyptian cat"),
        ("coffee", "espresso"),
        ("stereo_motorcycle", "moped"),
        ("camera", "tripod"),
    ],
)
def test_pretrained_weights_recognise_photographs(classifier, name, expected):
    with torch.no_grad():
        found = top_classes(classifier(to_input(photograph(name)))[0])
    assert found[0].name == expected
    assert found[0].probability > 0.3


def test_photographs_are_colour_pictures_from_minus_one_to_one():
    for name in ("camera", "rocket", "stereo_motorcycle"):
        picture = photograph(name)
        assert picture.shape[0] == 3
        assert picture.dtype == torch.float32
        assert -1 <= picture.min() < picture.max() <= 1


def test_cup_is_pasted_where_the_answer_says():
    size, generator = 96, torch.Generator().manual_seed(3)
    placement = Placement.random(40, size, generator)
    inside = ((placement.centers - (size - 1) / 2).abs() + placement.radii[:, None]) < size / 2 - 1
    whole = inside.all(dim=1)
    assert whole.sum() > 10
    white = cut_out_cup(40)
    white[:3] = 1
    painted = paste(torch.full((40, 3, size, size), -1.0), white, placement)[:, 0] + 1
    index = torch.arange(size, dtype=torch.float32)
    weight = painted.sum(dim=(1, 2))
    x = (painted.sum(dim=1) * index).sum(dim=1) / weight
    y = (painted.sum(dim=2) * index).sum(dim=1) / weight
    centroid = torch.stack([x, y], dim=1)
    torch.testing.assert_close(centroid[whole], placement.centers[whole], atol=0.15, rtol=0)
    # The cut-out's rim fades, so it covers a little less than the full disc.
    area = weight / 2
    disc = torch.pi * placement.radii.square()
    assert ((area / disc)[whole] > 0.8).all()
    assert ((area / disc)[whole] < 1.02).all()


def test_composed_pictures_show_the_cup_at_their_answers():
    task = CupTask(96, held_out=12, backgrounds=8, seed=0)
    pictures = task.batch(12)
    for shown in (pictures, task.held_out):
        for image, center in zip(shown.images, shown.centers.round().int(), strict=True):
            x, y = center.tolist()
            red, _, blue = image[:, y - 2 : y + 3, x - 2 : x + 3].mean(dim=(1, 2))
            # Coffee and cup are far more red than blue.
            assert red - blue > 0.25


def test_training_stream_depends_on_the_seed_alone():
    def first_batches(seed):
        task = CupTask(48, held_out=4, backgrounds=6, seed=seed)
        return torch.cat([task.held_out.images, task.batch(3).images, task.batch(3).images])

    assert torch.equal(first_batches(1), first_batches(1))
    assert not torch.equal(first_batches(1), first_batches(2))


def test_pixels_and_unit_coordinates_follow_the_papers_convention():
    pixels = torch.tensor([0.0, 47.5, 95.0])
    assert to_unit(pixels, 96).tolist() == [-1, 0, 1]
    torch.testing.assert_close(to_pixels(to_unit(pixels, 96), 96), pixels)


def test_errors_are_distances_in_pixels():
    truth = Pictures(torch.zeros(3, 3, 8, 8), torch.tensor([[0.0, 0], [1, 1], [2, 2]]))
    found = distances(torch.tensor([[3.0, 4], [1, 1], [2, 3]]), truth)
    assert found.tolist() == [5, 0, 1]
    assert Errors.of(found).median == 1
    assert Errors.of(found).mean == 2


def test_models_get_the_same_batches_and_frozen_weights_stay():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    )
    models = {"control": plain, "patched": patch(plain)}
    convolution = plain[0].weight.detach().clone()
    head = plain[3].weight.detach().clone()
    task = CupTask(32, held_out=4, backgrounds=4, seed=0)
    phase = Phase("head", ("3",), steps=4, learning_rate=1e-2, coord_learning_rate=1e-1)
    steps = []
    tuned = fine_tune(
        models,
        task,
        Settings((phase,), batch_size=4, measure_every=2),
        on_step=lambda step, _: steps.append(step),
    )
    assert steps == [1, 2, 3, 4]
    curves = {name: result.curve for name, result in tuned.items()}
    for name, model in models.items():
        assert torch.equal(tuned[name].after, predict(model, task.held_out.images))
    assert torch.equal(tuned["control"].before, tuned["patched"].before)
    assert not torch.equal(tuned["control"].before, tuned["control"].after)
    assert curves["control"].steps == [0, 2, 4]
    # Before the first step both give the same answers to the same pictures.
    assert curves["control"].batch_errors[0] == curves["patched"].batch_errors[0]
    assert curves["patched"].trained_parameters[0] == curves["control"].trained_parameters[0] + 72
    for model in models.values():
        assert torch.equal(model[0].weight, convolution)
        assert not torch.equal(model[3].weight, head)
    assert models["patched"][0].coord_weight.any()
    assert curves["control"].phase_errors[0].median == curves["control"].median_errors[-1]


@pytest.mark.parametrize(
    ("control", "patched", "verdict"),
    [(10.0, 5.0, "2.0 times closer"), (5.0, 10.0, "control is better"), (5.0, 5.1, "no real")],
)
def test_the_verdict_follows_the_figures(control, patched, verdict):
    assert verdict in compare("backbone frozen", control, patched)


def test_quick_run_leaves_its_files(quick_run):
    report, out = quick_run
    assert {path.name for path in out.iterdir()} == set(FILES.values())
    assert json.loads((out / FILES["figures"]).read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    header = (out / FILES["picture"]).read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") > 1000


def test_quick_run_preserved_every_logit(quick_run):
    report, _ = quick_run
    assert report.logits == 5000
    assert report.logits_equal
    assert report.starts_equal
    assert all(result.before == result.after for result in report.photographs)
    assert report.photographs[0].before[0].name == "Egyptian cat"


def test_quick_runs_figures_can_be_recomputed_from_its_files(quick_run):
    report, out = quick_run
    model = load_pretrained()
    model.reset_classifier(2)
    model = patch(model, WHERE)
    model.load_state_dict(load_file(out / FILES["all weights"]), strict=True)
    task = CupTask(report.picture_size, held_out=report.held_out_pictures, backgrounds=16, seed=0)
    images = task.held_out.images
    found = Errors.of(distances(predict(model, images), task.held_out))
    assert found.median == pytest.approx(report.errors["patched"].median, abs=1e-3)
    assert report.curves["patched"].phase_errors[-1].median == pytest.approx(
        report.errors["patched"].median, abs=1e-3
    )
    assert list(coord_layers(model)) == report.sites
    session = make_session(out / FILES["ONNX model"], [CPU], threads=1)
    answers = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(answers, model(images).numpy(), atol=1e-4)
    in_pixels = to_pixels(torch.from_numpy(answers), report.picture_size)
    error = Errors.of(distances(in_pixels, task.held_out)).median
    assert report.export.median_error_px == pytest.approx(error, abs=1e-3)
    assert report.export.worst_difference_px < 0.01


def test_saved_coordinates_load_onto_the_fine_tuned_base(quick_run):
    _, out = quick_run
    stored = load_file(out / FILES["all weights"])
    model = load_pretrained()
    model.reset_classifier(2)
    own = {name: value for name, value in stored.items() if not name.endswith("coord_weight")}
    model.load_state_dict(own, strict=True)
    loaded = load_coords(model, out / FILES["coordinate weights"])
    assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())


def test_missing_packages_are_named(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "skimage" else find_spec(name),
    )
    with pytest.raises(MissingPackageError, match=r"coordconv-patch\[demo\]") as raised:
        run_demo(tmp_path / "out")
    assert "scikit-image" in str(raised.value)
    assert isinstance(raised.value, CoordConvPatchError)
    assert not (tmp_path / "out").exists()
