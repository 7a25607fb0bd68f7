from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import coordconv_patch as ccp
from coordconv_patch import CoordConv2d, Coordinates, Window
from coordconv_patch.errors import CoordConvPatchError, CoordinatesError
from coordconv_patch.layers.coordinates import _cached_grid
from coordconv_patch.layers.grid_cache import GridCache

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100)

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def conventions(draw: st.DrawFn) -> dict[str, Any]:
    radius = draw(st.booleans())
    return {
        "order": draw(st.sampled_from(["xy", "yx"])),
        "align_corners": draw(st.booleans()),
        "value_range": draw(st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])),
        "radius": radius,
        "radius_center": draw(st.sampled_from([None, 0.5])) if radius else None,
        "fourier": draw(st.integers(0, 2)),
    }


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _empty_grid_cache() -> None:
    _cached_grid.cache_clear()


def grid64(coords: Coordinates, *size: int) -> Tensor:
    return coords.grid(size, dtype=torch.float64)


class GridOf(nn.Module):
    """Returns the coordinate grid of its input, for capturing."""

    def __init__(self, coords: Coordinates, ndim: int = 2) -> None:
        super().__init__()
        self.coords = coords
        self.ndim = ndim

    def forward(self, input: Tensor) -> Tensor:
        grid = self.coords.grid(input.shape[-self.ndim :], device=input.device, dtype=input.dtype)
        return grid + input.sum() * 0


def exported_grid(coords: Coordinates, example: Tensor) -> nn.Module:
    """The grid by torch.export, H and W dynamic."""
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(GridOf(coords), (example,), dynamic_shapes=(sizes,))
    return program.module()


# --- values -------------------------------------------------------------------------------


@SETTINGS
@given(size=SIZES, fields=conventions())
def test_grid_equals_pixel_by_pixel_reference(
    size: tuple[int, ...], fields: dict[str, Any]
) -> None:
    coords = Coordinates(**fields)
    grid = coords.grid(size, dtype=torch.float64)
    expected = reference.paper_grid(size, **fields)
    assert grid.shape == (coords.num_channels(len(size)), *size)
    torch.testing.assert_close(grid, expected, rtol=1e-13, atol=1e-13)


def test_default_is_x_along_width_then_y_along_height_from_minus_one_to_one() -> None:
    x, y = grid64(Coordinates(), 3, 5)
    assert x.tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0]] * 3
    assert y.tolist() == [[-1.0] * 5, [0.0] * 5, [1.0] * 5]


def test_x_and_y_are_divided_by_their_own_sizes_on_non_square_inputs() -> None:
    for height, width in ((4, 9), (9, 4), (2, 17)):
        x, y = grid64(Coordinates(), height, width)
        for channel in (x, y):
            assert channel.min() == -1
            assert channel.max() == 1
        np.testing.assert_allclose(x[0], np.linspace(-1, 1, width), rtol=0, atol=1e-15)
        np.testing.assert_allclose(y[:, 0], np.linspace(-1, 1, height), rtol=0, atol=1e-15)


@pytest.mark.parametrize("fields", [{}, {"align_corners": False}, {"value_range": (0.0, 10.0)}])
def test_radius_is_centred_on_the_image(fields: dict[str, Any]) -> None:
    x, y, r = grid64(Coordinates(radius=True, **fields), 5, 7)
    assert r[2, 3] == 0
    assert (r > 0).sum() == 5 * 7 - 1
    torch.testing.assert_close(r, r.flip(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(r, r.flip(1), rtol=0, atol=1e-14)
    middle = sum(fields.get("value_range", (-1, 1))) / 2
    torch.testing.assert_close(r, torch.hypot(x - middle, y - middle), rtol=0, atol=1e-14)


PRESETS = ["paper", "reference", "mkocabas", "solo", "paddledetection"]


@pytest.mark.parametrize("size", [(1,), (1, 1), (1, 6), (6, 1), (1, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_axis_of_one_pixel_gives_zero_not_nan(size: tuple[int, ...], align_corners: bool) -> None:
    grid = grid64(Coordinates(align_corners=align_corners, radius=True, fourier=1), *size)
    assert torch.isfinite(grid).all()
    for dim, length in enumerate(reversed(size)):
        assert length != 1 or torch.equal(grid[dim], torch.zeros(size, dtype=torch.float64))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_finite_on_one_pixel_axes(name: str) -> None:
    for size in ((1, 1), (1, 4), (4, 1)):
        assert torch.isfinite(grid64(Coordinates.preset(name), *size)).all()
    assert grid64(Coordinates.preset(name), 1, 1).tolist() == [[[0.0]], [[0.0]]]


def test_yx_order_reverses_the_axes_in_every_dimension() -> None:
    for size in ((4,), (3, 4), (2, 3, 4)):
        forwards = grid64(Coordinates(), *size)
        backwards = grid64(Coordinates(order="yx"), *size)
        assert torch.equal(backwards, forwards.flip(0))


def test_half_pixel_centres_follow_grid_sample() -> None:
    x, y = grid64(Coordinates(align_corners=False), 2, 4)
    assert x[0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert y[:, 0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("align_corners", [True, False])
def test_grid_sampled_by_its_own_coordinates_is_the_image(align_corners: bool) -> None:
    image = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    grid = grid64(Coordinates(align_corners=align_corners), 5, 7)
    sampled = nn.functional.grid_sample(
        image, grid.permute(1, 2, 0).unsqueeze(0), align_corners=align_corners
    )
    torch.testing.assert_close(sampled, image, rtol=0, atol=1e-12)


def test_value_range_sets_the_values_at_both_ends() -> None:
    x, y = grid64(Coordinates(value_range=(0, 1)), 3, 5)
    assert x[0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert y[:, 0].tolist() == [0.0, 0.5, 1.0]


def test_fourier_features_are_of_the_unit_position_whatever_the_value_range() -> None:
    coords = Coordinates(fourier=2, value_range=(0.0, 255.0))
    assert coords.channel_names(2) == (
        "x", "y", "sin(1πx)", "cos(1πx)", "sin(1πy)", "cos(1πy)",
        "sin(2πx)", "cos(2πx)", "sin(2πy)", "cos(2πy)",
    )  # fmt: skip
    grid = dict(zip(coords.channel_names(2), grid64(coords, 3, 5), strict=True))
    unit = torch.linspace(-1, 1, 5, dtype=torch.float64).expand(3, 5)
    torch.testing.assert_close(grid["sin(2πx)"], (2 * math.pi * unit).sin())
    torch.testing.assert_close(grid["cos(1πx)"], (math.pi * unit).cos())
    torch.testing.assert_close(grid["sin(1πy)"][2], torch.zeros(5, dtype=torch.float64))


def test_channel_names_and_counts() -> None:
    assert Coordinates().channel_names(1) == ("x",)
    assert Coordinates(radius=True).channel_names(2) == ("x", "y", "r")
    assert Coordinates(order="yx").channel_names(3) == ("z", "y", "x")
    for ndim in (1, 2, 3):
        for coords in (Coordinates(), Coordinates(radius=True, fourier=3)):
            assert coords.num_channels(ndim) == len(coords.channel_names(ndim))


# --- presets: what others ship ------------------------------------------------------------

NON_SQUARE = [(4, 7), (7, 4), (5, 5), (2, 3)]


@pytest.mark.parametrize("size", NON_SQUARE)
@pytest.mark.parametrize("radius", [False, True])
def test_preset_reference_is_the_released_code(size: tuple[int, int], radius: bool) -> None:
    grid = grid64(Coordinates.preset("reference", radius=radius), *size)
    expected = reference.released_reference_grid(*size, radius=radius)
    np.testing.assert_allclose(grid.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", NON_SQUARE)
@pytest.mark.parametrize("radius", [False, True])
def test_preset_mkocabas_is_row_first_with_r_from_one_half(
    size: tuple[int, int], radius: bool
) -> None:
    grid = grid64(Coordinates.preset("mkocabas", radius=radius), *size)
    expected = reference.mkocabas_grid(*size, radius=radius)
    np.testing.assert_allclose(grid.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", NON_SQUARE)
def test_preset_solo(size: tuple[int, int]) -> None:
    grid = grid64(Coordinates.preset("solo"), *size)
    np.testing.assert_allclose(grid.numpy(), reference.solo_grid(*size), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", NON_SQUARE)
def test_preset_paddledetection(size: tuple[int, int]) -> None:
    grid = grid64(Coordinates.preset("paddledetection"), *size)
    expected = reference.paddledetection_grid(*size)
    np.testing.assert_allclose(grid.numpy(), expected, rtol=0, atol=1e-13)


def test_preset_paper_is_the_default_and_differs_from_reference_only_off_square() -> None:
    assert Coordinates.preset("paper") == Coordinates() == Coordinates.of(None)
    released = Coordinates.preset("reference")
    assert torch.equal(grid64(released, 6, 6), grid64(Coordinates(), 6, 6))
    assert not torch.allclose(grid64(released, 6, 8), grid64(Coordinates(), 6, 8))


def test_swapped_sizes_of_a_volume_swap_height_and_width_and_keep_depth() -> None:
    x, y, z = grid64(Coordinates(swap_sizes=True), 2, 3, 5)
    assert x[0, 0].tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert y[0, :, 0].tolist() == [-1.0, -0.5, 0.0]
    assert z[:, 0, 0].tolist() == [-1.0, 1.0]


# --- windows ------------------------------------------------------------------------------


@st.composite
def tilings(draw: st.DrawFn) -> tuple[int, Window]:
    """A stride, and a window whose numbers are all multiples of it."""
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    offsets, sizes, images = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        size, before, after = (draw(st.integers(low, 4)) for low in (1, 0, 0))
        offsets.append(before * stride)
        sizes.append(size * stride)
        images.append((before + size + after) * stride)
    return stride, Window(tuple(offsets), tuple(sizes), tuple(images))


@SETTINGS
@given(tiling=tilings(), align_corners=st.booleans())
def test_grid_of_a_tile_is_the_slice_of_the_whole_grid(
    tiling: tuple[int, Window], align_corners: bool
) -> None:
    stride, window = tiling
    whole = Coordinates(radius=True, fourier=1, align_corners=align_corners)
    tile = dataclasses.replace(whole, window=window)
    full_grid = grid64(whole, *(length // stride for length in window.image_size))
    slices = [slice(None)]
    for offset, size in zip(window.offset, window.size, strict=True):
        slices.append(slice(offset // stride, (offset + size) // stride))
    tile_grid = grid64(tile, *(length // stride for length in window.size))
    torch.testing.assert_close(tile_grid, full_grid[tuple(slices)], rtol=0, atol=1e-13)


def test_window_of_the_whole_image_changes_nothing() -> None:
    whole = Window(offset=(0, 0), size=(32, 48), image_size=(32, 48))
    for size in ((32, 48), (16, 24), (5, 7)):
        assert torch.equal(grid64(Coordinates(window=whole), *size), grid64(Coordinates(), *size))


# --- dtypes, modes, capture ---------------------------------------------------------------

ODD = Coordinates(radius=True, fourier=2, value_range=(-0.3, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coords", [Coordinates(), ODD], ids=["default", "odd"])
def test_grid_is_computed_in_float64_then_rounded_once(
    coords: Coordinates, dtype: torch.dtype
) -> None:
    grid = coords.grid((37, 301), dtype=dtype)
    assert grid.dtype == dtype
    assert torch.equal(grid, grid64(coords, 37, 301).to(dtype))


def test_half_precision_grids_keep_neighbours_apart_as_well_as_the_dtype_can() -> None:
    exact = reference.paper_grid((1, 300))[0]
    for dtype in (torch.bfloat16, torch.float16):
        grid = Coordinates().grid((1, 300), dtype=dtype)[0]
        assert ((grid.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2).all()


def test_grid_takes_torchs_default_dtype_and_device() -> None:
    assert Coordinates().grid((2, 3)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert Coordinates().grid((2, 3)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert Coordinates().grid((2, 3)).device.type == "meta"
    assert Coordinates().grid((2, 3)).device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_default_grid_has_the_bits_of_the_eager_one(dtype: torch.dtype) -> None:
    exported = exported_grid(Coordinates(), torch.zeros(5, 7, dtype=dtype))
    for height, width in [(2, n) for n in range(2, 260)] + [(1000, 3), (1333, 800)]:
        grid = exported(torch.zeros(height, width, dtype=dtype))
        assert torch.equal(grid, Coordinates().grid((height, width), dtype=dtype))


CAPTURED = {
    "default": Coordinates(),
    "yx": Coordinates(order="yx"),
    "half pixel": Coordinates(align_corners=False),
    "range": Coordinates(value_range=(0.0, 3.0)),
    "radius": Coordinates(radius=True),
    "fourier": Coordinates(fourier=2),
    "window": Coordinates(window=Window((2, 6), (8, 12), (24, 32))),
    "half-pixel window": Coordinates(align_corners=False, window=Window((2, 6), (8, 12), (24, 32))),
    "reference": Coordinates.preset("reference", radius=True),
    "mkocabas": Coordinates.preset("mkocabas", radius=True),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_exported_grid_follows_the_size(name: str) -> None:
    coords = CAPTURED[name]
    exported = exported_grid(coords, torch.zeros(5, 7))
    for size in ((5, 7), (8, 12), (3, 16), (17, 2)):
        torch.testing.assert_close(
            exported(torch.zeros(size)), coords.grid(size), rtol=0, atol=3e-6
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CAPTURED)
def test_traced_grid_follows_the_size(name: str) -> None:
    coords = CAPTURED[name]
    traced = torch.jit.trace(GridOf(coords), torch.zeros(5, 7))
    for size in ((5, 7), (8, 12), (3, 16), (1, 9), (17, 1), (1, 1)):
        torch.testing.assert_close(traced(torch.zeros(size)), coords.grid(size), rtol=0, atol=3e-6)


@pytest.mark.filterwarnings("ignore")
def test_y_is_not_x_after_capture() -> None:
    example = torch.zeros(6, 6)
    graphs = {
        "trace": torch.jit.trace(GridOf(Coordinates()), example),
        "export": exported_grid(Coordinates(), example),
        "static export": torch.export.export(GridOf(Coordinates()), (example,)).module(),
    }
    for name, graph in graphs.items():
        x, y = graph(example)
        assert torch.equal(x, y.t()), name
        assert not torch.equal(x, y), name
        np.testing.assert_allclose(x[3], np.linspace(-1, 1, 6), rtol=0, atol=1e-7, err_msg=name)


def test_grid_made_in_inference_mode_can_train_later() -> None:
    with torch.inference_mode():
        first = Coordinates().grid((4, 6))
    assert not first.is_inference()
    weight = torch.ones(2, 4, 6, requires_grad=True)
    (weight * Coordinates().grid((4, 6))).sum().backward()
    assert torch.equal(weight.grad, Coordinates().grid((4, 6)))


def test_grid_made_under_fake_tensors_does_not_reach_later_calls() -> None:
    with FakeTensorMode():
        assert isinstance(Coordinates().grid((4, 6)), FakeTensor)
    grid = grid64(Coordinates(), 4, 6)
    assert type(grid) is Tensor
    torch.testing.assert_close(grid, reference.paper_grid((4, 6)))
    with FakeTensorMode():  # nor does a kept real grid reach the fake world
        assert isinstance(Coordinates().grid((4, 6), dtype=torch.float64), FakeTensor)


@pytest.mark.parametrize("transform", ["grad", "jvp", "functionalize"])
def test_grid_made_under_a_function_transform_does_not_reach_later_calls(transform: str) -> None:
    def loss(x: Tensor) -> Tensor:
        return (x * Coordinates().grid((4, 6), dtype=x.dtype)).sum()

    x = torch.ones(2, 4, 6, dtype=torch.float64)
    if transform == "grad":
        torch.func.grad(loss)(x)
    elif transform == "jvp":
        torch.func.jvp(loss, (x,), (x,))
    else:
        torch.func.functionalize(loss)(x)
    grid = grid64(Coordinates(), 4, 6)
    np.testing.assert_allclose(grid.numpy(), reference.paper_grid((4, 6)).numpy(), atol=1e-14)
    assert torch.equal(copy.deepcopy(grid), grid)


def test_grid_ignores_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Coordinates(radius=True).grid((4, 6)).dtype == torch.float32


# --- the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_grid_is_the_callers_own(dtype: torch.dtype) -> None:
    coords = Coordinates(radius=True)
    expected = reference.paper_grid((3, 4), radius=True).to(dtype)
    for _ in range(2):  # once made, once kept
        grid = coords.grid((3, 4), dtype=dtype)
        torch.testing.assert_close(grid, expected)
        grid.zero_()
        grid.numpy(force=True).fill(7) if dtype is not torch.bfloat16 else grid.fill_(7)
    with torch.inference_mode():
        coords.grid((3, 4), dtype=dtype).fill_(7)
    torch.testing.assert_close(coords.grid((3, 4), dtype=dtype), expected)


def test_a_grid_that_was_written_to_leaves_patched_models_alone() -> None:
    conv = CoordConv2d(1, 2, 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.coord_weight.copy_(torch.eye(2)[:, :, None, None])
    Coordinates().grid((3, 4)).zero_()
    for layer in (conv, copy.deepcopy(conv).eval()):
        branch = layer(torch.zeros(1, 1, 3, 4))[0]
        torch.testing.assert_close(branch, reference.paper_grid((3, 4)).float())


def test_layers_share_one_grid() -> None:
    first = Coordinates().shared_grid((3, 4))
    assert Coordinates().shared_grid((3, 4)) is first
    assert Coordinates(radius=True).shared_grid((3, 4)) is not first


def test_the_cache_is_bounded_in_bytes() -> None:
    for side in range(2, 1500, 7):
        Coordinates().shared_grid((side, 512))
        assert _cached_grid.bytes <= _cached_grid.max_bytes
    assert _cached_grid.bytes > 0.8 * _cached_grid.max_bytes
    newest = Coordinates().shared_grid((side, 512))
    assert Coordinates().shared_grid((side, 512)) is newest


def test_tiny_grids_do_not_pile_up() -> None:
    cache = GridCache(max_bytes=100_000)
    for key in range(1000):
        cache.keep(key, torch.zeros(1))
    assert 0 < len(cache) < 100
    assert cache.lookup(0) is None
    assert cache.lookup(999) is not None


def test_a_grid_larger_than_the_cache_is_not_kept_and_pushes_nothing_out() -> None:
    cache = GridCache(max_bytes=5000)
    small = cache.keep("small", torch.zeros(10))
    large = torch.zeros(10_000)
    assert cache.keep("large", large) is large
    assert cache.lookup("large") is None
    assert cache.lookup("small") is small


def test_threads_share_the_cache() -> None:
    sizes = [(side, 3) for side in range(1, 60)]
    expected = [reference.paper_grid(size).float() for size in sizes]
    wrong: list[object] = []
    cache = GridCache(max_bytes=20 * 1024)

    def work() -> None:
        for index in list(range(len(sizes))) * 20:
            try:
                kept = cache.lookup(sizes[index])
                grid = cache.keep(sizes[index], expected[index]) if kept is None else kept
                if not torch.equal(grid, expected[index]):
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 <= cache.bytes <= cache.max_bytes
    cache.cache_clear()
    assert (cache.bytes, len(cache)) == (0, 0)


# --- the value itself ---------------------------------------------------------------------


def test_coordinates_and_windows_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Coordinates().order = "yx"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window((0,), (1,), (2,)).size = (2,)  # type: ignore[misc]


def test_equal_coordinates_hash_alike() -> None:
    window = {"offset": [0, 1], "size": [2, 3], "image_size": [4, 5]}
    left = Coordinates(value_range=(0, 1), window=Window(**window))
    right = Coordinates(value_range=(0.0, 1.0), window=Window((0, 1), (2, 3), (4, 5)))
    assert left == right
    assert hash(left) == hash(right)
    assert len({left, right, Coordinates()}) == 2


@SETTINGS
@given(fields=conventions(), window=st.sampled_from([None, Window((1, 2), (3, 4), (5, 6))]))
def test_dict_round_trip_through_json(fields: dict[str, Any], window: Window | None) -> None:
    coords = Coordinates(**fields, window=window)
    again = Coordinates.from_dict(json.loads(json.dumps(coords.to_dict())))
    assert again == coords
    assert hash(again) == hash(coords)


def test_to_dict_holds_only_what_differs_from_the_default() -> None:
    assert Coordinates().to_dict() == {}
    assert Coordinates.preset("reference").to_dict() == {"swap_sizes": True}
    assert Coordinates(radius=True, window=Window((0,), (1,), (2,))).to_dict() == {
        "radius": True,
        "window": {"offset": (0,), "size": (1,), "image_size": (2,)},
    }


def test_coordinates_pickle_and_copy() -> None:
    coords = Coordinates(radius=True, window=Window((0, 0), (1, 1), (2, 2)))
    assert pickle.loads(pickle.dumps(coords)) == coords
    assert copy.deepcopy(coords) == coords


def test_of_accepts_a_description_a_preset_name_and_none() -> None:
    coords = Coordinates(radius=True)
    assert Coordinates.of(coords) is coords
    assert Coordinates.of("mkocabas") == Coordinates(order="yx")
    assert Coordinates.of(None) == Coordinates()


def test_str_names_the_channels_and_what_is_not_default() -> None:
    assert str(Coordinates()) == "(x, y)"
    assert str(Coordinates(order="yx", radius=True)) == "(y, x, r) order='yx'"


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_str_of_a_window_of_any_dimension(ndim: int) -> None:
    window = Window((0,) * ndim, (1,) * ndim, (2,) * ndim)
    assert "image_size" in str(Coordinates(window=window))


# --- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": "zyx"}, r"order='zyx': write 'xy' \(x first\) or 'yx'"),
        ({"value_range": (1, 1)}, r"value_range=\(1, 1\): write two finite numbers, the smaller"),
        ({"value_range": (2, -2)}, r"value_range=\(2, -2\): write two finite numbers"),
        ({"value_range": (0, math.inf)}, r"value_range=\(0, inf\): write two finite numbers"),
        ({"value_range": (math.nan, 1)}, r"value_range=\(nan, 1\): write two finite numbers"),
        ({"value_range": (0, 1, 2)}, r"value_range=\(0, 1, 2\): write two finite numbers"),
        ({"value_range": None}, r"value_range=None: write two finite numbers"),
        ({"fourier": -1}, r"fourier=-1: write a number of octaves, 0 or more"),
        ({"fourier": 1.5}, r"fourier=1.5: write a number of octaves"),
        ({"radius_center": 0.5}, r"radius_center is given, but radius=False: write radius=True"),
        ({"swap_sizes": True, "align_corners": False}, r"swap_sizes reproduces the released"),
        (
            {"swap_sizes": True, "window": Window((0, 0), (1, 1), (2, 2))},
            r"knows neither windows nor align_corners=False: leave those out",
        ),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoordinatesError, match=message):
        Coordinates(**fields)


HUGE = 10**5000
"""Python refuses to write this number out."""
HUGE_PARAM = pytest.param(HUGE, id="huge")


@pytest.mark.parametrize("field", ["radius", "align_corners", "swap_sizes"])
@pytest.mark.parametrize("value", [0, 1, 5, 1.0, "True", None, [], np.True_, HUGE_PARAM])
def test_a_flag_is_true_or_false(field: str, value: Any) -> None:
    with pytest.raises(CoordinatesError, match=f"{field}=.*: write True or False"):
        Coordinates(**{field: value})


@pytest.mark.parametrize(
    "value", [True, False, "3", None, 3.0, math.nan, -1, 33, 14000, [1], HUGE_PARAM]
)
def test_octaves_are_a_small_whole_number(value: Any) -> None:
    with pytest.raises(CoordinatesError, match=r"fourier=.*: write a number of octaves, .*most 32"):
        Coordinates(fourier=value)


def test_the_most_octaves_still_tell_pixels_apart() -> None:
    grid = grid64(Coordinates(fourier=32), 2, 3)
    assert grid.shape == (2 + 4 * 32, 2, 3)
    assert grid.isfinite().all()
    assert grid.abs().max() <= 1


@pytest.mark.parametrize(
    "value",
    [
        *(True, 3, "01", (0,), {0: 1, 1: 2}, {0, 1}, ("0", "1"), (False, True), (0, None)),
        *(
            pytest.param((0, HUGE), id="huge"),
            (-math.inf, 0),
            (0, 1e30),
            (0, 1j),
            torch.tensor([0, 1]),
        ),
    ],
)
def test_a_range_is_two_real_numbers(value: Any) -> None:
    with pytest.raises(CoordinatesError, match=r"value_range=.*: write two finite numbers"):
        Coordinates(value_range=value)


@pytest.mark.parametrize(
    "value", [True, "0", math.nan, math.inf, -math.inf, 1j, (0, 0), 1e30, HUGE_PARAM]
)
def test_a_centre_is_a_real_number(value: Any) -> None:
    with pytest.raises(CoordinatesError, match=r"radius_center=.*: write a finite number"):
        Coordinates(radius=True, radius_center=value)


@pytest.mark.parametrize(
    "value", [None, 1, b"xy", ["xy"], {}, np.array(["xy", "yx"]), "x" * 10_000]
)
def test_an_order_is_one_of_two_words(value: Any) -> None:
    with pytest.raises(CoordinatesError, match="write 'xy'") as refused:
        Coordinates(order=value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("value", [1, "whole", {"offset": (0,)}, ((0,), (1,), (2,))])
def test_a_window_is_a_window(value: Any) -> None:
    with pytest.raises(CoordinatesError, match=r"window=.*: write a Window\(\.\.\.\) or None"):
        Coordinates(window=value)


def test_numbers_of_numpy_become_pythons() -> None:
    window = Window((np.int64(0),), (np.int32(1),), (np.uint8(2),))  # type: ignore[arg-type]
    coords = Coordinates(
        radius=True,
        radius_center=np.float32(0.5),
        value_range=(np.float64(0), np.int64(1)),
        fourier=np.int64(2),
        window=window,
    )
    assert coords == Coordinates(
        radius=True,
        radius_center=0.5,
        value_range=(0.0, 1.0),
        fourier=2,
        window=Window((0,), (1,), (2,)),
    )
    assert Coordinates.from_dict(json.loads(json.dumps(coords.to_dict()))) == coords


def subclass(**overridden: Any) -> Any:
    return type("Twice", (Coordinates,), overridden)


def test_a_subclass_of_a_convention_is_refused() -> None:
    with pytest.raises(CoordinatesError, match="Twice is a subclass of Coordinates"):
        subclass()()
    with pytest.raises(CoordinatesError, match="Twice is a subclass of Coordinates"):
        subclass().preset("mkocabas")
    with pytest.raises(CoordinatesError, match="Twice is a subclass of Coordinates"):
        subclass().from_dict({})
    with pytest.raises(CoordinatesError, match="Part is a subclass of Window"):
        type("Part", (Window,), {})((0,), (1,), (2,))


def test_a_subclass_that_checks_nothing_is_refused_where_it_enters() -> None:
    sneaky = subclass(__post_init__=lambda self: None)()
    for enter in (
        Coordinates.of,
        lambda coords: CoordConv2d(1, 1, 1, coords=coords),
        lambda coords: ccp.patch(nn.Conv2d(1, 1, 1), coords=coords),
        lambda coords: ccp.CoordConvPass("first", coords=coords),
        lambda coords: coords.to_dict(),
    ):
        with pytest.raises(CoordinatesError, match="Twice is a subclass of Coordinates"):
            enter(sneaky)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((0, 0), (1,), (2, 2)), "must have one number per spatial dimension each"),
        (((0, 0), (0, 1), (2, 2)), "size and image_size must be above 0 pixels"),
        (((0, 0), (1, 1), (2, -2.5)), "size and image_size must be above 0 pixels"),
        (((0, False), (1, 1), (2, 2)), r"offset=\(0, False\): write a tuple"),
        (((0, 0), ("1", "1"), (2, 2)), r"size=\('1', '1'\): write a tuple"),
        (((0, 0), "11", (2, 2)), "size='11': write a tuple"),
        ((0, 1, 2), "offset=0: write a tuple"),
        ((None, (1, 1), (2, 2)), "offset=None: write a tuple"),
        (((), (), ()), r"offset=\(\): write a tuple"),
        (((0,) * 4, (1,) * 4, (2,) * 4), "offset=.*: write a tuple of one to three"),
        (((0,), (1,), (2**31,)), r"image_size=\(2147483648,\): .*below 2\*\*31"),
        pytest.param(((0,), (1,), (HUGE,)), "image_size=.*below", id="huge"),
        (((0,), (math.nan,), (2,)), r"size=\(nan,\): write a tuple"),
    ],
)
def test_impossible_windows_are_refused(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CoordinatesError, match=message):
        Window(*fields)


def test_windows_keep_fractions_and_reach_beyond_the_image() -> None:
    window = Window((-3, 10.5), (8.25, 4.0), (20, 12))
    assert window == Window((-3.0, 10.5), (8.25, 4), (20, 12))
    assert repr(window.size) == "(8.25, 4)"
    grid = grid64(Coordinates(align_corners=False, window=window), 11, 5)
    rows = (-3 + (np.arange(11) + 0.5) * 8.25 / 11) / 20 * 2 - 1
    columns = (10.5 + (np.arange(5) + 0.5) * 4 / 5) / 12 * 2 - 1
    np.testing.assert_allclose(grid[0], np.tile(columns, (11, 1)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(grid[1], np.tile(rows[:, None], (1, 5)), rtol=0, atol=1e-14)


def test_unknown_preset_names_the_close_one_and_all() -> None:
    with pytest.raises(
        CoordinatesError,
        match=r"no coordinate preset 'refrence': did you mean 'reference'\? presets are "
        "mkocabas, paddledetection, paper, reference, solo",
    ):
        Coordinates.preset("refrence")
    with pytest.raises(CoordinatesError, match=r"no coordinate preset 'q': presets are mkocabas"):
        Coordinates.of("q")


@pytest.mark.parametrize("name", ["solo", "paddledetection"])
def test_preset_without_radius_refuses_one(name: str) -> None:
    with pytest.raises(CoordinatesError, match=rf"preset '{name}' has no radius channel; write"):
        Coordinates.preset(name, radius=True)


def test_of_refuses_other_values() -> None:
    with pytest.raises(CoordinatesError, match=r"coords=3: write a Coordinates\(\.\.\.\), or"):
        Coordinates.of(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(), (2, 2, 2, 2)])
def test_grid_refuses_other_numbers_of_dimensions(size: tuple[int, ...]) -> None:
    with pytest.raises(CoordinatesError, match=f"{len(size)} spatial dimensions: coordinates know"):
        Coordinates().grid(size)
    with pytest.raises(CoordinatesError, match="coordinates know 1, 2 or 3"):
        Coordinates().channel_names(len(size))


def test_grid_refuses_a_window_of_other_dimensions() -> None:
    coords = Coordinates(window=Window((0,), (1,), (2,)))
    with pytest.raises(CoordinatesError, match="has 1 dimensions, the input has 2 spatial"):
        coords.grid((1, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hyperbolic": 1}, r"unknown coordinate fields \['hyperbolic'\]: a newer version"),
        ({"order": "qq"}, r"coordinate fields .* are invalid: order='qq'"),
        ({"window": {"offset": [0]}}, "are invalid: .*missing"),
        ({"value_range": 3}, "are invalid"),
        ({"radius": 5}, "are invalid: radius=5: write True or False"),
        (
            {"window": {"offset": [0], "size": [True], "image_size": [3]}},
            "are invalid: window: size",
        ),
        ({"window": [[0], [1], [2]]}, "are invalid"),
        ({"window": 3}, "are invalid"),
        ({7: 1, "x": 2}, r"unknown coordinate fields \[7, 'x'\]"),
        ([("order", "xy")], "must be a mapping"),
        (None, "must be a mapping"),
        ({"x" * 9999: 1}, "unknown coordinate fields"),
        ({"order": "x" * 9999}, "are invalid"),
    ],
)
def test_from_dict_refuses_what_it_cannot_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoordinatesError, match=message) as refused:
        Coordinates.from_dict(fields)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("size", [(2.5, 3), (2.0, 3), ("2", 3), (True, 3), (None, 3)])
def test_grid_refuses_sizes_that_are_not_whole(size: tuple[Any, ...]) -> None:
    with pytest.raises(CoordinatesError, match=r"size=.*: write whole numbers"):
        Coordinates().grid(size)


def test_grid_refuses_negative_sizes() -> None:
    with pytest.raises(CoordinatesError, match=r"size=\(2, -3\): an input has 0 pixels"):
        Coordinates().grid((2, -3))
    assert Coordinates().grid((2, 0)).shape == (2, 2, 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_grid_refuses_dtypes_that_are_not_of_floats(dtype: torch.dtype) -> None:
    with pytest.raises(CoordinatesError, match=f"dtype={dtype}: coordinates are fractions"):
        Coordinates().grid((2, 3), dtype=dtype)


def test_sizes_of_numpy_give_the_same_grid() -> None:
    size = (np.int64(37), np.int32(301))
    for coords in (Coordinates(), ODD):
        grid = coords.grid(size)  # type: ignore[arg-type]
        assert torch.equal(grid, coords.grid((37, 301)))


@pytest.mark.parametrize("name", [None, 3, ["paper"], {}, "x" * 10_000])
def test_a_preset_is_named(name: Any) -> None:
    with pytest.raises(CoordinatesError, match=r"preset .*paper, reference, solo") as refused:
        Coordinates.preset(name)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("radius", [1, 5, "yes", None])
def test_a_presets_radius_is_true_or_false(radius: Any) -> None:
    with pytest.raises(CoordinatesError, match=r"radius=.*: write True or False"):
        Coordinates.preset("paper", radius=radius)


def test_coordinate_errors_are_value_errors_of_the_package() -> None:
    assert issubclass(CoordinatesError, ValueError)
    assert issubclass(CoordinatesError, CoordConvPatchError)
