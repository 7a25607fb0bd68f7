"""Version counters, of tensors that have none too."""

from __future__ import annotations

import torch

from coordconv_patch.running.version_counters import version_of, versions_of


def test_a_change_in_place_shows() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) == versions_of([tensor])[0] == before + 1


def test_inference_tensors_have_an_answer() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(2)
    before = version_of(tensor)
    with torch.inference_mode():
        tensor.add_(1)
    assert version_of(tensor) == before
    assert versions_of([torch.zeros(2), None, tensor]) == [0, before, before]
