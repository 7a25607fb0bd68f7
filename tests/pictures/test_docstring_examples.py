"""What the docstrings of transforms show runs, and what older versions lack is said."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import coordconv_patch as ccp
from coordconv_patch.errors import MissingPackageError


def test_the_example_of_placed_transform_runs() -> None:
    run_example(ccp.PlacedTransform)


def test_the_example_of_places_in_turn_runs() -> None:
    run_example(ccp.places_in_turn)


def test_a_torchvision_without_key_points_is_refused_by_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(tv_tensors, "KeyPoints", raising=False)  # 0.22 has none
    with pytest.raises(MissingPackageError, match=r"torchvision \S+ moves no points.*0\.23"):
        ccp.PlacedTransform(v2.CenterCrop(32))


def run_example(thing: Any) -> None:
    values = {"torch": torch, "coordconv_patch": ccp, "PlacedTransform": ccp.PlacedTransform}
    values["model"] = ccp.patch(nn.Conv2d(3, 4, 3, padding=1))
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, "example", globs=values)
    assert example.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert results.failed == 0
