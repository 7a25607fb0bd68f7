"""Example inputs: how they are taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.running.inputs import split_inputs, takes_image_list

IMAGE = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (([IMAGE],), True),
        ([IMAGE], True),
        (((IMAGE, IMAGE), {"flag": True}), True),
        (IMAGE, False),
        ((IMAGE, IMAGE), False),
        ((), False),
        (({"images": [IMAGE]},), False),
    ],
    ids=["tuple", "bare", "keywords", "tensor", "two", "nothing", "keywords alone"],
)
def test_a_list_of_images_is_told_from_a_batch(example: Any, expected: bool) -> None:
    assert takes_image_list(example) is expected


def test_a_dict_at_the_end_is_keyword_arguments() -> None:
    args, kwargs = split_inputs((IMAGE, {"scale": 2}))
    assert args == (IMAGE,)
    assert kwargs == {"scale": 2}


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, path: ccp.fold(model),
        lambda model, x, path: ccp.fold_with(model, lambda plain: plain),
        lambda model, x, path: ccp.import_coordconv(model, x),
        lambda model, x, path: ccp.export_onnx(model, path, x),
    ],
    ids=["fold", "fold_with", "import_coordconv", "export_onnx"],
)
def test_a_model_without_values_is_refused(call: Any, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = ccp.patch(plain, "all").to("meta")
    with pytest.raises(ccp.PatchError, match=r"0\.weight is on the meta device"):
        call(model, torch.zeros(1, 3, 8, 8, device="meta"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
