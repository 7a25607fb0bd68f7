"""Conversions by torch: TorchScript, MKLDNN, and function modes that draw graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.mkldnn import to_mkldnn

import coordconv_patch as ccp
from coordconv_patch.errors import CoordConvPatchError, ExportError, PatchError, first_line

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def patched(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "layer":
        model = ccp.patch(nn.Sequential(block(), nn.Conv2d(4, 2, 1)), "0.0")
    elif kind == "function":
        model = ccp.patch(nn.Sequential(Functional(), nn.ReLU()), "all")
    elif kind == "graph":
        model = ccp.patch(fx.symbolic_trace(Functional()), "all")
    else:
        model = ccp.patch(Twice(), "conv@1", example_inputs=X)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_()
    return model.eval()


KINDS = ("layer", "function", "graph", "calls")
SITES = {"layer": "'0.0'", "function": "coord", "graph": "coord", "calls": "'conv.coord_branch'"}


@pytest.mark.parametrize("kind", KINDS)
def test_scripting_is_refused_by_name_with_advice(kind: str) -> None:
    model = patched(kind)
    want = model(X)
    for each in (model, nn.Sequential(model), ccp.fold(model)):
        with pytest.raises(PatchError, match=r"torch\.jit\.script cannot compile") as caught:
            torch.jit.script(each)
        assert SITES[kind].strip("'") in str(caught.value)
        assert "torch.jit.trace(coordconv_patch.fold(model), example)" in str(caught.value)
    assert torch.equal(model(X), want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_advice_says_works(kind: str) -> None:
    model = patched(kind)
    other = torch.flip(X, (0, 3))
    for each in (model, ccp.fold(model)):
        traced = torch.jit.trace(each, X)
        torch.testing.assert_close(traced(other), model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "calls"])
def test_an_unpatched_model_can_be_scripted_again(kind: str) -> None:
    unpatched = ccp.unpatch(patched(kind), discard=True)
    torch.testing.assert_close(torch.jit.script(unpatched)(X), unpatched(X))


def test_a_layer_by_itself_is_refused_by_its_class() -> None:
    with pytest.raises(PatchError, match="cannot compile the coordinate layer CoordConv1d"):
        torch.jit.script(ccp.CoordConv1d(2, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_to_mkldnn_never_drops_coordinates(kind: str) -> None:
    with pytest.raises(PatchError, match="to_mkldnn would leave the coordinates of"):
        to_mkldnn(patched(kind))


@pytest.mark.parametrize("kind", ["layer", "function", "graph", "calls"])
def test_mkldnn_inputs_give_what_dense_ones_give(kind: str) -> None:
    model = patched(kind)
    with torch.no_grad():
        want = model(X)
        for _ in range(2):
            found = model(X.to_mkldnn())
            assert found.layout is torch._mkldnn
            torch.testing.assert_close(found.to_dense(), want, rtol=1e-5, atol=1e-5)


def test_mkldnn_inputs_see_the_grid() -> None:
    layer = ccp.CoordConv2d(3, 4, 3)
    nn.init.normal_(layer.coord_weight)
    grid = reference.paper_grid((8, 8)).to(X)[None].expand(2, -1, -1, -1)
    weight = torch.cat((layer.weight, layer.coord_weight), dim=1)
    want = F.conv2d(torch.cat((X, grid), dim=1), weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(X.to_mkldnn()).to_dense(), want, rtol=1e-5, atol=1e-5)


def test_children_are_listed_for_everybody_else() -> None:
    assert list(patched("layer")[0][0].children()) == []  # type: ignore[index]
    assert [name for name, _ in patched("calls").conv.named_children()] == ["coord_branch"]  # type: ignore[union-attr]


# --- function modes -------------------------------------------------------------------------------


class Drawing(TorchFunctionMode):
    """Lists the functions that are called, as NNCF does, which names them by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.called.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("warm", [False, True])
def test_a_function_mode_sees_the_same_functions_at_every_call(warm: bool) -> None:
    model = patched("layer")
    if warm:
        model(X)
    seen = []
    for _ in range(3):
        with Drawing() as drawing:
            model(X)
        seen.append(drawing.called)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0].count("conv2d") == 3


@torch.no_grad()
def test_a_default_device_leaves_the_kept_maps_alone() -> None:
    layer = patched("layer")[0][0]  # type: ignore[index]
    with torch.device("cpu"):
        layer(X)
    assert len(layer._map_cache) == 1


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (AssertionError(), "AssertionError"),
        (ValueError(""), "ValueError"),
        (ValueError("\n\n"), "ValueError"),
        (ValueError("\n first \nsecond"), "ValueError: first"),
        (RuntimeError("\x1b[31mred\x1b[0m\nmore"), "RuntimeError: red"),
        (KeyError("x" * 300), "KeyError: '" + "x" * 199),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


class Asserts(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.conv, self.error = nn.Conv2d(3, 4, 3), error

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise self.error
        return self.conv(x)


@pytest.mark.parametrize("error", [AssertionError(), ValueError("\n"), KeyError(), StopIteration()])
def test_an_error_without_a_message_is_no_crash(error: Exception, tmp_path: Any) -> None:
    model = Asserts(error)
    patched = ccp.patch(model, "all")
    assert torch.equal(patched(X), model(X))
    assert "traced regions" in ccp.plan(model, "all").summary()
    with pytest.raises(CoordConvPatchError, match=type(error).__name__):
        ccp.patch(model, "first")
    report = ccp.export_onnx(patched, tmp_path / "a.onnx", X, providers=["CPUExecutionProvider"])
    assert report.worst_difference < 1e-5


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def test_a_model_that_fails_without_a_message_is_told_by_its_class(tmp_path: Any) -> None:
    with pytest.raises(PatchError, match="AssertionError"):
        ccp.patch(Fails(), "all", example_inputs=X)
    with pytest.raises((ExportError, PatchError), match="AssertionError"):
        ccp.export_onnx(ccp.patch(Fails(), "all"), tmp_path / "a.onnx", X)
