"""Example inputs: how they are taken apart."""

from __future__ import annotations

import collections
import threading
from typing import Any

import pytest
import torch

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
