"""Lowering: every form is the same sum, against an independent concatenating reference."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from concat_model import concatenating
from reference import concatenating_conv, paper_grid, tensorflow_same
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ExportError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.lowering.lower import Lowered, lower_
from coordconv_patch.lowering.registry import LOWERINGS

STORED = [lowering for lowering in LOWERINGS if lowering != "computed"]


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(generator=generator)
    return model


def patched_conv(conv: nn.Module, **options: Any) -> nn.Sequential:
    """A float64 model of one patched convolution with random coordinate weights."""
    model = nn.Sequential(conv).double().eval()
    return filled(ccp.patch(model, "all", **options))


def lowered(model: nn.Module, inputs: Any, lowering: str) -> tuple[nn.Module, Lowered]:
    made = copy.deepcopy(model)
    return made, lower_(made, inputs, lambda site: lowering)


def reference_of(layer: ccp.CoordConv2d, x: Tensor, **options: Any) -> Tensor:
    """The layer as the paper writes it, from its numbers and weights alone."""
    ndim = len(layer.kernel_size)
    return concatenating_conv(
        x,
        paper_grid(x.shape[-ndim:]),
        options.pop("weight", layer.weight),
        layer.coord_weight,
        layer.bias,
        stride=layer.stride,
        padding=options.pop("padding", layer.padding),
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        transposed=layer.transposed,
        output_padding=options.pop("output_padding", layer.output_padding),
    )


def assert_lowers(model: nn.Module, x: Tensor, expected: Tensor, lowering: str) -> nn.Module:
    """The lowered model, the model and the reference agree, and coordinates matter in them."""
    made, result = lowered(model, x, lowering)
    assert set(result.lowerings.values()) == {lowering}
    with torch.no_grad():
        assert (expected - ccp.unpatch(model, discard=True)(x)).abs().max() > 1e-3
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=1e-10)
    return made


def random_conv(ndim: int, seed: int) -> tuple[nn.Module, Tensor]:
    """A convolution of random geometry, and an input with sides of different length."""
    draw = random.Random(1000 * ndim + seed)
    groups = draw.choice([1, 1, 2, 4])
    kernel = tuple(draw.choice([1, 2, 3, 4]) for _ in range(ndim))
    dilation = tuple(draw.choice([1, 1, 2]) for _ in range(ndim))
    stride = tuple(draw.choice([1, 1, 2, 3]) for _ in range(ndim))
    padding: Any = tuple(draw.choice([0, 1, 2]) for _ in range(ndim))
    if draw.random() < 0.3:
        padding = draw.choice(["same", "valid"])
        stride = (1,) * ndim if padding == "same" else stride
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    kind = getattr(nn, f"Conv{ndim}d")
    torch.manual_seed(seed)
    conv = kind(
        4,
        draw.choice([4, 8]),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw.random() < 0.5,
    )
    sizes = draw.sample(range(8, 14), ndim)
    return conv, torch.randn(draw.choice([1, 3]), 4, *sizes, dtype=torch.float64)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_random_convolutions_equal_the_concatenating_reference(
    ndim: int, seed: int, lowering: str
) -> None:
    conv, x = random_conv(ndim, seed)
    model = patched_conv(conv)
    assert_lowers(model, x, reference_of(model[0], x), lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", (2, 1), 0])
def test_padding_modes_and_even_kernels(padding: Any, mode: str, lowering: str) -> None:
    torch.manual_seed(0)
    model = patched_conv(nn.Conv2d(3, 5, (4, 3), padding=padding, padding_mode=mode))
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    assert_lowers(model, x, reference_of(model[0], x), lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_up_to_depthwise(groups: int, lowering: str) -> None:
    torch.manual_seed(0)
    model = patched_conv(nn.Conv2d(6, 12, 3, padding=1, stride=2, groups=groups))
    x = torch.randn(2, 6, 7, 10, dtype=torch.float64)
    assert_lowers(model, x, reference_of(model[0], x), lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_transposed_convolutions(ndim: int, groups: int, lowering: str) -> None:
    torch.manual_seed(0)
    kind = getattr(nn, f"ConvTranspose{ndim}d")
    model = patched_conv(
        kind(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=1, groups=groups)
    )
    x = torch.randn(2, 4, *(5, 7, 4)[:ndim], dtype=torch.float64)
    assert_lowers(model, x, reference_of(model[0], x), lowering)


class AskedSize(nn.Module):
    """A transposed convolution that is asked for an output size at each call."""

    def __init__(self, sizes: list[tuple[int, int]], groups: int = 1) -> None:
        super().__init__()
        self.sizes = sizes
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.up(x, output_size=size).flatten(1) for size in self.sizes], dim=1)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("groups", [1, 2])
def test_asked_output_sizes_of_one_transposed_convolution(groups: int, lowering: str) -> None:
    torch.manual_seed(0)
    model = filled(ccp.patch(AskedSize([(13, 19), (15, 21)], groups).double().eval(), "all"))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    parts = [reference_of(model.up, x, output_padding=padding) for padding in ((0, 0), (2, 2))]
    assert [tuple(part.shape[2:]) for part in parts] == [(13, 19), (15, 21)]
    expected = torch.cat([part.flatten(1) for part in parts], dim=1)
    assert_lowers(model, x, expected, lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("size", [(7, 10), (8, 9), (6, 11)])
@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2dSame])
def test_tensorflow_same_padding(
    kind: type[nn.Conv2d], size: tuple[int, int], lowering: str
) -> None:
    torch.manual_seed(0)
    model = patched_conv(kind(3, 4, 3, stride=2))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    layer = model[0]
    amounts = tensorflow_same(size, layer.kernel_size, layer.stride, layer.dilation)
    expected = reference_of(layer, x, padding=amounts, weight=standardised(layer))
    assert_lowers(model, x, expected, lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_standardised_weights_stay_standardised_and_coordinates_do_not(
    kind: type[nn.Conv2d], lowering: str
) -> None:
    torch.manual_seed(0)
    model = patched_conv(kind(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    expected = reference_of(model[0], x, weight=standardised(model[0]))
    assert_lowers(model, x, expected, lowering)


def standardised(layer: Any) -> Tensor:
    """Weight standardisation (Qiao et al. 2019; scaled: Brock et al. 2021), where it applies."""
    if "StdConv" not in type(layer).__name__:
        return layer.weight
    weight = layer.weight
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
    weight = (weight - mean) / (variance + layer.eps).sqrt()
    return weight * layer.gain * layer.scale if hasattr(layer, "gain") else weight


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_unbatched_input(groups: int, transposed: bool, lowering: str) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = patched_conv(kind(4, 6, 3, stride=2, padding=1, groups=groups))
    x = torch.randn(4, 6, 9, dtype=torch.float64)
    made = assert_lowers(model, x, reference_of(model[0], x), lowering)
    assert made(x).dim() == 3


class Pyramid(nn.Module):
    """One convolution at two sizes, as a detector's shared head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) + self.conv(F.avg_pool2d(x, 2)).mean((2, 3))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_convolution_at_two_sizes_gets_coordinates_of_each(lowering: str) -> None:
    torch.manual_seed(0)
    model = filled(ccp.patch(Pyramid().double().eval(), "all"))
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    small = F.avg_pool2d(x, 2)
    expected = sum(reference_of(model.conv, part).mean((2, 3)) for part in (x, small))
    made, result = lowered(model, x, lowering)
    torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=1e-10)
    assert len(result.constants) == (0 if lowering == "computed" else 2)


class Functional(nn.Module):
    """Functional convolutions, a transposed one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.back = nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, None, 2, 1)
        return F.conv_transpose2d(y.relu(), self.back, stride=2, padding=1, output_padding=1)


def functional_reference(model: nn.Module, x: Tensor) -> Tensor:
    layers = coord_layers(model)
    common = {"dilation": (1, 1), "stride": (2, 2), "padding": (1, 1)}
    grid = paper_grid(x.shape[2:])
    weight = layers["kernel"].coord_weight
    y = concatenating_conv(x, grid, model.kernel, weight, None, **common).relu()
    return concatenating_conv(
        y,
        paper_grid(y.shape[2:]),
        model.back,
        layers["back"].coord_weight,
        None,
        transposed=True,
        output_padding=(1, 1),
        **common,
    )


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("lowering", ["map", "branch", "separable", "computed"])
def test_functional_convolutions_in_plain_and_graph_modules(lowering: str, traced: bool) -> None:
    torch.manual_seed(0)
    plain = Functional().double().eval()
    model = filled(ccp.patch(fx.symbolic_trace(plain) if traced else plain, "all"))
    assert isinstance(model, fx.GraphModule) is traced
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = functional_reference(model, x)
    made, _ = lowered(model, x, lowering)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=1e-10)


class UnbatchedFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


@pytest.mark.parametrize("lowering", ["map", "branch", "separable", "computed"])
def test_unbatched_functional_convolution(lowering: str) -> None:
    torch.manual_seed(0)
    model = filled(ccp.patch(UnbatchedFunctional().double().eval(), "all"))
    x = torch.randn(3, 6, 9, dtype=torch.float64)
    expected = concatenating_conv(
        x,
        paper_grid((6, 9)),
        model.kernel,
        coord_layers(model)["kernel"].coord_weight,
        None,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
    )
    made, _ = lowered(model, x, lowering)
    torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=1e-10)


def test_a_functional_convolution_has_no_channels_form() -> None:
    model = ccp.patch(Functional().eval(), "all")
    with pytest.raises(ExportError, match=r"kernel is a functional .*choose 'branch' or 'map'"):
        lower_(model, torch.randn(1, 3, 8, 12), lambda site: "channels")


class CallsByKeyword(nn.Conv2d):
    """A subclass that names every argument of its convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input=input, weight=self.weight, bias=self.bias, stride=self.stride)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_subclass_that_calls_its_convolution_by_keyword(lowering: str) -> None:
    torch.manual_seed(0)
    model = patched_conv(CallsByKeyword(3, 4, 3, stride=2))
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    assert_lowers(model, x, reference_of(model[0], x), lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_parametrized_weight_is_followed(lowering: str) -> None:
    torch.manual_seed(0)
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    model = patched_conv(conv)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    assert_lowers(model, x, reference_of(model[0], x), lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_whole_network_equals_its_concatenating_form(lowering: str) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 5, 1),
    ]
    model = nn.Sequential(*layers).double()
    model(torch.randn(4, 3, 12, 16, dtype=torch.float64) + 1)  # batch norm statistics of its own
    model = filled(ccp.patch(model.eval(), "all"))
    x = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    assert_lowers(model, x, concatenating(model)(x), lowering)


RADIUS = ccp.Coordinates(order="yx", align_corners=False, radius=True)


@pytest.mark.parametrize("lowering", [form for form in LOWERINGS if form != "separable"])
def test_conventions_with_more_channels(lowering: str) -> None:
    torch.manual_seed(0)
    model = patched_conv(nn.Conv2d(3, 4, 3, padding=1), coords=RADIUS)
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    layer = model[0]
    expected = concatenating_conv(
        x,
        paper_grid((6, 9), order="yx", align_corners=False, radius=True),
        layer.weight,
        layer.coord_weight,
        layer.bias,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    assert_lowers(model, x, expected, lowering)


def test_a_radius_has_no_separable_form_and_the_error_says_why() -> None:
    model = patched_conv(nn.Conv2d(3, 4, 3, padding=1), coords=RADIUS)
    with pytest.raises(
        ExportError,
        match=r"0 has no 'separable' form, .*\(y, x, r\).* not each depend on one axis alone: "
        r"choose 'branch'",
    ):
        lower_(model, torch.zeros(1, 3, 6, 9, dtype=torch.float64), lambda site: "separable")


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_fourier_features_are_separable_too(lowering: str) -> None:
    torch.manual_seed(0)
    model = patched_conv(nn.Conv2d(3, 4, 3, padding=1), coords=ccp.Coordinates(fourier=2))
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    layer = model[0]
    grid = paper_grid((6, 9), fourier=2)
    expected = concatenating_conv(
        x,
        grid,
        layer.weight,
        layer.coord_weight,
        layer.bias,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    assert_lowers(model, x, expected, lowering)


# --- what else a lowering promises --------------------------------------------------------------


def two_convs() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    return filled(ccp.patch(model.eval(), "all"))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_parameter_names_and_state_stay(lowering: str) -> None:
    model = two_convs()
    made, _ = lowered(model, torch.randn(1, 3, 6, 8), lowering)
    assert list(made.state_dict()) == list(model.state_dict())
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("lowering", STORED)
def test_another_size_is_refused_by_the_layers_name(lowering: str) -> None:
    made, _ = lowered(two_convs(), torch.randn(1, 3, 6, 8), lowering)
    with pytest.raises(ExportError, match=r"0 is called at size \(7, 8\), but was at \[\(6, 8\)\]"):
        made(torch.randn(1, 3, 7, 8))
    with pytest.raises(ExportError, match=r"\(8, 6\)"):
        made(torch.randn(1, 3, 8, 6))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_another_batch_size_is_welcome(lowering: str) -> None:
    model = two_convs()
    made, _ = lowered(model, torch.randn(2, 3, 6, 8), lowering)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 6, 8)
        torch.testing.assert_close(made(x), model(x))


def test_computed_works_at_any_size() -> None:
    model = two_convs()
    made, result = lowered(model, torch.randn(1, 3, 6, 8), "computed")
    assert result.constants == ()
    x = torch.randn(1, 3, 11, 5)
    torch.testing.assert_close(made(x), model(x))


def test_coordinate_channels_of_one_size_are_stored_once() -> None:
    for lowering in ("channels", "branch"):
        _, result = lowered(two_convs(), torch.randn(1, 3, 6, 8), lowering)
        assert shapes_of(result) == [(1, 2, 6, 8)]
    _, result = lowered(two_convs(), torch.randn(1, 3, 6, 8), "map")
    assert shapes_of(result) == [(1, 4, 6, 8)] * 2
    left, right = (constant.map_of for constant in result.constants)
    assert left[0] is right[0]  # both maps are made of one strip
    _, result = lowered(two_convs(), torch.randn(1, 3, 6, 8), "separable")
    assert shapes_of(result) == [(1, 1, 1 + 6 + 1, 7 * 8)]


def shapes_of(result: Lowered) -> list[tuple[int, ...]]:
    return [tuple(constant.tensor.shape) for constant in result.constants]


def test_layers_that_pad_differently_do_not_share_their_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
    )
    model = filled(ccp.patch(model.double().eval(), "all"))
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    expected = reference_of(model[1], reference_of(model[0], x))
    for lowering in STORED:
        assert_lowers(model, x, expected, lowering)


def test_each_site_gets_the_form_chosen_for_it() -> None:
    model = two_convs()
    made = copy.deepcopy(model)
    forms = {"0": "map", "1": "channels"}
    result = lower_(made, torch.randn(1, 3, 6, 8), lambda site: forms[site.name])
    assert result.lowerings == forms
    assert shapes_of(result) == [(1, 4, 6, 8), (1, 2, 6, 8)]
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(made(x), model(x))


def test_recording_sizes_leaves_no_hooks_and_no_training_mode() -> None:
    model = two_convs().train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    lower_(model, torch.randn(1, 3, 6, 8), lambda site: "map")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(module.training for module in model.modules())


class Spare(nn.Module):
    """A convolution that the forward pass never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.spare = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_layer_that_is_never_called_gets_no_constant(lowering: str) -> None:
    model = filled(ccp.patch(Spare().eval(), "all"))
    made, result = lowered(model, torch.randn(1, 3, 6, 8), lowering)
    assert len(result.constants) == (0 if lowering == "computed" else 1)
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(made(x), model(x))


def test_constants_follow_the_weights_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = two_convs().to(dtype)
        for lowering in STORED:
            _, result = lowered(model, torch.randn(1, 3, 6, 8, dtype=dtype), lowering)
            assert {constant.tensor.dtype for constant in result.constants} == {dtype}
            bands = [band for constant in result.constants for band in constant.factors or ()]
            parts = [part for band in bands for part in band]
            assert {part.dtype for part in parts} == (set() if lowering == "map" else {dtype})


@pytest.mark.parametrize("inputs", ["keyword", "tuple", "both"])
def test_inputs_of_every_form_fix_the_sizes(inputs: str) -> None:
    model = filled(ccp.patch(Gated().eval(), "all"))
    x, gate = torch.randn(2, 3, 6, 8), torch.randn(2, 1, 1, 1)
    forms: dict[str, Any] = {
        "keyword": ({"x": x, "gate": gate},),
        "tuple": (x, gate),
        "both": (x, {"gate": gate}),
    }
    made, _ = lowered(model, forms[inputs], "map")
    torch.testing.assert_close(made(x, gate), model(x, gate))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.conv(input=x) * gate
