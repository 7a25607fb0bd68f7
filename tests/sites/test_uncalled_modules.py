"""Convolution modules whose weight other code convolves with, while nobody calls them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import coordconv_patch as ccp


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.conv2d(x, self.c.weight, self.c.bias, padding=1))


class ByForward(ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c.forward(x))


X = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("example_inputs", [None, X])
@pytest.mark.parametrize("kind", [ByFunction, ByForward])
@pytest.mark.parametrize("where", ["c", "c.weight", "first", "re:c"])
def test_the_function_is_what_a_name_means(where: str, kind: Any, example_inputs: Any) -> None:
    plain = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Any = ccp.patch(plain, where, example_inputs=example_inputs)
    assert torch.equal(model(X), plain(X))
    (weight,) = ccp.coord_parameters(model)
    with torch.no_grad():
        weight.normal_()
    grid = reference.paper_grid((6, 7)).to(X)[None].expand(2, -1, -1, -1)
    joined = torch.cat((plain.c.weight, weight), 1)
    first = F.conv2d(torch.cat((X, grid), 1), joined, plain.c.bias, padding=1)
    torch.testing.assert_close(model(X), plain.last(first))


@pytest.mark.parametrize("example_inputs", [None, X])
@pytest.mark.parametrize("kind", [ByFunction, ByForward])
def test_there_is_one_coordinate_weight_a_convolution(kind: Any, example_inputs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ccp.patch(kind(), "all", example_inputs=example_inputs)
    assert len(ccp.coord_parameters(model)) == 2
    rows = ccp.plan(kind(), "all", example_inputs=example_inputs).rows
    assert [row.site.name for row in rows] == ["c.weight", "last"]
    assert rows[0].site.names == ("c.weight", "c")


def test_files_are_loaded_by_what_they_name(tmp_path: Path) -> None:
    plain = ByFunction()
    model: Any = ccp.patch(plain, "c")
    with torch.no_grad():
        ccp.coord_parameters(model)[0].normal_()
    file = ccp.save_coords(model, tmp_path / "coords.safetensors")
    assert torch.equal(ccp.load_coords(plain, file)(X), model(X))


def test_graphs_too() -> None:
    graph = fx.symbolic_trace(ByFunction())
    model = ccp.patch(graph, "c")
    assert len(ccp.coord_parameters(model)) == 1
    assert torch.equal(model(X), graph(X))
    ccp.coord_parameters(model)[0].data.normal_()
    assert not torch.equal(model(X), graph(X))


def test_a_module_that_is_called_as_well_is_another_site() -> None:
    class Both(ByFunction):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) + F.conv2d(x, self.c.weight, padding=1)

    for example_inputs in (None, X):
        names = {
            row.site.name for row in ccp.plan(Both(), "all", example_inputs=example_inputs).rows
        }
        assert names == {"c", "c.weight", "last"}


def test_a_module_stays_where_the_function_cannot_have_coordinates() -> None:
    class Merging(ByFunction):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.conv2d(torch.ones(1, 3, 6, 7), self.c.weight) + x.mean())

    with pytest.warns(UserWarning, match="never run on the example inputs: c"):
        ccp.patch(Merging(), "c", example_inputs=X)
