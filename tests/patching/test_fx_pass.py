"""CoordConvPass: the rewrite in a torch.fx PassManager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError, SelectionError
from coordconv_patch.patching.fx_pass import CoordConvPass


class Mixed(nn.Module):
    """One convolution module and one functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x).relu(), self.kernel, stride=2)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 9, 12)


def test_pass_patches_the_graph_module_in_place(x: Tensor) -> None:
    graph_module = fx.symbolic_trace(Mixed())
    before = graph_module(x)
    result = CoordConvPass("all")(graph_module)
    assert result.graph_module is graph_module
    assert result.modified is True
    assert len(ccp.coord_parameters(graph_module)) == 2
    assert torch.equal(graph_module(x), before)


def test_second_run_modifies_nothing() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    CoordConvPass("all")(graph_module)
    weights = ccp.coord_parameters(graph_module)
    code = graph_module.code
    result = CoordConvPass("all")(graph_module)
    assert result == PassResult(graph_module, False)
    assert graph_module.code == code
    assert all(a is b for a, b in zip(ccp.coord_parameters(graph_module), weights, strict=True))


@pytest.mark.parametrize("where", ["first", "conv", ["conv", "kernel"], "re:.*", nn.Conv2d])
def test_second_run_modifies_nothing_whatever_the_selector(where: object) -> None:
    graph_module = fx.symbolic_trace(Mixed())
    assert CoordConvPass(where)(graph_module).modified is True
    assert CoordConvPass(where)(graph_module).modified is False


def test_pass_patches_what_an_earlier_one_left() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    CoordConvPass("first")(graph_module)
    first = ccp.coord_parameters(graph_module)
    assert CoordConvPass("all")(graph_module).modified is True
    both = ccp.coord_parameters(graph_module)
    assert len(both) == 2
    assert both[0] is first[0]


def test_pass_runs_in_a_pass_manager_until_nothing_changes(x: Tensor) -> None:
    runs: list[bool] = []

    class Counted(CoordConvPass):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            result = super().call(graph_module)
            runs.append(result.modified)
            return result

    graph_module = fx.symbolic_trace(Mixed())
    expected = graph_module(x)
    manager = PassManager(passes=[Counted("all")], steps=5, run_checks_after_each_pass=True)
    result = manager(graph_module)
    assert runs == [True, False]
    assert result.modified is True
    assert torch.equal(result.graph_module(x), expected)


def test_pass_takes_the_convention() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    CoordConvPass("all", coords=ccp.Coordinates(radius=True))(graph_module)
    assert [weight.shape[1] for weight in ccp.coord_parameters(graph_module)] == [3, 3]


def test_another_convention_on_a_patched_site_is_refused() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    CoordConvPass("conv")(graph_module)
    with pytest.raises(PatchError, match=r"conv has coordinates \(x, y\) already, not \(x, y, r\)"):
        CoordConvPass("all", coords=ccp.Coordinates(radius=True))(graph_module)
    assert len(ccp.coord_parameters(graph_module)) == 1


def test_window_of_a_patched_site_is_no_other_convention() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    CoordConvPass("all")(graph_module)
    ccp.set_window_(graph_module, ccp.Window((0, 0), (4, 4), (8, 8)))
    assert CoordConvPass("all")(graph_module).modified is False


def test_pass_refuses_what_is_no_graph_module() -> None:
    with pytest.raises(PatchError, match="GraphModule, not on Mixed: use patch_"):
        CoordConvPass("all")(Mixed())


def test_selector_that_matches_nothing_is_an_error() -> None:
    graph_module = fx.symbolic_trace(Mixed())
    with pytest.raises(SelectionError, match="close names: conv"):
        CoordConvPass("convv")(graph_module)


def test_pass_works_on_the_graph_of_an_exported_program(x: Tensor) -> None:
    model = Mixed()
    exported = torch.export.export(model, (x,)).module()
    assert isinstance(exported, fx.GraphModule)
    assert CoordConvPass(example_inputs=x)(exported).modified is True
    assert torch.equal(exported(x), model(x))
    assert CoordConvPass(example_inputs=x)(exported).modified is False
