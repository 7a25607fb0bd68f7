"""Verification: what counts as a difference, and what is said about one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

import coordconv_patch as ccp
from coordconv_patch.errors import CoordConvPatchError, ExportError
from coordconv_patch.running.inputs import tensors_in
from coordconv_patch.verification import comparison as comparison_module
from coordconv_patch.verification import verify as verify_module
from coordconv_patch.verification.check import Check
from coordconv_patch.verification.comparison import Verdict
from coordconv_patch.verification.detections import Detections, find_fields
from coordconv_patch.verification.differences import compare
from coordconv_patch.verification.match_detections import DetectionAgreement, compare_detections
from coordconv_patch.verification.rounding import other_roundings, rounding_noise
from coordconv_patch.verification.torch_run import run_torch, torch_outputs
from coordconv_patch.verification.verify import Verifier, run_session, verify_onnx

CPU = ["CPUExecutionProvider"]
INF, NAN = math.inf, math.nan


def difference(expected: Any, actual: Any, dtype: torch.dtype | None = None) -> float:
    return compare([torch.tensor(expected, dtype=dtype)], [np.array(actual)])


# --- compare ------------------------------------------------------------------------------------


def test_equal_outputs_do_not_differ() -> None:
    assert difference([1.0, -2.0], [1.0, -2.0]) == 0
    assert compare([], []) == 0


def test_the_difference_is_relative_to_the_largest_magnitude_of_its_output() -> None:
    assert difference([1.0, -200.0], [2.0, -200.0]) == pytest.approx(1 / 200)
    large, small = torch.tensor([1000.0]), torch.tensor([0.001])
    assert compare([large, small], [np.array([1001.0]), np.array([0.002])]) == pytest.approx(
        1, rel=1e-4
    )


def test_the_worst_output_counts_wherever_it_stands() -> None:
    outputs = [torch.ones(2), torch.ones(2), torch.ones(2)]
    for index in range(3):
        arrays = [np.ones(2), np.ones(2), np.ones(2)]
        arrays[index][1] = 1.5
        assert compare(outputs, arrays) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [([NAN, 1.0], [NAN, 1.0]), ([INF, -INF, 2.0], [INF, -INF, 2.0]), ([NAN, NAN], [NAN, NAN])],
)
def test_not_a_number_and_infinity_agree_with_themselves(
    expected: list[float], actual: list[float]
) -> None:
    assert difference(expected, actual) == 0


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ([NAN, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [NAN, 1.0]),
        ([NAN, 1.0], [1.0, NAN]),
        ([INF, 1.0], [-INF, 1.0]),
        ([INF, 1.0], [3e38, 1.0]),
        ([1.0, 1.0], [1.0, INF]),
    ],
)
def test_not_a_number_and_infinity_agree_with_nothing_else(
    expected: list[float], actual: list[float]
) -> None:
    assert difference(expected, actual) == INF


def test_a_difference_beside_not_a_number_is_still_seen() -> None:
    assert difference([NAN, 2.0], [NAN, 3.0]) == pytest.approx(0.5)
    assert difference([INF, 2.0], [INF, 3.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (2, 4)])
def test_another_shape_is_an_infinite_difference(shape: tuple[int, ...]) -> None:
    assert compare([torch.ones(2, 3)], [np.ones(shape)]) == INF


def test_another_number_of_outputs_is_an_infinite_difference() -> None:
    assert compare([torch.ones(1)], [np.ones(1), np.ones(1)]) == INF
    assert compare([torch.ones(1)], []) == INF


def test_whole_numbers_and_booleans_are_compared_too() -> None:
    assert difference([1, 2, 4], [1, 2, 4], torch.int64) == 0
    assert difference([1, 2, 4], [1, 3, 4], torch.int64) == pytest.approx(0.25)
    assert difference([True, False], [True, False]) == 0
    assert difference([True, False], [True, True]) == 1


def test_empty_outputs_agree_if_their_shapes_do() -> None:
    assert compare([torch.ones(0, 4)], [np.ones((0, 4))]) == 0
    assert compare([torch.ones(0, 4)], [np.ones((0, 5))]) == INF
    both = [torch.ones(0), torch.ones(1)]
    assert compare(both, [np.ones(0), np.full(1, 2.0)]) == 1


def test_numbers_without_axes_are_compared() -> None:
    assert difference(2.0, 3.0) == pytest.approx(0.5)


def test_an_output_of_zeros_has_no_room_for_noise() -> None:
    assert difference([0.0, 0.0], [0.0, 0.0]) == 0
    assert difference([0.0, 0.0], [0.0, 1e-6]) > 1


def test_half_precision_outputs_are_compared_in_double() -> None:
    assert difference([1.0, 1.0], np.array([1.0, 1.5], np.float16), torch.float16) == 0.5
    assert difference([1.0, 1.0], [1.0, 1.5], torch.bfloat16) == 0.5


# --- detections ---------------------------------------------------------------------------------

ROWS = [  # x1, y1, x2, y2, score, label
    (10, 10, 50, 60, 0.9, 1),
    (100, 20, 180, 90, 0.8, 2),
    (30, 80, 70, 120, 0.7, 1),
    (12, 11, 49, 62, 0.6, 2),
    (150, 100, 200, 160, 0.5, 3),
]


def detections(rows: Any = ROWS, **extras: Any) -> Detections:
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    made = {name: np.array(field) for name, field in extras.items()}
    return Detections(table[:, :4], table[:, 4], table[:, 5], made)


def changed(row: int, column: int, by: float) -> Any:
    rows = [list(each) for each in ROWS]
    rows[row][column] += by
    return rows


def judged(actual: Any, *roundings: Any, expected: Any = ROWS) -> DetectionAgreement:
    sets = [each if isinstance(each, Detections) else detections(each) for each in roundings]
    expected = expected if isinstance(expected, Detections) else detections(expected)
    actual = actual if isinstance(actual, Detections) else detections(actual)
    return compare_detections(expected, actual, sets, 1e-4)


def test_the_same_detections_agree_without_another_run() -> None:
    def never() -> Any:
        raise AssertionError("asked for another rounding")
        yield

    agreement = compare_detections(detections(), detections(), never(), 1e-4)
    assert agreement == DetectionAgreement(0.0, None, 5, 0, ())


def test_nothing_found_on_both_sides_agrees() -> None:
    assert judged([], expected=[]) == DetectionAgreement(0.0, None, 0, 0, ())


def test_the_difference_is_that_of_the_worst_matched_detection() -> None:
    assert judged(changed(2, 0, 0.01)).difference == pytest.approx(0.01 / 200)
    assert judged(changed(4, 4, 4e-5)).difference == pytest.approx(4e-5 / 0.9)


def test_nearly_equal_scores_may_be_in_another_order() -> None:
    rows = changed(1, 4, 0.1 - 1e-6)
    swapped = [rows[1], rows[0], *rows[2:]]
    agreement = judged(swapped, expected=rows)
    assert (agreement.matched, agreement.problems) == (5, ())
    assert agreement.difference == 0


def test_detections_that_are_not_sorted_are_told() -> None:
    (problem,) = judged(ROWS[::-1]).problems
    assert "not sorted by score" in problem
    assert not judged(ROWS[::-1], expected=[ROWS[1], ROWS[0], *ROWS[2:]]).problems


@pytest.mark.parametrize("row", range(5))
def test_a_missing_detection_is_told_unless_torch_wavers(row: int) -> None:
    without = [each for index, each in enumerate(ROWS) if index != row]
    (problem,) = judged(without, ROWS, ROWS).problems
    assert problem.startswith("torch finds box (" + ", ".join(map(str, ROWS[row][:4])))
    assert f"score {ROWS[row][4]}, the file does not" in problem
    agreement = judged(without, ROWS, without)
    assert (agreement.problems, agreement.matched, agreement.unstable) == ((), 4, 1)


@pytest.mark.parametrize("row", range(5))
def test_a_detection_of_the_file_alone_is_told_unless_torch_wavers(row: int) -> None:
    without = [each for index, each in enumerate(ROWS) if index != row]
    (problem,) = judged(ROWS, without, without, expected=without).problems
    assert problem.startswith("the file finds box (" + ", ".join(map(str, ROWS[row][:4])))
    agreement = judged(ROWS, without, ROWS, expected=without)
    assert (agreement.problems, agreement.matched, agreement.unstable) == ((), 4, 1)


@pytest.mark.parametrize(("column", "by"), [(0, 1.0), (3, -0.5), (4, 0.01), (5, 1)])
def test_a_moved_box_a_score_and_a_label_are_told(column: int, by: float) -> None:
    problems = judged(changed(1, column, by), ROWS, ROWS).problems
    assert len(problems) == 2
    assert problems[0].startswith("torch finds box (100, 20, 180, 90), label 2, score 0.8")
    assert "its nearest: box (" in problems[0]
    assert problems[1].startswith("the file finds box (")


def test_a_detection_given_twice_is_told_even_if_torch_wavers_elsewhere() -> None:
    double = [ROWS[0], *ROWS]
    for roundings in ((ROWS, ROWS), (changed(0, 0, 1e-3),), (ROWS[:4], changed(0, 4, 1e-6))):
        (problem,) = judged(double, *roundings).problems
        assert problem.startswith("the file finds box (10, 10, 50, 60)")


def test_one_of_two_like_detections_that_is_missing_is_told() -> None:
    twins = [ROWS[0], *ROWS]
    (problem,) = judged(ROWS, twins, twins, expected=twins).problems
    assert problem.startswith("torch finds box (10, 10, 50, 60)")


def test_rounding_excuses_what_it_moves_but_no_more_than_threefold() -> None:
    moved = changed(0, 0, 0.04)
    agreement = judged(changed(0, 0, 0.1), moved)
    assert agreement.problems == ()
    assert agreement.noise == pytest.approx(0.04 / 200)
    assert agreement.difference == pytest.approx(0.1 / 200)
    assert judged(changed(0, 0, 0.2), moved).problems


def test_rounding_that_moves_boxes_far_excuses_no_large_move() -> None:
    assert judged(changed(0, 0, 3.0), changed(0, 0, 1.9)).problems
    assert judged(changed(0, 0, 30.0), changed(0, 0, -30.0)).problems


def test_a_file_that_shares_less_than_half_with_torch_is_not_accepted() -> None:
    agreement = judged(ROWS[:2], ROWS[:1], ROWS[:2])
    (problem,) = agreement.problems
    assert "only 2 of 5 detections can be compared" in problem
    assert agreement.undecided == "Compare on a picture with clearer objects"


def test_roundings_are_drawn_only_as_long_as_something_is_unexplained() -> None:
    drawn = []

    def roundings() -> Any:
        for rows in (ROWS, ROWS[:4], ROWS, ROWS):
            drawn.append(rows)
            yield detections(rows)

    assert compare_detections(detections(), detections(ROWS[:4]), roundings(), 1e-4).unstable == 1
    assert len(drawn) == 2


def test_a_long_list_of_problems_is_cut() -> None:
    problems = judged([], ROWS).problems
    assert len(problems) == 5
    assert problems[0].endswith("the file does not, which finds nothing")
    assert problems[-1] == "and 1 more"


MASKS = np.linspace(0, 1, 5 * 12).reshape(5, 3, 4)


def with_masks(row: int = 0, pixel: float = 0.0) -> Detections:
    masks = MASKS.copy()
    masks[row, 1, 2] += pixel
    return detections(masks=masks)


def test_a_mask_that_differs_is_told_unless_torch_wavers_on_it() -> None:
    assert judged(with_masks(3, 5e-5), expected=with_masks()).difference == pytest.approx(5e-5)
    (problem,) = judged(with_masks(3, 0.5), with_masks(), expected=with_masks()).problems
    assert problem == "the masks of box (12, 11, 49, 62), label 2, score 0.6 differ"
    agreement = judged(with_masks(3, 0.5), with_masks(3, 0.5), expected=with_masks())
    assert (agreement.problems, agreement.unstable) == ((), 1)
    assert judged(with_masks(3, 0.5), with_masks(2, 0.5), expected=with_masks()).problems
    assert judged(with_masks(3, 0.25), with_masks(3, 0.5), expected=with_masks()).problems


def test_masks_follow_their_boxes_into_another_order() -> None:
    rows = changed(1, 4, 0.1 - 1e-6)
    order = [1, 0, 2, 3, 4]
    swapped = detections([rows[i] for i in order], masks=MASKS[order])
    assert not judged(swapped, expected=detections(rows, masks=MASKS)).problems
    mixed_up = detections([rows[i] for i in order], masks=MASKS)
    assert len(judged(mixed_up, expected=detections(rows, masks=MASKS)).problems) == 2


def test_masks_of_another_shape_are_told() -> None:
    problems = judged(detections(masks=MASKS[:, :2]), expected=with_masks()).problems
    assert "masks (of another shape)" in problems[0]


def test_detections_are_found_in_what_models_return() -> None:
    boxes, scores, labels = torch.rand(7, 4), torch.rand(7), torch.ones(7)
    one = {"boxes": boxes, "labels": labels, "scores": scores, "size": torch.ones(2)}
    wanted = {"boxes": (1, ()), "labels": (2, ()), "scores": (3, ())}
    assert find_fields((torch.ones(3), [one])) == (wanted,)
    assert len(find_fields([one, one])) == 2
    assert find_fields({"boxes": boxes, "logits": scores}) == ()
    assert find_fields({"boxes": torch.rand(2, 7, 4), "scores": torch.rand(2, 7)}) == ()
    assert find_fields(torch.rand(2, 3, 6)) == ()


class Nameless(dict):
    """An output class whose fields' names torch is not told, as diffusers registers its own."""


register_pytree_node(
    Nameless, lambda d: (list(d.values()), list(d)), lambda v, k: Nameless(zip(k, v, strict=True))
)


class NamelessNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Nameless:
        return Nameless(sample=self.conv(x))


def test_outputs_of_a_class_without_field_names_are_compared(tmp_path: Path) -> None:
    table = torch.tensor(ROWS)[None]
    (fields,) = find_fields(Nameless(sample=torch.ones(3), table=table))
    assert fields["scores"] == (1, (0, slice(None), 4))
    model = ccp.patch(NamelessNet(), "all")
    with torch.no_grad():
        model.conv.coord_weight.normal_()
    x = torch.randn(1, 3, 8, 8)
    path = ccp.export_onnx(model, tmp_path / "n.onnx", x, providers=CPU).path
    other = ccp.unpatch(model, discard=True)
    with pytest.raises(ExportError, match="differ"):
        verify_onnx(other, path, x, providers=CPU)


def test_a_table_of_sorted_boxes_scores_and_classes_is_found() -> None:
    table = torch.tensor(ROWS)[None].repeat(2, 1, 1)
    fields = find_fields((torch.ones(1), table))
    assert [each["scores"] for each in fields] == [(1, (n, slice(None), 4)) for n in (0, 1)]
    taken = Detections.take(fields[1], [np.ones(1), table.numpy()])
    assert taken is not None
    assert np.allclose(taken.boxes, detections().boxes)
    assert (taken.labels == detections().labels).all()
    assert find_fields(table.flip(1)) == ()


def test_outputs_of_other_shapes_are_no_detections() -> None:
    fields = {"boxes": (0, ()), "scores": (1, ())}
    assert Detections.take(fields, [np.ones((2, 4)), np.ones(2)]) is not None
    for boxes, scores in (((2, 4), (3,)), ((2, 5), (2,)), ((2, 4), (2, 1)), ((), (2,))):
        assert Detections.take(fields, [np.ones(boxes), np.ones(scores)]) is None


# --- tensors_in ---------------------------------------------------------------------------------


class Answer(dict):  # type: ignore[type-arg]  # a library's own output class, as transformers has
    """A mapping that torch does not know."""


def test_tensors_are_found_in_nested_values() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [len(t) for t in tensors_in((a, [b, {"k": c}], None, 3, "text"))] == [1, 2, 3]
    assert [len(t) for t in tensors_in(a)] == [1]
    assert tensors_in({"x": a, "y": [b]}) == [a, b]
    assert tensors_in("no tensor") == []


def test_an_unknown_mapping_is_looked_into() -> None:
    a, b = torch.ones(1), torch.ones(2)
    answer: Mapping[str, Tensor] = Answer(x=a, y=b)
    assert [len(tensor) for tensor in tensors_in(answer)] == [1, 2]


# --- the noise floor ----------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Cancels(Net):
    """Loses nearly all digits: float32 is far from float64."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y + 3e5) - 3e5


class Overflows(Net):
    """A second output that float32 cannot hold and float64 can."""

    def forward(self, x: Tensor) -> Any:
        return self.conv(x), torch.exp(x.abs() + 200)


class Picks(Net):
    """A second output that hangs on the last digit."""

    def forward(self, x: Tensor) -> Any:
        return self.conv(x), (x.flatten(1) * 1e-9 + 1).argmax(1)


def made(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(kind().eval(), "all")
    with torch.no_grad():
        model.conv.coord_weight.normal_()
    return model


X = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(1))


def exported(path: Path, model: nn.Module, **options: Any) -> Path:
    """A file from torch's own exporter, unchecked."""
    torch.onnx.export(model, (X,), str(path), dynamo=False, opset_version=17, **options)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return exported(tmp_path / "net.onnx", made())


def noises(model: nn.Module) -> list[float]:
    own = torch_outputs(model, X)
    return [rounding_noise(own, rounded) for rounded in other_roundings(model, X)]


def test_the_rounding_noise_of_a_plain_model_is_small() -> None:
    measured = noises(made())
    assert len(measured) == 9
    assert all(0 < noise < 2e-6 for noise in measured)


def test_the_rounding_noise_of_cancellation_is_large() -> None:
    measured = noises(made(Cancels))
    assert measured[0] > 1e-3
    assert max(measured) > 1e-3


class Sum(nn.Module):
    """Passes on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_each_pixel_of_a_layer_is_rounded_on_its_own() -> None:
    """Weights are shared by all pixels, so that they alone could not part two equal ones."""
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 8
    rounded = [outputs[0] for outputs in other_roundings(Sum(), x)]
    for output in rounded[1:]:
        apart = (output - x).flatten()
        eps = torch.finfo(torch.float32).eps
        assert apart.unique().numel() > 8
        assert 0 < apart[1:].abs().max() <= 2 * eps * 0.5001  # the mean is 8 / 16
        assert apart[0].abs() <= 7 * eps * 8
    assert torch.equal(rounded[0].float(), x)
    assert noises_repeat(x)


def noises_repeat(x: Tensor) -> bool:
    pairs = zip(other_roundings(Sum(), x), other_roundings(Sum(), x), strict=True)
    return all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_the_worst_of_several_roundings_counts_and_no_more_are_drawn_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, drawn = made(), []
    run = run_torch(model, X)
    (y,) = run.tensors
    largest = float(y.abs().max())

    def roundings(*_: Any) -> Any:
        for share in (1e-4, 4e-4, 2e-4, 9.0):
            drawn.append(share)
            yield [y + share * largest]

    monkeypatch.setattr(comparison_module, "other_roundings", roundings)

    def verdict(share: float) -> Verdict:
        drawn.clear()
        moved = (y + share * largest).detach().numpy()
        return comparison_module.Comparison(model, X, run, 1e-5).compare([moved])

    assert verdict(1e-3).agrees
    assert drawn == [1e-4, 4e-4]
    assert verdict(1e-3).check.noise == pytest.approx(4e-4, rel=0.01)
    assert verdict(2.5e-4).agrees
    assert drawn == [1e-4]
    assert verdict(9e-6).check.noise is None
    assert drawn == []


def test_a_model_that_knows_no_double_has_no_measured_noise() -> None:
    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is not torch.float32:
                raise TypeError("float32 only")
            return self.conv(x)

    assert len(noises(made(Single))) == 8


def test_a_difference_within_the_noise_agrees_and_says_so(tmp_path: Path) -> None:
    model = made(Cancels)
    noise = max(noises(model))
    path = exported(tmp_path / "noisy.onnx", model)
    check = Check("x", 2 * noise, 1e-9, noise)
    assert check.agrees
    assert not Check("x", 4 * noise, 1e-9, noise).agrees
    assert verify_onnx(model, path, X, providers=CPU, tolerance=1e-9).agrees


def test_noise_that_is_not_a_finite_number_excuses_nothing(tmp_path: Path) -> None:
    model = made(Overflows)
    path = exported(tmp_path / "overflow.onnx", model)
    assert verify_onnx(model, path, X, providers=CPU).difference < 1e-5
    with torch.no_grad():
        model.conv.weight.mul_(3)
    with pytest.raises(ExportError, match="differ"):
        verify_onnx(model, path, X, providers=CPU)


def test_an_infinite_difference_never_agrees() -> None:
    assert not Check("x", INF, 1e-4, INF).agrees
    assert not Check("x", 0.5, 1e-4, INF).agrees
    assert not Check("x", INF, 1e-4, 0.1).agrees


# --- verify_onnx --------------------------------------------------------------------------------


def test_a_right_file_gives_the_figures(file: Path) -> None:
    check = verify_onnx(made(), file, X, providers=CPU)
    assert check.inputs == "a tensor of shape (2, 3, 6, 9), torch.float32"
    assert check.difference < 1e-5
    assert check.tolerance == 1e-4
    assert check.noise is None
    assert check.agrees


def test_another_models_file_is_an_error_with_figures(file: Path) -> None:
    other = made()
    with torch.no_grad():
        other.conv.coord_weight.mul_(1.5)
    with pytest.raises(ExportError) as caught:
        verify_onnx(other, file, X, providers=CPU)
    message = str(caught.value)
    assert "CPUExecutionProvider" in message
    assert "(2, 3, 6, 9)" in message
    assert "allowed are 0.0001" in message
    assert "Is it of this model, with these weights?" in message
    shown = float(message.split(" by ")[1].split()[0])
    expected = (other(X) - made()(X)).abs().max() / other(X).abs().max()
    assert shown == pytest.approx(expected.item(), rel=0.01)


def test_the_tolerance_decides(file: Path) -> None:
    other = made()
    with torch.no_grad():
        other.conv.bias.add_(0.01)
    assert verify_onnx(other, file, X, providers=CPU, tolerance=0.1).difference > 1e-4
    with pytest.raises(ExportError, match=r"allowed are 0\.0001"):
        verify_onnx(other, file, X, providers=CPU)


def test_the_model_is_compared_in_evaluation_mode_and_left_in_training(tmp_path: Path) -> None:
    model = nn.Sequential(made(), nn.Dropout(0.5), nn.BatchNorm2d(2)).eval()
    path = exported(tmp_path / "drop.onnx", model)
    model.train()
    assert verify_onnx(model, path, X, providers=CPU).agrees
    assert all(module.training for module in model.modules())
    assert model[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("blamed", "reason"),
    [
        ("Pad_Fusion", r'Pad_Fusion, not the file: pass disabled_optimizers=\["Pad_Fusion"\]'),
        ("level", "Without graph optimisation ONNX Runtime agrees"),
        ("graph", r"try another lowering= or exporter="),
    ],
)
def test_the_cause_of_a_difference_is_named(
    blamed: str, reason: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(session: dict[str, Any], feeds: list[Tensor]) -> list[np.ndarray]:
        right = made()(X).detach().numpy()
        good = {
            "Pad_Fusion": "Pad_Fusion" in session["disabled_optimizers"],
            "level": not session["graph_optimization"],
            "graph": False,
        }[blamed]
        return [right if good else right + 1]

    defaults = {"disabled_optimizers": (), "graph_optimization": True}
    monkeypatch.setattr(
        verify_module, "make_session", lambda path, providers, **options: defaults | options
    )
    monkeypatch.setattr(verify_module, "run_session", run)
    with pytest.raises(ExportError, match=reason):
        verify_onnx(made(), file, X, providers=CPU)


def test_optimizers_asked_to_be_left_out_are_left_out(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    make = verify_module.make_session

    def make_session(path: Any, providers: Any, **options: Any) -> Any:
        seen.append(options)
        return make(path, providers, **options)

    monkeypatch.setattr(verify_module, "make_session", make_session)
    verify_onnx(made(), file, X, providers=CPU, disabled_optimizers=["Pad_Fusion"])
    assert seen == [{"disabled_optimizers": ["Pad_Fusion"]}]


def test_one_session_does_for_all_inputs_of_a_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sessions = []
    make = verify_module.make_session
    monkeypatch.setattr(
        verify_module, "make_session", lambda *a, **k: made_sessions.append(a) or make(*a, **k)
    )
    verifier = Verifier(made(), file, providers=CPU)
    assert verifier.check(X).agrees
    assert verifier.check(-X).agrees
    with pytest.raises(ExportError, match="cannot run the graph"):
        verifier.check(torch.zeros(2, 3, 7, 9))
    assert len(made_sessions) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda y: y[..., :4],
            r"output 0 of the file has the shape \(2, 2, 6, 9\), that of torch ",
        ),
        (lambda y: (y, y), "the file gives 1 outputs, torch 2"),
    ],
)
def test_a_file_of_another_model_is_told_by_its_shapes(
    change: Any, said: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Any:
            return change(self.conv(x))

    made_sessions: list[Any] = []
    make = verify_module.make_session
    monkeypatch.setattr(
        verify_module, "make_session", lambda *a, **k: made_sessions.append(a) or make(*a, **k)
    )
    with pytest.raises(ExportError, match=said) as caught:
        verify_onnx(made(Other), file, X, providers=CPU)
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith("Is it the file of another model?")
    assert len(made_sessions) == 1  # no optimizer is suspected


class Finds(nn.Module):
    """Detections whose key point is where a heat map is largest; of equals, the first."""

    last = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        heat = self.conv(x).flatten(1)
        numbers = torch.arange(heat.shape[1])
        at = heat >= heat.max(1, keepdim=True).values
        point = torch.where(at, numbers, -1).max(1) if self.last else at.float().max(1)
        boxes = torch.stack((heat[:, 0], heat[:, 1], heat[:, 2], heat[:, 3]), 1)
        return {"boxes": boxes, "scores": heat[:, 0], "keypoints": point.indices.float()[:, None]}


class FindsLast(Finds):
    last = True


def heat_maps(gap: float) -> Tensor:
    """Two pictures: one clear maximum; and one with two, the first larger by a gap."""
    x = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0, 2, 2] = 2.0
    x[1, 0, 4, 1] = 1.5
    x[1, 0, 1, 1] = 1.5 + gap
    x[1, 0, 0] = x[0, 0, 0] / 2
    return x


def exported_on(path: Path, model: nn.Module, x: Tensor) -> Path:
    torch.onnx.export(model.eval(), (x,), str(path), dynamo=False, opset_version=17)
    return path


def test_an_argmax_of_two_equals_is_a_tie_and_no_fault(tmp_path: Path) -> None:
    x = heat_maps(0.0)
    path = exported_on(tmp_path / "last.onnx", FindsLast(), x)
    check = verify_onnx(Finds().eval(), path, x, providers=CPU)
    assert (check.detections, check.unstable) == (2, 1)


def test_an_argmax_of_what_is_not_equal_is_a_fault(tmp_path: Path) -> None:
    x = heat_maps(1e-4)
    path = exported_on(tmp_path / "lower.onnx", Finds(), heat_maps(0.0))
    assert verify_onnx(Finds().eval(), path, x, providers=CPU).unstable == 0

    class Lower(Finds):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = super().forward(x)
            return found | {"keypoints": torch.tensor([[14.0], [25.0]])}

    path = exported_on(tmp_path / "lower.onnx", Lower(), x)
    with pytest.raises(ExportError, match="the keypoints of box"):
        verify_onnx(Finds().eval(), path, x, providers=CPU)


class Tied(nn.Module):
    """Detects the first three places; every score is the same, as of a head not trained yet."""

    order = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.constant_(self.conv.bias, -4.6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.conv(x).flatten().sigmoid()
        at = torch.arange(scores.shape[0], dtype=torch.float32)
        if self.order < 0:
            scores, at = scores.flip(0), at.flip(0)
        kept = scores.topk(3).indices
        boxes = torch.stack((at, at, at + 2, at + 3), 1)
        return {"boxes": boxes[kept], "scores": scores[kept]}


class TiedFromTheEnd(Tied):
    order = -1


def test_ties_of_scores_are_told_as_such_and_nothing_is_blamed(tmp_path: Path) -> None:
    path = exported_on(tmp_path / "ties.onnx", TiedFromTheEnd(), X)
    with pytest.raises(ExportError, match="scores that others have too") as caught:
        verify_onnx(Tied().eval(), path, X, providers=CPU)
    assert "the file finds box" in str(caught.value)
    assert "lowering" not in str(caught.value)
    rows = [(*ROWS[0][:4], 0.5, 1), (*ROWS[1][:4], 0.5, 1), ROWS[2]]
    rows = [ROWS[2], *rows[:2]]
    tied = judged([rows[0], (*ROWS[3][:4], 0.5, 1), rows[1]], expected=rows)
    assert tied.problems
    assert "to the last bit" in tied.undecided
    assert judged([rows[0], (*ROWS[3][:4], 0.6, 1), rows[1]], expected=rows).undecided == ""
    assert judged(rows[1:], expected=rows).undecided == ""


def test_an_output_beside_the_detections_is_still_compared(tmp_path: Path) -> None:
    class WithFeatures(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            scores = y.flatten()[:3].sigmoid()
            return {"boxes": y.flatten()[:12].view(3, 4), "scores": scores}, y

    model = made(WithFeatures)
    path = exported(tmp_path / "two.onnx", model)
    assert verify_onnx(model, path, X, providers=CPU).detections == 3

    class Wrong(WithFeatures):
        def forward(self, x: Tensor) -> Any:
            found, y = super().forward(x)
            return found, torch.cat((y[:1], y[1:] * 1.1))

    with pytest.raises(ExportError, match="of the largest output"):
        verify_onnx(made(Wrong), path, X, providers=CPU)


def test_a_missing_file_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nothing\.onnx"):
        verify_onnx(made(), tmp_path / "nothing.onnx", X, providers=CPU)


def test_a_file_that_is_no_onnx_is_an_export_error(tmp_path: Path) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"not a graph" * 50)
    with pytest.raises(ExportError, match=r"garbage\.onnx"):
        verify_onnx(made(), path, X, providers=CPU)


def test_a_graph_that_does_not_take_these_inputs_is_an_export_error(file: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot run the graph on .*\(2, 3, 7, 9\)"):
        verify_onnx(made(), file, torch.zeros(2, 3, 7, 9), providers=CPU)


def test_another_number_of_inputs_is_an_export_error(file: Path) -> None:
    class Pair(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x + y)

    with pytest.raises(ExportError, match=r"the ONNX graph has inputs .*, but the example has 2"):
        verify_onnx(made(Pair), file, (X, X), providers=CPU)


def test_inputs_that_the_model_refuses_are_no_raw_error(file: Path) -> None:
    with pytest.raises(CoordConvPatchError, match=r"\(2, 4, 6, 9\)"):
        verify_onnx(made(), file, torch.zeros(2, 4, 6, 9), providers=CPU)


def test_the_sessions_inputs_are_fed_in_order() -> None:
    class Session:
        def get_inputs(self) -> list[Any]:
            return [type("Value", (), {"name": name}) for name in ("b", "a")]

        def run(self, outputs: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [feeds["b"], feeds["a"]]

    outputs = run_session(Session(), [torch.ones(1), torch.zeros(2, requires_grad=True)])
    assert [array.tolist() for array in outputs] == [[1.0], [0.0, 0.0]]


def test_outputs_come_without_gradients() -> None:
    (output,) = torch_outputs(made(), (X,))
    assert not output.requires_grad
    assert torch.equal(output, made()(X))
