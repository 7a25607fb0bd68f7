"""What the docstrings show runs."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import nn

import coordconv_patch as ccp


@pytest.mark.parametrize("thing", [ccp.PlacedTransform, ccp.places_in_turn])
def test_the_examples_of_docstrings_run(thing: Any) -> None:
    values = {"torch": torch, "coordconv_patch": ccp, "PlacedTransform": ccp.PlacedTransform}
    values["model"] = ccp.patch(nn.Conv2d(3, 4, 3, padding=1))
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, "example", globs=values)
    assert example.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert results.failed == 0
