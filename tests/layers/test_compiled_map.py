"""Compiled inference of one image: maps summed from lines are those of the convolution."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from old_torch import IS_2_6, STRICT
from timm.layers import Conv2dSame
from torch import Tensor, fx, nn
from torch.func import functional_call, stack_module_state, vmap

from coordconv_patch import (
    Axes,
    ChannelBlock,
    CoordConv2d,
    Coordinates,
    Window,
    __version__,
    patch,
    register_channel_block,
)
from coordconv_patch.channels import registry
from coordconv_patch.layers import compiled_map

CONVS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "not padded": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "stride beyond the kernel": {"kernel_size": (2, 3), "padding": (1, 0), "stride": (4, 3)},
    "dilation": {"kernel_size": (3, 5), "padding": (4, 2), "dilation": (3, 2), "stride": (1, 2)},
    "one axis": {"kernel_size": (1, 7), "padding": (0, 3)},
    "padding beyond the kernel": {"kernel_size": 3, "padding": (4, 5)},
    "same, even": {"kernel_size": (4, 2), "padding": "same"},
    "groups": {"kernel_size": 5, "padding": 2, "groups": 3},
}
SIZES = [(11, 14), (5, 8), (6, 5), (7, 16)]
"""One of whole vectors of 16 columns, which is summed otherwise."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows with every map that is computed from lines, by compiled code too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    seen: list[int] = []
    original = compiled_map.map_by_lines

    def counted(*args: Any) -> Tensor:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr("coordconv_patch.layers.compiled_map.map_by_lines", counted)
    yield seen
    torch._dynamo.reset()


def compiled(module: nn.Module, **arguments: Any) -> Any:
    return torch.compile(module, backend="eager", fullgraph=True, **arguments)


def expected(layer: Any, x: Tensor, **coords: Any) -> Tensor:
    return reference.concatenating_conv(
        x,
        reference.paper_grid(x.shape[-2:], **coords),
        layer.weight,
        layer.coord_weight,
        layer.bias,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


CONVENTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "edges": {"align_corners": False, "order": "yx", "value_range": (0.0, 3.0)},
    "fourier": {"fourier": 2},
}


@pytest.mark.parametrize(
    ("name", "convention"),
    # Compilation takes seconds: every convolution, and every convention, not every pair.
    [*((name, "paper") for name in CONVS), ("dilation", "edges"), ("groups", "fourier")],
)
def test_lines_give_the_map_of_the_convolution(
    name: str, convention: str, calls: list[int]
) -> None:
    coords = CONVENTIONS[convention]
    layer = CoordConv2d(3, 6, **CONVS[name], coords=Coordinates(**coords))
    quick = compiled(layer, dynamic=False)
    for is_trained in (False, True):
        if is_trained:
            nn.init.normal_(layer.coord_weight)
        for size in SIZES:
            x = torch.randn(1, 3, *size)
            with torch.no_grad():
                torch.testing.assert_close(
                    quick(x), expected(layer, x, **coords), rtol=1e-5, atol=2e-5
                )
    assert bool(calls) != IS_2_6  # which convolves


def test_zero_weights_leave_every_bit(calls: list[int]) -> None:
    layer = CoordConv2d(3, 6, 3, padding=1)
    plain = nn.Conv2d(3, 6, 3, padding=1)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.equal(compiled(layer)(x), plain(x))
    assert bool(calls) != IS_2_6  # which convolves


def test_lines_follow_windows_paddings_and_unbatched_inputs(calls: list[int]) -> None:
    window = Coordinates(window=Window(image_size=(40, 30), offset=(4, 7), size=(11, 14)))
    tensorflow = patch(
        nn.Sequential(Conv2dSame(3, 4, 3, 2)), "all", example_inputs=torch.zeros(1, 3, 8, 8)
    )
    layer = CoordConv2d(3, 4, 3, padding=1, coords=window)
    for module in (layer, *tensorflow):
        nn.init.normal_(module.coord_weight)
        for size in [(11, 14), (8, 9)]:
            for shape in [(1, 3, *size), (3, *size)]:
                x = torch.randn(shape)
                if len(shape) == 3 and module is not layer:
                    continue  # TensorFlow's padding is for batches
                with torch.no_grad():
                    torch.testing.assert_close(compiled(module)(x), module(x), rtol=1e-5, atol=2e-5)
    assert len(calls) >= 4 or IS_2_6


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, stride=(1, 2))


def test_lines_lie_where_the_weight_does_whatever_the_default_device(calls: list[int]) -> None:
    layer = CoordConv2d(3, 4, 3, padding=1)
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(1, 3, 9, 7)
    with torch.no_grad():
        wanted = layer(x)
        with torch.device("meta"):
            found = compiled(layer)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert bool(calls) != IS_2_6  # which convolves


def test_functional_convolutions_too(calls: list[int]) -> None:
    patched = patch(Functional(), "all")
    branch = patched.get_submodule("weight_coord_branch")
    nn.init.normal_(branch.coord_weight)
    x = torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        found = compiled(patched)(x)
    grid = reference.paper_grid((9, 8))
    wanted = reference.concatenating_conv(
        x,
        grid,
        patched.weight,
        branch.coord_weight,
        None,
        stride=(1, 2),
        padding=(1, 1),
        dilation=(1, 1),
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert bool(calls) != IS_2_6  # which convolves


def test_one_compilation_serves_many_sizes() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = CoordConv2d(3, 6, 3, padding=1, stride=2)
    nn.init.normal_(layer.coord_weight)
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    quick = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for size in [(11, 14), (5, 8), (6, 5), (20, 31)]:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(quick(x), expected(layer, x), rtol=1e-5, atol=2e-5)
    assert len(graphs) == 1
    convolutions = sum(node.target is torch.conv2d for node in graphs[0].graph.nodes)
    assert convolutions == 1 + IS_2_6


def test_attributes_that_change_after_compilation_are_followed(calls: list[int]) -> None:
    layer = CoordConv2d(3, 4, 3, padding=1)
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(1, 3, 9, 7)
    quick = compiled(layer)
    changes: list[dict[str, Any]] = [
        {},
        {"stride": (2, 1)},
        {"padding": 2, "dilation": (2, 2)},
        {"coords": Coordinates(align_corners=False)},
        {"padding_mode": "reflect"},
        {"padding_mode": "zeros"},
    ]
    for change in changes:
        for name, value in change.items():
            setattr(layer, name, value)
        before = len(calls)
        with torch.no_grad():
            torch.testing.assert_close(quick(x), layer(x), rtol=1e-5, atol=2e-5)
        assert (len(calls) > before) == (layer.padding_mode == "zeros" and not IS_2_6)
    bare = copy.deepcopy(layer)
    del bare.__dict__["_made_from"]  # pickled by an older version
    with torch.no_grad():
        torch.testing.assert_close(compiled(bare)(x), layer(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("strict", STRICT)
def test_exported_programs_need_no_operator_of_this_package(strict: bool) -> None:
    layer = CoordConv2d(3, 4, 3)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(1, 3, 9, 7),), strict=strict)
    assert "coordconv_patch" not in str(program.graph)


def test_vmapped_models_compute_each_its_own_map(calls: list[int]) -> None:
    layers = [CoordConv2d(3, 4, 3, padding=1) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.coord_weight)
    parameters, buffers = stack_module_state(layers)

    def run(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,))

    x = torch.randn(1, 3, 9, 7)
    every = torch.compile(vmap(run, in_dims=(0, 0, None)), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wanted = torch.stack([layer(x) for layer in layers])
        torch.testing.assert_close(every(parameters, buffers, x), wanted, rtol=1e-5, atol=2e-5)
    assert bool(calls) != IS_2_6


def test_what_inductor_keeps_on_the_disk_is_of_this_version_and_formula() -> None:
    # The cache's key is the operator and its arguments, not the Python behind it.
    layer = CoordConv2d(3, 4, 3)
    if IS_2_6:
        assert not layer._made_from
        return
    assert json.loads(layer._made_from)[0].startswith(f"{__version__}, ")


@dataclass(frozen=True)
class Stripes(ChannelBlock):
    """Separable, and somebody's own code."""

    kind = "stripes"

    def names(self, ndim: int) -> tuple[str, ...]:
        return ("stripes",)

    def dims(self, ndim: int) -> list[int | None]:
        return [ndim - 1]

    def values(self, positions: Any) -> list[Tensor]:
        return [positions[-1][0] % 2]


def test_blocks_of_others_are_convolved_for_their_code_may_change(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BLOCKS", dict(registry.BLOCKS))
    register_channel_block(Stripes)
    layer = CoordConv2d(3, 4, 3, coords=Coordinates(channels=(Axes("x"), Stripes())))
    assert layer.coords.is_separable(2)
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(1, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert not calls


def test_the_package_can_be_imported_a_second_time() -> None:
    code = (
        "import sys, torch, coordconv_patch\n"
        "first = coordconv_patch.CoordConv2d(3, 4, 3)\n"
        "for name in [name for name in sys.modules if name.startswith('coordconv_patch')]:\n"
        "    del sys.modules[name]\n"
        "import coordconv_patch\n"
        "x = torch.ones(1, 3, 5, 5)\n"
        "for layer in (first, coordconv_patch.CoordConv2d(3, 4, 3)):\n"
        "    with torch.no_grad():\n"
        "        torch.nn.init.ones_(layer.coord_weight)\n"
        "        torch._dynamo.reset()\n"
        "        quick = torch.compile(layer, backend='eager', fullgraph=True)\n"
        "        torch.testing.assert_close(quick(x), layer(x))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CoordConv2d(3, 4, 1),
        lambda: CoordConv2d(3, 4, 3, coords=Coordinates(radius=True)),
        lambda: CoordConv2d(3, 4, 3, padding=1, padding_mode="circular"),
        lambda: CoordConv2d(3, 4, 3).double(),
    ],
    ids=["1x1", "radius", "circular", "float64"],
)
def test_others_are_convolved(make: Any, calls: list[int]) -> None:
    layer = make()
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(1, 3, 9, 7, dtype=layer.weight.dtype)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert not calls


def test_training_and_batches_are_convolved(calls: list[int]) -> None:
    layer = CoordConv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(compiled(layer)(x[:1]), layer(x[:1]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert not calls
