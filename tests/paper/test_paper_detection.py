"""The detection and classification experiments: their parts, and a run of seconds."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import coordconv_patch as ccp

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(autouse=True)
def paper_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import their siblings; the folder is no package."""
    monkeypatch.syspath_prepend(str(PAPER))


def load(name: str) -> Any:
    return importlib.import_module(name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_test_digit_is_a_training_digit() -> None:
    training, test = load("scattered_digits").training_and_test_digits()
    assert (len(training), len(test)) == (1347, 450)
    known = {image.numpy().tobytes() for image in training.images}
    assert not known & {image.numpy().tobytes() for image in test.images}
    assert set(test.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("margin", [0, 28])
def test_a_digits_ink_fills_its_box(margin: int) -> None:
    digits = load("scattered_digits")
    layout = digits.Layout(digits=1, margin=margin)
    scenes = digits.scatter(digits.training_and_test_digits()[0], 200, layout, generator())
    assert scenes.visible.all() == (margin == 0)
    for image, box, seen in zip(
        scenes.images, scenes.boxes[:, 0], scenes.visible[:, 0], strict=True
    ):
        rows, columns = (image[0] > 0.01).nonzero().unbind(1)
        if not len(rows):
            assert not seen or (box[2:] - box[:2]).min() < 3
            continue
        ink = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        # Interpolation spreads ink by at most half a digit's pixel, 25 / 2 / 3 of a narrow one.
        assert (ink[:2] > box[:2] - 4.5).all()
        assert (ink[2:] < box[2:] + 4.5).all()
        if not load("detection_metrics").touches_edge(box, 64):
            assert (ink - box).abs().max() < 4.5
            assert (ink - box).abs().mean() < 2.5


def test_digits_lie_everywhere_and_add_up_to_white_at_most() -> None:
    digits = load("scattered_digits")
    training = digits.training_and_test_digits()[0]
    scenes = digits.scatter(training, 300, digits.Layout(), generator())
    assert scenes.images.shape == (300, 1, 64, 64)
    assert 0 <= scenes.images.min() < scenes.images.max() == 1
    assert scenes.boxes.min() >= 0
    assert scenes.boxes.max() <= 64
    sides = scenes.boxes[..., 2:] - scenes.boxes[..., :2]
    assert 15 <= sides.min() < 16
    assert 24 < sides.max() <= 25
    again = digits.scatter(training, 300, digits.Layout(), generator())
    assert torch.equal(again.images, scenes.images)


@pytest.mark.parametrize(("padding", "places"), [("none", 9), ("released", 13), ("zeros", 16)])
def test_anchors_are_centred_on_what_their_place_sees(padding: str, places: int) -> None:
    rpn = load("region_proposals")
    model = rpn.RegionProposals(padding, (4, 4), 4)
    assert len(model.anchors) == 9 * places**2
    # Where does the score of one place depend on the picture? Its receptive field tells.
    images = torch.rand(1, 1, 64, 64, requires_grad=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 0.01)
    place = (places // 2) * places + places // 2 + 1
    # A max-pool hands the gradient to one pixel of four; averages hand it to all.
    model.features[2], model.features[5] = torch.nn.AvgPool2d(2), torch.nn.AvgPool2d(2)
    model(images)[0][0, 9 * place].backward()
    assert images.grad is not None
    rows, columns = images.grad[0, 0].nonzero().unbind(1)
    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    centre = (seen[:2] + seen[2:]) / 2
    anchors = model.anchors[9 * place : 9 * place + 9]
    assert torch.equal((anchors[:, :2] + anchors[:, 2:]) / 2, centre.expand(9, 2))


def test_anchors_have_every_pair_of_sides_as_torchvision_makes_them() -> None:
    rpn = load("region_proposals")
    anchors = rpn.centred_anchors(13, 64)
    sides = anchors[:9, 2:] - anchors[:9, :2]
    assert sorted(map(tuple, sides.tolist())) == [
        (width, height) for width in (15.0, 20.0, 25.0) for height in (15.0, 20.0, 25.0)
    ]
    maker = AnchorGenerator(((20,),), ((1.0,),))
    (grid,) = maker(ImageList(torch.zeros(1, 1, 52, 52), [(52, 52)]), [torch.zeros(1, 1, 13, 13)])
    square = anchors.reshape(169, 9, 4)[:, 4]
    # Torchvision puts its first anchor on the picture's corner; ours stands 8 pixels in.
    assert torch.equal(square, grid + 8)


def test_moving_anchors_to_the_digits_gives_the_digits_boxes() -> None:
    rpn = load("region_proposals")
    model = rpn.RegionProposals("released", (4, 4), 4)
    scene = torch.tensor([[10.0, 12.0, 30.0, 29.0], [40.0, 40.0, 64.0, 64.0]])
    truth = scene[torch.arange(len(model.anchors)) % 2]
    x0, y0, x1, y1 = truth.unbind(1)
    ax0, ay0, ax1, ay1 = model.anchors.unbind(1)
    width, height = ax1 - ax0, ay1 - ay0
    moves = torch.stack(
        [
            ((x0 + x1) - (ax0 + ax1)) / 2 / width,
            ((y0 + y1) - (ay0 + ay1)) / 2 / height,
            ((x1 - x0) / width).log(),
            ((y1 - y0) / height).log(),
        ],
        dim=1,
    )
    torch.testing.assert_close(model.boxes(moves[None], 64)[0], truth)


@pytest.mark.parametrize("absolute", [False, True])
def test_only_coordinates_let_an_absolute_box_follow_its_digit(absolute: bool) -> None:
    digits, rpn = load("scattered_digits"), load("region_proposals")
    digit = digits.training_and_test_digits()[0].of(torch.tensor([0, 0]))
    corner = torch.tensor([[20.0, 20.0], [24.0, 20.0]])  # one place to the right of the other
    images = digits.draw(digit, torch.cat([corner, corner + 18], dim=1), 64)
    torch.manual_seed(0)
    model = rpn.RegionProposals("none", (4, 8), 8, absolute=absolute)
    torch.nn.init.normal_(model.box_regression[-1].weight, std=0.01)

    def by_place(net: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The boxes of both pictures at places that see the same of the digit."""
        boxes = net.boxes(net(images)[1], 64).reshape(2, 9, 9, 9, 4)
        return boxes[0, 2:7, 2:6], boxes[1, 2:7, 3:7]

    first, second = by_place(model)
    step = 0.0 if absolute else 4.0
    torch.testing.assert_close(first + torch.tensor([step, 0.0, step, 0.0]), second)
    patched = ccp.patch(model, list(rpn.PAPER_SITES))
    for weight in ccp.coord_parameters(patched):
        torch.nn.init.normal_(weight, std=0.1)
    first, second = by_place(patched)
    assert ((second - first)[..., 0] - step).abs().max() > 0.1


def test_whole_boxes_are_cut_off_to_the_boxes_that_can_be_seen() -> None:
    digits, detection = load("scattered_digits"), load("detection")
    layout = digits.Layout(margin=28)
    scenes = digits.scatter(digits.training_and_test_digits()[0], 200, layout, generator())
    assert torch.equal(scenes.whole.clamp(0, 64), scenes.boxes)
    assert -28 <= scenes.whole.min() < -20
    assert 84 < scenes.whole.max() <= 92
    assert 0.6 < scenes.visible.float().mean() < 0.8
    expected = {
        "cut": (scenes.boxes, scenes.visible),
        "seen": (scenes.whole, scenes.visible),
        "all": (scenes.whole, torch.ones(200, 5, dtype=torch.bool)),
    }
    for targets, (boxes, counted) in expected.items():
        found = detection.truth_of(scenes, targets)
        assert torch.equal(found[0], boxes)
        assert torch.equal(found[1], counted)


def test_an_unseen_digit_makes_the_first_box_positive() -> None:
    rpn = load("region_proposals")
    boxes = torch.tensor([[[0.0, 0, 20, 20], [30, 30, 50, 50], [50, 30, 70, 50], [40, 0, 60, 20]]])
    truth = torch.tensor([[[100.0, 100, 120, 120], [52, 30, 72, 50], [31, 30, 51, 50]]])
    visible = torch.ones(1, 3, dtype=torch.bool)
    sampling = rpn.Sampling(each=4, within=64)
    positive, negative, digit = rpn.sample(boxes, truth, visible, sampling)
    # The third reaches beyond 64 pixels: positive as the best box of a digit, and so it stays.
    assert positive.tolist() == [[True, True, True, False]]
    assert negative.tolist() == [[False, False, False, True]]
    assert digit[positive].tolist() == [0, 2, 1]
    # Of boxes that reach beyond the canvas, on whichever side, none is a negative.
    for shift in ([45.0, 0.0], [-31.0, 0.0], [0.0, 60.0], [0.0, -35.0]):
        low = torch.tensor(shift)
        moved = boxes[:, 1:3] + torch.cat([low, low])
        outside = torch.cat([boxes[:, :1], moved], dim=1)
        sampling = rpn.Sampling(each=3, within=64)
        positive, negative, _ = rpn.sample(outside, truth[:, :1], visible[:, :1], sampling)
        assert positive.tolist() == [[True, False, False]]
        beyond = (moved < 0).any(2) | (moved > 64).any(2)
        assert negative[:, 1:].tolist() == (~beyond).tolist()
        assert beyond.any()


@pytest.mark.parametrize("cut", [True, False])
def test_boxes_are_cut_off_at_the_canvas_only_if_asked(cut: bool) -> None:
    model = load("region_proposals").RegionProposals("released", (4, 4), 4, cut=cut)
    moves = torch.zeros(2, len(model.anchors), 4)
    expected = model.anchors.clamp(0, 64) if cut else model.anchors
    assert not torch.equal(model.anchors, model.anchors.clamp(0, 64))
    torch.testing.assert_close(model.boxes(moves, 64), expected.expand(2, -1, -1))


def test_samples_are_what_their_overlap_says() -> None:
    rpn = load("region_proposals")
    truth = torch.rand(3, 4, 4, generator=generator()) * 30
    truth[..., 2:] += truth[..., :2] + 5
    visible = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    corner = torch.rand(3, 500, 2, generator=generator(1)) * 40
    boxes = torch.cat([corner, corner + 20], dim=2)
    sampling = rpn.Sampling()
    positive, negative, digit = rpn.sample(boxes, truth, visible, sampling)
    assert not (positive & negative).any()
    assert positive.sum(1).tolist()[2] == 0
    assert (positive.sum(1) <= 6).all()
    assert (negative.sum(1) == 6).all()
    for one in range(2):
        overlap = box_iou(boxes[one], truth[one][visible[one]])
        closest = set(overlap.argmax(0).tolist())
        for index in positive[one].nonzero()[:, 0].tolist():
            assert overlap[index].max() > 0.5 or index in closest
            assert visible[one, digit[one, index]]
            if index not in closest:
                chosen = box_iou(boxes[one, [index]], truth[one, [int(digit[one, index])]])
                assert chosen == overlap[index].max()
        assert (overlap[negative[one]] < 0.1).all()


def test_measures_agree_with_a_direct_computation() -> None:
    metrics = load("detection_metrics")
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [0.0, 5.0, 10.0, 15.0]])
    found = torch.tensor([[0.0, 0.0, 10.0, 8.0], [0.0, 2.0, 10.0, 12.0]])
    # By hand: 80/100 and 30/150 with the first digit; 80/120 and 70/130 with the first and third.
    assert metrics.digit_ious(found, truth).tolist() == pytest.approx([0.8, 0.0, 70 / 130])
    best = metrics.iou_of_best_boxes([found, found[:0]], [truth, truth])
    assert best == pytest.approx((0.8 + 80 / 120) / 2 / 2)
    assert metrics.iou_of_best_boxes([found, found], [truth, truth[:0]]) == 2 * best
    overlap = box_iou(found, truth).numpy()
    rows, columns = linear_sum_assignment(-overlap)
    assert metrics.digit_ious(found, truth).sum() == pytest.approx(overlap[rows, columns].sum())
    edges = torch.tensor([[0.0, 3.0, 9.0, 9.0], [1.0, 3.0, 9.0, 64.0], [1.0, 1.0, 63.0, 63.0]])
    assert metrics.touches_edge(edges, 64).tolist() == [True, True, False]


def test_patching_the_paper_s_sites_changes_no_score_and_no_box() -> None:
    rpn, rcnn = load("region_proposals"), load("digit_faster_rcnn")
    images = torch.rand(2, 1, 64, 64, generator=generator())
    plain = rpn.RegionProposals("released", (4, 8), 8)
    patched = ccp.patch(plain, list(rpn.PAPER_SITES))
    assert len(ccp.coord_parameters(patched)) == 3
    for before, after in zip(plain(images), patched(images), strict=True):
        assert torch.equal(before, after)
    detector = rcnn.make_faster_rcnn()
    same = ccp.patch(detector, list(rcnn.RCNN_SITES))
    assert len(ccp.coord_parameters(same)) == 3
    for before, after in zip(rcnn.detect(detector, images), rcnn.detect(same, images), strict=True):
        assert torch.equal(before.boxes, after.boxes)


def test_quick_detection_moves_every_coordinate_weight(tmp_path: Path) -> None:
    detection = load("detection")
    record = detection.main(["--quick", "--out", str(tmp_path)])
    assert {run.setting for run in record.runs} == set(detection.SETTINGS)
    for run in record.runs:
        moved = run.extra["largest coordinate weights"]
        sites = 0 if run.variant == "plain" else 1 if run.variant in detection.ONE_SITE else 3
        assert len(moved) == sites
        assert all(value > 0 for value in moved)
        assert all(0 < run.metrics[name] < 1 for name in (detection.BEST_BOXES, detection.DIGITS))
    assert (tmp_path / "detection.png").stat().st_size > 10_000
    stored = json.loads((tmp_path / "detection.json").read_text())
    before = (tmp_path / "detection.json").stat().st_mtime_ns
    detection.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "detection.json").stat().st_mtime_ns == before
    assert len(stored["runs"]) == len(record.runs)


def test_short_training_needs_true_coordinates_for_absolute_boxes(tmp_path: Path) -> None:
    detection = load("detection")
    options = load("experiment").parse_options(None, ["--quick", "--out", str(tmp_path)])
    setting = dataclasses.replace(detection.SETTINGS[detection.ABSOLUTE], length=30)
    iou = {}
    for variant in setting.variants:
        torch.manual_seed(0)
        run = detection.train(setting, variant, options, 0, variant)
        iou[variant] = run.metrics[detection.BEST_BOXES]
    assert iou["patched"] > 1.2 * max(iou["plain"], iou["scrambled"])


def test_quick_classification_moves_the_coordinate_weights(tmp_path: Path) -> None:
    script = load("image_classification")
    record = script.main(["--quick", "--out", str(tmp_path)])
    by_variant = {run.variant: run for run in record.runs}
    assert by_variant["plain"].extra["largest coordinate weights"] == []
    for variant in ("patched", "scrambled"):
        (moved,) = by_variant[variant].extra["largest coordinate weights"]
        assert moved > 0
        assert by_variant[variant].parameters > by_variant["plain"].parameters
    assert (tmp_path / "image_classification.png").stat().st_size > 10_000
