"""Recipes of coordinate constants: what they evaluate to, their bytes, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_graphs import (
    CPU,
    PADDED_3X3,
    HandMadeGraph,
    assert_close,
    banded_strip_bytes,
    checked,
    count,
    flat_strip_bytes,
    optimized_operators,
    run,
    serialized,
)
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from reference import paper_grid
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export.graph_passes.compact_constants import (
    CompactConstants,
)
from coordconv_patch.export.graph_passes.vocabulary import coordinate_bytes
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite, lowering_sites

SIZE = (12, 9)


def site_of(conv: nn.Module, size: tuple[int, ...] = SIZE, **options: Any) -> LoweringSite:
    """The site of one patched convolution with random coordinate weights."""
    torch.manual_seed(0)
    model = ccp.patch(nn.Sequential(conv).eval(), "all", **options)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    example = torch.zeros(1, conv.in_channels, *size, dtype=conv.weight.dtype)
    (site,) = lowering_sites(model, example)
    return site


def constant_of(site: LoweringSite, lowering: str) -> CoordConstant:
    constant = LOWERINGS[lowering].constant(site, site.calls[0])
    assert constant is not None
    return constant


def array_of(constant: CoordConstant) -> np.ndarray:
    return constant.tensor.detach().numpy().copy()


def graph_with(*arrays: np.ndarray, held: str = "initializer") -> ir.Model:
    """A model whose outputs are the given arrays, each plus the input (1, 1, ...)."""
    graph = HandMadeGraph(channels=1, size=(1, 1), dtype=arrays[0].dtype)
    keep = graph.stored if held == "initializer" else graph.in_a_node
    return graph.model(*(graph.node("Add", graph.x, keep(array)) for array in arrays))


def compact(
    model: ir.Model,
    constants: Sequence[CoordConstant],
    batch: int,
    kernels: Sequence[CoordKernel] = (),
) -> int:
    """The bytes of coordinates that remain, where constants may lie in nodes before."""
    LiftConstantsToInitializersPass(size_limit=0)(model)
    result = CompactConstants(constants, kernels, batch)(model)
    assert result.modified == (result.count > 0)
    return coordinate_bytes(model.graph)


def constant_bytes(graph: ir.Graph, constants: list[CoordConstant], batch: int) -> int:
    """Bytes of the stored values that hold a constant as it is, or expanded to a batch."""
    arrays = [array_of(constant) for constant in constants]
    forms = [form for array in arrays for form in (array, np.repeat(array, batch, axis=0))]
    held = [value.const_value for value in graph.initializers.values()]
    held += [n.attributes["value"].as_tensor() for n in graph if n.op_type == "Constant"]
    return sum(
        tensor.nbytes
        for tensor in held
        if any(np.array_equal(tensor.numpy(), form) for form in forms)
    )


def compacted(model: ir.Model, constants: list[CoordConstant], tolerance: float = 0.0) -> int:
    """The bytes that remain; outputs are what they were, and the file is valid."""
    before = run(model)
    remaining = compact(model, constants, batch=3)
    after = run(model)
    if tolerance:
        assert_close(after, before, tolerance)
    else:
        for left, right in zip(after, before, strict=True):
            np.testing.assert_array_equal(left, right)
    return remaining


CONVENTIONS = {
    "paper": {},
    "half pixels": {"coords": ccp.Coordinates(align_corners=False)},
    "rows first": {"coords": ccp.Coordinates(order="yx")},
    "from zero to one": {"coords": ccp.Coordinates(value_range=(0.0, 1.0))},
}


@pytest.mark.parametrize("held", ["initializer", "node"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_channels_are_a_product_to_the_last_bit(convention: str, held: str) -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3), **CONVENTIONS[convention]), "branch")
    array = array_of(constant)
    model = graph_with(array, held=held)
    assert constant_bytes(model.graph, [constant], 2) == 2 * 12 * 9 * 4
    assert compacted(model, [constant]) == 2 * (12 + 9) * 4
    assert count(model, "Mul") == 1
    stored = [value.const_value.nbytes for value in model.graph.initializers.values()]
    assert max(stored) <= 2 * 12 * 4
    assert constant_bytes(model.graph, [constant], 2) == 0


def test_channels_evaluate_to_the_paper_s_coordinates() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3)), "branch")
    model = graph_with(array_of(constant))
    compact(model, [constant], batch=2)
    (evaluated,) = run(model, {"x": np.zeros((1, 1, 1, 1), dtype=np.float32)})
    np.testing.assert_allclose(evaluated[0], paper_grid(SIZE).numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_channels_that_are_padded_already(mode: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=2, padding_mode=mode)
    constant = constant_of(site_of(conv), "branch")
    assert tuple(constant.tensor.shape) == (1, 2, 16, 13)
    assert compacted(graph_with(array_of(constant)), [constant]) == 2 * (16 + 13) * 4


def test_a_strip_is_a_product_in_another_shape() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3)), "separable")  # unpadded: no border
    assert tuple(constant.tensor.shape) == (1, 1, 10, 3 * 7)
    model = graph_with(array_of(constant))
    # x and y shifted and not span three images, of two lines an axis: a constant and a ramp.
    assert compacted(model, [constant]) == flat_strip_bytes((10, 7), 3, 2)
    assert count(model, "Mul") == count(model, "Reshape") == 1


def test_bands_of_a_strip_are_products_in_another_shape() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3, padding=1)), "separable")
    assert tuple(constant.tensor.shape) == (1, 1, 14, 7 * 9)
    model = graph_with(array_of(constant))
    before = count(model, "Concat")
    assert compacted(model, [constant]) == banded_strip_bytes(SIZE, PADDED_3X3, kernels=False)
    assert count(model, "Mul") == count(model, "Reshape") == 3
    assert count(model, "Concat") == before + 1


def kernels_of_images(model: ir.Model) -> int:
    """Kernels that are stored without empty places."""
    return sum(name.endswith("_of_images") for name in model.graph.initializers)


@pytest.mark.parametrize("held", ["initializer", "node"])
@pytest.mark.parametrize("expanded", [False, True])
def test_kernels_are_stored_without_the_places_that_have_no_image(
    expanded: bool, held: str
) -> None:
    site = site_of(nn.Conv2d(3, 4, 3, padding=1))
    constant = constant_of(site, "separable")
    strip = constant.strip
    assert strip is not None
    kernel = site.kernel(site.calls[0], strip).tensor.numpy()
    assert kernel.shape == (4, 1, 3, 7)
    graph = HandMadeGraph(channels=4, size=SIZE)
    keep = graph.stored if held == "initializer" else graph.in_a_node
    source = graph.stored(array_of(constant))
    if expanded:
        source = graph.node("Expand", source, graph.stored(np.array([3, 1, 14, 63])))
    branch = graph.node(
        *("Conv", source, keep(kernel)),
        dilations=list(strip.dilation),
        pads=[*strip.padding, *strip.padding],
    )
    model = graph.model(graph.node("Add", graph.x, branch))
    assert compacted(model, [constant]) == banded_strip_bytes(SIZE, PADDED_3X3)
    shapes = [tuple(value.shape) for value in model.graph.initializers.values()]
    assert kernel.shape not in shapes
    assert (4, 15) in shapes
    assert kernels_of_images(model) == 1


def test_a_kernel_that_something_else_reads_stays() -> None:
    site = site_of(nn.Conv2d(3, 4, 3, padding=1))
    constant = constant_of(site, "separable")
    strip = constant.strip
    assert strip is not None
    graph = HandMadeGraph(channels=4, size=SIZE)
    kernel = graph.stored(site.kernel(site.calls[0], strip).tensor.numpy())
    branch = graph.node(
        *("Conv", graph.stored(array_of(constant)), kernel),
        dilations=list(strip.dilation),
        pads=[*strip.padding, *strip.padding],
    )
    model = graph.model(graph.node("Add", graph.x, branch), graph.node("Neg", kernel))
    assert compacted(model, [constant]) == banded_strip_bytes(SIZE, PADDED_3X3, kernels=False)
    assert kernels_of_images(model) == 0


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_map_is_a_convolution_of_a_strip(ndim: int) -> None:
    size = (40, 9, 8)[:ndim]
    conv = getattr(nn, f"Conv{ndim}d")(3, 4, 3, padding=1)
    constant = constant_of(site_of(conv, size), "map")
    array = array_of(constant)
    graph = HandMadeGraph(channels=4, size=size)
    model = graph.model(graph.node("Add", graph.x, graph.stored(array)))
    remaining = compacted(model, [constant], tolerance=3e-6)
    assert remaining < array.nbytes
    assert count(model, "Conv") == 1


def test_maps_of_one_geometry_share_their_strip_and_the_order_is_topological() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    model = ccp.patch(nn.Sequential(*layers).eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    sites = lowering_sites(model, torch.zeros(1, 4, 24, 18))
    constants = [constant_of(site, "map") for site in sites]
    graph = HandMadeGraph(channels=4, size=(24, 18))
    total = graph.x
    for constant in constants:
        total = graph.node("Add", total, graph.stored(array_of(constant)))
    made = graph.model(total)
    remaining = compacted(made, constants, tolerance=3e-6)
    assert count(made, "Mul") == 1
    assert count(made, "Conv") == 3
    strip = flat_strip_bytes((24, 18), 15, 4)
    assert remaining == strip + 3 * 4 * 15 * 4


def test_a_radius_stays_whole() -> None:
    site = site_of(nn.Conv2d(3, 4, 3), coords=ccp.Coordinates(radius=True))
    constant = constant_of(site, "branch")
    model = graph_with(array_of(constant))
    before = serialized(model)
    assert compacted(model, [constant]) == 3 * 12 * 9 * 4
    assert serialized(model) == before


def test_what_would_not_be_smaller_stays_whole() -> None:
    site = site_of(nn.Conv2d(3, 4, 3, padding=1), (3, 3))
    constant = constant_of(site, "map")
    model = graph_with(array_of(constant))
    before = serialized(model)
    assert compacted(model, [constant]) == 4 * 3 * 3 * 4
    assert serialized(model) == before


def test_channels_expanded_to_a_fixed_batch_are_counted_and_stay() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3)), "branch")
    array = np.repeat(array_of(constant), 3, axis=0)
    model = graph_with(array)
    assert constant_bytes(model.graph, [constant], 3) == array.nbytes
    before = serialized(model)
    assert compacted(model, [constant]) == array.nbytes
    assert serialized(model) == before


def test_other_values_stay_even_of_the_same_size() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3)), "branch")
    other = array_of(constant)
    other[0, 0, 0, 0] = np.nextafter(other[0, 0, 0, 0], 1)
    model = graph_with(other)
    before = serialized(model)
    assert compacted(model, [constant]) == 0
    assert serialized(model) == before


def test_a_value_of_the_same_bytes_and_another_type_stays() -> None:
    """A map is all zeros before training, as are whole numbers that a model counts with."""
    site = site_of(nn.Conv2d(3, 4, 3, padding=1))
    with torch.no_grad():
        site.layer.coord_weight.zero_()
    constant = constant_of(site, "map")
    graph = HandMadeGraph(channels=4, size=SIZE)
    counters = graph.stored(np.zeros((1, 4, *SIZE), dtype=np.int32))
    cast = graph.node("Cast", graph.node("Abs", counters), to=1)
    model = graph.model(graph.node("Add", graph.x, cast))
    before = serialized(model)
    assert compacted(model, [constant]) == 0
    assert serialized(model) == before


def test_a_constant_that_is_the_graphs_output_stays() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3)), "branch")
    graph = HandMadeGraph(channels=2, size=SIZE)
    stored = graph.stored(array_of(constant))
    model = graph.model(graph.node("Add", graph.x, stored), stored)
    before = serialized(model)
    assert compacted(model, [constant]) == 2 * 12 * 9 * 4
    assert serialized(model) == before


def test_an_initializer_that_the_caller_may_replace_stays() -> None:
    constant = constant_of(site_of(nn.Conv2d(3, 4, 3)), "branch")
    graph = HandMadeGraph(channels=2, size=SIZE)
    stored = graph.stored(array_of(constant))
    graph.inputs.append(stored)
    model = graph.model(graph.node("Add", graph.x, stored))
    before = serialized(model)
    compact(model, [constant], 2)
    assert serialized(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_keep_their_numbers_and_their_type(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).to(dtype)
    for lowering, bytes_ in (
        ("branch", 2 * (12 + 9) * 2),
        ("separable", banded_strip_bytes(SIZE, PADDED_3X3, 2, kernels=False)),
    ):
        constant = constant_of(site_of(conv), lowering)
        recipe = constant.factors
        assert recipe is not None
        assert {factor.dtype for band in recipe for factor in band} == {dtype}
        graph = HandMadeGraph(channels=1, size=(1, 1))
        kind = ir.DataType.FLOAT16 if dtype is torch.float16 else ir.DataType.BFLOAT16
        bits = constant.tensor.contiguous().view(torch.int16).numpy()
        tensor = ir.tensor(bits.view(kind.numpy()), name="held")
        held = ir.Value(
            name="held", const_value=tensor, shape=tensor.shape, type=ir.TensorType(kind)
        )
        graph.initializers.append(held)
        model = graph.model(graph.node("Add", graph.x, graph.node("Cast", held, to=1)))
        expected = constant.tensor.float().numpy()
        stored = compact(model, [constant], batch=1)
        assert stored == bytes_
        reference = ReferenceEvaluator(checked(model))
        (evaluated,) = reference.run(None, {"x": np.zeros((1, 1, 1, 1), dtype=np.float32)})
        np.testing.assert_array_equal(evaluated, expected)


class Pyramid(nn.Module):
    """One convolution at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        small = nn.functional.avg_pool2d(x, 2)
        return self.conv(x).mean((2, 3)) + self.conv(small).mean((2, 3))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("lowering", ["channels", "map", "branch", "separable"])
def test_real_files_hold_vectors(lowering: str, exporter: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ccp.patch(Pyramid().eval(), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_()
    x = torch.randn(2, 3, 32, 24)
    options: dict[str, Any] = {"lowering": lowering, "exporter": exporter, "providers": CPU}
    report = ccp.export_onnx(model, tmp_path / "m.onnx", x, **options)
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto, full_check=True)
    sizes = ((32, 24), (16, 12))
    expected = {
        "map": sum(flat_strip_bytes(size, 15, 4) + 3 * 15 * 4 for size in sizes),
        "separable": sum(banded_strip_bytes(size, PADDED_3X3) for size in sizes),
    }.get(lowering, sum(2 * sum(size) * 4 for size in sizes))
    assert report.coord_constant_bytes == expected
    largest = max(len(t.raw_data) or 4 * len(t.float_data) for t in proto.graph.initializer)
    assert largest <= 5 * 32 * 4
    (actual,) = run(report.path, {"x": x.numpy()})
    assert_close([actual], [copy.deepcopy(model).double()(x.double()).detach().numpy()], 3e-6)


class Head(nn.Module):
    """Two convolutions that see each of three sizes, as a detector's head does."""

    SIZES = ((24, 16), (12, 8), (6, 4))

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [nn.functional.adaptive_avg_pool2d(x, size) for size in self.SIZES]
        return [self.second(self.first(level).relu()).mean((2, 3)) for level in levels]


def head(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Head().eval().to(dtype), "all")
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("lowering", ["map", "separable"])
def test_kernels_of_several_sizes_come_from_one_coordinate_weight(
    lowering: str, exporter: str, tmp_path: Path
) -> None:
    model = head()
    x = torch.randn(2, 3, 48, 32)
    options: dict[str, Any] = {"lowering": lowering, "exporter": exporter, "providers": CPU}
    path = ccp.export_onnx(model, tmp_path / "m.onnx", x, **options).path
    proto = onnx.load(path)
    shapes = [tuple(tensor.dims) for tensor in proto.graph.initializer]
    assert shapes.count((96, 2 * 9)) == 2  # one weight for each convolution
    matrices = [dims for dims in shapes if len(dims) == 2 and dims[0] == 2 * 9 and dims[1] != 96]
    assert len(matrices) == 3  # one matrix for each size
    assert count(proto, "MatMul") == 6
    expected = [output.detach().numpy() for output in copy.deepcopy(model).double()(x.double())]
    assert_close(run(path, {"x": x.numpy()}), expected, 3e-6)
    assert optimized_operators(path)["MatMul"] == 0  # computed when the file is loaded


def test_narrow_kernels_of_several_sizes_stay_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 48, 32).half()
    report = ccp.export_onnx(
        *(head(torch.float16), tmp_path / "m.onnx", x),
        **{"lowering": "separable", "providers": CPU, "tolerance": 2e-2},
    )
    assert count(onnx.load(report.path), "MatMul") == 0


def test_a_kernel_that_a_pass_has_scaled_is_no_product() -> None:
    sites = lowering_sites(head(), torch.zeros(1, 3, 48, 32))
    site = sites[0]
    graph = HandMadeGraph(channels=96, size=Head.SIZES[0])
    constants, kernels, outputs = [], [], []
    for factor, call in zip((1, 2, 1), site.calls, strict=True):
        constant = LOWERINGS["separable"].constant(site, call)
        assert constant is not None
        strip = constant.strip
        assert strip is not None
        constants.append(constant)
        kernels.append(site.kernel(call, strip))
        branch = graph.node(
            *("Conv", graph.stored(array_of(constant))),
            graph.stored(factor * kernels[-1].tensor.numpy()),
            dilations=list(strip.dilation),
            pads=[*strip.padding, *strip.padding],
        )
        outputs.append(graph.node("Add", graph.node("ReduceMean", graph.x), branch))
    model = graph.model(*outputs)
    before = run(model)
    compact(model, constants, 3, kernels)
    assert_close(run(model), before, 3e-6)
    assert (count(model, "MatMul"), kernels_of_images(model)) == (2, 1)


def test_without_constants_nothing_happens() -> None:
    model = graph_with(np.ones((1, 1, 2, 2), dtype=np.float32))
    before = serialized(model)
    assert compact(model, [], 1) == 0
    assert serialized(model) == before
