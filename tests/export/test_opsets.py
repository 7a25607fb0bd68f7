"""Operator sets: the one asked for is in the file, or the export is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from old_torch import IS_2_6
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export.targets import TARGETS, Target
from coordconv_patch.runtime import newest_opset as newest_module
from coordconv_patch.runtime.newest_opset import newest_opset

CPU = ["CPUExecutionProvider"]

NEWEST = min(newest_opset(), 25) if IS_2_6 else newest_opset()
"""What the exporter of torch 2.6 writes ends at 25, whatever ONNX Runtime reads."""


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 6, 8, generator=torch.Generator().manual_seed(batch))


def usual() -> nn.Module:
    """Operators that the version converters bring from operator set 18 to 16 and 17."""
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), depthwise, nn.Conv2d(4, 2, 1))


def padded() -> nn.Module:
    """A Pad of operator set 18, which they cannot bring to an older one."""
    stem = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(stem, nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))


def patched(net: nn.Module) -> nn.Module:
    """Coordinate weights that are not zero: a forgotten branch shows."""
    model = ccp.patch(net.eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model


def assert_agrees(path: Path, model: nn.Module) -> None:
    """The file computes what torch does, at both batches."""
    session = ort.InferenceSession(str(path), providers=CPU)
    for batch in (1, 2):
        (actual,) = session.run(None, {session.get_inputs()[0].name: images(batch).numpy()})
        with torch.no_grad():
            expected = model(images(batch)).numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def written(path: Path) -> int:
    return next(o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx"))


@pytest.mark.parametrize(
    ("opset", "dynamic_size"),
    [
        *((opset, False) for opset in (7, 8, 9, 11, 13, 16, 17, 18, 20, NEWEST)),
        *((opset, True) for opset in (9, 17, NEWEST)),
    ],
)
def test_the_operator_set_asked_for_is_in_the_file(
    opset: int, dynamic_size: bool, tmp_path: Path
) -> None:
    model, path = patched(usual()), tmp_path / "asked.onnx"
    report = ccp.export_onnx(
        model, path, images(2), opset=opset, dynamic_size=dynamic_size, providers=CPU
    )
    assert report.opset == opset == written(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert_agrees(path, model)


@pytest.mark.parametrize("opset", [11, 16, 20])
def test_the_report_says_when_the_other_exporter_wrote_it(opset: int, tmp_path: Path) -> None:
    model, path = patched(padded()), tmp_path / "asked.onnx"
    report = ccp.export_onnx(model, path, images(2), opset=opset, providers=CPU)
    assert report.opset == opset == written(path)
    assert report.exporter == ("torchscript" if opset < 18 else "dynamo")
    other = f"could not write operator set {opset} for this model; the TorchScript exporter did"
    assert any(other in note for note in report.notes) == (opset < 18)
    assert_agrees(path, model)


def test_what_no_exporter_writes_is_refused_with_what_can_be_written(tmp_path: Path) -> None:
    for opset, exporter, message in (
        (11, "dynamo", r"operator set 18 .*: pass opset=18 or None, or exporter='torchscript'"),
        (7, "auto", r"pass opset=18 or None\nthe TorchScript exporter (.|\n)*pass another opset="),
    ):
        with pytest.raises(ExportError, match=message):
            ccp.export_onnx(
                *(patched(usual()), tmp_path / "old.onnx", images(2)),
                opset=opset,
                exporter=exporter,  # type: ignore[arg-type]
                dynamic_size=opset == 7,  # which cannot expand; coordinates of one size need not be
                providers=CPU,
            )
    assert not list(tmp_path.iterdir())


def test_what_onnx_runtime_cannot_read_is_refused_with_the_newest_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newest_module, "_reads", lambda opset: opset <= 19)
    newest_opset.cache_clear()
    try:
        with pytest.raises(ArgumentError, match=r"opset=20: write a whole number from 7 to 19 "):
            ccp.export_onnx(patched(usual()), tmp_path / "new.onnx", images(2), opset=20)
    finally:
        newest_opset.cache_clear()


def test_a_target_s_own_operator_set_holds_unless_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "old_board", Target("old_board", "an old board", opset=11))
    model, path = patched(usual()), tmp_path / "board.onnx"
    for asked, opset in ((None, 11), (13, 13)):
        report = ccp.export_onnx(
            model, path, images(2), opset=asked, target="old_board", providers=CPU
        )
        assert report.opset == opset == written(path)
        assert_agrees(path, model)
