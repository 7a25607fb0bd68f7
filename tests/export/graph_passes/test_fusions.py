"""What ONNX Runtime's CPU provider runs: beside the plain model's operators, only convolutions.

An addition that is not fused, a batch norm that is not folded or a change of layout each cost a
pass over an activation. The block of the layout is 16 channels or 8, by the processor: what is
compared is the plain model on the same one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from old_torch import RUNTIME_1_23
from onnx_graphs import CPU, assert_close, optimized_operators
from torch import nn

import coordconv_patch as ccp

COSTLY = ("BatchNormalization", "ReorderInput", "ReorderOutput", "Add", "Relu", "Clip")

PAIRS = (
    *(("resnet10t", "first"), ("resnet10t", "k>1"), ("resnet10t", "all")),
    *((name, "all") for name in ("mobilenetv3_small_050", "efficientnet_lite0", "convnext_atto")),
)
"""Models and which of their convolutions are patched: each kind of both, not every pair."""
SIZE = 64


def larger_than_one_pixel(site: Any) -> bool:
    return any(length > 1 for length in site.geometry.kernel_size)


SELECTIONS: dict[str, Any] = {"first": "first", "k>1": larger_than_one_pixel, "all": "all"}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


def exported(model: nn.Module, path: Path) -> ccp.ExportReport:
    return ccp.export_onnx(model, path, torch.randn(1, 3, SIZE, SIZE), providers=CPU)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Any]]:
    @functools.cache
    def of(name: str) -> tuple[nn.Module, Any]:
        model = made(name)
        path = tmp_path_factory.mktemp(name) / "plain.onnx"
        exported(model, path)
        return model, optimized_operators(path)

    return of


@pytest.fixture(scope="module", params=PAIRS, ids=" ".join)
def pair(
    request: Any,
    plain: Callable[[str], tuple[nn.Module, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Counter[str], Counter[str], ccp.ExportReport, nn.Module]:
    name, selection = request.param
    model, operators = plain(name)
    patched = ccp.patch(model, SELECTIONS[selection])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(patched):
            parameter.normal_(std=0.05, generator=generator)
    path = tmp_path_factory.mktemp(f"{name}-{selection[0]}") / "patched.onnx"
    report = exported(patched, path)
    return f"{name} {selection}", operators, optimized_operators(path), report, patched


def last_clip(name: str) -> dict[str, int]:
    """The last ReLU6 before the pooling, which no convolution reads: a pass over 2 x 2 pixels."""
    return {"Clip": 1} if name.startswith("efficientnet_lite0 ") else {}


def test_no_pass_over_an_activation_is_added(pair: Any) -> None:
    name, before, after, _, _ = pair
    stray = {kind: after[kind] - before[kind] for kind in COSTLY if after[kind] > before[kind]}
    if RUNTIME_1_23 and last_clip(name):  # it leaves its layout for some additions
        stray = {kind: count for kind, count in stray.items() if not kind.startswith("Reorder")}
    assert stray in ({}, last_clip(name))


def test_every_addition_is_a_convolutions_or_was_there_before(pair: Any) -> None:
    """Branches that were not carried are convolutions of their own, and nothing else is new."""
    name, before, after, report, _ = pair
    added = {kind for kind in after if after[kind] > before[kind]}
    # One Expand of the coordinates to the batch for each size, and what computes the batch.
    harmless = {"Expand", "Shape", "Slice", "Gather", "Concat", "Unsqueeze", "Reshape", "Cast"}
    if RUNTIME_1_23 and last_clip(name):
        harmless |= {"ReorderInput", "ReorderOutput"}
    assert added <= {"Conv", "HardSigmoid", *last_clip(name), *harmless}
    assert after["Conv"] - before["Conv"] <= len(report.lowerings)


def test_the_file_computes_the_patched_model(pair: Any) -> None:
    _, _, _, report, patched = pair
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    session = ort.InferenceSession(str(report.path), providers=CPU)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = patched.double()(x.double()).numpy()
        plain = ccp.unpatch(patched, discard=True)(x.double()).numpy()
        patched.float()
    assert_close([actual], [expected], 1e-4)
    assert abs(expected - plain).max() > 1e-2 * abs(plain).max()


def test_the_file_is_valid_and_hardly_larger(pair: Any) -> None:
    _, _, _, report, _ = pair
    onnx.checker.check_model(onnx.load(report.path), full_check=True)
    assert report.coord_constant_bytes < 0.01 * report.file_size
