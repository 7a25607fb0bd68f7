"""A model of each odd kind through the checks of the zoo sweep, and the checks themselves.

The whole sweep is ``pytest -m zoo``; its results are in docs/zoo.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from zoo import onnx_stage, results, sweep, torch_stage
from zoo.catalogue import CATALOGUE
from zoo.entry import Entry, image
from zoo.onnx_stage import check_in_onnx
from zoo.report import TABLE, render
from zoo.results import RESULTS, STAGES, expected_failures, judge
from zoo.torch_stage import FINDINGS, check_in_torch

import coordconv_patch as ccp
from coordconv_patch.layers.coordconv import CoordConvNd

REPRESENTATIVE = [
    "timm/test_nfnet",  # ScaledStdConv2d
    "timm/vit_tiny_r_s16_p8_224",  # StdConv2dSame
    "timm/tf_mixnet_s",  # MixedConv2d, Conv2dSame
    "timm/tf_efficientnet_cc_b0_4e",  # CondConv2d, refused
    "timm/lambda_resnet26t",  # Conv3d in an attention layer
    "timm/coat_tiny",  # one convolution under several names
    "timm/densenetblur121d",  # a functional convolution in a layer that has no nn.Conv2d
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",  # called at several sizes
    "torchvision/raft_small",  # two images, one encoder for both, a loop
    "ultralytics/yolo11n-seg",  # ConvTranspose2d
    "transformers/BitForImageClassification-same",  # padding in a class of its own
    "transformers/Wav2Vec2ForSequenceClassification",  # Conv1d under weight norm
]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_model(name: str) -> None:
    verdict, problems = judge("torch", check_in_torch(CATALOGUE[name]))
    assert verdict == "passes", problems


def test_representative_export() -> None:
    row = check_in_onnx(CATALOGUE["transformers/ViTForImageClassification"])
    assert judge("onnx", row) == ("passes", [])
    assert 0 < row["difference"] < 1e-4


class ConvLikeConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Small(nn.Module):
    """Two convolutions, one of them used twice, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = ConvLikeConv(4, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.twice(self.twice(x).relu())


SMALL = Entry("small", Small, image(2, 3, 12, 16))


def test_checks_pass_on_a_right_patch() -> None:
    row = check_in_torch(SMALL)
    assert judge("torch", row) == ("passes", [])
    assert all(row[name] == "ok" for name in FINDINGS)
    assert (row["sites"], row["sites_in_regions"], row["called_repeatedly"]) == (2, 2, 1)
    assert row["gradients_ok"] == 2
    assert row["reference_difference"] < 1e-12


def patched_then(change: Callable[[nn.Module], Any]) -> Callable[..., nn.Module]:
    """A patch that is followed by a fault."""

    def patch(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        patched = ccp.patch(model, *args, **kwargs)
        return change(patched) or patched

    return patch


def nudge_a_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1e-6


def change_momentum(model: nn.Module) -> None:
    model.norm.momentum = 0.11


def freeze_norm_in_training(model: nn.Module) -> None:
    model.norm.register_forward_pre_hook(lambda module, args: module.eval() and None)


def scale_a_gradient(model: nn.Module) -> None:
    model.stem.weight.register_hook(lambda gradient: gradient * 1.001)


def become_a_graph(model: nn.Module) -> nn.Module:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return not isinstance(m, Small)

    return fx.GraphModule(model, Tracer().trace(model))


def change_a_class(model: nn.Module) -> None:
    model.norm.__class__ = type("Renamed", (nn.BatchNorm2d,), {})


def add_a_buffer(model: nn.Module) -> None:
    model.register_buffer("extra", torch.zeros(1))


def forget_to_convert_the_class(model: nn.Module) -> None:
    layer = nn.Linear(3, 3)
    layer.coord_weight = nn.Parameter(torch.zeros(1, 2, 1, 1))
    model.stem = layer


def cut_the_gradient(model: nn.Module) -> None:
    plain = type(model.stem).compute_branch
    model.stem.compute_branch = lambda *args: plain(model.stem, *args).detach()


def ignore_coordinates(model: nn.Module) -> None:
    for layer in (model.stem, model.twice):
        layer.compute_branch = lambda *args, layer=layer: layer.coord_weight.sum() * 0


def keep_a_local_object(model: nn.Module) -> None:
    model.kept = lambda: None


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (nudge_a_weight, "eval_bits"),
        (freeze_norm_in_training, "train_bits"),
        (scale_a_gradient, "train_gradients"),
        (change_momentum, "buffers"),
        (become_a_graph, "class_kept"),
        (change_a_class, "class_kept"),
        (add_a_buffer, "state_dict"),
        (cut_the_gradient, "coord_gradients"),
        (ignore_coordinates, "coords_matter"),
        (keep_a_local_object, "pickle"),
        (change_a_class, "unpatch"),
    ],
)
def test_checks_catch_a_fault(fault: Callable[[nn.Module], Any], finding: str) -> None:
    row = check_in_torch(SMALL, patch=patched_then(fault))
    assert row[finding] != "ok"
    assert not row[finding].startswith("plain")
    verdict, problems = judge("torch", row)
    assert verdict == "fails"
    assert any(problem.startswith(finding) for problem in problems)


def swapped_axes(layer: CoordConvNd, *arguments: Any) -> Tensor:
    *arguments, right = arguments
    swapped = [a.flip(1) if isinstance(a, Tensor) else a for a in arguments]
    assert any(isinstance(a, Tensor) for a in arguments), "the weight is an argument"
    return right(layer, *swapped)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda *args: -args[-1](*args[:-1]), id="sign"),
        pytest.param(lambda *args: args[-1](*args[:-1]) * 1.00001, id="scale"),
        pytest.param(swapped_axes, id="x and y swapped"),
        pytest.param(lambda *args: args[-1](*args[:-1]).flip(-1), id="mirrored"),
    ],
)
def test_reference_catches_a_wrong_branch(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CoordConvNd.compute_branch
    monkeypatch.setattr(
        CoordConvNd, "compute_branch", lambda layer, *args: wrong(layer, *args, right)
    )
    row = check_in_torch(SMALL)
    assert row["eval_bits"] == "ok", "a wrong branch of zeros cannot be seen in the bits"
    assert row["reference"].startswith("differs by")
    assert judge("torch", row)[0] == "fails"


def test_a_failing_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def zero_in_copies(self: CoordConvNd, memo: dict[int, Any]) -> CoordConvNd:
        made = type(self).__new__(type(self))
        made.__dict__ = {**self.__dict__, "_parameters": dict(self._parameters)}
        made._parameters["coord_weight"] = nn.Parameter(torch.zeros_like(self.coord_weight))
        return made

    def patch(*args: Any, **kwargs: Any) -> nn.Module:
        patched = ccp.patch(*args, **kwargs)
        monkeypatch.setattr(CoordConvNd, "__deepcopy__", zero_in_copies, raising=False)
        return patched

    row = check_in_torch(SMALL, patch=patch)
    assert row["deepcopy"] not in ("ok", "")
    assert judge("torch", row)[0] == "fails"


def test_a_changed_original_is_caught() -> None:
    def patch(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        patched = ccp.patch(model, *args, **kwargs)
        for either in (model, patched):
            either.norm.running_mean += 1e-3
        return patched

    row = check_in_torch(SMALL, patch=patch)
    assert row["eval_bits"] == "ok"
    assert "running_mean" in row["left_alone"]
    assert judge("torch", row)[0] == "fails"


class OwnNorm(nn.Conv2d):
    """Refused: its output is not the convolution's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class WithOwnNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.twice = OwnNorm(4, 4, 3, padding=1)


def test_a_refused_convolution_is_a_failure_unless_the_catalogue_says_so() -> None:
    row = check_in_torch(Entry("small", WithOwnNorm, SMALL.inputs))
    assert row["refusals"].startswith("1 convolutions, such as ('twice'")
    assert judge("torch", row)[0] == "fails"
    known = Entry("small", WithOwnNorm, SMALL.inputs, refused="changes the convolution's output")
    assert judge("torch", check_in_torch(known)) == ("passes", [])
    gone = Entry("small", Small, SMALL.inputs, refused="changes the convolution's output")
    assert check_in_torch(gone)["refusals"] == "no convolution is refused any more"


def test_a_refused_patch_is_a_failure() -> None:
    def refuse(*args: Any, **kwargs: Any) -> nn.Module:
        raise ccp.errors.PatchError("no")

    row = check_in_torch(SMALL, patch=refuse)
    assert judge("torch", row) == ("fails", ["patch: PatchError: no"])


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("this model never runs")


class Noisy(Broken):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.rand(1)


class Unexportable(Broken):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(self.conv(x)[0, :, :4, 0]).abs()


def test_a_plain_model_that_fails_is_no_fault_of_the_patch() -> None:
    row = check_in_torch(Entry("broken", Broken, image(1, 3, 4, 4)))
    assert row == {"plain": "ValueError: this model never runs"}
    assert judge("torch", row)[0] == "plain fails"


def test_a_model_that_draws_noise_is_no_yardstick_for_onnx() -> None:
    row = check_in_onnx(Entry("noisy", Noisy, image(1, 3, 4, 4)))
    assert row["plain"] == "draws random numbers in evaluation"
    assert judge("onnx", row)[0] == "plain fails"


def test_a_model_that_no_exporter_takes_is_no_fault_of_the_patch() -> None:
    row = check_in_onnx(Entry("unexportable", Unexportable, image(1, 3, 4, 4)))
    assert row["plain"].startswith("does not export: dynamo: ")
    assert "torchscript: " in row["plain"]
    assert judge("onnx", row)[0] == "plain fails"


def test_a_wrong_export_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def export_without_branches(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ccp.export_onnx(ccp.unpatch(model, discard=True), *args, **kwargs)

    class Shim:
        patch = staticmethod(ccp.patch)
        coord_parameters = staticmethod(ccp.coord_parameters)
        export_onnx = staticmethod(export_without_branches)
        verify_onnx = staticmethod(ccp.verify_onnx)

    monkeypatch.setattr(onnx_stage, "ccp", Shim)
    row = check_in_onnx(SMALL)
    verdict, problems = judge("onnx", row)
    assert verdict == "fails"
    assert "differs by" in problems[0]


def test_onnx_difference_is_judged_by_the_plain_model_and_by_float64() -> None:
    row = {"plain_difference": 1e-6, "plain_noise": 0.0, "noise": 2e-6, "difference": 6e-6}
    assert judge("onnx", row)[0] == "passes"
    assert judge("onnx", {**row, "difference": 6.1e-6})[0] == "fails"
    assert judge("onnx", {**row, "difference": float("inf")})[0] == "fails"
    assert judge("onnx", {**row, "noise": 0.9, "difference": 0.019})[0] == "passes"
    assert judge("onnx", {**row, "noise": 0.9, "difference": 0.021})[0] == "fails"
    assert judge("onnx", {"patched": "ExportError: no"})[0] == "fails"
    assert judge("onnx", {"error": "took longer than 3 seconds"})[0] == "fails"


def test_a_model_that_takes_too_long_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(results, "_ROWS", tmp_path)
    monkeypatch.setattr(sweep, "_PRELOADED", [])
    monkeypatch.setitem(sweep.TIME_LIMITS, "torch", 0.01)
    row = sweep.row_of("timm/test_resnet", "torch")
    assert row == {"error": "took longer than 0 seconds", "versions": results.versions_here()}
    assert judge("torch", row)[0] == "fails"
    assert results.load("timm/test_resnet", "torch") == row


def test_expected_failures_are_the_plain_models() -> None:
    """The list, the results and the table that are checked in say the same."""
    found = json.loads(RESULTS.read_text())
    verdicts = {
        (name, stage): judge(stage, row[stage])[0]
        for name, row in found["rows"].items()
        for stage in STAGES
        if stage in row
    }
    assert set(found["rows"]) <= set(CATALOGUE)
    assert {key for key, verdict in verdicts.items() if verdict == "plain fails"} == set(
        expected_failures()
    )
    assert "fails" not in verdicts.values()
    assert all(expected_failures().values()), "each needs a reason"
    assert TABLE.read_text() == render(found)


def test_checks_cover_every_finding() -> None:
    assert all(callable(getattr(torch_stage._Check, name)) for name in FINDINGS)
