"""What a pickle of a watched model tells, and what it leaves as it is."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import coordconv_patch as ccp

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained() -> Any:
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(inner)).eval()
    patched = ccp.patch(model, "all")
    with torch.no_grad():
        for weight in ccp.coord_parameters(patched):
            weight.normal_(generator=torch.Generator().manual_seed(1))
        patched(IMAGES)
    return patched


class Noting(pickle.Pickler):
    """Notes the memory of the tensors that it pickled."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.memory: list[StorageWeakRef] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.memory.append(StorageWeakRef(value.untyped_storage()))
        return NotImplemented


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda model: None,
    "a training": lambda model: model.train() and model[0].weight.add_(1),
    "a plain convolution changed": lambda model: model[2][0][0].weight.mul_(2),
    "a weight scaled through .data": lambda model: model[0].weight.data.mul_(2),
    "another head": lambda model: setattr(model, "2", nn.Conv2d(8, 2, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_pickled_lives_on(change: str) -> None:
    """A spawned process is started with the open files of the tensors' shared memory."""
    model = trained()
    with torch.no_grad():
        CHANGES[change](model)
    pickler = Noting(io.BytesIO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickler.dump(model)
    pickler.clear_memo()  # which kept them alive
    assert pickler.memory
    assert not any(memory.expired() for memory in pickler.memory)


def test_layers_that_are_gone_are_not_pickled() -> None:
    model = trained()
    before = len(pickle.dumps(model))
    model[2] = nn.Identity()
    assert len(pickle.dumps(model)) < before / 2
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_warning_comes_once_for_all_parts() -> None:
    model = trained()
    model[0].weight.data.mul_(2)
    model[2][0][1].weight.data.mul_(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pickle.dumps(model)
    assert len(caught) == 1
    assert "at 0 (by 2 to 2), 2.0.1 (by 2 to 2)" in str(caught[0].message)
    with pytest.warns(UserWarning, match=r"at 2\.0\.1 \(by"):  # of the part alone
        pickle.dumps(model[2])
