"""Convolutions out of the ordinary: chosen calls, tied weights, other tools' modules, lazy ones."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from concat_model import ConcatConv2d
from timm.layers import Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError, SelectionError, WeightsError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.sites.find import find_sites


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 12, 16)


def fill_coords_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(std=0.3, generator=generator)
    return model


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- chosen calls of a shared convolution ---------------------------------------------------------


class Head(nn.Module):
    """One tower for every level of a pyramid, like a detector's; loops, so fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)
        self.checkpointed = False

    def level(self, feature: Tensor) -> Tensor:
        return self.out(self.conv(input=feature).relu())

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        assert all(len(feature) for feature in features)
        if self.checkpointed:
            return [checkpoint(self.level, each, use_reentrant=False) for each in features]
        return [self.level(each) for each in features]


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.head = Head()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        return self.head([x, F.max_pool2d(x, 2), F.max_pool2d(x, 4)])


def pyramid() -> Pyramid:
    torch.manual_seed(0)
    return Pyramid()


def patched_at(where: str, x: Tensor) -> nn.Module:
    return fill_coords_(ccp.patch(pyramid(), where, example_inputs=x))


def test_all_calls_share_one_coordinate_weight(x: Tensor) -> None:
    patched = ccp.patch(pyramid(), "head.conv", example_inputs=x)
    assert_equal(patched(x), pyramid()(x))
    fill_coords_(patched)
    assert len(ccp.coord_parameters(patched)) == 1
    assert all(not torch.equal(a, b) for a, b in zip(patched(x), pyramid()(x), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_only_the_chosen_calls_get_coordinates(training: bool, x: Tensor) -> None:
    model = pyramid().train(training)
    patched = ccp.patch(model, "head.conv@0,2", example_inputs=x)
    assert_equal(patched(x), model(x))
    fill_coords_(patched)
    whole = ccp.patch(model, "head.conv")
    with torch.no_grad():
        whole.head.conv.coord_weight.copy_(patched.head.conv.coord_branch.coord_weight)
    expected = [whole(x)[0], model(x)[1], whole(x)[2]]
    torch.testing.assert_close(patched(x), expected)
    assert torch.equal(patched(x)[1], model(x)[1])


def test_chosen_call_equals_concatenation(x: Tensor) -> None:
    model, patched = pyramid(), patched_at("head.conv@1", x)
    layer = copy.deepcopy(model.head.conv)
    layer.coord_weight = patched.head.conv.coord_branch.coord_weight
    level = F.max_pool2d(model.stem(x), 2)
    expected = model.head.out(ConcatConv2d(layer)(level).relu())
    torch.testing.assert_close(patched(x)[1], expected, rtol=1e-5, atol=1e-5)


def test_calls_are_counted_where_all_of_them_come_together(x: Tensor) -> None:
    """A tower inside the head is called once a level, so its own calls tell nothing apart."""

    class Towers(Head):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def level(self, feature: Tensor) -> Tensor:
            return self.tower(feature)

    model = pyramid()
    model.head = Towers()
    (site,) = [site for site in find_sites(model, x).sites if site.name == "head.tower.0"]
    assert site.caller == "head"
    patched = fill_coords_(ccp.patch(model, "head.tower.0@1", example_inputs=x))
    equal = [torch.equal(a, b) for a, b in zip(patched(x), model(x), strict=True)]
    assert equal == [True, False, True]


def test_chosen_call_pads_as_its_convolution_does(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv2dSame(3, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    torch.manual_seed(0)
    model = Twice()
    patched = fill_coords_(ccp.patch(model, "conv@1", example_inputs=x))
    layer = copy.deepcopy(model.conv)
    layer.coord_weight = patched.conv.coord_branch.coord_weight
    expected = ConcatConv2d(layer)(model.conv(x))
    torch.testing.assert_close(patched(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_chosen_call_alone(x: Tensor) -> None:
    patched = patched_at("head.conv@1", x)
    (weight,) = ccp.coord_parameters(patched)
    for level, reached in enumerate((False, True, False)):
        weight.grad = None
        patched(x)[level].sum().backward()
        assert (weight.grad is not None) is reached


def test_other_image_sizes_keep_the_order_of_the_calls(x: Tensor) -> None:
    patched, model = patched_at("head.conv@1", x), pyramid()
    image = torch.randn(1, 3, 24, 20)
    equal = [torch.equal(a, b) for a, b in zip(patched(image), model(image), strict=True)]
    assert equal == [True, False, True]


def test_chosen_calls_survive_copies_and_pickles(x: Tensor) -> None:
    patched = patched_at("head.conv@1", x)
    stream = io.BytesIO()
    torch.save(patched, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(stream, weights_only=False),
    )
    for each in copies:
        assert_equal(each(x), patched(x))
        with torch.no_grad():
            each.head.conv.coord_branch.coord_weight.zero_()
        assert_equal(each(x), pyramid()(x))
    assert not torch.equal(patched(x)[1], pyramid()(x)[1])


def test_chosen_calls_compile_to_one_graph(x: Tensor) -> None:
    patched = patched_at("head.conv@1", x).eval()
    compiled = torch.compile(patched, backend="eager", fullgraph=True)
    for _ in range(3):
        assert_equal(compiled(x), patched(x))


def test_chosen_calls_are_exported_to_onnx(x: Tensor, tmp_path: Any) -> None:
    patched = patched_at("head.conv@0,2", x)
    report = ccp.export_onnx(patched, tmp_path / "p.onnx", x)
    assert list(report.lowerings) == ["head.conv"]
    # The exporter's optimizer may compute one of the two maps itself.
    assert report.nodes["Conv"] in (1 + 3 + 3 + 2, 1 + 3 + 3 + 1)
    assert report.checks[0].difference < 1e-5


def test_plan_shows_the_chosen_calls_and_counts_them_alone(x: Tensor) -> None:
    plan = ccp.plan(pyramid(), ["stem", "head.*@1"], example_inputs=x)
    rows = {row.site.name: row for row in plan.rows}
    assert rows["head.conv"].multiply_adds == 2 * 4 * 9 * 6 * 8
    assert rows["head.conv"].choice.chosen_calls.caller == "head"
    assert "matches 'head.*@1': head.conv" in str(plan)
    assert "call 1 of 3: head.conv" in str(plan)
    chosen = {site["name"]: site["chosen_calls"] for site in plan.to_dict()["sites"]}
    assert chosen == {"stem": None, "head.conv": [1], "head.out": [1]}


def test_selectors_of_one_site_add_up(x: Tensor) -> None:
    plan = ccp.plan(pyramid(), ["head.conv@2", "head.c*@0"], example_inputs=x)
    (row,) = [row for row in plan.rows if row.chosen]
    assert row.choice.chosen_calls.indices == (0, 2)
    plan = ccp.plan(pyramid(), ["head.conv@2", "head.conv"], example_inputs=x)
    assert [row.choice.chosen_calls for row in plan.rows if row.chosen] == [None]


@pytest.mark.parametrize(
    ("where", "inputs", "message"),
    [
        ("head.conv@3", True, r"no call 3; .*called 3 times: @0 at 12×16, @1 at 6×8, @2 at 3×4"),
        ("head.conv@1", False, r"calls of head\.conv are not known: pass example_inputs"),
        ("heed.conv@1", True, r"matches no convolution.*close names: head\.conv"),
    ],
)
def test_impossible_calls_are_refused(where: str, inputs: bool, message: str, x: Tensor) -> None:
    model = pyramid()
    with pytest.raises(SelectionError, match=message):
        ccp.patch_(model, where, example_inputs=x if inputs else None)
    assert not coord_layers(model)
    assert not model.head._forward_hooks


def test_call_outside_its_caller_is_an_error_and_no_miscount(x: Tensor) -> None:
    patched = patched_at("head.conv@1", x)
    for _ in range(2):  # before the first pass and after one
        with pytest.raises(PatchError, match="called outside of it"):
            patched.head.conv(x)
        patched(x)
    broken = patched.head.register_forward_pre_hook(_broken)
    with pytest.raises(ValueError, match="broken"):
        patched(x)
    broken.remove()
    expected = patched_at("head.conv@1", x)(x)
    assert_equal(patched(x), expected)


def _broken(module: nn.Module, args: Any) -> None:
    raise ValueError("broken")


def test_checkpointing_inside_the_caller_is_an_error_and_around_it_is_not(x: Tensor) -> None:
    patched, plain_weights = patched_at("head.conv@1", x), []
    for around in (False, True):
        patched.zero_grad()
        outputs = checkpoint(patched, x, use_reentrant=False) if around else patched(x)
        sum(level.square().sum() for level in outputs).backward()
        plain_weights.append(ccp.coord_parameters(patched)[0].grad.clone())
    assert torch.equal(*plain_weights)
    patched.head.checkpointed = True
    outputs = patched(x)
    with pytest.raises(PatchError, match="gradient checkpointing inside 'head'"):
        sum(level.square().sum() for level in outputs).backward()


def test_unpatching_takes_hooks_and_branch_away(x: Tensor) -> None:
    model, patched = pyramid(), patched_at("head.conv@1", x)
    with pytest.raises(PatchError, match=r"not zero at head\.conv"):
        ccp.unpatch(patched)
    plain = ccp.unpatch(patched, discard=True)
    assert_equal(plain(x), model(x))
    assert list(plain.state_dict()) == list(model.state_dict())
    for module in plain.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
    again = fill_coords_(ccp.patch(plain, "head.conv@1", example_inputs=x))
    assert_equal(again(x), patched(x))


def test_patched_calls_are_a_patched_site(x: Tensor) -> None:
    patched = patched_at("head.conv@1", x)
    assert [site.name for site in find_sites(patched).sites if site.patched] == ["head.conv"]
    for where in ("head.conv", "head.conv@0"):
        with pytest.raises(SelectionError, match=r"already patched: head\.conv"):
            ccp.patch(patched, where, example_inputs=x)


def test_coordinate_file_carries_the_chosen_calls(x: Tensor, tmp_path: Any) -> None:
    patched = patched_at("head.conv@0,2", x)
    path = ccp.save_coords(patched, tmp_path / "c.safetensors")
    loaded = ccp.load_coords(pyramid(), path)
    assert_equal(loaded(x), patched(x))
    in_place = pyramid()
    ccp.load_coords_(in_place, path)
    assert_equal(in_place(x), patched(x))
    with pytest.raises(WeightsError, match=r"at calls 0, 2 of 3, the model is patched at all"):
        ccp.load_coords(ccp.patch(pyramid(), "head.conv"), path)


def test_plain_checkpoint_loads_into_chosen_calls(x: Tensor) -> None:
    patched = patched_at("head.conv@1", x)
    patched.load_state_dict(pyramid().state_dict())
    assert_equal(patched(x), pyramid()(x))


def test_other_hooks_see_the_output_with_coordinates(x: Tensor) -> None:
    model, seen = pyramid(), []
    model.head.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    patched = fill_coords_(ccp.patch_(model, "head.conv@1", example_inputs=x))
    seen.clear()
    outputs = patched(x)
    assert torch.equal(patched.head.out(seen[1].relu()), outputs[1])


def test_calls_of_a_whole_graph_module_cannot_be_counted(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    with pytest.raises(SelectionError, match="only GraphModules call it"):
        ccp.patch(fx.symbolic_trace(Twice()), "conv@1", example_inputs=x)


def test_calls_of_a_functional_convolution_are_its_nodes(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.kernel, padding=1)
            return F.conv2d(x.relu(), self.kernel, padding=1)

    torch.manual_seed(0)
    model = Twice()
    patched = ccp.patch(model, "kernel@1", example_inputs=x)
    assert torch.equal(patched(x), model(x))
    fill_coords_(patched)
    first = F.conv2d(x, model.kernel, padding=1).relu()
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    layer.weight = model.kernel
    layer.coord_weight = patched.kernel_coord_branch.coord_weight
    torch.testing.assert_close(patched(x), ConcatConv2d(layer)(first), rtol=1e-4, atol=1e-4)


def test_chosen_call_of_a_transposed_convolution_with_an_output_size_is_refused() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.up(x), output_size=(32, 40))

    x = torch.randn(1, 2, 7, 9)
    with pytest.raises(SelectionError, match="call 1 of up asks for an output_size"):
        ccp.patch(Up(), "up@1", example_inputs=x)
    patched = ccp.patch(Up(), "up@0", example_inputs=x)
    patched(x)


# --- convolutions of other tools ------------------------------------------------------------------


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 3, 1), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.conv(x))


def torchscript(kind: str, x: Tensor) -> nn.Module:
    model = small_net().eval()
    if kind == "traced":
        return torch.jit.trace(model, x)
    scripted = torch.jit.script(model)
    return torch.jit.freeze(scripted) if kind == "frozen" else scripted


@pytest.mark.parametrize("where", ["all", "first"])
@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_model_is_refused(kind: str, where: str, x: Tensor) -> None:
    model = torchscript(kind, x)
    before = model(x)
    for act in (ccp.plan, ccp.patch, ccp.patch_):
        with pytest.raises(SelectionError, match=r"compiled by TorchScript.*patch the Python"):
            act(model, where, example_inputs=x)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_part_of_a_model_is_named_and_left_alone(kind: str, x: Tensor) -> None:
    model = Holder(torchscript(kind, x)).eval()
    before = model(x)
    plan = ccp.plan(model, "all", example_inputs=x)
    refused = [row.site.name for row in plan.rows if "TorchScript" in row.reason]
    assert refused == (["inner"] if kind == "frozen" else ["inner.0", "inner.3"])
    with pytest.warns(UserWarning, match="compiled by TorchScript"):
        patched = ccp.patch(model, "all", example_inputs=x)
    assert torch.equal(patched(x), before)
    assert list(coord_layers(patched)) == ["conv"]
    with pytest.raises(SelectionError, match="compiled by TorchScript"):
        ccp.patch(model, refused[0])


def test_obstacles_that_nobody_selected_bring_no_warning(x: Tensor) -> None:
    model = Holder(torchscript("scripted", x)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ccp.patch(model, "conv")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("kind", ["observed", "quantized", "dynamic", "qat", "qat fused"])
def test_quantized_convolutions_are_refused(kind: str, x: Tensor) -> None:
    from torch.ao import quantization as tq

    model = small_net()
    if kind == "dynamic":
        model = nn.Sequential(torch.ao.nn.quantized.dynamic.Conv2d(3, 4, 3))
    elif kind.startswith("qat"):
        model.train()
        if kind == "qat fused":
            model = tq.fuse_modules_qat(model, [["0", "1", "2"]])
        model.qconfig = tq.get_default_qat_qconfig("qnnpack")
        tq.prepare_qat(model, inplace=True)
    else:
        model.eval().qconfig = tq.get_default_qconfig("qnnpack")
        tq.prepare(model, inplace=True)
        if kind == "quantized":
            model(x)
            tq.convert(model, inplace=True)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(SelectionError, match=r"0: it is (prepared for quantization|quantized) "):
        ccp.patch_(model, "all")
    assert [type(module) for module in model.modules()] == classes
    assert not coord_layers(model)
    if kind in ("observed", "qat fused"):  # recording leaves observers as they were
        ranges = {name: value.clone() for name, value in model.named_buffers()}
        with pytest.raises(SelectionError, match="prepared for quantization"):
            ccp.plan(model, "all", example_inputs=x)
        assert {name: tuple(value.shape) for name, value in model.named_buffers()} == {
            name: tuple(value.shape) for name, value in ranges.items()
        }


def test_torchao_weights_are_refused(x: Tensor) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = small_net().eval()
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: name == "0",
    )
    plan = ccp.plan(model, "all")
    assert [row.chosen for row in plan.rows] == [False, True]
    assert "it is quantized (Int8Tensor)" in plan.rows[0].reason
    with pytest.raises(SelectionError, match="leave the patched convolutions out"):
        ccp.patch(model, "0")


def test_fused_float_convolution_is_patched(x: Tensor) -> None:
    model = torch.ao.quantization.fuse_modules(small_net().eval(), [["0", "1", "2"]])
    patched = ccp.patch(model, "all")
    assert torch.equal(patched(x), model(x))
    assert list(coord_layers(patched)) == ["0.0", "3"]


# --- functional convolutions in code of every kind -----------------------------------------------


class Looping(nn.Module):
    """Calls F.conv2d in code that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.shape[0])):
            x = F.conv2d(x, self.kernel)
        return x


def test_functional_convolution_outside_every_graph_is_patched(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Looping())
    site = find_sites(model, x).sites[1]
    assert (site.name, site.kind, len(site.calls)) == ("1.kernel", "function", 2)
    assert site.calls[0].input_size == (12, 16)
    patched = ccp.patch(model, "all", example_inputs=x)
    assert list(coord_layers(patched)) == ["0", "1.kernel"]
    assert torch.equal(patched(x), model(x))
    fill_coords_(patched)
    more = torch.cat((x, x))  # four turns of the loop now, each with coordinates
    expected = ConcatConv2d(patched[0])(more)
    grid = ccp.Coordinates().grid((12, 16))
    for _ in range(4):
        branch = F.conv2d(grid[None], patched[1].kernel_coord_branch.coord_weight)
        expected = F.conv2d(expected, model[1].kernel) + branch
    torch.testing.assert_close(patched(more), expected, rtol=1e-4, atol=1e-4)


def test_convolution_modules_and_traced_functions_are_reported_once(x: Tensor) -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), Traced(), Looping()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))) if len(x) else x

    names = [(site.name, len(site.calls)) for site in find_sites(Model(), x).sites]
    assert names == [("a", 1), ("b.kernel", 1), ("c.kernel", 2)]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1) * scale


class Masked(Scaled):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = F.conv2d(x, self.kernel, padding=1)
        return x if mask is None else x * mask


class Calling(nn.Module):
    def __init__(self, inner: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.inner, self.keywords = inner, keywords

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **self.keywords)


@pytest.mark.parametrize("keywords", [{}, {"scale": 3.0}, {"scale": 2.0, "shift": None}])
def test_optional_arguments_stay_arguments(keywords: dict[str, Any], x: Tensor) -> None:
    model = Calling(Scaled(), **keywords)
    patched = ccp.patch(model, "all")
    assert torch.equal(patched(x), model(x))
    fill_coords_(patched)
    difference = patched(x) - model(x)
    at_one = patched.inner(x) - model.inner(x)
    torch.testing.assert_close(difference, at_one * keywords.get("scale", 1.0))


def test_optional_argument_may_change_the_course(x: Tensor) -> None:
    model = Calling(Masked(), mask=torch.rand(16))
    patched = ccp.patch(model, "all")
    assert torch.equal(patched(x), model(x))
    fill_coords_(patched)
    unmasked = patched.inner(x) - model.inner(x)
    torch.testing.assert_close(patched(x) - model(x), unmasked * model.keywords["mask"])


class Dropping(nn.Module):
    """Its function and its part's each read a flag of their own."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.part = nn.Identity() if part is None else part

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1)
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        return self.part(F.dropout(x, p=0.3, training=self.training))


@pytest.mark.parametrize("part_training", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_and_norm_follow_their_modules_flags(
    training: bool, part_training: bool, x: Tensor
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Dropping(Dropping()))
    patched = ccp.patch(model, "all")
    assert isinstance(patched[0], Dropping)
    for each in (patched, copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        results = []
        for candidate in (copy.deepcopy(model), each):
            candidate.train(training)
            candidate[0].part.train(part_training)
            torch.manual_seed(2)
            results.append((candidate(x), candidate[0].mean))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    assert [region.name for region in find_sites(patched).regions] == [""]
    plain = ccp.unpatch(patched)
    assert list(plain.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_code_may_differ_between_the_modes(training: bool, x: Tensor) -> None:
    class Doubling(Scaled):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x = F.conv2d(x, self.kernel, padding=1)
            return x * 2 if self.training else x

    class Swapped(Scaled):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.dropout(F.conv2d(x, self.kernel), 0.2, not self.training)

    class Foreign(Scaled):
        """Reads the flag of a module other than the one that runs."""

        def __init__(self) -> None:
            super().__init__()
            self.other = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.dropout(F.conv2d(x, self.kernel), 0.2, self.other.training)

    for module in (Doubling(), Swapped(), Foreign()):
        model = nn.Sequential(module)
        patched = ccp.patch(model, "all").train(training)
        outputs = []
        for each in (model.train(training), patched):
            torch.manual_seed(3)
            outputs.append(each(x))
        assert torch.equal(*outputs)
        fill_coords_(patched)
        torch.manual_seed(3)
        assert not torch.equal(patched(x), outputs[0])


# --- tied weights, lazy modules, hooks, meta, bare convolutions -----------------------------------


def test_convolutions_that_tie_one_weight_get_coordinates_each(x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    model[2].weight = model[0].weight
    for patched in (ccp.patch(model, "all"), ccp.patch_(copy.deepcopy(model), "all")):
        assert patched[0].weight is patched[2].weight
        assert patched[0].coord_weight is not patched[2].coord_weight
        assert torch.equal(patched(x), model(x))
        fill_coords_(patched)
        expected = ConcatConv2d(patched[2])(ConcatConv2d(patched[0])(x).relu())
        torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-5)
        plain = ccp.unpatch(patched, discard=True)
        assert plain[0].weight is plain[2].weight
        assert torch.equal(plain(x), model(x))


def test_tied_weights_of_a_patched_program_stay_one(x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False))
    model[2].weight = model[0].weight
    patched = ccp.patch(torch.export.export(model, (x,)), "all")
    assert torch.equal(patched(x), model(x))
    names = {name.partition(".")[0] for name, _ in patched.named_parameters()}
    assert len([p for p in patched.parameters() if p.shape == model[0].weight.shape]) == 1, names


def test_lazy_model_is_refused_until_it_has_run(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(5, 3), nn.LazyConvTranspose2d(2, 2))
    with pytest.raises(SelectionError, match="1: it is lazy: run the model once"):
        ccp.patch_(model, "1")
    assert not coord_layers(model)
    expected = model(x)
    patched = ccp.patch_(model, "all")
    kinds = (ccp.CoordConv2d, ccp.CoordConv2d, ccp.CoordConvTranspose2d)
    assert all(map(isinstance, patched, kinds))
    assert torch.equal(patched(x), expected)


def test_lazy_convolutions_beside_others_are_left_out_with_a_warning(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(5, 3))
    with pytest.warns(UserWarning, match="1: it is lazy"):
        patched = ccp.patch_(model, "all")
    torch.manual_seed(3)
    patched(x)
    assert list(coord_layers(patched)) == ["0"]
    assert isinstance(patched[1], nn.Conv2d)


@pytest.mark.parametrize("training", [True, False])
def test_root_that_is_a_convolution_goes_every_way(
    training: bool, x: Tensor, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).train(training)
    patched = fill_coords_(ccp.patch(conv, "all"))
    path = ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert torch.equal(ccp.load_coords(conv, path)(x), patched(x))
    ccp.patch_(conv, "first")
    assert isinstance(conv, CoordConvNd)
    program = torch.export.export(patched, (x,))
    found = ccp.from_exported(program)
    assert torch.equal(found(x), patched(x))
    assert len(coord_layers(found)) == 1


def test_hooks_of_every_kind_survive(x: Tensor) -> None:
    model, seen = small_net(), []
    conv = model[0]
    conv.register_forward_pre_hook(lambda module, args: seen.append("before"))
    conv.register_forward_hook(
        lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True
    )
    conv.register_full_backward_hook(lambda module, given, taken: seen.append("backward"))
    conv.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append("state"))
    conv.weight.register_hook(lambda gradient: seen.append("gradient"))
    patched = ccp.patch_(model, "all")
    seen.clear()
    patched(x).sum().backward()
    patched.state_dict()
    assert sorted(seen) == ["after", "backward", "before", "gradient", "state"]


def test_meta_model_with_chosen_calls_and_functions(x: Tensor) -> None:
    with torch.device("meta"):
        model = Pyramid()
        functional = Calling(Scaled())
    patched = ccp.patch(model, "head.conv@1", example_inputs=x.to("meta"))
    assert [weight.device.type for weight in ccp.coord_parameters(patched)] == ["meta"]
    weights = pyramid().state_dict()
    patched.load_state_dict(weights, assign=True)
    assert_equal(patched(x), pyramid()(x))
    found = ccp.patch(functional, "all")
    assert ccp.coord_parameters(found)[0].is_meta


def test_parametrized_convolution_takes_chosen_calls(x: Tensor) -> None:
    model = pyramid()
    weight_norm(model.head.conv)
    patched = ccp.patch(model, "head.conv@1", example_inputs=x)
    assert_equal(patched(x), model(x))
    fill_coords_(patched)
    equal = [torch.equal(a, b) for a, b in zip(patched(x), model(x), strict=True)]
    assert equal == [True, False, True]
