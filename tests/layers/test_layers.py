from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from random_convolutions import CLASSES, Case, cases
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrize, skip_init
from torch.nn.utils.parametrizations import weight_norm

from coordconv_patch import (
    CoordConv1d,
    CoordConv2d,
    CoordConvTranspose2d,
    Coordinates,
    Window,
)
from coordconv_patch.errors import CoordinatesError, PatchError
from coordconv_patch.layers.branch import BRANCH_NAME, CoordBranch
from coordconv_patch.layers.conversion import check_convertible, convert_
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordinates import _cached_grid
from coordconv_patch.layers.geometry import ConvGeometry
from coordconv_patch.layers.map_cache import MapCache
from coordconv_patch.layers.patched_classes import patched_class

SETTINGS = settings(derandomize=True, deadline=None, max_examples=250)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    _cached_grid.cache_clear()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@SETTINGS
@given(case=cases())
def test_layer_equals_the_concatenating_definition_forward_and_backward(case: Case) -> None:
    layer = case.coord(dtype=torch.float64)
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(case.input_shape, dtype=torch.float64, requires_grad=True)
    output = case.call(layer, x)
    expected = case.expected(layer, x)
    close(output, expected)

    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        close(found, wanted)

    for _ in range(2):  # the map is made, then taken from the cache
        with torch.no_grad():
            close(case.call(layer, x), expected)


@SETTINGS
@given(case=cases())
def test_fresh_layer_is_torchs_layer_to_the_last_bit(case: Case) -> None:
    plain, layer = case.plain(), case.coord()
    assert torch.equal(plain.weight, layer.weight)
    x = torch.randn(case.input_shape, requires_grad=True)
    output, expected = case.call(layer, x), case.call(plain, x)
    assert torch.equal(output, expected)
    with torch.no_grad():
        assert torch.equal(case.call(layer, x), expected)

    upstream = torch.randn_like(expected)
    inputs, own = (
        [x, *plain.parameters()],
        [x, layer.weight, layer.bias][: 2 + (plain.bias is not None)],
    )
    for found, wanted in zip(
        torch.autograd.grad(output, own, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert torch.equal(found, wanted)


# --- the layers as modules ----------------------------------------------------------------


def a_layer(**arguments: Any) -> CoordConv2d:
    """A 2d layer with coordinate weights that are not zero."""
    layer = CoordConv2d(3, 4, 3, **({"padding": 1, "stride": 2} | arguments))
    nn.init.normal_(layer.coord_weight)
    return layer


def wanted(layer: Any, x: Tensor) -> Tensor:
    """What a 2d layer must return, in float64, by concatenation."""
    coords = layer.coords.to_dict()
    with torch.no_grad():
        return reference.concatenating_conv(
            x.double(),
            reference.paper_grid(x.shape[-2:], **coords),
            layer.weight.double(),
            layer.coord_weight.double(),
            None if layer.bias is None else layer.bias.double(),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            transposed=layer.transposed,
            output_padding=layer.output_padding,
        )


TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def agrees(layer: Any, x: Tensor, found: Tensor, dtype: torch.dtype | None = None) -> None:
    """Whether an output is right to the precision of its dtype."""
    expected = wanted(layer, x)
    dtype = dtype or found.dtype
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"off by {error:.1e} of the largest output"


@pytest.mark.parametrize("key", CLASSES)
def test_layer_takes_torchs_arguments_by_position_and_names_a_preset(key: Any) -> None:
    plain, made = CLASSES[key]
    extra = (1, 2) if key[1] else (2, 1)  # output_padding, groups or dilation, groups
    layer = made(4, 6, 3, 2, 1, *extra, coords="mkocabas")
    expected = plain(4, 6, 3, 2, 1, *extra)
    assert isinstance(layer, plain)
    assert ConvGeometry.of(layer) == ConvGeometry.of(expected)
    assert layer.coords == Coordinates(order="yx")
    shape = (6, key[0]) if not key[1] else (key[0], 6)
    assert layer.coord_weight.shape == (*shape, *[3] * key[0])
    assert layer.coord_weight.requires_grad
    assert "coords=(" in repr(layer)


def test_factory_arguments_reach_the_coordinate_weight() -> None:
    layer = CoordConv2d(3, 4, 3, device="meta", dtype=torch.float16)
    assert layer.coord_weight.device.type == "meta"
    assert layer.coord_weight.dtype == torch.float16
    assert skip_init(CoordConv2d, 3, 4, 3).coord_weight.shape == (4, 2, 3, 3)


def test_unknown_coords_are_refused_at_construction() -> None:
    with pytest.raises(CoordinatesError, match="no coordinate preset 'papr': did you mean 'paper'"):
        CoordConv2d(3, 4, 3, coords="papr")


def test_window_of_other_dimensions_is_refused_at_construction_with_the_reason() -> None:
    coords = Coordinates(window=Window((0,), (1,), (2,)))
    with pytest.raises(CoordinatesError, match="has 1 dimensions, the input has 2 spatial"):
        CoordConv2d(3, 4, 3, coords=coords)(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_repr_of_a_layer_with_a_window(ndim: int) -> None:
    window = Window((0,) * ndim, (4,) * ndim, (8,) * ndim)
    layer = CLASSES[ndim, False][1](1, 1, 1, coords=Coordinates(window=window))
    assert "coords=" in repr(layer)


def test_tile_with_its_window_gets_the_output_of_the_whole_image() -> None:
    layer = a_layer(padding=0, stride=2).double()
    image = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    whole = layer(image)
    layer.coords = Coordinates(window=Window((4, 8), (13, 15), (24, 32)))
    tile = layer(image[..., 4:17, 8:23])
    close(tile, whole[..., 2:8, 4:11])


def test_kernel_of_one_reads_the_grid_itself() -> None:
    layer = CoordConv2d(1, 2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.coord_weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
    close(layer(torch.randn(1, 1, 4, 7, dtype=torch.float64))[0], reference.paper_grid((4, 7)))


def test_padded_coordinates_are_zero_outside_the_image_not_extrapolated() -> None:
    layer = CoordConv1d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.coord_weight)
    nn.init.zeros_(layer.weight)
    assert layer(torch.zeros(1, 1, 3)).tolist() == [[[-1.0, 0.0, 1.0]]]


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)])
def test_inputs_of_one_pixel_give_no_nan(size: tuple[int, int]) -> None:
    layer = a_layer(coords=Coordinates(radius=True))
    x = torch.randn(2, 3, *size)
    agrees(layer, x, layer(x))
    layer(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_non_square_inputs_see_x_over_width_and_y_over_height() -> None:
    layer = a_layer()
    for size in ((5, 13), (13, 5)):
        x = torch.randn(2, 3, *size)
        agrees(layer, x, layer(x))


def test_radius_is_centred_in_the_layer() -> None:
    layer = CoordConv2d(1, 1, 1, bias=False, coords=Coordinates(radius=True))
    with torch.no_grad():
        layer.weight.zero_()
        layer.coord_weight.copy_(torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1))
    radius = layer(torch.zeros(1, 1, 5, 9))[0, 0]
    assert radius[2, 4] == 0
    assert torch.equal(radius, radius.flip(0, 1))


# --- dtypes -------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], Any]] = {
    "conv": lambda: CoordConv2d(3, 4, 3, 2, 1),
    "grouped": lambda: CoordConv2d(4, 4, 3, 1, 1, groups=2, bias=False),
    "depthwise": lambda: CoordConv2d(4, 4, 5, padding=2, groups=4),
    "same": lambda: CoordConv2d(3, 4, 5, padding="same", coords=Coordinates(radius=True)),
    "reflect": lambda: CoordConv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: CoordConvTranspose2d(3, 4, 3, 2, 1, output_padding=1),
}

LOW = [torch.float32, torch.bfloat16, torch.float16]


def plain_of(layer: Any) -> Any:
    """torch.nn's layer with the same numbers."""
    plain = copy.deepcopy(layer)
    plain._detach()
    plain.__class__ = layer._plain_class
    return plain


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("grad", [True, False])
def test_zero_coordinate_weights_change_no_bit_in_any_dtype(
    name: str, dtype: torch.dtype, grad: bool
) -> None:
    layer = LAYERS[name]().to(dtype)
    x = torch.randn(2, layer.in_channels, 11, 14).to(dtype)
    with torch.set_grad_enabled(grad):
        output = layer(x)
        assert torch.equal(output, plain_of(layer)(x))
        assert output.dtype == dtype


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("grad", [True, False])
def test_other_coordinate_weights_are_right_in_every_dtype(
    name: str, dtype: torch.dtype, grad: bool
) -> None:
    layer = LAYERS[name]()
    nn.init.normal_(layer.coord_weight)
    layer.to(dtype)
    x = torch.randn(2, layer.in_channels, 11, 14).to(dtype)
    with torch.set_grad_enabled(grad):
        agrees(layer, x, layer(x), dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, layer.in_channels, 11, 14)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x), plain_of(layer)(x))
    nn.init.normal_(layer.coord_weight)
    with torch.autocast("cpu", dtype=dtype):
        agrees(layer, x, layer(x), dtype)
    with torch.autocast("cpu", dtype=dtype):
        layer(x).float().square().mean().backward()
    assert layer.coord_weight.grad.dtype == torch.float32
    assert layer.coord_weight.grad.abs().max() > 0


def test_float32_coordinates_do_not_break_half_precision_training() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = a_layer().to(dtype)
        x = torch.randn(2, 3, 7, 9, dtype=dtype, requires_grad=True)
        layer(x).square().mean().backward()
        assert x.grad.dtype == layer.coord_weight.grad.dtype == dtype
        assert torch.isfinite(layer.coord_weight.grad).all()


@pytest.mark.parametrize("name", LAYERS)
def test_meta_device(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, layer.in_channels, 11, 14)
    shape = layer(x).shape
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = copy.deepcopy(layer).to("meta")(x.to("meta"))
        assert output.device.type == "meta"
        assert output.shape == shape


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
def test_channels_last_input_gives_the_layout_that_torch_gives(name: str, grad: bool) -> None:
    layer = LAYERS[name]()
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(2, layer.in_channels, 11, 14)
    for module, input in (
        (layer, x.to(memory_format=torch.channels_last)),
        (copy.deepcopy(layer).to(memory_format=torch.channels_last), x),
        (layer, x),
    ):
        with torch.set_grad_enabled(grad):
            output = module(input)
            plain = plain_of(module)(input)
        assert output.stride() == plain.stride()
        agrees(module, input, output)


def test_channels_last_of_a_subclass() -> None:
    layer = Conv2dSame(3, 4, 3, 2)
    x = torch.randn(2, 3, 11, 14).to(memory_format=torch.channels_last)
    stride = layer(x).stride()
    convert_(layer, Coordinates(), check_convertible(layer))
    assert layer(x).stride() == stride
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["coords", "coord_geometry", "compute_map", "_followed"])
@pytest.mark.parametrize("kind", ["attribute", "method", "buffer"])
def test_an_attribute_that_a_layer_needs_is_not_taken_from_its_owner(name: str, kind: str) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            factor = getattr(self, name)
            weight = self.weight * (factor() if callable(factor) else factor)
            return self._conv_forward(input, weight, self.bias)

    if kind == "method":
        setattr(Scaled, name, lambda self: 2.5)
    conv = Scaled(3, 4, 3)
    if kind == "attribute":
        conv.__dict__[name] = 2.5
    elif kind == "buffer":
        conv.register_buffer(name, torch.tensor(2.5))
    x = torch.randn(1, 3, 6, 7)
    before = conv(x)
    with pytest.raises(PatchError, match=f"has an attribute '{name}' of its own"):
        check_convertible(conv)
    assert torch.equal(conv(x), before)


# --- capture ------------------------------------------------------------------------------

OTHER_SIZES = [(11, 14), (6, 15), (20, 9), (8, 8)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
def test_compile_follows_the_input_size(name: str, grad: bool) -> None:
    torch._dynamo.reset()
    layer = LAYERS[name]()
    nn.init.normal_(layer.coord_weight)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for size in OTHER_SIZES:
        x = torch.randn(2, layer.in_channels, *size)
        with torch.set_grad_enabled(grad):
            agrees(layer, x, compiled(x))
    assert len(layer._map_cache) == 0


def test_compiled_layer_trains() -> None:
    torch._dynamo.reset()
    layer = a_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 7, 9)
    grads = [
        torch.autograd.grad(module(x).square().sum(), list(layer.parameters()))
        for module in (compiled, layer)
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        layer.coord_weight.mul_(-2)
        agrees(layer, x, compiled(x))


@pytest.mark.parametrize("name", LAYERS)
def test_export_does_not_freeze_height_and_width(name: str) -> None:
    layer = LAYERS[name]().eval()
    nn.init.normal_(layer.coord_weight)
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    x = torch.randn(2, layer.in_channels, 10, 12)
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    assert "coord_weight" in program.state_dict
    graph = program.module()
    for size in OTHER_SIZES:
        x = torch.randn(3, layer.in_channels, *size)
        agrees(layer, x, graph(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("frozen", [True, False])
def test_trace_does_not_freeze_height_and_width(name: str, frozen: bool) -> None:
    layer = LAYERS[name]().eval().requires_grad_(not frozen)
    nn.init.normal_(layer.coord_weight)
    layer(torch.randn(2, layer.in_channels, 10, 12))  # a kept map must not be baked in
    traced = torch.jit.trace(layer, torch.randn(2, layer.in_channels, 10, 12))
    for size in OTHER_SIZES:
        x = torch.randn(3, layer.in_channels, *size)
        agrees(layer, x, traced(x))


@pytest.mark.filterwarnings("ignore")
def test_y_is_not_x_in_an_exported_or_traced_layer() -> None:
    layer = CoordConv2d(1, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.coord_weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
    example = torch.randn(1, 1, 6, 6)
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (example,), dynamic_shapes=(sizes,))
    for graph in (program.module(), torch.jit.trace(layer, example)):
        for size in ((6, 6), (4, 9)):
            x, y = graph(torch.randn(1, 1, *size))[0]
            expected = reference.paper_grid(size).float()
            torch.testing.assert_close(torch.stack([x, y]), expected)
        assert torch.equal(graph(example)[0, 0], graph(example)[0, 1].t())


def test_symbolic_tracers_see_a_leaf() -> None:
    model = nn.Sequential(CoordConv2d(3, 4, 3), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    x = torch.randn(1, 3, 6, 7)
    assert torch.equal(graph(x), model(x))


# --- copies and checkpoints ---------------------------------------------------------------


def saved_and_loaded(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("key", CLASSES)
def test_copies_are_equal_and_independent(way: str, key: Any) -> None:
    layer = CLASSES[key][1](2, 3, 3, coords=Coordinates(radius=True)).eval()
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(1, 2, *[4] * key[0])
    with torch.no_grad():
        expected = layer(x)
    duplicate = COPIES[way](layer)
    assert type(duplicate) is type(layer)
    assert duplicate.coords == layer.coords
    assert not duplicate.training
    assert len(layer._map_cache) == 1
    assert len(duplicate._map_cache) == 0
    with torch.no_grad():
        assert torch.equal(duplicate(x), expected)
        layer.coord_weight.zero_()
        assert torch.equal(duplicate(x), expected)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_converted_subclass(way: str) -> None:
    layer = Conv2dSame(3, 4, 3, 2)
    layer.note = "kept"
    convert_(layer, Coordinates(), check_convertible(layer))
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(1, 3, 8, 9)
    duplicate = COPIES[way](layer)
    assert type(duplicate) is patched_class(Conv2dSame)
    assert duplicate.note == "kept"
    assert duplicate.coord_padding == layer.coord_padding
    assert torch.equal(duplicate(x), layer(x))


def test_map_cache_is_in_no_state_dict_and_no_pickle() -> None:
    layer = CoordConv2d(1, 64, 1).requires_grad_(False)
    empty = len(pickle.dumps(layer))
    layer(torch.zeros(1, 1, 64, 64))
    assert len(layer._map_cache) == 1
    assert len(pickle.dumps(layer)) == empty
    assert list(layer.state_dict()) == ["weight", "bias", "coord_weight"]
    assert not list(layer.buffers())


def test_patched_state_dict_is_a_superset_of_the_plain_one() -> None:
    for plain, made in CLASSES.values():
        names, shapes = plain(2, 4, 3).state_dict(), made(2, 4, 3).state_dict()
        assert {name: value.shape for name, value in names.items()}.items() <= {
            name: value.shape for name, value in shapes.items()
        }.items()
        assert shapes.keys() - names.keys() == {"coord_weight"}


def test_state_dict_round_trip() -> None:
    layer, other = a_layer(), a_layer()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 6, 7)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoint_loads_strictly_and_zeroes_the_coordinates(assign: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    model = nn.Sequential(CoordConv2d(3, 4, 3), CoordConvTranspose2d(4, 2, 3))
    for layer in model:
        nn.init.normal_(layer.coord_weight)
    result = model.load_state_dict(plain.state_dict(), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert all(not layer.coord_weight.any() for layer in model)
    x = torch.randn(1, 3, 6, 7)
    assert torch.equal(model(x), plain(x))


def test_plain_checkpoint_with_strict_false_reports_and_keeps_the_coordinates() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(CoordConv2d(3, 4, 3))
    nn.init.ones_(model[0].coord_weight)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["0.coord_weight"]
    assert result.unexpected_keys == []
    assert torch.equal(model[0].coord_weight, torch.ones(4, 2, 3, 3))
    assert torch.equal(model[0].weight, plain[0].weight)


def test_strict_loading_still_refuses_other_missing_and_misshapen_keys() -> None:
    layer = CoordConv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict(nn.Conv2d(3, 4, 3, bias=False).state_dict())
    other = CoordConv2d(3, 4, 3, coords=Coordinates(radius=True)).state_dict()
    with pytest.raises(
        RuntimeError, match=r"coord_weight was trained with coordinates \(x, y, r\)"
    ):
        layer.load_state_dict(other)
    with pytest.raises(RuntimeError, match="size mismatch for coord_weight"):
        layer.load_state_dict(dict(other))  # which does not tell the convention


@pytest.mark.parametrize("frozen", [False, True])
def test_plain_checkpoint_assigned_to_a_layer_on_meta(frozen: bool) -> None:
    plain = nn.Conv2d(3, 4, 3).to(torch.bfloat16)
    layer = CoordConv2d(3, 4, 3, device="meta", dtype=torch.bfloat16)
    layer.coord_weight.requires_grad_(not frozen)
    layer.load_state_dict(plain.state_dict(), assign=True)
    assert layer.coord_weight.device.type == "cpu"
    assert layer.coord_weight.dtype == torch.bfloat16
    assert layer.coord_weight.requires_grad is not frozen
    assert isinstance(layer.coord_weight, nn.Parameter)
    x = torch.randn(1, 3, 6, 7, dtype=torch.bfloat16)
    assert torch.equal(layer(x), plain(x))


def test_patched_checkpoint_assigned_to_a_layer_on_meta() -> None:
    source = a_layer()
    layer = CoordConv2d(3, 4, 3, 2, 1, device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 3, 6, 7)
    assert torch.equal(layer(x), source(x))


def test_reset_parameters_is_torchs_with_zero_coordinates() -> None:
    layer, plain = a_layer(), nn.Conv2d(3, 4, 3)
    for module in (layer, plain):
        torch.manual_seed(7)
        module.reset_parameters()
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    assert not layer.coord_weight.any()


# --- the published, concatenating form ----------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_concatenated_weight_in_torchs_conv_on_concatenated_input(bias: bool) -> None:
    layer = a_layer(bias=bias, coords=Coordinates(radius=True)).double()
    literal = nn.Conv2d(6, 4, 3, 2, 1, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        literal.weight.copy_(layer.concatenated_weight())
        if bias:
            literal.bias.copy_(layer.bias)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    coords = reference.paper_grid((7, 9), radius=True).expand(2, 3, 7, 9)
    close(layer(x), literal(torch.cat([x, coords], dim=1)))

    loaded = CoordConv2d(
        3, 4, 3, 2, 1, bias=bias, coords=Coordinates(radius=True), dtype=torch.float64
    )
    loaded.load_concatenated_(literal.weight, literal.bias)
    assert torch.equal(loaded(x), layer(x))
    assert loaded.weight.requires_grad
    assert not loaded.concatenated_weight().requires_grad


def test_concatenated_weight_of_a_transposed_layer() -> None:
    layer = CoordConvTranspose2d(3, 4, 3, 2, dtype=torch.float64)
    nn.init.normal_(layer.coord_weight)
    literal = nn.ConvTranspose2d(5, 4, 3, 2, dtype=torch.float64)
    literal.weight.data = layer.concatenated_weight()
    literal.bias.data = layer.bias.data
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    coords = reference.paper_grid((5, 6)).expand(2, 2, 5, 6)
    close(layer(x), literal(torch.cat([x, coords], dim=1)))
    loaded = CoordConvTranspose2d(3, 4, 3, 2, dtype=torch.float64)
    loaded.load_concatenated_(literal.weight, literal.bias)
    assert torch.equal(loaded(x), layer(x))


def test_concatenated_form_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    layer = a_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(PatchError, match=r"shape \(4, 3, 3, 3\), this layer needs \(4, 5, 3, 3\)"):
        layer.load_concatenated_(torch.zeros(4, 3, 3, 3), torch.zeros(4))
    for bias in (None, torch.zeros(3)):
        with pytest.raises(PatchError, match="the bias does not fit: pass one exactly if"):
            layer.load_concatenated_(torch.zeros(4, 5, 3, 3), bias)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    grouped = CoordConv2d(4, 4, 3, groups=2)
    for call in (grouped.concatenated_weight, lambda: grouped.load_concatenated_(torch.zeros(1))):
        with pytest.raises(PatchError, match="groups=2 has no concatenated form"):
            call()


# --- what torch does to modules -----------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "coord_weight"])
def test_parametrization_and_its_removal(name: str) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 7, 9)
    before = layer(x)
    weight_norm(layer, name)
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before)
        layer.parametrizations[name].original0.mul_(3)
        agrees(layer, x, layer(x))
        assert not torch.allclose(layer(x), before)
    changed = layer(x)
    changed.sum().backward()
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is CoordConv2d
    torch.testing.assert_close(layer(x), changed)
    with torch.no_grad():
        agrees(layer, x, layer(x))


@pytest.mark.parametrize("grad", [True, False])
def test_functional_call_uses_the_weights_given_and_leaves_no_trace(grad: bool) -> None:
    layer, other = a_layer(), a_layer()
    x = torch.randn(2, 3, 7, 9)
    with torch.set_grad_enabled(grad):
        own, expected = layer(x), other(x)
        for given_weights in (dict(other.named_parameters()), other.state_dict()):
            torch.testing.assert_close(functional_call(layer, given_weights, (x,)), expected)
            assert torch.equal(layer(x), own)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_over_an_ensemble_of_coordinate_weights(grad: bool) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 7, 9)
    ensemble = torch.randn(5, *layer.coord_weight.shape)
    with torch.set_grad_enabled(grad):
        outputs = torch.vmap(lambda w: functional_call(layer, {"coord_weight": w}, (x,)))(ensemble)
    for weight, output in zip(ensemble, outputs, strict=True):
        with torch.no_grad():
            layer.coord_weight.copy_(weight)
        agrees(layer, x, output)


def test_vmap_over_a_whole_ensemble_and_over_inputs() -> None:
    layers = [a_layer() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    x = torch.randn(3, 2, 3, 7, 9)
    outputs = torch.vmap(lambda p, x: functional_call(layers[0], p, (x,)))(parameters, x)
    for layer, input, output in zip(layers, x, outputs, strict=True):
        agrees(layer, input, output)
    with torch.no_grad():
        outputs = torch.vmap(layers[0])(x)
    for input, output in zip(x, outputs, strict=True):
        agrees(layers[0], input, output)


def test_func_grad_equals_autograd() -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 7, 9)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    grads = torch.func.grad(lambda p: functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("transform", ["grad", "jvp", "functionalize", "vmap"])
def test_use_under_a_function_transform_does_not_reach_later_calls(transform: str) -> None:
    layer = a_layer().requires_grad_(False)
    x = torch.randn(2, 3, 7, 9)
    if transform == "grad":
        torch.func.grad(lambda x: layer(x).sum())(x)
    elif transform == "jvp":
        torch.func.jvp(layer, (x,), (x,))
    elif transform == "vmap":
        torch.vmap(layer)(x.unsqueeze(1))
    else:
        torch.func.functionalize(lambda x: layer(x))(x)
    agrees(layer, x, layer(x))
    for kept in layer._map_cache._contents.kept.maps.values():
        copy.deepcopy(kept)  # a tensor of a transform that ended has no storage
    copy.deepcopy(layer.coords.grid((7, 9)))


def test_hooks_run_once_and_see_the_output_with_coordinates() -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 7, 9, requires_grad=True)
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.register_full_backward_hook(lambda module, gi, go: seen.append(go[0]))
    output = layer(x)
    output.sum().backward()
    assert len(seen) == 3
    assert seen[0] is x or torch.equal(seen[0], x)
    agrees(layer, x, seen[1].detach())
    assert torch.equal(seen[2], torch.ones_like(output))


def test_frozen_coordinates_let_gradients_of_the_rest_through() -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 7, 9, requires_grad=True)
    inputs = [x, layer.weight, layer.bias]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    layer.coord_weight.requires_grad_(False)
    for _ in range(2):
        for found, one in zip(
            torch.autograd.grad(layer(x).square().sum(), inputs), expected, strict=True
        ):
            torch.testing.assert_close(found, one)
    only = a_layer().requires_grad_(False)
    only.coord_weight.requires_grad_(True)
    only(x.detach()).sum().backward()
    assert only.coord_weight.grad.abs().max() > 0
    assert only.weight.grad is None


def test_gradient_checkpointing() -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 7, 9, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for found, one in zip(torch.autograd.grad(again.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, one)


# --- the map cache is never stale ---------------------------------------------------------


@pytest.fixture(params=["no_grad", "inference_mode", "frozen"])
def inferring(request: pytest.FixtureRequest) -> Callable[[Any, Tensor], Tensor]:
    """A way to run a layer in which it may keep its maps."""

    def run(layer: Any, x: Tensor) -> Tensor:
        if request.param == "no_grad":
            with torch.no_grad():
                return layer(x)
        if request.param == "inference_mode":
            with torch.inference_mode():
                return layer(x).clone()
        layer.requires_grad_(False)
        output = layer(x)
        layer.requires_grad_(True)
        return output

    return run


def by_optimizer_step(layer: CoordConv2d) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(2, 3, 8, 9)).square().sum().backward()
    optimizer.step()


def by_foreach_step(layer: CoordConv2d) -> None:
    layer.coord_weight.grad = torch.ones_like(layer.coord_weight)
    torch.optim.AdamW([layer.coord_weight], lr=1.0, foreach=True).step()


def by_data(layer: CoordConv2d) -> None:
    layer.coord_weight.data.mul_(2)


def by_new_data(layer: CoordConv2d) -> None:
    layer.coord_weight.data = torch.randn_like(layer.coord_weight)


def by_numpy(layer: CoordConv2d) -> None:
    layer.coord_weight.detach().numpy()[0, 0, 0, 0] += 3


def by_load_state_dict(layer: CoordConv2d) -> None:
    layer.load_state_dict(a_layer().state_dict())


def by_assigning_load(layer: CoordConv2d) -> None:
    layer.load_state_dict(a_layer().state_dict(), assign=True)


def by_plain_load(layer: CoordConv2d) -> None:
    layer.load_state_dict(nn.Conv2d(3, 4, 3).state_dict())


def by_copy_in_inference_mode(layer: CoordConv2d) -> None:
    with torch.inference_mode():
        layer.coord_weight.copy_(torch.randn_like(layer.coord_weight))


def by_new_parameter(layer: CoordConv2d) -> None:
    layer.coord_weight = nn.Parameter(torch.randn_like(layer.coord_weight))


def by_coords(layer: CoordConv2d) -> None:
    layer.coords = Coordinates(order="yx")


def by_stride(layer: CoordConv2d) -> None:
    layer.stride = (1, 1)


def by_padding(layer: CoordConv2d) -> None:
    layer.padding = (0, 2)


def by_dilation(layer: CoordConv2d) -> None:
    layer.dilation = (1, 2)


def by_reset(layer: CoordConv2d) -> None:
    layer.reset_parameters()


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_kept_map_is_never_stale(
    change: Callable[[CoordConv2d], None], inferring: Callable[[Any, Tensor], Tensor]
) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 8, 9)
    before = inferring(layer, x)
    agrees(layer, x, inferring(layer, x))
    change(layer)
    after = inferring(layer, x)
    agrees(layer, x, after)
    assert after.shape != before.shape or not torch.allclose(after, before)
    agrees(layer, x, inferring(layer, x))


def test_every_write_between_many_calls_is_seen() -> None:
    layer = a_layer()
    x = torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        for step in range(20):
            layer.coord_weight.view(-1)[step] += 1
            agrees(layer, x, layer(x))


def test_kept_map_follows_dtype_moves(inferring: Callable[[Any, Tensor], Tensor]) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 8, 9)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        for _ in range(2):
            agrees(layer, x.to(dtype), inferring(layer, x.to(dtype)), dtype)


def test_kept_map_follows_autocast_on_and_off(inferring: Callable[[Any, Tensor], Tensor]) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 8, 9)
    exact = inferring(layer, x)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                agrees(layer, x, inferring(layer, x), dtype)
                with torch.autocast("cpu", enabled=False):
                    assert torch.equal(inferring(layer, x), exact)
        assert torch.equal(inferring(layer, x), exact)


def test_map_kept_under_autocast_does_not_cost_later_precision(
    inferring: Callable[[Any, Tensor], Tensor],
) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 8, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inferring(layer, x)
    agrees(layer, x, inferring(layer, x), torch.float32)


def test_kept_map_is_not_made_from_autocasts_copy_of_older_weights() -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 8, 9)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
            layer.coord_weight.mul_(-3)
            layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            agrees(layer, x, layer(x), torch.bfloat16)


def test_inference_mode_first_then_training() -> None:
    layer = a_layer(padding_mode="reflect")
    x = torch.randn(2, 3, 8, 9)
    with torch.inference_mode():
        layer(x)
        layer(x)
    layer(x).square().sum().backward()
    assert layer.coord_weight.grad.abs().max() > 0
    agrees(layer, x, layer(x).detach())


def test_inference_mode_first_then_training_with_frozen_coordinates() -> None:
    layer = a_layer()
    layer.coord_weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 9)
    with torch.inference_mode():
        layer(x)
    assert all(not kept.is_inference() for kept in layer._map_cache._contents.kept.maps.values())
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
    agrees(layer, x, layer(x).detach())


@pytest.mark.parametrize("grad", [True, False])
def test_fake_tensors_do_not_poison_later_calls(grad: bool) -> None:
    layer = a_layer()
    x = torch.randn(2, 3, 8, 9)
    with torch.set_grad_enabled(grad):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (2, 4, 4, 5)
        for _ in range(2):
            agrees(layer, x, layer(x).detach())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (2, 4, 4, 5)


def test_writing_to_an_output_does_not_reach_the_kept_map() -> None:
    layer = a_layer()
    for x in (torch.randn(2, 3, 8, 9), torch.randn(3, 8, 9), torch.randn(1, 3, 8, 9)):
        with torch.no_grad():
            for _ in range(3):
                output = layer(x)
                agrees(layer, x, output)
                output.fill_(7)


def test_maps_are_kept_between_inference_calls_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = a_layer()
    made: list[tuple[int, ...]] = []
    compute = CoordConv2d.compute_branch

    def counting(self: CoordConv2d, size: Any, output_padding: Any, weight: Any) -> Tensor:
        made.append(tuple(size))
        return compute(self, size, output_padding, weight)

    monkeypatch.setattr(CoordConv2d, "compute_branch", counting)
    sizes = [(8, 9 + extra) for extra in range(MapCache.max_maps)]
    with torch.no_grad():
        for _ in range(3):
            for size in sizes:
                layer(torch.randn(1, 3, *size))
        assert made == sizes
        for extra in range(3 * MapCache.max_maps):
            x = torch.randn(1, 3, 20 + extra, 5)
            agrees(layer, x, layer(x))
            assert len(layer._map_cache) <= MapCache.max_maps
    layer(torch.randn(1, 3, 8, 9)).sum().backward()
    assert len(layer._map_cache) == 0


def test_maps_of_a_transposed_layer_are_kept_per_output_size() -> None:
    layer = CoordConvTranspose2d(3, 4, 3, 3, 1, dtype=torch.float64)
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            for first, second in itertools.product(range(3), range(3)):
                output = layer(x, output_size=[10 + first, 13 + second])
                expected = reference.concatenating_conv(
                    x,
                    reference.paper_grid((4, 5)),
                    layer.weight,
                    layer.coord_weight,
                    layer.bias,
                    stride=(3, 3),
                    padding=(1, 1),
                    dilation=(1, 1),
                    transposed=True,
                    output_padding=(first, second),
                )
                close(output, expected)
        close(layer(x), layer(x, output_size=None))


# --- the branch alone ---------------------------------------------------------------------

BRANCHED = {
    "conv": nn.Conv2d(3, 4, 3, 2, 1),
    "same": nn.Conv2d(4, 4, 4, padding="same", groups=2, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1),
}


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_branch_module_plus_convolution_is_a_coordconv(name: str, batch: tuple[int, ...]) -> None:
    plain: Any = copy.deepcopy(BRANCHED[name]).double()
    branch = CoordBranch(ConvGeometry.of(plain), Coordinates(radius=True), dtype=torch.float64)
    x = torch.randn(*batch, plain.in_channels, 7, 9, dtype=torch.float64)
    assert torch.equal(plain(x) + branch(x), plain(x))
    nn.init.normal_(branch.coord_weight)
    expected = reference.concatenating_conv(
        x,
        reference.paper_grid((7, 9), radius=True),
        plain.weight,
        branch.coord_weight,
        plain.bias,
        stride=plain.stride,
        padding=plain.padding,
        dilation=plain.dilation,
        groups=plain.groups,
        padding_mode=plain.padding_mode,
        transposed=plain.transposed,
        output_padding=plain.output_padding,
    )
    close(plain(x) + branch(x), expected)
    assert "coords=(x, y, r)" in repr(branch)


def test_coord_layers_lists_every_holder_of_coordinates_once_by_site() -> None:
    shared = CoordConv2d(1, 1, 1)
    model = nn.Module()
    model.first = shared
    model.plain = nn.Conv2d(1, 1, 1)
    model.again = shared
    model.block = nn.Sequential(CoordConvTranspose2d(1, 1, 1))
    functional = CoordBranch(ConvGeometry.of(nn.Conv2d(1, 1, 1)), Coordinates())
    model.add_module(f"head_{BRANCH_NAME}", functional)
    layers = coord_layers(model)
    assert list(layers) == ["first", "block.0", "head"]
    assert layers["first"] is shared
    assert layers["head"] is functional


def parameters_of(*modules: nn.Module) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(module.parameters() for module in modules)


def test_layer_learns_where_a_pixel_is_and_a_plain_one_does_not() -> None:
    size = (6, 10)
    target = reference.paper_grid(size).float().unsqueeze(0)
    x = torch.ones(1, 1, *size)
    losses = {}
    for name, layer in (("coord", CoordConv2d(1, 2, 1)), ("plain", nn.Conv2d(1, 2, 1))):
        optimizer = torch.optim.SGD(parameters_of(layer), lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["coord"] < 1e-4
    assert losses["plain"] > 0.1
