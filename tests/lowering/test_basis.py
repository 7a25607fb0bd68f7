"""Images that the responses of all taps are sums of, against loops over taps and pixels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import CONVS, paper_grid, tensorflow_same
from timm.layers import Conv2dSame
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.lowering.basis import SeparableBasis, factors, separable_basis
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite, lowering_sites
from coordconv_patch.lowering.strips import Strip, banded_strip, flat_strip


def site_of(conv: nn.Module, size: tuple[int, ...], **options: Any) -> LoweringSite:
    """The float64 site of one patched convolution with random coordinate weights."""
    torch.manual_seed(0)
    model = ccp.patch(nn.Sequential(conv).double().eval(), "all", **options)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    (site,) = lowering_sites(model, torch.zeros(1, conv.in_channels, *size, dtype=torch.float64))
    return site


def pad_with_loops(grid: Tensor, pairs: list[tuple[int, int]], mode: str) -> Tensor:
    """The channels (K, *size) padded, pixel by pixel, each read from where its mode says."""
    sizes = grid.shape[1:]

    def source(index: int, length: int) -> int | None:
        if 0 <= index < length:
            return index
        if mode == "zeros":
            return None
        if mode == "replicate":
            return min(max(index, 0), length - 1)
        if mode == "circular":
            return index % length
        return -index if index < 0 else 2 * (length - 1) - index

    padded = [length + sum(pair) for length, pair in zip(sizes, pairs, strict=True)]
    result = torch.zeros(len(grid), *padded, dtype=grid.dtype)
    for pixel in np.ndindex(*padded):
        at = [
            source(index - pair[0], length)
            for index, pair, length in zip(pixel, pairs, sizes, strict=True)
        ]
        if None not in at:
            result[(slice(None), *pixel)] = grid[(slice(None), *at)]
    return result


def responses_by_loops(
    grid: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    pairs: list[tuple[int, int]],
    mode: str,
) -> Tensor:
    """The map of each tap alone, (K * taps, *output size): a shifted, strided cut of the grid."""
    padded = pad_with_loops(grid, pairs, mode)
    output = [
        (length - (k - 1) * d - 1) // s + 1
        for length, k, s, d in zip(padded.shape[1:], kernel, stride, dilation, strict=True)
    ]
    found = []
    for channel in padded:
        for tap in itertools.product(*(range(k) for k in kernel)):
            cut = tuple(
                slice(u * d, u * d + (n - 1) * s + 1, s)
                for u, d, n, s in zip(tap, dilation, output, stride, strict=True)
            )
            found.append(channel[cut])
    return torch.stack(found)


def images_of(basis: SeparableBasis) -> Tensor:
    """The images (R, *output size), by loops over images and pixels."""
    images = []
    for r in range(basis.rank):
        image = torch.ones((), dtype=torch.float64)
        for matrix in basis.vectors:
            image = torch.stack([image * number for number in matrix[r]], dim=-1)
        images.append(image)
    return torch.stack(images)


def reproduced(basis: SeparableBasis) -> Tensor:
    """What the basis makes of each tap, (T, *output size)."""
    return torch.einsum("tr,r...->t...", basis.coefficients, images_of(basis))


def assert_lays_out(strip: Strip, basis: SeparableBasis) -> None:
    """A kernel for one image alone gives this image, and no place costs more than needed."""
    one_each = torch.eye(basis.rank, dtype=torch.float64)
    convolve = CONVS[len(basis.vectors), False]
    given = convolve(strip.tensor(), strip.kernel(one_each), None, 1, strip.padding, strip.dilation)
    assert torch.equal(given[0], images_of(basis))
    assert strip.width <= basis.rank
    assert sorted(strip.images[strip.images >= 0].tolist()) == list(range(basis.rank))


def assert_reproduces(site: LoweringSite, expected: Tensor) -> SeparableBasis | None:
    """The basis gives each tap's response; there is none only where all responses are zero."""
    basis = site.basis(site.calls[0])
    if not expected.any():
        assert basis is None
        return None
    assert basis is not None
    scale = expected.abs().max()
    assert reproduced(basis).shape == expected.shape
    assert (reproduced(basis) - expected).abs().max() <= 1e-8 * scale
    assert basis.rank <= len(expected)
    assert_lays_out(banded_strip(basis), basis)
    return basis


MODES = ["zeros", "reflect", "replicate", "circular"]
CONVENTIONS: list[tuple[ccp.Coordinates, dict[str, Any]]] = [
    (ccp.Coordinates(), {}),
    (ccp.Coordinates(align_corners=False), {"align_corners": False}),
    (ccp.Coordinates(order="yx", value_range=(0.0, 1.0)), {"order": "yx", "value_range": (0, 1)}),
    (ccp.Coordinates(fourier=1), {"fourier": 1}),
]


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    ndim = draw(st.integers(1, 3))
    longest = (9, 7, 4)[ndim - 1]

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    geometry = {
        "size": numbers(1, longest),
        "kernel_size": numbers(1, (5, 4, 2)[ndim - 1]),
        "stride": numbers(1, 3),
        "padding": draw(st.one_of(st.just("same"), st.just(numbers(0, 3)))),
        "dilation": numbers(1, 2),
        "padding_mode": draw(st.sampled_from(MODES)),
    }
    if geometry["padding"] == "same":
        geometry["stride"] = (1,) * ndim
    return geometry


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometry=geometries(), convention=st.sampled_from(CONVENTIONS))
def test_the_basis_reproduces_the_response_of_every_tap(
    geometry: dict[str, Any], convention: tuple[ccp.Coordinates, dict[str, Any]]
) -> None:
    size = geometry.pop("size")
    coords, described = convention
    kernel, dilation, mode = (geometry[k] for k in ("kernel_size", "dilation", "padding_mode"))
    if geometry["padding"] == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(amount, amount) for amount in geometry["padding"]]
    for length, k, d, pair in zip(size, kernel, dilation, pairs, strict=True):
        assume(length + sum(pair) >= d * (k - 1) + 1)
        assume(mode != "reflect" or max(pair) < length)
        assume(mode != "circular" or max(pair) <= length)
    conv = getattr(nn, f"Conv{len(size)}d")(2, 3, **geometry)
    site = site_of(conv, size, coords=coords)
    grid = paper_grid(size, **described)
    expected = responses_by_loops(grid, kernel, geometry["stride"], dilation, pairs, mode)
    assert_reproduces(site, expected)


@pytest.mark.parametrize("size", [(5, 6), (1, 7), (6, 1), (2, 2)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (4, 3), (2, 2), (1, 1)])
def test_transposed_convolutions(kernel: int, stride: int, size: tuple[int, int]) -> None:
    conv = nn.ConvTranspose2d(2, 3, kernel, stride, padding=kernel // 3, dilation=1)
    site = site_of(conv, size)
    taps = []
    for channel in paper_grid(size):
        for u, v in itertools.product(range(kernel), repeat=2):
            image = torch.zeros(
                (size[0] - 1) * stride + kernel,
                (size[1] - 1) * stride + kernel,
                dtype=torch.float64,
            )
            for i, j in np.ndindex(*size):
                image[i * stride + u, j * stride + v] += channel[i, j]
            cut = kernel // 3
            taps.append(image[cut : image.shape[0] - cut, cut : image.shape[1] - cut])
    assert_reproduces(site, torch.stack(taps))


@pytest.mark.parametrize("size", [(7, 10), (8, 9), (1, 6), (3, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_tensorflow_same_padding(stride: int, size: tuple[int, int]) -> None:
    conv = Conv2dSame(2, 3, 4, stride=stride)
    pairs = tensorflow_same(size, (4, 4), (stride, stride), (1, 1))
    expected = responses_by_loops(
        paper_grid(size), (4, 4), (stride, stride), (1, 1), pairs, "zeros"
    )
    assert_reproduces(site_of(conv, size), expected)


def test_a_window_of_a_larger_image() -> None:
    window = ccp.Coordinates(window=ccp.Window((2, 3), (6, 9), (20, 30)))
    site = site_of(nn.Conv2d(2, 3, 3, padding=1), (6, 9), coords=window)
    grid = paper_grid((20, 30))[:, 2:8, 3:12]
    expected = responses_by_loops(grid, (3, 3), (1, 1), (1, 1), [(1, 1)] * 2, "zeros")
    basis = assert_reproduces(site, expected)
    assert basis is not None
    assert basis.rank == 15


# --- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "options", "rank", "width"),
    [
        (1, {}, 2, 2),
        (3, {"padding": 1}, 15, 7),
        (3, {"padding": 1, "stride": 2}, 8, 5),
        (5, {"padding": 2}, 35, 12),
        (7, {"padding": 3, "stride": 2}, 24, 10),
        (3, {}, 3, 3),
        (3, {"padding": 1, "padding_mode": "circular"}, 15, 7),
    ],
)
def test_the_number_of_images(kernel: int, options: dict[str, Any], rank: int, width: int) -> None:
    """All images, and those that an output value takes."""
    site = site_of(nn.Conv2d(2, 3, kernel, **options), (32, 48))
    basis = site.basis(site.calls[0])
    assert basis is not None
    assert basis.rank == rank
    assert site.num_images == width
    assert site.num_taps == 2 * kernel**2


@pytest.mark.parametrize("size", [(24, 36), (32, 48)])
def test_no_basis_is_larger_than_the_span_of_the_responses_needs(size: tuple[int, int]) -> None:
    """R lies between the rank of the responses and the number of taps."""
    for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 2), (7, 2, 3)):
        site = site_of(nn.Conv2d(2, 3, kernel, stride, padding), size)
        expected = responses_by_loops(
            paper_grid(size),
            (kernel, kernel),
            (stride, stride),
            (1, 1),
            [(padding, padding)] * 2,
            "zeros",
        )
        span = torch.linalg.matrix_rank(expected.flatten(1), rtol=1e-9).item()
        basis = site.basis(site.calls[0])
        assert basis is not None
        assert span <= basis.rank < site.num_taps


def test_a_radius_has_no_basis() -> None:
    site = site_of(nn.Conv2d(2, 3, 3), (6, 9), coords=ccp.Coordinates(radius=True))
    assert site.basis(site.calls[0]) is None
    assert site.banded_strip(site.calls[0]) is None
    assert site.num_images is None


def test_a_radius_of_one_row_is_a_product_of_vectors() -> None:
    site = site_of(nn.Conv2d(2, 3, 1), (1, 9), coords=ccp.Coordinates(radius=True))
    assert site.num_images == 2  # x, and its magnitude


def test_zero_responses_have_no_basis() -> None:
    assert separable_basis(torch.zeros(4, 3, 3, dtype=torch.float64), [0, 0, 1, 1]) is None


# --- the strip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [flat_strip, banded_strip])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_strip_convolved_with_its_kernel_is_the_map(
    ndim: int, transposed: bool, layout: Callable[[SeparableBasis], Strip]
) -> None:
    size = (8, 7, 5)[:ndim]
    kind = f"ConvTranspose{ndim}d" if transposed else f"Conv{ndim}d"
    site = site_of(getattr(nn, kind)(2, 3, 3, padding=1, stride=2), size)
    call = site.calls[0]
    basis = site.basis(call)
    assert basis is not None
    strip = layout(basis)
    kernel = site.kernel(call, strip).tensor
    grid = paper_grid(size).unsqueeze(0)
    expected = CONVS[ndim, transposed](grid, site.layer.coord_weight.detach(), None, 2, 1)
    convolve = CONVS[ndim, False]
    actual = convolve(strip.tensor(), kernel, None, 1, strip.padding, strip.dilation)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert torch.equal(strip.add_up(kernel, strip.tensor()), actual)
    if layout is flat_strip:
        *others, width = call.output_size
        assert tuple(kernel.shape) == (3, 1, *(1,) * (ndim - 1), basis.rank)
        assert strip.dilation == (*(1,) * (ndim - 1), width)
        assert tuple(strip.tensor().shape) == (1, 1, *others, basis.rank * width)


def test_images_of_a_flat_strip_stand_side_by_side() -> None:
    site = site_of(nn.Conv2d(2, 3, 3, padding=1), (5, 4))
    basis = site.basis(site.calls[0])
    assert basis is not None
    rows, columns = basis.vectors
    strip = flat_strip(basis)
    assert (strip.width, strip.dilation, strip.padding) == (basis.rank, (1, 4), (0, 0))
    for r in range(basis.rank):
        image = strip.tensor()[0, 0, :, 4 * r : 4 * (r + 1)]
        torch.testing.assert_close(image, torch.outer(rows[r], columns[r]))


def test_border_images_have_bands_of_their_own() -> None:
    site = site_of(nn.Conv2d(2, 3, 5, padding=2), (20, 16))
    strip = site.banded_strip(site.calls[0])
    assert strip is not None
    assert tuple(strip.tensor().shape) == (1, 1, 2 + 20 + 2, 12 * 16)
    assert strip.dilation == (20, 16)
    assert strip.padding == (18, 0)
    assert [(row >= 0).sum().item() for row in strip.images] == [12, 11, 12]
    inner = strip.bands[1][0]  # rows of the images that are not for one border row
    assert not inner[:, [0, 1, 18, 19]].any()


@pytest.mark.parametrize("conv", [nn.Conv3d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)])
def test_the_strips_factors_have_its_numbers_in_its_order(conv: nn.Module) -> None:
    size = (4, 5, 3)[: conv.weight.dim() - 2]
    site = site_of(conv, size)
    strip = site.banded_strip(site.calls[0])
    assert strip is not None
    products = [functools.reduce(torch.mul, factors).flatten() for factors in strip.factors()]
    assert torch.equal(torch.cat(products), strip.tensor().flatten())


# --- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(7,), (5, 9), (1, 8), (6, 1), (3, 4, 5)])
@pytest.mark.parametrize("convention", range(len(CONVENTIONS)))
def test_factors_multiply_to_the_channels_to_the_last_bit(
    convention: int, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    images = CONVENTIONS[convention][0].grid(size, dtype=dtype).unsqueeze(0)
    found = factors(images)
    assert found is not None
    assert len(found) == len(size)
    product = found[0]
    for vector in found[1:]:
        product = product * vector
    assert product.dtype == dtype
    assert torch.equal(product, images)
    assert sum(vector.numel() for vector in found) == images.shape[1] * sum(size)


def test_a_radius_has_no_factors() -> None:
    assert factors(ccp.Coordinates(radius=True).grid((5, 9)).unsqueeze(0)) is None


def test_products_that_would_round_are_no_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, generator=generator) for n in (9, 11))
    outer = torch.outer(left, right)
    found = factors(outer[None, None])
    if found is not None:
        assert torch.equal((found[0] * found[1])[0, 0], outer)
    outer[3, 4] = torch.nextafter(outer[3, 4], torch.tensor(10.0))
    assert factors(outer[None, None]) is None


# --- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "fourier"),
    [
        (3, 1, (56, 56), 0),
        (3, 1, (1000, 700), 0),
        (7, 2, (1000, 700), 0),
        (5, 1, (9, 8), 0),
        (3, 1, (56, 48), 2),
        (7, 2, (96, 80), 2),
    ],
)
def test_float32_rounds_the_separable_form_by_a_few_units(
    kernel: int, stride: int, size: tuple[int, int], fourier: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, kernel, stride, kernel // 2)
    model = ccp.patch(nn.Sequential(conv).eval(), "all", coords=ccp.Coordinates(fourier=fourier))
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    (site,) = lowering_sites(model, torch.zeros(1, 2, *size))
    call = site.calls[0]
    constant = LOWERINGS["separable"].constant(site, call)
    assert constant is not None
    strip = constant.strip
    assert strip is not None
    weight = site.kernel(call, strip).tensor
    assert weight.dtype == torch.float32
    actual = F.conv2d(constant.tensor, weight, None, 1, strip.padding, strip.dilation)
    grid = paper_grid_fast(size, fourier)
    exact = F.conv2d(grid, site.layer.coord_weight.detach().double(), None, stride, kernel // 2)
    scale = exact.abs().amax(dim=(0, 2, 3), keepdim=True)
    error = ((actual.double() - exact).abs() / scale).max().item()
    assert error < 8 * torch.finfo(torch.float32).eps


def paper_grid_fast(size: tuple[int, int], fourier: int) -> Tensor:
    """:func:`reference.paper_grid` of the first axes, one row and one column at a time."""
    x = paper_grid((1, size[1]), fourier=fourier)[:, 0]
    y = paper_grid((size[0], 1), fourier=fourier)[:, :, 0]
    # Channels of the last axis, then of the first: x, y, then a sine and a cosine of each.
    along_x = [0] + [2 + 4 * o + i for o in range(fourier) for i in (0, 1)]
    channels = [
        (x[c][None, :] if c in along_x else y[c][:, None]).expand(size) for c in range(len(x))
    ]
    return torch.stack(channels).unsqueeze(0)
