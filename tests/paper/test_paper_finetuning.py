"""The fine-tuning experiment: its nets and tasks, and a run of seconds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

import coordconv_patch as ccp

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(autouse=True)
def paper_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import their siblings; the folder is no package."""
    monkeypatch.syspath_prepend(str(PAPER))


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize(("strides", "seen"), [((2, 2, 1), 15), ((2, 2, 2, 2), 31)])
def test_a_place_of_the_last_map_sees_what_the_docstring_says(
    strides: tuple[int, ...], seen: int
) -> None:
    net = load("localiser").Localiser(False, strides).eval()
    for module in net.features:
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 0.1)
    images = torch.rand(1, 1, 64, 64, requires_grad=True)
    features = net.features(images)
    features[0, 0, 1, 1].backward()
    assert images.grad is not None
    rows, columns = images.grad[0, 0].nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == seen


def test_a_box_is_centre_and_size() -> None:
    net = load("localiser").Localiser(True)
    torch.nn.init.zeros_(net.head[-1].weight)
    net.head[-1].bias.data = torch.tensor([0.25, -0.25, 0.0, 0.0]) + torch.tensor([0, 0, 1.0, 2.0])
    (box,) = net.eval()(torch.rand(1, 1, 64, 64))
    width, height = torch.tensor([1.0, 2.0]).exp() / 4
    expected = torch.stack(
        [0.75 - width / 2, 0.25 - height / 2, 0.75 + width / 2, 0.25 + height / 2]
    )
    torch.testing.assert_close(box, expected)


def test_an_unpadded_narrow_net_sees_no_place_and_a_patched_one_does() -> None:
    digits, localiser = load("scattered_digits"), load("localiser")
    digit = digits.training_and_test_digits()[0].of(torch.tensor([0, 0]))
    # Two places whole strides apart, farther from the border than the net sees.
    boxes = torch.tensor([[16.0, 16.0, 32.0, 32.0], [32.0, 28.0, 48.0, 44.0]])
    images = digits.draw(digit, boxes, 64)
    torch.manual_seed(0)
    net = localiser.Localiser(False).eval()
    first, second = net(images)
    torch.testing.assert_close(first, second)
    patched = ccp.patch(net, "first")
    (weight,) = ccp.coord_parameters(patched)
    torch.nn.init.normal_(weight)
    first, second = patched(images)
    assert (first - second).abs().max() > 1e-4  # of the canvas; rounding is below 1e-6


def test_the_digit_task_measures_mean_iou_and_its_loss_falls_to_zero() -> None:
    task = load("localisation").DigitTask(False, (2, 2, 1), pictures=20, held_out=30, seed=0)

    class Oracle(torch.nn.Module):
        """Knows every box; ``shift`` moves them by a part of the canvas."""

        def __init__(self, scenes: Any, shift: float) -> None:
            super().__init__()
            self.scenes, self.shift = scenes, shift

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            same = (images[:, None] == self.scenes.images[None]).flatten(2).all(2)
            return self.scenes.boxes[same.int().argmax(1), 0] / 64 + self.shift

    assert task.measure(Oracle(task.held_out, 0.0)) == pytest.approx(1)
    true = task.held_out.boxes[:, 0]
    shifted = box_iou(true + 4, true).diagonal().mean()
    assert task.measure(Oracle(task.held_out, 4 / 64)) == pytest.approx(float(shifted))
    chosen = torch.arange(20)
    assert task.loss(Oracle(task.pictures, 0.0), chosen) < 1e-12
    assert task.loss(Oracle(task.pictures, 0.1), chosen) > 0.01


def test_new_places_are_a_quadrant_that_training_never_shows() -> None:
    make = load("localisation").DigitTask
    task = make(False, (2, 2, 1), pictures=200, held_out=100, seed=0, new_places=True)
    for scenes, new in ((task.pictures, False), (task.held_out, True)):
        x0, y0, x1, y1 = scenes.boxes[:, 0].unbind(1)
        assert torch.equal((x0 + x1 > 64) & (y0 + y1 > 64), torch.full((len(scenes),), new))
        assert len(scenes) == len(scenes.images) == len(scenes.labels) == len(scenes.visible)
    assert 120 < len(task.pictures) < 180
    assert 70 < len(task.held_out) < 130


def test_the_cup_task_measures_the_median_distance_in_pixels() -> None:
    task = load("localisation").CupOfCoffee(pictures=4, held_out=6, seed=0, size=32)

    class Constant(torch.nn.Module):
        """Always says "the middle"."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 2)

    distances = (task.held_out.centers - 15.5).square().sum(1).sqrt()
    assert task.measure(Constant()) == pytest.approx(float(distances.median()))


def test_quick_fine_tuning_carries_true_coordinates_over_to_new_places(tmp_path: Path) -> None:
    finetune, branches = load("finetune"), load("branches")
    record = finetune.main(["--quick", "--out", str(tmp_path)])
    runs = [run for run in record.runs if run.setting == branches.NEW_PLACES]
    iou = {run.variant: run.metrics["IOU"] for run in runs}
    for true, scrambled in (
        (branches.FIRST, branches.SCRAMBLED),
        (branches.ALL, branches.ALL_SCRAMBLED),
    ):
        assert iou[true] > 2 * iou[branches.KEPT_ON]
        assert iou[true] > 1.3 * iou[scrambled]
    for run in record.runs:
        moved = run.extra["largest coordinate weights"]
        plain = run.variant in (branches.PRETRAINING, branches.KEPT_ON)
        assert bool(moved) != plain
        if run.setting == branches.NEW_PLACES:
            assert all(value > 0 for value in moved)
        elif not plain:
            # On maps of 1 x 1 every coordinate is 0, and small pictures end in such maps.
            assert any(value > 0 for value in moved)
    start = iou[branches.PRETRAINING]
    from_the_pretrained = (branches.ALL, branches.SCRAMBLED, branches.ALL_SCRAMBLED)
    for variant in (branches.KEPT_ON, branches.FIRST, *from_the_pretrained):
        # Patching changes no output, so every branch begins where the pretraining ended.
        assert record.of(branches.NEW_PLACES, variant)[0].curves["IOU"][0] == start
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
