"""Example inputs: how they are taken apart."""

from __future__ import annotations

import collections
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.running.inputs import split_inputs, takes_image_list, writable_inputs

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


def test_writable_inputs_are_copies_that_keep_what_they_are() -> None:
    image = torch.zeros(2, requires_grad=True)
    computed = image * 2
    module, lock = torch.nn.ReLU(), threading.Lock()
    given = ([image, image], {"a": computed, "b": module}, lock, collections.deque([image]))
    (first, second), named, same_lock, (third,) = writable_inputs(given)
    assert first is second is third is not image
    assert first.requires_grad
    assert named["a"] is not computed
    assert named["a"].is_leaf
    assert named["b"] is module
    assert same_lock is lock


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
