from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from coordconv_patch import CoordConv2d
from coordconv_patch.errors import CoordConvPatchError, PatchError
from coordconv_patch.layers.conversion import check_convertible, convert_, revert_
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import ConvGeometry, Padding, flat_amounts, pad_amounts
from coordconv_patch.layers.padding_probe import padding_of
from coordconv_patch.layers.patched_classes import patched_class

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100)

DECLARED, SAME = Padding("declared"), Padding("same")


pytestmark = pytest.mark.usefixtures("one_thread")


class StaticSameConv2d(nn.Conv2d):
    """As in lukemelas/EfficientNet-PyTorch: the padding is worked out for one image size."""

    def __init__(self, *args: Any, image_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        amounts = reference.tensorflow_same(
            (image_size, image_size), self.kernel_size, self.stride, self.dilation
        )
        (top, bottom), (left, right) = amounts
        self.static_padding = nn.ZeroPad2d((left, right, top, bottom))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0))
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class KeywordConv2d(nn.Conv2d):
    """Gives its numbers by keyword, as single ints and as a string."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, stride=1, weight=self.weight, bias=self.bias, padding="same")


class ConvThenRelu(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ConvThenBatchNorm(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class InPlaceReluConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class TwoConvs(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return super().forward(x)


class NoConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x


class PerSampleWeights(nn.Conv2d):
    """As CondConv: every sample has a kernel of its own."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.cat([self.weight * 2] * 2)
        x = torch.cat([x, x], dim=1).reshape(1, 2 * n * c, h, w)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, 2)


class ReflectSame(nn.Conv2d):
    """TensorFlow's amounts, but reflected."""

    def forward(self, x: Tensor) -> Tensor:
        amounts = reference.tensorflow_same(
            x.shape[2:], self.kernel_size, self.stride, self.dilation
        )
        x = F.pad(x, flat_amounts(amounts), mode="reflect")
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PadByMinusOne(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), value=-1.0)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ScalesItsInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class CropsItsInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., 1:, 1:])


class OtherStride(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, 2, self.padding)


class Failing(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such thing")


class OwnTransposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(x, output_size) * 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, (2, 0, 1, 0)), weight, bias)


# --- padding_of ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(1, 1, 3, padding=1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
        nn.Conv3d(1, 2, 3),
        nn.ConvTranspose2d(2, 2, 3, stride=2, output_padding=1),
        nn.Conv2d(3, 4, 3, device="meta"),
        weight_norm(nn.Conv2d(3, 4, 3)),
    ],
)
def test_torchs_own_convolutions_declare_their_padding(conv: Any) -> None:
    assert padding_of(conv) == DECLARED


@pytest.mark.parametrize("kernel", [2, 3, 5, (3, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_conv2d_same_of_timm_pads_as_tensorflow(kernel: Any, stride: Any, dilation: int) -> None:
    conv = Conv2dSame(3, 4, kernel, stride, dilation=dilation)
    assert padding_of(conv) == SAME


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (StdConv2d(3, 8, 3, stride=2), DECLARED),
        (StdConv2d(3, 8, 7, stride=2, padding=3), DECLARED),
        (ScaledStdConv2d(3, 8, 3), DECLARED),
        (StdConv2dSame(3, 8, 7, stride=2), SAME),
        (ScaledStdConv2dSame(3, 8, 3, stride=2), SAME),
        (StaticSameConv2d(3, 8, 3, 2, image_size=224), Padding("fixed", ((0, 1), (0, 1)))),
        (StaticSameConv2d(3, 8, 5, 2, image_size=225), Padding("fixed", ((2, 2), (2, 2)))),
        (StaticSameConv2d(3, 8, 1, 1, image_size=7), DECLARED),
        (CausalConv1d(2, 2, 3, dilation=2), Padding("fixed", ((4, 0),))),
        (KeywordConv2d(2, 2, 4, padding="same"), DECLARED),
        (ReflectSame(2, 2, 3, stride=2), Padding("same", (), ("reflect", "reflect"))),
        (OwnConvForward(2, 2, 3), Padding("fixed", ((1, 0), (2, 0)))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_of_a_subclass_is_what_its_forward_does(conv: Any, expected: Padding) -> None:
    assert padding_of(conv) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_padding_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    assert padding_of(Conv2dSame(3, 4, 3, 2).to(dtype)) == SAME
    assert padding_of(StaticSameConv2d(3, 4, 3, 2, image_size=8).to(dtype)).rule == "fixed"


def test_padding_of_grouped_and_depthwise_subclasses() -> None:
    assert padding_of(Conv2dSame(6, 6, 3, 2, groups=6)) == SAME
    assert padding_of(StdConv2dSame(4, 8, 3, 2, groups=2)) == SAME


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (ConvThenRelu(2, 2, 3), "ConvThenRelu changes the convolution's output before it returns"),
        (ConvThenBatchNorm(2, 2, 3), "ConvThenBatchNorm changes the convolution's output"),
        (TwoConvs(2, 2, 3), "TwoConvs calls 2 convolutions, not one"),
        (NoConv(2, 2, 3), "NoConv calls 0 convolutions, not one"),
        (PerSampleWeights(2, 2, 3), "PerSampleWeights convolves with a weight of another shape"),
        (PadByMinusOne(2, 2, 3), r"PadByMinusOne pads its input by no rule known here \(seen at"),
        (ScalesItsInput(2, 2, 3), "ScalesItsInput pads its input by no rule known here"),
        (CropsItsInput(2, 2, 3), "CropsItsInput pads its input by no rule known here"),
        (OtherStride(2, 2, 3), r"OtherStride convolves with stride=2, its attribute says \(1, 1\)"),
        (Failing(2, 2, 3), "Failing failed on a probe of shape .*no such thing"),
        (OwnTransposed(2, 2, 3), "OwnTransposed overrides the forward of a transposed"),
        (Conv2dSame(2, 2, 3, device="meta"), "cannot be watched on the meta device: load the"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_forward_that_a_branch_cannot_follow_is_refused_with_the_reason(
    conv: Any, message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        padding_of(conv)
    assert not isinstance(conv, CoordConvNd)


def test_in_place_activation_is_refused() -> None:
    with pytest.raises(PatchError, match="changes the convolution's output"):
        padding_of(InPlaceReluConv(2, 2, 3))


def test_probe_leaves_training_flags_statistics_and_gradients_alone() -> None:
    conv = spectral_norm(Conv2dSame(3, 4, 3, 2))
    conv.parametrizations.weight[0].eval()
    conv.train(True)
    conv.parametrizations.weight.eval()
    flags = [module.training for module in conv.modules()]
    assert True in flags
    assert False in flags
    before = copy.deepcopy(conv.state_dict())
    assert padding_of(conv) == SAME
    assert [module.training for module in conv.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())
    assert all(parameter.grad is None for parameter in conv.parameters())

    refused = ConvThenBatchNorm(2, 2, 3).train()
    with pytest.raises(PatchError):
        padding_of(refused)
    assert refused.training
    assert refused.norm.training
    assert refused.norm.num_batches_tracked == 0


# --- pad_amounts --------------------------------------------------------------------------


@SETTINGS
@given(
    length=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 3),
)
def test_same_amounts_are_tensorflows(length: int, kernel: int, stride: int, dilation: int) -> None:
    geometry = ConvGeometry(False, 1, 1, (kernel,), (stride,), (0,), (dilation,))
    found = pad_amounts(SAME, [length], geometry)
    assert found == reference.tensorflow_same([length], [kernel], [stride], [dilation])
    padded = length + sum(found[0])
    assert (padded - (kernel - 1) * dilation - 1) // stride + 1 == math.ceil(length / stride)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ((1, 2), [(1, 1), (2, 2)]),
        ("valid", [(0, 0), (0, 0)]),
        ("same", [(1, 2), (2, 2)]),
    ],
)
def test_declared_amounts(declared: str | tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    geometry = ConvGeometry(False, 1, 1, (4, 3), (1, 1), declared, (1, 2))
    assert pad_amounts(DECLARED, (9, 9), geometry) == expected


def test_torchs_same_puts_the_odd_pixel_behind_as_declared_amounts_say() -> None:
    impulse = torch.zeros(1, 1, 5).index_fill(2, torch.tensor(2), 1.0)
    weight = torch.arange(1.0, 5.0).reshape(1, 1, 4)
    geometry = ConvGeometry(False, 1, 1, (4,), (1,), "same", (1,))
    amounts = pad_amounts(DECLARED, (5,), geometry)
    assert amounts == [(1, 2)]
    padded = F.conv1d(F.pad(impulse, flat_amounts(amounts)), weight)
    assert torch.equal(padded, F.conv1d(impulse, weight, padding="same"))


def test_flat_amounts_are_last_dimension_first() -> None:
    assert flat_amounts([(1, 2), (3, 4), (5, 6)]) == [5, 6, 3, 4, 1, 2]


# --- ConvGeometry -------------------------------------------------------------------------

GEOMETRIES: list[tuple[Any, str]] = [
    (nn.Conv2d(3, 64, 7, 2, 3), "3→64 7×7 s2 p3"),
    (nn.Conv2d(8, 8, (3, 5), groups=8, dilation=(1, 2)), "8→8 3×5 d1×2 depthwise"),
    (nn.Conv2d(8, 4, 3, groups=2, padding="same"), "8→4 3×3 psame g2"),
    (nn.Conv2d(8, 4, 3, padding=(0, 1), padding_mode="circular"), "8→4 3×3 p0×1 circular"),
    (nn.Conv1d(2, 3, 5, padding="valid"), "2→3 5 pvalid"),
    (nn.ConvTranspose3d(2, 4, 3, 2, output_padding=1), "2→4 3×3×3 s2 transposed"),
]


@pytest.mark.parametrize(("conv", "text"), GEOMETRIES)
def test_geometry_in_short(conv: Any, text: str) -> None:
    assert str(ConvGeometry.of(conv)) == text


@pytest.mark.parametrize(("conv", "text"), GEOMETRIES)
def test_geometry_round_trips_through_json(conv: Any, text: str) -> None:
    geometry = ConvGeometry.of(conv)
    again = ConvGeometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert again == geometry
    assert hash(again) == hash(geometry)


def test_geometry_reads_every_number_of_the_module() -> None:
    conv = nn.ConvTranspose2d(4, 6, (3, 2), (3, 4), (1, 0), (2, 3), groups=2, dilation=(1, 2))
    assert ConvGeometry.of(conv) == ConvGeometry(
        transposed=True,
        in_channels=4,
        out_channels=6,
        kernel_size=(3, 2),
        stride=(3, 4),
        padding=(1, 0),
        dilation=(1, 2),
        groups=2,
        output_padding=(2, 3),
    )
    assert ConvGeometry.of(nn.Conv2d(1, 1, 3)).output_padding == ()
    assert ConvGeometry.of(nn.Conv3d(1, 1, 3)).ndim == 3


def test_coord_weight_shape_ignores_the_groups() -> None:
    assert ConvGeometry.of(nn.Conv2d(4, 8, (3, 5), groups=4)).coord_weight_shape(2) == (8, 2, 3, 5)
    transposed = ConvGeometry.of(nn.ConvTranspose1d(4, 8, 3, groups=2))
    assert transposed.coord_weight_shape(3) == (3, 8, 3)


# --- patched subclasses against the reference ---------------------------------------------


def standardised(conv: Any) -> Tensor:
    """Weight standardisation, written anew: per filter, biased variance."""
    flat = conv.weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    flat = centred / (centred.square().mean(1, keepdim=True) + conv.eps).sqrt()
    if hasattr(conv, "gain"):
        flat = flat * conv.gain.flatten()[:, None] * (conv.weight[0].numel() ** -0.5)
    return flat.reshape(conv.weight.shape)


def plain_weight(conv: Any) -> Tensor:
    return conv.weight


def as_tensorflow(conv: Any, size: Sequence[int]) -> list[tuple[int, int]]:
    return reference.tensorflow_same(size, conv.kernel_size, conv.stride, conv.dilation)


def as_declared(conv: Any, size: Sequence[int]) -> list[tuple[int, int]]:
    return [(amount, amount) for amount in conv.padding]


def as_made_for_9(conv: Any, size: Sequence[int]) -> list[tuple[int, int]]:
    return reference.tensorflow_same((9, 9), conv.kernel_size, conv.stride, conv.dilation)


WeightOf = Callable[[Any], Tensor]
AmountsOf = Callable[[Any, Sequence[int]], list[tuple[int, int]]]

SUBCLASSES: dict[str, tuple[Callable[[], Any], WeightOf, AmountsOf]] = {
    "Conv2dSame stride 2": (lambda: Conv2dSame(3, 4, 3, 2), plain_weight, as_tensorflow),
    "Conv2dSame stride 3": (lambda: Conv2dSame(3, 4, (2, 5), 3), plain_weight, as_tensorflow),
    "Conv2dSame depthwise": (
        lambda: Conv2dSame(4, 4, 5, 2, groups=4, bias=False),
        plain_weight,
        as_tensorflow,
    ),
    "Conv2dSame dilated": (
        lambda: Conv2dSame(3, 4, 3, (1, 2), dilation=2),
        plain_weight,
        as_tensorflow,
    ),
    "StdConv2d": (lambda: StdConv2d(3, 4, 3, 2), standardised, as_declared),
    "StdConv2dSame": (lambda: StdConv2dSame(3, 4, 7, 2), standardised, as_tensorflow),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(3, 4, 3, bias=True), standardised, as_declared),
    "ScaledStdConv2dSame": (
        lambda: ScaledStdConv2dSame(4, 4, 3, 2, groups=2),
        standardised,
        as_tensorflow,
    ),
    "StaticSameConv2d": (
        lambda: StaticSameConv2d(3, 4, 4, 3, image_size=9),
        plain_weight,
        as_made_for_9,
    ),
}


def patched(conv: Any, *, coords: Coordinates | None = None) -> Any:
    """The conv in float64 with its coordinate class, and coordinate weights that are not zero."""
    conv = conv.double()
    convert_(conv, coords or Coordinates(), check_convertible(conv))
    nn.init.normal_(conv.coord_weight)
    return conv


@pytest.mark.parametrize("name", SUBCLASSES)
def test_patched_subclass_equals_concatenation_padded_its_way(name: str) -> None:
    torch.manual_seed(0)
    make, weight_of, amounts_of = SUBCLASSES[name]
    conv = patched(make())
    for size in ((9, 9), (10, 13), (12, 11)):
        x = torch.randn(2, conv.in_channels, *size, dtype=torch.float64, requires_grad=True)
        output = conv(x)
        expected = reference.concatenating_conv(
            x,
            reference.paper_grid(size),
            weight_of(conv),
            conv.coord_weight,
            conv.bias,
            stride=conv.stride,
            padding=amounts_of(conv, size),
            dilation=conv.dilation,
            groups=conv.groups,
        )
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
        inputs = [x, *conv.parameters()]
        upstream = torch.randn_like(output)
        for found, wanted in zip(
            torch.autograd.grad(output, inputs, upstream),
            torch.autograd.grad(expected, inputs, upstream),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", SUBCLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_subclass_is_bit_equal_at_zero(name: str, dtype: torch.dtype) -> None:
    plain = SUBCLASSES[name][0]().to(dtype)
    conv = copy.deepcopy(plain)
    convert_(conv, Coordinates(), check_convertible(conv))
    x = torch.randn(2, plain.in_channels, 9, 9).to(dtype)
    assert torch.equal(conv(x), plain(x))
    with torch.no_grad():
        assert torch.equal(conv(x), plain(x))


@pytest.mark.parametrize("name", SUBCLASSES)
def test_revert_gives_back_the_class_and_the_state(name: str) -> None:
    plain = SUBCLASSES[name][0]()
    conv = copy.deepcopy(plain)
    convert_(conv, Coordinates(), check_convertible(conv))
    assert isinstance(conv, type(plain))
    assert type(conv) is patched_class(type(plain))
    assert list(conv.state_dict()) == [*plain.state_dict(), "coord_weight"]
    revert_(conv)
    assert type(conv) is type(plain)
    assert vars(conv).keys() == vars(plain).keys()
    assert list(conv.state_dict()) == list(plain.state_dict())


def test_subclass_whose_output_is_kept_by_others_is_not_written_to() -> None:
    class Remembers(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    conv = patched(Remembers(2, 3, 3))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    output = conv(x)
    assert torch.equal(conv.last, F.conv2d(x, conv.weight, conv.bias))
    assert not torch.equal(conv.last, output)


# --- what may be converted at all ---------------------------------------------------------


def test_unconvertible_modules_are_refused_with_the_reason() -> None:
    with pytest.raises(PatchError, match=r"it already is a CoordConv with coordinates \(x, y\)"):
        check_convertible(CoordConv2d(1, 1, 3))
    with pytest.raises(PatchError, match="it is lazy: run the model once"):
        check_convertible(nn.LazyConv2d(4, 3))
    with pytest.raises(PatchError, match=r"Linear is not a torch\.nn convolution"):
        check_convertible(nn.Linear(2, 2))  # type: ignore[arg-type]
    hooked = nn.Conv2d(1, 1, 3)
    hooked.forward = hooked.forward  # type: ignore[method-assign]
    with pytest.raises(PatchError, match="its forward is replaced on the instance"):
        check_convertible(hooked)
    complex_conv = nn.Conv2d(1, 1, 3, dtype=torch.complex64)
    with pytest.raises(PatchError, match=r"its weight has dtype torch\.complex64"):
        check_convertible(complex_conv)
    assert issubclass(PatchError, RuntimeError)
    assert issubclass(PatchError, CoordConvPatchError)


def test_a_convolution_that_was_lazy_is_convertible_after_its_first_run() -> None:
    lazy = nn.LazyConv2d(4, 3)
    lazy(torch.zeros(1, 2, 5, 5))
    assert check_convertible(lazy) == DECLARED


@pytest.mark.parametrize("plain", [nn.Conv2d(3, 4, 3), Conv2dSame(3, 4, 3, 2)])
def test_parametrized_convolution_converts_and_sheds_its_parametrization(plain: Any) -> None:
    conv = weight_norm(copy.deepcopy(plain))
    convert_(conv, Coordinates(), check_convertible(conv))
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(conv(x), plain(x))
    assert parametrize.is_parametrized(conv, "weight")
    nn.init.normal_(conv.coord_weight)
    before = conv(x)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is patched_class(type(plain))
    torch.testing.assert_close(conv(x), before)
    assert not torch.allclose(before, plain(x))


def test_parametrized_convolution_reverts_with_its_parametrization() -> None:
    conv = weight_norm(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 7, 9)
    before = conv(x)
    convert_(conv, Coordinates(), check_convertible(conv))
    revert_(conv)
    assert parametrize.is_parametrized(conv, "weight")
    assert torch.equal(conv(x), before)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is nn.Conv2d
