"""Finding the sites of a model: tracing by regions, recorded calls, and what must not change."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from old_torch import BEFORE_2_9
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError, SelectionError
from coordconv_patch.layers.geometry import Call
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.site import Site


class Functional(nn.Module):
    """A convolution written with F.conv2d."""

    def __init__(self, channels: int = 3, out_channels: int = 3) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(out_channels, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


class Untraceable(nn.Module):
    """Decides on data; registered in the reverse of the order of execution."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for index, part in reversed(list(enumerate(parts))):
            self.add_module(f"part{index}", part)
        self.count = len(parts)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.count):
            if x.sum() > -1e9:
                x = getattr(self, f"part{index}")(x)
        return x


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, 10)


def names(model: nn.Module, example_inputs: Any = None) -> list[str]:
    return [site.name for site in find_sites(model, example_inputs).sites]


def site_named(model: nn.Module, name: str, example_inputs: Any = None) -> Site:
    (site,) = [s for s in find_sites(model, example_inputs).sites if s.name == name]
    return site


# --- order and sizes -----------------------------------------------------------------------------


class Reversed(nn.Module):
    """Convolutions registered in the reverse of the order in which they run; one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(5, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(x))


def test_sites_come_in_order_of_execution_and_the_never_executed_last() -> None:
    site_map = find_sites(Reversed())
    assert [(s.name, s.order) for s in site_map.sites] == [
        ("head.0", 0),
        ("head.2", 1),
        ("last", 2),
        ("unused", None),
    ]
    assert site_map.order_known
    assert site_map.untraced == ""
    assert [region.name for region in site_map.regions] == [""]


def test_sizes_are_seen_on_the_example_inputs() -> None:
    sites = {s.name: s.calls for s in find_sites(Reversed(), torch.rand(1, 3, 11, 16)).sites}
    assert sites == {
        "head.0": (Call((11, 16), (5, 7)),),
        "head.2": (Call((5, 7), (3, 5)),),
        "last": (Call((3, 5), (3, 5)),),
        "unused": (),
    }


def test_sizes_are_unknown_without_example_inputs() -> None:
    assert all(site.calls is None for site in find_sites(Reversed()).sites)


def test_site_describes_its_convolution() -> None:
    site = site_named(Reversed(), "head.0")
    assert (site.kind, site.class_name, site.kernel_size) == ("module", "Conv2d", (3, 3))
    assert site.geometry is not None
    assert str(site.geometry) == "3\u21924 3\u00d73 s2"
    assert site.obstacle == ""
    assert not site.patched


def test_convolution_under_two_names_is_one_site_with_an_alias(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
            self.two = nn.Sequential(self.one[0], nn.MaxPool2d(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(x))

    (site,) = find_sites(Tied(), x).sites
    assert (site.name, site.aliases) == ("one.0", ("two.0",))
    assert site.calls == (Call((8, 10), (8, 10)), Call((4, 5), (4, 5)))


def test_convolution_subclasses_are_leaves_of_the_trace() -> None:
    for name in ("nf_resnet26", "resnetv2_50x1_bit", "tf_efficientnet_b0"):
        model = timm.create_model(name)
        site_map = find_sites(model, torch.randn(1, 3, 64, 64))
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert site_map.untraced == ""
        assert [s.kind for s in site_map.sites] == ["module"] * len(convs)
        assert [s.order for s in site_map.sites] == list(range(len(convs)))
        assert not any(s.obstacle for s in site_map.sites)


def test_padding_of_subclasses_is_found() -> None:
    stem = site_named(timm.create_model("tf_efficientnet_b0"), "conv_stem")
    assert stem.padding.rule == "same"
    assert site_named(timm.create_model("resnet18"), "conv1").padding.rule == "declared"


def test_detector_heads_are_called_at_every_level() -> None:
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    )
    site_map = find_sites(model, ([torch.rand(3, 64, 96)],))
    assert not find_sites(model).order_known
    assert site_map.untraced
    assert "backbone" in [region.name for region in site_map.regions]
    heads = [s for s in site_map.sites if s.name.startswith("head.")]
    assert len(heads) == 10
    for site in heads:
        assert [call.input_size for call in site.calls or ()] == [
            (8, 12),
            (4, 6),
            (2, 3),
            (1, 2),
            (1, 1),
        ]
    assert [s.order for s in site_map.sites] == list(range(71))


# --- regions -------------------------------------------------------------------------------------


def test_model_that_cannot_be_traced_is_traced_in_parts() -> None:
    model = Untraceable(Reversed(), nn.Sequential(nn.Conv2d(2, 3, 1)))
    site_map = find_sites(model)
    assert sorted(region.name for region in site_map.regions) == ["part0", "part1"]
    assert "TraceError" in site_map.untraced
    assert not site_map.order_known
    # In order of registration, as the order of execution is unknown.
    assert [s.name for s in site_map.sites] == [
        "part1.0",
        "part0.unused",
        "part0.last",
        "part0.head.0",
        "part0.head.2",
    ]


def test_first_of_an_untraceable_model_asks_for_example_inputs() -> None:
    model = Untraceable(Reversed(), nn.Sequential(nn.Conv2d(2, 3, 1)))
    with pytest.raises(
        SelectionError,
        match=r"cannot be traced whole \(TraceError: .*Pass example_inputs=.*is 'part1.0'",
    ):
        ccp.plan(model, "first")


def test_first_of_an_untraceable_model_goes_by_the_recorded_order(x: Tensor) -> None:
    model = Untraceable(Reversed(), nn.Sequential(nn.Conv2d(2, 3, 1)))
    plan = ccp.plan(model, "first", example_inputs=x)
    assert [site.name for site in plan.chosen] == ["part0.head.0"]
    assert [row.site.name for row in plan.rows] == [
        "part0.head.0",
        "part0.head.2",
        "part0.last",
        "part1.0",
        "part0.unused",
    ]


def test_convolution_outside_every_region_is_a_site(x: Tensor) -> None:
    model = Untraceable(nn.Conv2d(3, 3, 1))
    (site,) = find_sites(model).sites
    assert (site.name, site.region) == ("part0", None)


class Counted(Untraceable):
    """Counts its forward passes on tensors."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).runs += type(x) is Tensor  # and not a proxy
        return super().forward(x)


@pytest.mark.parametrize(
    "part", [nn.Conv2d(3, 4, 1), Functional(), Untraceable(nn.Conv2d(3, 4, 1))]
)
def test_a_model_that_cannot_be_traced_is_run_once(part: nn.Module, x: Tensor) -> None:
    Counted.runs = 0
    (site,) = find_sites(Counted(part), x).sites
    assert (site.order, site.calls) == (0, (Call((8, 10), (8, 10)),))
    assert Counted.runs == 1


@pytest.mark.parametrize("exported", [False, True])
def test_a_graph_with_functional_convolutions_is_run_once(exported: bool, x: Tensor) -> None:
    model = nn.Sequential(Functional(), nn.Conv2d(3, 4, 1), nn.Softsign())
    graph: Any = torch.export.export(model, (x,)).module() if exported else fx.symbolic_trace(model)
    runs = 0

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal runs
            runs += func in (F.softsign, torch.ops.aten.abs.default)
            return func(*args, **(kwargs or {}))

    with Counting():
        sites = find_sites(graph, x).sites
    assert [site.calls for site in sites] == [(Call((8, 10), (8, 10)),)] * 2
    assert runs == 1
    assert "forward" not in vars(graph)


def test_functional_convolution_in_a_region_is_a_site(x: Tensor) -> None:
    model = Untraceable(Functional(), nn.Conv2d(3, 4, 1))
    site = site_named(model, "part0.kernel", x)
    assert (site.kind, site.class_name, site.owned.owner) == ("function", "conv2d", "part0")
    assert site.calls == (Call((8, 10), (8, 10)),)


def test_functional_convolution_in_a_container_of_an_untraceable_model_is_a_site() -> None:
    model = Untraceable(nn.Sequential(nn.Identity(), Functional()), nn.Conv2d(3, 4, 1))
    assert set(names(model)) == {"part0.1.kernel", "part1"}


def test_order_inside_a_region_is_that_of_its_graph(x: Tensor) -> None:
    model = Untraceable(nn.Sequential(nn.Conv2d(3, 3, 1), Functional()), nn.Conv2d(3, 4, 1))
    assert names(model, x) == ["part0.0", "part0.1.kernel", "part1"]


def test_optional_arguments_do_not_prevent_tracing(x: Tensor) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, flip: bool = False) -> Tensor:
            if mask is not None:
                x = x * mask
            return self.a(self.b(x)) if flip else self.b(self.a(x))

    model = Optional()
    assert find_sites(model).untraced == ""
    assert names(model) == ["a", "b"]
    assert names(model, (x, {"mask": torch.ones(8, 10), "flip": True})) == ["b", "a"]


def test_graph_modules_are_taken_as_they_are(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), Functional()))
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.inner(x))

    model = Outer()
    assert names(model) == ["inner.0", "inner.1.kernel", "conv"]
    assert names(model, x) == ["inner.0", "inner.1.kernel", "conv"]
    assert names(Untraceable(model), x) == ["part0." + name for name in names(model)]


def test_bare_convolution_is_one_site() -> None:
    (site,) = find_sites(nn.Conv2d(3, 4, 3)).sites
    assert (site.name, site.kind) == ("", "module")


# --- functional convolutions ---------------------------------------------------------------------


class EveryFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 3, 3))
        self.w2 = nn.Parameter(torch.randn(4, 1, 3, 5))
        self.w3 = nn.Parameter(torch.randn(4, 3, 1, 2, 3))
        self.t2 = nn.Parameter(torch.randn(3, 2, 3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            F.conv1d(x.flatten(2), self.w1, stride=2),
            F.conv2d(input=x[:, :2], weight=self.w2, padding="same", dilation=2, groups=2),
            F.conv3d(x.unsqueeze(2), self.w3, padding=(0, 1, 2)),
            F.conv_transpose2d(x, self.t2, stride=2, output_padding=1, groups=3),
        )


@pytest.mark.parametrize("kind", ["traced", "exported", "decomposed"])
def test_functional_convolutions_tell_their_geometry(kind: str, x: Tensor) -> None:
    model: Any = EveryFunction()
    if kind == "traced":
        model = fx.symbolic_trace(model)
    else:
        exported = torch.export.export(model, (x,))
        model = (exported if kind == "exported" else exported.run_decompositions()).module()
    sites = find_sites(model, x).sites
    assert [s.name for s in sites] == ["w1", "w2", "w3", "t2"]
    assert [s.kernel_size for s in sites] == [(3,), (3, 5), (1, 2, 3), (3, 3)]
    geometries = [s.geometry for s in sites if s.geometry]
    assert [(g.in_channels, g.out_channels, g.groups) for g in geometries] == [
        (3, 4, 1),
        (2, 4, 2),
        (3, 4, 1),
        (3, 6, 3),
    ]
    assert [g.transposed for g in geometries] == [False, False, False, True]
    assert [s.calls for s in sites] == [
        (Call((80,), (39,)),),
        (Call((8, 10), (8, 10)),),
        (Call((1, 8, 10), (1, 9, 12)),),
        (Call((8, 10), (18, 22)),),
    ]


def test_exported_graph_knows_its_sizes_without_example_inputs(x: Tensor) -> None:
    graph_module = torch.export.export(EveryFunction(), (x,)).module()
    assert site_named(graph_module, "w1").calls == (Call((80,), (39,)),)


def test_weight_used_twice_is_one_site(x: Tensor) -> None:
    class Twice(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.max_pool2d(super().forward(x), 2))

    (site,) = find_sites(Twice(), x).sites
    assert site.owned is not None
    assert (site.owned.weight, site.owned.indices) == ("kernel", None)
    assert site.calls == (Call((8, 10), (8, 10)), Call((4, 5), (4, 5)))


def odd_model(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    model = Functional()
    model.scale = nn.Linear(1, 1)
    model.__class__ = type("Odd", (Functional,), {"forward": forward})
    return model


def obstacle(forward: Callable[[Any, Tensor], Tensor]) -> str:
    (site,) = find_sites(odd_model(forward)).sites
    return site.obstacle


def test_weight_computed_at_run_time_is_an_obstacle() -> None:
    reason = obstacle(lambda self, x: F.conv2d(x, self.kernel * x.mean()))
    assert reason.startswith("its weight is computed when the model runs")
    assert "pass example_inputs=" in reason


def test_weight_with_two_strides_is_an_obstacle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.kernel), self.kernel, stride=2)

    assert obstacle(forward) == "one weight is used with several strides or paddings"


def test_stride_computed_at_run_time_is_an_obstacle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=x.shape[0])

    if BEFORE_2_9:  # whose tracer stops there
        assert "invalid combination of arguments" in find_sites(odd_model(forward)).untraced
        return
    assert obstacle(forward) == "its stride is computed at run time"


def test_integer_weight_of_a_functional_convolution_is_an_obstacle() -> None:
    class Integer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.ones(1, 1, 2, 2, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel)

    (site,) = find_sites(Integer()).sites
    assert site.obstacle == "its weight has dtype torch.int32; coordinates need floats"


def test_module_and_function_on_one_weight_are_told_apart(x: Tensor) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.conv(x), self.conv.weight)

    sites = find_sites(Autoencoder(), x).sites
    assert sorted(site.kind for site in sites) == ["function", "module"]
    assert len({site.name for site in sites}) == 2
    assert [len(site.calls or ()) for site in sites] == [1, 1]


# --- obstacles of modules ------------------------------------------------------------------------


def test_lazy_convolution_is_an_obstacle_until_its_shape_is_known(x: Tensor) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 1))
    site = site_named(model, "0")
    assert site.obstacle == "it is lazy: run the model once, so that its shape is known"
    assert site.geometry is None
    model(x)
    assert site_named(model, "0").obstacle == ""


def test_replaced_forward_is_an_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].forward = model[0].forward
    assert "its forward is replaced on the instance" in site_named(model, "0").obstacle


def test_module_integer_weight_is_an_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].weight = nn.Parameter(model[0].weight.to(torch.int8), requires_grad=False)
    assert site_named(model, "0").obstacle == (
        "its weight has dtype torch.int8; coordinates need floats"
    )


def test_patched_convolution_says_so() -> None:
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), "first")
    assert [site.patched for site in find_sites(model).sites] == [True, False]


# --- example inputs ------------------------------------------------------------------------------


class Calling(nn.Module):
    """Takes images as a list, a scale by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, images: list[Tensor], *, scale: float = 1.0) -> list[Tensor]:
        return [self.conv(input=image * scale) for image in images]


@pytest.mark.parametrize("keywords", [(), ({"scale": 2.0},), ({},)], ids=str)
def test_example_inputs_may_be_lists_with_keywords(keywords: tuple[Any, ...]) -> None:
    images = [torch.rand(3, 8, 9), torch.rand(3, 5, 6)]
    expected = (Call((8, 9), (6, 7)), Call((5, 6), (3, 4)))
    assert site_named(Calling(), "conv", (images, *keywords)).calls == expected
    if not keywords:
        assert site_named(Calling(), "conv", images).calls == expected


def test_example_inputs_may_be_all_keywords(x: Tensor) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Functional()

        def forward(self, *, image: Tensor) -> Tensor:
            return self.conv(x=image)

    site = site_named(Keyword(), "conv.kernel", ({"image": x},))
    assert site.calls == (Call((8, 10), (8, 10)),)


def test_exported_program_takes_nested_example_inputs(x: Tensor) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, batch: dict[str, Tensor], scale: Tensor) -> Tensor:
            return self.conv(batch["image"]) * scale

    inputs = ({"image": x}, torch.tensor(2.0))
    exported = torch.export.export(Nested(), inputs)
    plan = ccp.plan(exported, "all", example_inputs=inputs)
    assert plan.rows[0].site.calls == (Call((8, 10), (6, 8)),)


def test_model_that_fails_on_the_example_inputs_is_an_error() -> None:
    with pytest.raises(
        PatchError, match=r"failed on the example inputs \(a tensor of shape \(1, 4, 8, 8\), torch"
    ):
        find_sites(Reversed(), torch.rand(1, 4, 8, 8))


# --- what must not change ------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that finding sites could disturb."""
    return {
        "modes": [module.training for module in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": [
            {k: id(v) for k, v in vars(m).items() if k != "training"} for m in model.modules()
        ],
        "tensors": [
            {k: id(v) for d in (m._parameters, m._buffers) for k, v in d.items()}
            for m in model.modules()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random": [torch.get_rng_state().tolist(), random.getstate()],
    }


def assert_untouched(model: nn.Module, example_inputs: Any) -> None:
    before = snapshot(model)
    find_sites(model)
    for _ in range(2 if example_inputs is not None else 0):
        find_sites(model, example_inputs)
    after = snapshot(model)
    for key in ("modes", "attributes", "tensors", "hooks", "random"):
        assert after[key] == before[key], key
    assert list(after["state"]) == list(before["state"])
    for name, value in before["state"].items():
        assert isinstance(after["state"][name], Tensor)
        assert torch.equal(after["state"][name], value), name


def test_training_flags_batch_norm_and_random_state_stay(x: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Untraceable(nn.Conv2d(4, 4, 1))
    )
    model[1].eval()
    assert_untouched(model, x)
    assert [m.training for m in model] == [True, False, True, True]


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "mobilenetv3_small_050", "resnet18"])
def test_batch_norm_statistics_of_a_model_in_training_mode_stay(name: str) -> None:
    assert_untouched(timm.create_model(name).train(), torch.randn(2, 3, 64, 64))


def test_model_that_draws_random_numbers_leaves_the_random_state(x: Tensor) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + torch.rand(1)

    assert_untouched(Noisy(), x)


def test_recorded_forward_pass_leaves_the_random_state(x: Tensor) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    assert_untouched(Untraceable(Noise(), nn.Conv2d(3, 3, 1)), x)


@pytest.mark.parametrize("traceable", [True, False])
def test_tensors_stored_in_the_forward_pass_are_left_as_they_were(
    traceable: bool, x: Tensor
) -> None:
    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.last = None
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.conv(x)
            self.last = x
            self.seen += 1
            if not traceable and x.sum() > -1e9:
                return x
            return self.features

    model = Storing()
    assert_untouched(model, x)
    assert not hasattr(model, "features")
    assert model.last is None


def test_buffers_counted_in_place_are_left_as_they_were(x: Tensor) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.conv(x)

    assert_untouched(Counting(), x)


def test_buffers_replaced_in_the_forward_pass_are_left_as_they_were(x: Tensor) -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return self.conv(x)

    assert_untouched(Averaging(), x)


def test_model_whose_eval_raises_is_recorded_in_evaluation_mode(x: Tensor) -> None:
    modes = []

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def train(self, mode: bool = True) -> nn.Module:
            raise NotImplementedError("fixed mode")

        def forward(self, x: Tensor) -> Tensor:
            modes.append((self.training, self.conv.training, torch.is_grad_enabled()))
            return self.conv(x)

    model = Stubborn()
    assert_untouched(model, x)
    assert modes[-1] == (False, False, False)


def test_failed_forward_pass_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), Untraceable(nn.Conv2d(5, 4, 3)))
    before, images = snapshot(model), torch.zeros(1, 3, 8, 8)
    with pytest.raises(PatchError):
        find_sites(model, images)
    after = snapshot(model)
    for key in ("modes", "attributes", "hooks", "random"):
        assert after[key] == before[key], key


@pytest.mark.parametrize("kept_in", ["dict", "list", "nested"])
def test_what_a_forward_pass_keeps_in_containers_is_taken_out_again(kept_in: str) -> None:
    """LeViT keeps its attention biases by device; a trace would leave proxies there."""

    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.by_device: dict[str, Tensor] = {"before": torch.zeros(1)}
            self.seen: list[Tensor] = []
            self.nested = {"lists": [set[int]()]}

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if kept_in == "dict":
                self.by_device["now"] = y
            elif kept_in == "list":
                self.seen.append(y)
            else:
                self.nested["lists"].append({1})
            return y

    model = Keeper()
    before, seen, nested = model.by_device["before"], model.seen, model.nested["lists"]
    find_sites(model, torch.randn(1, 3, 8, 8))
    assert model.by_device == {"before": before}
    assert model.seen is seen
    assert seen == []
    assert model.nested["lists"] is nested
    assert nested == [set()]


def test_levit_is_unharmed_by_planning_in_evaluation() -> None:
    model = timm.create_model("levit_128s").eval()
    find_sites(model)
    assert not any(getattr(module, "attention_bias_cache", None) for module in model.modules())


def test_hooks_that_a_first_forward_pass_hangs_on_are_taken_off_again() -> None:
    """transformers does so, and notes in an attribute that it has."""

    class Hooking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.has_hooks = False
            self.seen = 0

        def count(self, *unused: Any) -> None:
            self.seen += 1

        def forward(self, x: Tensor) -> Tensor:
            if not self.has_hooks:
                self.conv.register_forward_hook(self.count)
                self.has_hooks = True
            return self.conv(x)

    model = Hooking()
    x = torch.randn(1, 3, 8, 8)
    find_sites(model, x)
    assert not model.conv._forward_hooks
    model(x)
    assert model.seen == 1
