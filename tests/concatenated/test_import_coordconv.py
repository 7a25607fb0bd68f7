"""Concatenating CoordConvs of many styles, imported: their own outputs are the reference."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import coordconv_ports as ports
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.layers.coordconv import CoordConvNd

SIZE = (17, 23)
SIZES = [(17, 23), (11, 30), (24, 9)]
X = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(*modules: nn.Module) -> nn.Module:
    """Modules behind a convolution, so that what they see is not the input itself."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *modules).eval()


def difference(before: Any, after: Any) -> float:
    """Largest difference of two outputs, relative to the largest value."""
    if isinstance(before, (list, tuple)):
        return max(map(difference, before, after))
    assert before.shape == after.shape
    return float((before - after).detach().abs().max() / before.detach().abs().max())


def assert_same_outputs(
    before: nn.Module, after: nn.Module, sizes: list[tuple[int, ...]] = SIZES
) -> None:
    with torch.no_grad():
        for size in sizes:
            image = torch.randn(2, 3, *size)
            assert difference(before(image), after(image)) < 1e-6


def imported(model: nn.Module, inputs: Any = X) -> ccp.ImportReport:
    """As a user has it: warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ccp.import_coordconv(model, inputs)


STYLES: dict[str, tuple[Callable[[], nn.Module], str, ccp.Coordinates]] = {
    "mkocabas": (
        lambda: net(ports.MkocabasCoordConv(6, 5, kernel_size=3, padding=1)),
        "2",
        ccp.Coordinates.preset("mkocabas"),
    ),
    "mkocabas with r": (
        lambda: net(ports.MkocabasCoordConv(6, 5, True, kernel_size=3, stride=2)),
        "2",
        ccp.Coordinates.preset("mkocabas", radius=True),
    ),
    "walsvid": (
        lambda: net(ports.WalsvidCoordConv2d(6, 5, 3, True, padding=1)),
        "2",
        ccp.Coordinates.preset("mkocabas", radius=True),
    ),
    "toolbelt, prepended": (
        lambda: net(
            ports.ToolbeltCoordConv(
                6, 5, True, first=True, kernel_size=3, padding=1, padding_mode="reflect"
            )
        ),
        "2",
        ccp.Coordinates(radius=True),
    ),
    "toolbelt's module before a convolution": (
        lambda: net(ports.ToolbeltAddCoords(True, first=True), nn.Conv2d(9, 5, (3, 2))),
        "3",
        ccp.Coordinates(radius=True),
    ),
    "a transposed convolution": (
        lambda: net(ports.ToolbeltAddCoords(), nn.ConvTranspose2d(8, 5, 3, 2, output_padding=1)),
        "3",
        ccp.Coordinates(),
    ),
    "paddledetection": (
        lambda: net(ports.PaddleCoordConv(6, 5, 3, 1)),
        "2.conv.conv",
        ccp.Coordinates(),
    ),
    "solo": (ports.Solo, "head.ins_convs.0", ccp.Coordinates.preset("solo")),
    "pixel edges in a unit square": (
        lambda: net(ports.ComputedCoordConv(6, 5, "edges", kernel_size=3, bias=False)),
        "2",
        ccp.Coordinates(align_corners=False, value_range=(0.0, 1.0)),
    ),
    "left edges": (
        lambda: net(ports.ComputedCoordConv(6, 5, "left", kernel_size=3)),
        "2",
        ccp.Coordinates(channels=(ccp.Axes("xy", (0.0, 1.0), "left edges"),)),
    ),
    "y alone": (
        lambda: net(ports.ComputedCoordConv(6, 5, "y", kernel_size=3)),
        "2",
        ccp.Coordinates(channels=(ccp.Axes("y"),)),
    ),
    "divided by the other axis": (
        lambda: net(ports.ComputedCoordConv(6, 5, "reference", kernel_size=3)),
        "2",
        ccp.Coordinates.preset("reference"),
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_recognised_and_gives_the_same_outputs(style: str) -> None:
    make, name, coords = STYLES[style]
    model = make().eval()
    report = imported(model)
    (site,) = report.sites
    assert (site.name, site.coords) == (name, coords)
    assert site.deviation < 2e-7
    assert len(site.sizes) >= 2
    assert report.worst_difference is not None
    assert report.worst_difference < 1e-6
    layer = report.model.get_submodule(name)
    assert isinstance(layer, CoordConvNd)
    assert layer.coord_weight.abs().max() > 0
    assert_same_outputs(model, report.model)
    assert name in str(report)


@pytest.mark.parametrize("style", [style for style in STYLES if STYLES[style][1] == "2"])
def test_a_module_of_its_own_needs_no_example_inputs(style: str) -> None:
    make, name, coords = STYLES[style]
    model = make()
    report = imported(model, None)
    assert [(site.name, site.coords) for site in report.sites] == [(name, coords)]
    assert report.worst_difference is None
    assert_same_outputs(model, report.model)


def test_sizes_that_are_fixed_at_construction_are_told_of() -> None:
    """AdaptiveWingLoss's layer, whose r is divided by its largest."""
    model = net(ports.WingCoordConv(*SIZE, 6, 5, True, returns_last=False, kernel_size=3)).eval()
    with pytest.warns(UserWarning, match="2.conv was seen at one size only"):
        report = ccp.import_coordconv(model, X)
    (site,) = report.sites
    assert site.coords == ccp.Coordinates(channels=(ccp.Axes("xy"), ccp.Radius(normalized=True)))
    assert difference(model(X), report.model(X)) < 1e-6


def test_coordinates_of_sounds() -> None:
    model = nn.Sequential(nn.Conv1d(3, 6, 3), ports.WalsvidCoordConv1d(6, 5, 3, stride=2)).eval()
    report = imported(model, torch.randn(2, 3, 40))
    assert report.sites[0].channels == ("x",)
    image = torch.randn(2, 3, 33)
    assert difference(model(image), report.model(image)) < 1e-6


def test_the_model_is_not_changed_and_the_in_place_form_changes_it() -> None:
    model = net(ports.MkocabasCoordConv(6, 5, kernel_size=3))
    before, state = copy.deepcopy(model), list(model.state_dict())
    imported(model)
    assert list(model.state_dict()) == state
    assert type(model[2]) is ports.MkocabasCoordConv
    conv = model[2].conv
    report = ccp.import_coordconv_(model, X)
    assert report.model is model
    assert model[2] is conv  # hooks and references to it stay
    assert list(model.state_dict()) == [
        *("0.weight", "0.bias", "2.weight", "2.bias", "2.coord_weight"),
    ]
    assert_same_outputs(before, model)


def test_several_places_of_one_convolution_and_several_names_of_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = ports.ToolbeltAddCoords()
            self.conv = nn.Conv2d(5, 3, 3)
            self.layer = ports.MkocabasCoordConv(3, 3, kernel_size=1)
            self.alias = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.layer(self.conv(self.add(self.conv(self.add(x))))))

    model = Twice().eval()
    report = imported(model)
    assert sorted(site.name for site in report.sites) == ["conv", "layer"]
    assert report.model.layer is report.model.alias
    assert isinstance(report.model.add, nn.Identity)
    assert_same_outputs(model, report.model)


def test_a_forward_of_its_own_keeps_class_and_code_and_concatenates_no_more() -> None:
    model = ports.Solo().eval()
    after = imported(model).model
    assert isinstance(after.head, ports.SoloHead)
    assert type(after.head).__name__ == "SoloHead"
    concatenated: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.cat:
                concatenated.append(tuple(part.shape[1] for part in args[0]))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(X)
        assert concatenated == [(1, 1), (8, 2)] * 2
        concatenated.clear()
        after(X)
    assert concatenated == [(1, 1)] * 2


def test_other_methods_than_forward_leave_the_coordinates_out_too() -> None:
    model = ports.Solo().eval()
    after = imported(model).model
    feature = torch.randn(2, 8, 6, 5)
    before, now = model.head.forward_single(feature), after.head.forward_single(feature)
    assert difference(before, now) < 1e-6


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_what_was_imported_is_copied_and_saved(way: str) -> None:
    model = imported(ports.Solo().eval()).model
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(X)[0][0], again(X)[0][0])


def test_it_compiles_and_is_traced() -> None:
    torch.manual_seed(0)
    model = imported(ports.Solo().eval()).model
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X)[0][0], model(X)[0][0])
    buffered = Buffered().eval()
    with pytest.warns(UserWarning, match="one size only"):
        after = ccp.import_coordconv(buffered, X).model
    graph = fx.symbolic_trace(after)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.cat) == 1
    assert torch.concat not in targets
    assert difference(buffered(X), graph(X)) < 1e-6


class Buffered(nn.Module):
    """Coordinates in a buffer, concatenated in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(8, 4, 3)
        self.register_buffer(
            "coords", ports.BufferedCoordConv.grid(SIZE, "edges").repeat(2, 1, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.stem(x).relu(), self.stem(x)], dim=1)[:, 3:9]
        return self.conv(torch.concat((x, self.coords), dim=-3))


def test_the_graph_of_a_graph_module_loses_the_concatenation() -> None:
    graph = fx.symbolic_trace(Buffered().eval())
    with pytest.warns(UserWarning, match="seen at one size only"):
        after = ccp.import_coordconv(graph, X).model
    assert (
        len([node for node in after.graph.nodes if node.target in (torch.cat, torch.concat)]) == 1
    )
    assert difference(graph(X), after(X)) < 1e-6
    assert "coords" not in after.code


def test_what_reads_the_coordinates_elsewhere_keeps_them() -> None:
    """AdaptiveWingLoss returns the last two channels of what it concatenated."""
    model = net(ports.WingCoordConv(*SIZE, 6, 5, kernel_size=3))
    with pytest.warns(UserWarning, match="one size only"):
        report = ccp.import_coordconv(model, X)
    assert "read by __getitem__ in 2 too, so they are joined still" in report.sites[0].was
    after = report.model
    assert isinstance(after[2].conv, CoordConvNd)
    assert after[2].conv.in_channels == 6
    with torch.no_grad():
        for before, now in zip(model(X), after(X), strict=True):
            assert difference(before, now) < 1e-6
        assert torch.equal(after(X)[0], pickle.loads(pickle.dumps(after))(X)[0])


def test_coordinates_that_are_joined_in_several_steps() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            joined = ports.toolbelt_append_coords(x, True, False)
            joined = torch.cat([torch.cat([x, joined[:, 3:5]], 1), joined[:, 5:]], 1)
            return self.norm(self.conv(joined))

    model = Steps().eval()
    report = imported(model)
    assert report.sites[0].channels == ("x", "y", "r")
    assert "the model joins image and coordinates in 2 steps" in report.sites[0].was
    assert_same_outputs(model, report.model)


def test_hooks_on_a_module_are_kept() -> None:
    model = net(ports.MkocabasCoordConv(6, 5, kernel_size=3))
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    report = ccp.import_coordconv(model, X)
    assert "has hooks, which would be lost" in report.sites[0].was
    calls.clear()
    assert_same_outputs(model, report.model, [SIZE])
    assert len(calls) == 2  # a copy shares the functions that are its model's hooks


def test_it_trains_and_its_coordinates_are_saved_and_exported_as_any_others() -> None:
    model = net(ports.MkocabasCoordConv(6, 5, True, kernel_size=3))
    model[2].conv.weight.requires_grad_(False)
    frozen = imported(model).model
    assert [weight.requires_grad for weight in ccp.coord_parameters(frozen)] == [False]
    model[2].conv.weight.requires_grad_(True)
    after = imported(model).model
    after(X).square().mean().backward()
    model(X).square().mean().backward()
    (weight,) = ccp.coord_parameters(after)
    joined = torch.cat((after[2].weight.grad, weight.grad), dim=1)
    assert difference(model[2].conv.weight.grad, joined) < 1e-5
    assert [status.name for status in ccp.layer_status(after)] == ["2"]
    plain = ccp.unpatch(after, discard=True)
    assert type(plain[2]) is nn.Conv2d
    assert plain(X).shape == model(X).shape


class Wraps(nn.Module):
    """Calls one module in its own forward, and does something around it."""

    def __init__(self, inner: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


@pytest.mark.parametrize("after", [torch.relu_, lambda y: y.mul_(2), torch.relu])
def test_what_a_module_does_after_its_convolution_stays(after: Callable[[Tensor], Tensor]) -> None:
    model = net(Wraps(ports.MkocabasCoordConv(6, 5, kernel_size=3), after))
    for inputs in (X, None):
        report = imported(model, inputs)
        assert [site.name for site in report.sites] == ["2.inner"]
        assert_same_outputs(model, report.model)


def test_what_a_module_does_to_the_output_in_place_stays() -> None:
    """The module returns the very tensor that its convolution returned."""

    class Activated(ports.MkocabasCoordConv):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu_()

    model = net(Activated(6, 5, kernel_size=3))
    report = imported(model)
    assert [site.name for site in report.sites] == ["2.conv"]
    assert_same_outputs(model, report.model)
    with pytest.raises(ccp.PatchError, match="no module of the model joins coordinates"):
        ccp.import_coordconv(model)


def test_dropout_behind_the_convolution_is_not_lost() -> None:
    """In evaluation mode it returns its input itself, as if it were not there."""

    class Dropped(ports.MkocabasCoordConv):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    with pytest.raises(
        ccp.PatchError, match="in training mode the imported model's output differs"
    ):
        ccp.import_coordconv(net(Dropped(6, 5, kernel_size=3)), X)


# --- refusals ----------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(ports.toolbelt_append_coords(x, False, False), self.weight)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(5, 5, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        size = [2 * x.shape[2] + 2, 2 * x.shape[3] + 2]
        return self.conv(ports.toolbelt_append_coords(x, False, False), size)


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(ports.toolbelt_append_coords(x, False, False)))


def shared() -> nn.Module:
    model = net(ports.ToolbeltAddCoords(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[4].weight = model[3].weight
    return model


def parametrized() -> nn.Module:
    model = net(ports.ToolbeltAddCoords(), nn.Conv2d(8, 8, 3))
    nn.utils.parametrizations.weight_norm(model[3])
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mask of coordinates": (
        lambda: net(
            ports.WingCoordConv(*SIZE, 6, 5, with_boundary=True, returns_last=False, kernel_size=3)
        ),
        "2.conv: the channels beside the image depend on the image",
    ),
    "unknown values": (
        lambda: net(ports.ComputedCoordConv(6, 5, "waves", kernel_size=3)),
        "its coordinates are not known: channel 0 deviates by 0.38 from the closest, x from -0.6",
    ),
    "groups": (
        lambda: net(ports.ToolbeltAddCoords(), nn.Conv2d(8, 8, 3, groups=2)),
        "3: it has groups=2",
    ),
    "a function": (Functional, "conv2d in the model: it is a convolution function: make it a"),
    "an output size": (Sized, "conv: it is called with more than its input, such as output_size"),
    "some calls only": (Sometimes, "conv: 2 of its 4 calls see no coordinates"),
    "a shared weight": (shared, "3: it shares its weight with 4"),
    "a parametrized weight": (parametrized, "3: its weight is parametrized or pruned"),
    "half precision": (
        lambda: ports.HalfImage(ports.ToolbeltCoordConv(3, 4, kernel_size=1)).bfloat16(),
        "inner.conv: in torch.bfloat16 coordinates are rounded too much to be read: import model.f",
    ),
    "nothing": (net, "no convolution of the model sees coordinate channels beside an image"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_imported_is_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    model = make().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ccp.PatchError) as raised:
        ccp.import_coordconv_(model, X)
    assert message in str(raised.value)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_one_refusal_leaves_the_others_imported_and_warns() -> None:
    model = net(
        ports.MkocabasCoordConv(6, 6, kernel_size=3),
        ports.ComputedCoordConv(6, 5, "waves", kernel_size=3),
    )
    with pytest.warns(UserWarning, match="3.conv sees coordinates and is left as it is: its coord"):
        report = ccp.import_coordconv(model, X)
    assert [site.name for site in report.sites] == ["2"]
    assert list(report.refused) == ["3.conv"]
    assert type(report.model[3]) is ports.ComputedCoordConv
    assert "1 left as they are" in str(report)
    assert_same_outputs(model, report.model, [(17, 23), (11, 30)])


def test_a_failure_in_the_middle_leaves_the_model_as_it_was() -> None:
    class Reads(nn.Module):
        """Looks at the class of its layer in training: an import changes its outputs then."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = ports.MkocabasCoordConv(3, 5, kernel_size=3)

        def forward(self, x: Tensor) -> Tensor:
            factor = 1 if isinstance(self.layer, ports.MkocabasCoordConv) else 2
            return self.layer(x) * factor

    model = Reads().eval()
    weight = model.layer.conv.weight
    with pytest.raises(ccp.PatchError, match="in evaluation mode the imported model's output diff"):
        ccp.import_coordconv_(model, X)
    assert model.layer.conv.weight is weight
    assert model.layer.conv.in_channels == 5
    assert type(model.layer) is ports.MkocabasCoordConv
    assert type(model.layer.conv) is nn.Conv2d
    report = ccp.import_coordconv(model, X, check=False)
    assert report.worst_difference is None


def test_without_example_inputs_it_says_what_was_not_looked_for() -> None:
    with pytest.raises(ccp.PatchError, match="its other code concatenates, pass example_inputs"):
        ccp.import_coordconv(ports.Solo())


def test_only_coordinates_are_taken_for_such() -> None:
    """A learned map beside the image does not depend on it either."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Parameter(torch.randn(1, 2, *SIZE))
            self.conv = nn.Conv2d(5, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.cat([x, self.map.expand(len(x), -1, -1, -1)], 1))

    with pytest.raises(ccp.PatchError, match="conv: its coordinates are not known"):
        ccp.import_coordconv(Learned(), X)
