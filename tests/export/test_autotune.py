"""Autotuning: the fastest lowering of each group is found, and kept only beyond doubt."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export import autotune as module
from coordconv_patch.export.autotune import Trial, autotune, group_of
from coordconv_patch.export.report import ExportReport
from coordconv_patch.lowering.site import LoweringSite, lowering_sites

CPU = ["CPUExecutionProvider"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.narrow, self.depthwise, self.wide):
            x = torch.relu(conv(x))
        return x


def patched() -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Net().eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def sites() -> list[LoweringSite]:
    return lowering_sites(patched(), torch.randn(2, 3, 16, 16))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes as long as it says, give or take a tenth: no test hangs on the machine's load."""
    draw = random.Random(0)

    def alternate(
        runs: Mapping[str, Callable[[], float]], *, repeats: int, **options: Any
    ) -> dict[str, list[float]]:
        return {
            name: [run() * draw.uniform(0.95, 1.05) for _ in range(repeats)]
            for name, run in runs.items()
        }

    monkeypatch.setattr(module, "alternate", alternate)


def taking(seconds: Callable[[Mapping[str, str]], float]) -> Callable[..., Callable[[], float]]:
    """Makes runs that take as long as their lowerings say."""
    return lambda lowerings: lambda: seconds(dict(lowerings))


def test_groups_tell_kernel_kind_and_stride(sites: list[LoweringSite]) -> None:
    groups = {site.name: group_of(site) for site in sites}
    assert groups == {
        "stem": "3x3 on the image stride 2",
        "narrow": "1x1",
        "depthwise": "3x3 depthwise",
        "wide": "1x1",
    }


def test_the_fastest_form_of_each_group_is_kept(sites: list[LoweringSite], clock: None) -> None:
    def seconds(lowerings: Mapping[str, str]) -> float:
        slow = 3e-3 * (lowerings["depthwise"] != "separable")
        slow += 3e-3 * (lowerings["narrow"] != "map") + 3e-3 * (lowerings["stem"] != "channels")
        return 1e-3 + slow

    tuning = autotune(sites, lambda site: "branch", taking(seconds))
    assert tuning.lowerings == {
        "stem": "channels",
        "narrow": "map",
        "depthwise": "separable",
        "wide": "map",
    }
    kept = [(trial.group, trial.lowering) for trial in tuning.trials if trial.kept]
    assert ("3x3 depthwise", "separable") in kept
    assert all(
        trial.ratio is not None and trial.ratio.high < 1 for trial in tuning.trials if trial.kept
    )
    assert {trial.sites for trial in tuning.trials if trial.group == "1x1"} == {2}


def test_what_is_not_faster_beyond_doubt_is_not_kept(
    sites: list[LoweringSite], clock: None
) -> None:
    def seconds(lowerings: Mapping[str, str]) -> float:
        return 1e-3 if set(lowerings.values()) == {"branch"} else 0.9999e-3

    tuning = autotune(sites, lambda site: "branch", taking(seconds))
    assert set(tuning.lowerings.values()) == {"branch"}
    assert tuning.trials
    assert not any(trial.kept for trial in tuning.trials)


def test_a_form_that_cannot_be_exported_is_reported_and_passed_over(
    sites: list[LoweringSite], clock: None
) -> None:
    def make_run(lowerings: Mapping[str, str]) -> Callable[[], float]:
        if "channels" in lowerings.values():
            raise ExportError("no channels here\nat all")
        return lambda: 1e-3

    tuning = autotune(sites, lambda site: "branch", make_run)
    failed = [trial for trial in tuning.trials if trial.lowering == "channels"]
    assert len(failed) == 3
    assert {(trial.obstacle, trial.ratio, trial.kept) for trial in failed} == {
        ("no channels here", None, False)
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SECONDS", 0.02)
        model = patched()
        path = tmp_path_factory.mktemp("tuned") / "tuned.onnx"
        example = torch.randn(2, 3, 16, 16)
        report = ccp.export_onnx(model, path, example, lowering="autotune", providers=CPU)
    return model, report


def test_an_autotuned_file_computes_the_concatenating_model(
    tuned: tuple[nn.Module, ExportReport],
) -> None:
    model, report = tuned
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    session = onnxruntime.InferenceSession(report.path, providers=CPU)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = concatenating(model)(x)
    assert (torch.from_numpy(actual) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_report_shows_every_trial(tuned: tuple[nn.Module, ExportReport]) -> None:
    _, report = tuned
    forms = {(trial.group, trial.lowering) for trial in report.trials if isinstance(trial, Trial)}
    for group in ("1x1", "3x3 depthwise", "3x3 on the image stride 2"):
        assert {(group, form) for form in ("map", "channels")} <= forms
        assert f"{group}, " in str(report)
    assert all(trial.seconds > 0 for trial in report.trials)
    assert "of the fastest before" in str(report)
    assert [path.name for path in report.path.parent.iterdir()] == ["tuned.onnx"]


def test_autotuning_sizes_that_are_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="write lowering='computed' or 'auto'"):
        ccp.export_onnx(
            patched(),
            tmp_path / "x.onnx",
            torch.randn(1, 3, 16, 16),
            lowering="autotune",
            dynamic_size=True,
        )
