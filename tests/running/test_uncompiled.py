"""Compiled models, parts and functions run as plain Python while they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.contributions.coordinate_maps import coordinate_maps
from coordconv_patch.running.inputs import run_model
from coordconv_patch.running.uncompiled import uncompiled


class Net(nn.Module):
    """Several modules: the compiler's trace of the hooks on a single one happens to work."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


class Decorated(Net):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def compiled() -> nn.Module:
    return torch.compile(Net().eval(), backend="eager")


def compiled_in_place() -> nn.Module:
    model = Net().eval()
    model.compile(backend="eager")
    return model


def compiled_part() -> nn.Module:
    model = Net().eval()
    model.stem = torch.compile(model.stem, backend="eager")
    return model


def compiled_part_in_place() -> nn.Module:
    model = Net().eval()
    model.stem.compile(backend="eager")
    return model


WAYS: list[Callable[[], nn.Module]] = [
    compiled,
    compiled_in_place,
    compiled_part,
    compiled_part_in_place,
    lambda: Decorated().eval(),
]
NAMES = ["model", "model in place", "part", "part in place", "forward"]


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before_and_after() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("was_run", [False, True], ids=["fresh", "run before"])
@pytest.mark.parametrize("make", WAYS, ids=NAMES)
def test_a_run_of_what_is_compiled_is_recorded(
    make: Callable[[], nn.Module], was_run: bool, x: Tensor
) -> None:
    model = make()
    if was_run:
        model(x)
    plan = ccp.plan(model, "all", example_inputs=x)
    calls = [site.calls for site in (row.site for row in plan.rows)]
    assert [[call.input_size for call in each or ()] for each in calls] == [[(8, 8)], [(8, 8)]]
    patched = ccp.patch(model, "all", example_inputs=x)
    assert len(ccp.coord_parameters(patched)) == 2
    assert torch.equal(patched(x), model(x))
    ccp.patch_(model, "all", example_inputs=x)
    for weight in ccp.coord_parameters(model):
        nn.init.ones_(weight)
    assert not torch.allclose(model(x), patched(x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model)])
def test_maps_of_a_wrapped_model_are_those_of_the_model(
    wrap: Callable[[nn.Module], nn.Module], x: Tensor, tmp_path: Path
) -> None:
    model = ccp.patch(Net().eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    expected, maps = coordinate_maps(model, x), coordinate_maps(wrap(model), x)
    assert list(maps) == list(expected) == ["stem.0", "head"]
    assert all(torch.equal(maps[site], expected[site]) for site in maps)
    ccp.plot_coords(wrap(model), tmp_path / "maps.png", x, sites=["stem.0"])


def test_influence_looks_into_a_compiled_part(x: Tensor) -> None:
    model = compiled_part()
    ccp.patch_(model, "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    model.stem, part = model.stem._orig_mod, model.stem
    expected = ccp.influence(model, [x], lambda model, x: model(x).mean())
    model.stem = part
    found = ccp.influence(model, [x], lambda model, x: model(x).mean())
    assert [site.share for site in found.sites] == [site.share for site in expected.sites]
    assert found.loss == expected.loss


@pytest.mark.parametrize("exporter", ["auto", "torchscript"])
def test_a_compiled_model_is_exported(exporter: str, x: Tensor, tmp_path: Path) -> None:
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "all")
    nn.init.normal_(model[0].coord_weight)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = ccp.export_onnx(compiled, tmp_path / "model.onnx", x, exporter=exporter)
    assert list(report.lowerings) == ["0"]
    assert ccp.verify_onnx(compiled, tmp_path / "model.onnx", x).difference < 1e-5


@pytest.mark.parametrize("make", WAYS, ids=NAMES)
def test_a_look_leaves_what_is_compiled_as_it_was(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make()
    model(x)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ccp.ExampleInputsError, match="channels"):
        ccp.plan(model, "all", example_inputs=x[:, :2])
    ccp.plan(model, "all", example_inputs=x)
    for attributes, module in zip(before, model.modules(), strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())


def test_another_model_stays_compiled_during_a_look(x: Tensor) -> None:
    other = torch.compile(Net().eval(), backend="eager", fullgraph=True)
    with uncompiled(compiled()):
        assert other(x).shape == (2, 2, 6, 6)  # it would fail if it ran uncompiled


def test_a_model_can_be_run_by_what_is_compiled(x: Tensor) -> None:
    model = Net().eval()

    @torch._dynamo.disable(recursive=False)
    def run(x: Tensor) -> Tensor:
        return run_model(model, x)

    function = torch.compile(lambda x: run(x) + 1, backend="eager")
    assert torch.equal(function(x), model(x) + 1)
