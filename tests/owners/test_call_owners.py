"""Convolution functions in plain modules: same code, same bits, and coordinates where chosen.

The reference concatenates coordinates by hand; it shares no code with the package but the grid.
"""

from __future__ import annotations

import abc
import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from function_owners import Owner, concatenated, fill_
from old_torch import BEFORE_2_11, STRICT
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, PatchError, SelectionError, WeightsError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.sites.find import find_sites

Reference = Callable[[nn.Module, list[Tensor], Tensor], Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 12)


class Scaled(Owner):
    """A weight that is computed, as in networks with an equalized learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w * self.scale, padding=1)


class TwoComputed(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w * self.scale, padding=1).relu()
        return F.conv2d(x, self.w.flip(2), padding=1)


class Recursive(Owner):
    def forward(self, x: Tensor, more: bool = True) -> Tensor:
        x = F.conv2d(x, self.w, padding=1)
        return self.forward(x, more=False) if more else x


class Padded(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 0, 1)), self.w)


class PaddedInWidth(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1)), self.w)


class Circular(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.w)


class Encoder(Owner):
    def encode(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) + 1


class Tied(nn.Module):
    """Uses the weight of a convolution module once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.conv.weight, padding=1)


def twice(m: nn.Module, c: list[Tensor], x: Tensor) -> Tensor:
    return concatenated(concatenated(x, m.w, c[0]), m.w, c[0])


def two_computed(m: nn.Module, c: list[Tensor], x: Tensor) -> Tensor:
    first = concatenated(x, m.w * 0.5, c[0]).relu()
    return concatenated(first, m.w.flip(2), c[1])


def padded_by(*amounts: int, mode: str = "constant") -> Reference:
    return lambda m, c, x: concatenated(x, m.w, c[0], lambda t: F.pad(t, amounts, mode=mode))


def tied(m: nn.Module, c: list[Tensor], x: Tensor) -> Tensor:
    # In order of registration: the functional branch lies beside the convolution.
    by_name = dict(zip(("conv", "function"), c, strict=True))
    return concatenated(
        concatenated(x, m.conv.weight, by_name["conv"]), m.conv.weight, by_name["function"]
    )


CASES: dict[str, tuple[type[nn.Module], Reference]] = {
    "stored": (Owner, lambda m, c, x: concatenated(x, m.w, c[0])),
    "computed": (Scaled, lambda m, c, x: concatenated(x, m.w * 0.5, c[0])),
    "two computed": (TwoComputed, two_computed),
    "recursive": (Recursive, twice),
    "padded": (Padded, padded_by(1, 2, 0, 1)),
    "padded in width": (PaddedInWidth, padded_by(1, 1, 0, 0)),
    "circular": (Circular, padded_by(1, 1, 1, 1, mode="circular")),
    "another method": (Encoder, lambda m, c, x: concatenated(x, m.w, c[0]) + 1),
    "tied": (Tied, tied),
}


def patched_case(name: str, x: Tensor) -> tuple[nn.Module, nn.Module, Reference]:
    plain, reference = CASES[name]
    model = plain()
    return model, ccp.patch(model, "all", example_inputs=x), reference


@pytest.mark.parametrize("name", CASES)
def test_bits_at_zero_and_an_independent_reference_beyond(name: str, x: Tensor) -> None:
    model, patched, reference = patched_case(name, x)
    assert isinstance(patched, type(model))
    results = []
    for each in (model, patched):
        image = x.clone().requires_grad_()
        output = each(image)
        output.square().sum().backward()
        results.append((output.detach(), image.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert all(weight.grad.any() for weight in ccp.coord_parameters(patched))
    fill_(patched)
    expected = reference(model, ccp.coord_parameters(patched), x)
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # maps are kept
        for _ in range(2):
            torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
        ccp.coord_parameters(patched)[0].mul_(2)
        assert not torch.allclose(patched(x), expected, atol=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_unpatched_models(name: str, x: Tensor) -> None:
    model, patched, _ = patched_case(name, x)
    expected = fill_(patched)(x)
    buffer = io.BytesIO()
    torch.save(patched, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(buffer, weights_only=False),
    )
    for each in copies:
        assert type(each) is type(patched)
        assert torch.equal(each(x), expected)
        fill_(each)
        assert not torch.equal(each(x), expected)
    assert torch.equal(patched(x), expected)
    unpatched = ccp.unpatch(patched, discard=True)
    assert type(unpatched) is type(model)
    assert torch.equal(unpatched(x), model(x))
    assert list(unpatched.state_dict()) == list(model.state_dict())
    assert vars(unpatched).keys() == vars(model).keys()


@pytest.mark.parametrize("name", CASES)
def test_compiled_in_one_graph(name: str, x: Tensor) -> None:
    _, patched, _ = patched_case(name, x)
    fill_(patched)
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), patched(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("name", CASES)
def test_programs_of_torch_export(name: str, strict: bool, x: Tensor) -> None:
    _, patched, _ = patched_case(name, x)
    fill_(patched)
    if name == "tied" and strict and BEFORE_2_11:  # whose dynamo calls a tied weight's module once
        with pytest.raises(torch._dynamo.exc.Unsupported, match="PatchError"):
            torch.export.export(patched, (x,), strict=True)
        return
    program = torch.export.export(patched, (x,), strict=strict)
    assert torch.equal(program.module()(x), patched(x))
    trainable = ccp.from_exported(program)
    assert len(ccp.coord_parameters(trainable)) == len(ccp.coord_parameters(patched))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("name", CASES)
def test_traces(name: str, x: Tensor) -> None:
    _, patched, _ = patched_case(name, x)
    fill_(patched)
    assert torch.equal(torch.jit.trace(patched, (x,), check_trace=False)(x), patched(x))
    if name == "tied":  # a traced module's call is none of the function, so counting goes wrong
        with pytest.raises(PatchError, match=r"conv\.weight is told from other convolutions by"):
            fx.symbolic_trace(patched)
    elif name != "recursive":  # its argument steers it, which torch.fx cannot follow
        traced = fx.symbolic_trace(patched)
        assert torch.equal(traced(x), patched(x))
        assert len(ccp.coord_parameters(traced)) == len(ccp.coord_parameters(patched))


@pytest.mark.parametrize("name", CASES)
def test_functional_calls_and_ensembles(name: str, x: Tensor) -> None:
    _, patched, _ = patched_case(name, x)
    fill_(patched)
    weights = {key: value.detach().clone() for key, value in patched.named_parameters()}
    assert torch.equal(torch.func.functional_call(patched, weights, (x,)), patched(x))
    stacked = {key: torch.stack((value, 2 * value)) for key, value in weights.items()}

    def run(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(patched, params, (x,))

    doubled = {key: 2 * value for key, value in weights.items()}
    torch.testing.assert_close(torch.vmap(run)(stacked)[1], run(doubled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_saved_coordinates_come_back(name: str, x: Tensor, tmp_path: Any) -> None:
    model, patched, _ = patched_case(name, x)
    expected = fill_(patched)(x)
    path = ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert torch.equal(ccp.load_coords(model, path)(x), expected)
    fresh = copy.deepcopy(model)
    assert ccp.load_coords_(fresh, path) is fresh
    assert torch.equal(fresh(x), expected)
    assert torch.equal(ccp.load_coords_(fill_(patched), path)(x), expected)
    outer = nn.Sequential(nn.Identity(), fill_(patched))  # names are those of the new root now
    expected = outer(x)
    path = ccp.save_coords(outer, tmp_path / "outer.safetensors")
    assert torch.equal(ccp.load_coords(nn.Sequential(nn.Identity(), model), path)(x), expected)
    assert all(site.patched for site in find_sites(outer, x).sites)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total", 0),
        ("total", True),
        ("indices", [1, 0]),
        ("indices", [5]),
        ("indices", None),
        ("function", "relu"),
        ("weight", 3),
        ("padding", {}),
    ],
)
def test_records_of_calls_have_strict_types(field: str, value: Any) -> None:
    good = OwnedCalls("a", "conv2d", None, indices=(0, 1), total=2).to_dict()
    good = json.loads(json.dumps(good))
    assert OwnedCalls.from_dict(good).to_dict() == {**good, "indices": (0, 1)} | {
        "padding": OwnedCalls.from_dict(good).to_dict()["padding"]
    }
    with pytest.raises(ArgumentError):
        OwnedCalls.from_dict(good | {field: value})


def test_a_record_that_does_not_fit_is_refused(x: Tensor, tmp_path: Any) -> None:
    path = ccp.save_coords(
        fill_(ccp.patch(Scaled(), "all", example_inputs=x)), tmp_path / "c.safetensors"
    )
    for other in (nn.Sequential(Scaled()), nn.Conv2d(3, 3, 3)):
        before = copy.deepcopy(other)
        with pytest.raises(WeightsError):
            ccp.load_coords_(other, path, check_base=False)
        assert [type(m) for m in other.modules()] == [type(m) for m in before.modules()]


@pytest.mark.parametrize("name", CASES)
def test_exported_to_onnx(name: str, x: Tensor, tmp_path: Any) -> None:
    _, patched, _ = patched_case(name, x)
    fill_(patched)
    report = ccp.export_onnx(patched, tmp_path / "m.onnx", x)  # compared with torch there
    assert report.coord_constant_bytes > 0


# --- the ways in which a model is run -------------------------------------------------------------


def test_a_method_that_is_called_by_itself_sees_coordinates(x: Tensor) -> None:
    patched = fill_(ccp.patch(Encoder(), "all"))
    assert torch.equal(patched.encode(x) + 1, patched(x))


def test_a_method_that_is_replaced_on_the_class_is_the_one_that_runs(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(Owner):
        pass

    patched = fill_(ccp.patch(Later(), "all"))
    before = patched(x)
    monkeypatch.setattr(Later, "forward", lambda self, x: 2 * F.conv2d(x, self.w, padding=1))
    assert torch.equal(patched(x), 2 * before)


class Checkpointed(Owner):
    def __init__(self, of_a_method: bool, reentrant: bool) -> None:
        super().__init__()
        self.of_a_method, self.reentrant = of_a_method, reentrant

    def inner(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, padding=1).relu()

    def forward(self, x: Tensor) -> Tensor:
        function = self.inner if self.of_a_method else lambda t: F.conv2d(t, self.w, padding=1)
        return checkpoint(function, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_a_method_have_the_right_gradients(reentrant: bool, x: Tensor) -> None:
    patched = fill_(ccp.patch(Checkpointed(True, reentrant), "all", example_inputs=x))
    image = x.clone().requires_grad_()
    patched(image).square().sum().backward()
    weight, coord_weight = patched.w, ccp.coord_parameters(patched)[0]
    leaves = [t.detach().clone().requires_grad_() for t in (image, weight, coord_weight)]
    concatenated(*leaves).relu().square().sum().backward()
    for found, expected in zip((image, weight, coord_weight), leaves, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_would_lose_coordinates_is_refused(reentrant: bool, x: Tensor) -> None:
    patched = fill_(ccp.patch(Checkpointed(False, reentrant), "all"))
    with pytest.raises(PatchError, match="w: gradient checkpointing of a function inside the mo"):
        patched(x.clone().requires_grad_())
    with torch.no_grad():
        assert patched(x).shape == x.shape


def test_a_checkpoint_around_the_module_is_right(x: Tensor) -> None:
    patched = fill_(ccp.patch(Owner(), "all"))
    image = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(patched(image).square().sum(), patched.w)
    for reentrant in (True, False):
        output = checkpoint(patched, image, use_reentrant=reentrant)
        output.square().sum().backward()
        torch.testing.assert_close(patched.w.grad, expected)
        patched.w.grad = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, x: Tensor) -> None:
    model = Owner().to(dtype)
    patched = ccp.patch(model, "all", example_inputs=x.to(dtype))
    assert torch.equal(patched(x.to(dtype)), model(x.to(dtype)))
    assert fill_(patched)(x.to(dtype)).dtype is dtype


def test_autocast(x: Tensor) -> None:
    model = Owner()
    patched = ccp.patch(model, "all")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(patched(x), model(x))
    fill_(patched)
    with torch.autocast("cpu", torch.bfloat16):
        found = patched(x)
        assert found.dtype is torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(patched(x), found)
    torch.testing.assert_close(found.float(), patched(x), rtol=5e-2, atol=5e-2)


def test_mkldnn_images(x: Tensor) -> None:
    patched = fill_(ccp.patch(nn.Sequential(Owner()), "all")).requires_grad_(False)
    torch.testing.assert_close(patched(x.to_mkldnn()).to_dense(), patched(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_torchscript_is_refused_by_name() -> None:
    patched = ccp.patch(nn.Sequential(Owner()), "all")
    with pytest.raises(PatchError, match=r"torch\.jit\.script cannot compile '0'"):
        torch.jit.script(patched)


def test_coordinates_of_functions_do_not_vanish_silently(x: Tensor) -> None:
    def trained() -> nn.Module:
        return fill_(ccp.patch(nn.Sequential(Owner(), nn.BatchNorm2d(3)).eval(), "all"))

    replaced = trained()
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    conv.weight.data.copy_(replaced[0].w.data)
    replaced[0] = conv
    folded = trained()
    folded(x)
    folded[0].w.data.mul_(torch.tensor([2.0, 3.0, 4.0]).view(-1, 1, 1, 1))
    folded[1] = nn.Identity()
    for model in (replaced, folded):
        with pytest.raises(PatchError, match=r"trained coordinates were left behind at 0\.w"):
            model(x)
    trained()(x)


def test_unbatched_images(x: Tensor) -> None:
    patched = fill_(ccp.patch(Owner(), "all"))
    torch.testing.assert_close(patched(x[0]), patched(x)[0])


def test_one_and_three_dimensions_and_transposed() -> None:
    class Every(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 2, 3))
            self.w3 = nn.Parameter(torch.randn(4, 1, 2, 2, 2))
            self.t2 = nn.Parameter(torch.randn(2, 3, 3, 3))

        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            return (
                F.conv1d(a, weight=self.w1, stride=2, padding="valid"),
                F.conv3d(b, self.w3, None, 1, (0, 1, 1), 1, groups=2),
                F.conv_transpose2d(c, self.t2, stride=2, output_padding=1),
            )

    inputs = (torch.randn(2, 2, 9), torch.randn(2, 2, 4, 5, 6), torch.randn(2, 2, 4, 5))
    model = Every()
    patched = ccp.patch(model, "all", example_inputs=inputs)
    for found, expected in zip(patched(*inputs), model(*inputs), strict=True):
        assert torch.equal(found, expected)
    fill_(patched)
    w1, w3, t2 = (layer.coord_weight for layer in coord_layers(patched).values())
    grid = ccp.Coordinates().grid
    branches = (
        F.conv1d(grid((9,))[None], w1, stride=2),
        F.conv3d(grid((4, 5, 6))[None], w3, padding=(0, 1, 1)),
        F.conv_transpose2d(grid((4, 5))[None], t2, stride=2, output_padding=1),
    )
    for found, plain, branch in zip(patched(*inputs), model(*inputs), branches, strict=True):
        torch.testing.assert_close(found, plain + branch, rtol=1e-4, atol=1e-4)


# --- owners of every kind -------------------------------------------------------------------------

T = TypeVar("T")


class Abstract(Owner, abc.ABC):
    @abc.abstractmethod
    def part(self) -> int: ...


class Concrete(Abstract):
    def part(self) -> int:
        return 1


class Parametric(Owner, Generic[T]):
    pass


REGISTRY: dict[str, type] = {}


class Registered(Owner):
    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY[key] = cls


class InRegistry(Registered, key="model"):
    pass


class Reducing(Owner):
    def __reduce__(self) -> Any:
        return Reducing, (), self.__dict__


def test_methods_of_every_kind_stay_what_they_are(x: Tensor) -> None:
    class Base(Owner):
        def convolve(self, x: Tensor) -> Tensor:
            raise NotImplementedError

        def scale_of(self) -> float:
            return 0.0

        @property
        def doubled(self) -> float:
            return 2 * self.scale

    class Mixed(Base):
        @staticmethod
        def convolve(x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
            return F.conv2d(x, w, padding=1)

        @classmethod
        def scale_of(cls) -> float:  # type: ignore[override]
            return 0.25

        def parts(self, x: Tensor) -> Any:
            yield self.convolve(x, self.w) * self.doubled
            yield x * self.scale_of()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack(list(self.parts(x))).sum(0)

    model = Mixed()
    patched = ccp.patch(model, "all", example_inputs=x)
    assert torch.equal(patched(x), model(x))
    (coord_weight,) = ccp.coord_parameters(fill_(patched))
    expected = concatenated(x, model.w, coord_weight) + x / 4
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Concrete, Parametric, InRegistry, Reducing])
def test_classes_of_every_kind_may_own_calls(kind: type[nn.Module], x: Tensor) -> None:
    model = kind()
    patched = fill_(ccp.patch(model, "all"))
    expected = concatenated(x, model.w, ccp.coord_parameters(patched)[0])
    for each in (patched, copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-4)
    assert type(patched).__name__ == kind.__name__
    assert {"model": InRegistry} == REGISTRY
    assert type(type(patched)()) is not kind  # a fresh one, which computes as a plain one
    assert type(patched)()(x).shape == x.shape


def test_owners_that_would_run_the_branch_as_a_member_are_refused(x: Tensor) -> None:
    class Chain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.ReLU())
            self.w = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.conv2d(x, self.w))

    for inputs in (None, x):
        with pytest.raises(SelectionError, match=r"is a torch\.nn\.Sequential, whose members"):
            ccp.patch(Chain(), "all", example_inputs=inputs)


def test_a_forward_on_the_instance_is_refused() -> None:
    model = Owner()
    model.forward = model.forward
    with pytest.raises(SelectionError, match="is replaced on the instance"):
        ccp.patch(model, "all")


def test_a_weight_from_elsewhere_makes_the_common_module_the_owner(x: Tensor) -> None:
    class Borrowing(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(x, weight, padding=1)

    class Lending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 3, 3) / 3)
            self.a, self.b = Borrowing(), Borrowing()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x, self.w).relu(), self.w)

    model = nn.Sequential(Lending())
    for inputs in (None, x):
        site = find_sites(model, inputs).sites[0]
        assert (site.name, site.owned.owner) == ("0.w", "0")
        patched = ccp.patch(model, "all", example_inputs=inputs)
        assert torch.equal(patched(x), model(x))
        coord_weight = ccp.coord_parameters(fill_(patched))[0]
        weight = model[0].w
        expected = concatenated(concatenated(x, weight, coord_weight).relu(), weight, coord_weight)
        torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)


def test_a_parametrized_weight_is_known_by_its_position(x: Tensor) -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    model = Owner()
    parametrize.register_parametrization(model, "w", Half())
    patched = fill_(ccp.patch(model, "all", example_inputs=x))
    expected = concatenated(x, model.w, ccp.coord_parameters(patched)[0])
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
    parametrize.remove_parametrizations(patched, "w")
    assert torch.equal(ccp.unpatch(patched, discard=True)(x), model(x))


def test_a_weight_that_is_parametrized_afterwards_raises_by_name(x: Tensor) -> None:
    patched = fill_(ccp.patch(Owner(), "all"))
    parametrize.register_parametrization(patched, "w", nn.Tanh())
    with pytest.raises(PatchError, match="w is known by its stored weight, but the model now"):
        patched(x)


def test_a_weight_computed_from_the_input_is_refused(x: Tensor) -> None:
    class Modulated(Owner):
        """A weight for each picture, as in StyleGAN2 and CondConv."""

        def forward(self, x: Tensor) -> Tensor:
            style = x.mean((2, 3))
            weight = (self.w * style[:, None, :, None, None]).flatten(0, 1)
            return F.conv2d(x.flatten(0, 1)[None], weight, padding=1, groups=len(x))

    for batch in (x, x[:1]):
        with pytest.raises(SelectionError, match="its weight is computed from the model's input"):
            ccp.patch(Modulated(), "all", example_inputs=batch)


def test_a_weight_computed_from_the_input_by_an_autograd_function_is_refused(x: Tensor) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    class Hidden(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w * Double.apply(x).mean(), padding=1)

    class Doubled(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(Double.apply(x), self.w * 2, padding=1)

    with pytest.raises(SelectionError, match="its weight is computed from the model's input"):
        ccp.patch(Hidden(), "all", example_inputs=x)
    model = Doubled()
    assert torch.equal(ccp.patch(model, "all", example_inputs=x)(x), model(x))


def test_a_weight_that_asks_the_input_for_its_shape_alone_is_patched(x: Tensor) -> None:
    class Resampling(nn.Module):
        """One filter for each channel, as in Downsample1d of diffusers; no trace follows it."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.rand(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            channels = x.shape[1]
            weight = x.new_zeros(channels, channels, 3, 3)
            index = torch.arange(channels)
            weight[index, index] = self.kernel.to(x).expand(channels, -1, -1)
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight)

    class Written(Resampling):
        def forward(self, x: Tensor) -> Tensor:
            weight = x.new_zeros(3, 3, 3, 3)
            weight[0] = x[0, :, :3, :3].unsqueeze(0)
            return F.conv2d(x, weight, padding=1)

    model = Resampling()
    patched = ccp.patch(model, "all", example_inputs=x)
    assert torch.equal(patched(x), model(x))
    (coord_weight,) = ccp.coord_parameters(fill_(patched))
    weight = torch.stack([torch.eye(3)[c, :, None, None] * model.kernel for c in range(3)])
    expected = concatenated(x, weight, coord_weight)
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(SelectionError, match="its weight is computed from the model's input"):
        ccp.patch(Written(), "all", example_inputs=x)


def test_convolutions_that_merge_kernels_are_left_out(x: Tensor) -> None:
    class Merging(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            merged = F.conv2d(self.w.detach().transpose(0, 1), self.conv.weight.data)
            return F.conv2d(x, merged.transpose(0, 1), padding=1)

    model = Merging()
    with pytest.warns(UserWarning, match="its input does not depend on the model's input"):
        patched = ccp.patch(model, "conv2d*", example_inputs=x)
    assert torch.equal(patched(x), model(x))
    names = list(coord_layers(patched))
    assert names == ["conv2d_1"]


def test_a_call_that_runs_otherwise_than_when_patched_raises_by_name(x: Tensor) -> None:
    class Steered(Owner):
        def forward(self, x: Tensor, dilation: int = 1, pad: int = 1) -> Tensor:
            return F.conv2d(F.pad(x, (pad,) * 4), self.w, dilation=dilation)

    patched = ccp.patch(Steered(), "all", example_inputs=x)
    with pytest.raises(PatchError, match="w has coordinates for a convolution 3→3 3×3, but its"):
        patched(x, dilation=2)
    with pytest.raises(PatchError, match="w pads its input by itself, by other pixels than when"):
        patched(x, pad=2)


def test_a_computed_weight_among_another_number_of_calls_raises_by_name(x: Tensor) -> None:
    class Looping(Owner):
        turns = 2

        def forward(self, x: Tensor) -> Tensor:
            for turn in range(self.turns):
                x = F.conv2d(x, self.w * (turn + 1), padding=1)
            return x

    model = Looping()
    patched = ccp.patch(model, "all", example_inputs=x)
    assert len(ccp.coord_parameters(patched)) == 2
    patched.turns = 3
    with pytest.raises(PatchError, match="position among 2 calls of conv2d in the model, which no"):
        patched(x)


def test_chosen_calls_of_a_function(x: Tensor, tmp_path: Any) -> None:
    class Thrice(Owner):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = F.conv2d(x, self.w, padding=1).relu()
            return x

    model = nn.Sequential(Thrice())
    patched = fill_(ccp.patch(model, "0.w@0,2", example_inputs=x))
    (coord_weight,) = ccp.coord_parameters(patched)
    weight = model[0].w
    expected = concatenated(x, weight, coord_weight).relu()
    expected = F.conv2d(expected, weight, padding=1).relu()
    expected = concatenated(expected, weight, coord_weight).relu()
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
    path = ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert torch.equal(ccp.load_coords(model, path)(x), patched(x))


def test_chosen_calls_of_a_computed_weight_come_back(x: Tensor, tmp_path: Any) -> None:
    class Thrice(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.w * self.scale
            for _ in range(3):
                x = F.conv2d(x, weight, padding=1).relu()
            return x

    model = Thrice()
    patched = fill_(ccp.patch(model, "conv2d@1,2", example_inputs=x))
    path = ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert torch.equal(ccp.load_coords(model, path)(x), patched(x))
    plain = F.conv2d(x, model.w * 0.5, padding=1).relu()
    (coord_weight,) = ccp.coord_parameters(patched)
    expected = concatenated(plain, model.w * 0.5, coord_weight).relu()
    expected = concatenated(expected, model.w * 0.5, coord_weight).relu()
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)


def test_chosen_calls_over_several_runs_of_their_module_are_refused(x: Tensor) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Owner()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(x), self.head(x[..., ::2, ::2])

    with pytest.raises(SelectionError, match="in several runs of head, which cannot be told apart"):
        ccp.patch(Pyramid(), "head.w@0", example_inputs=x)


def test_kept_maps_of_layers_inside_are_not_counted(x: Tensor) -> None:
    """They are made in a first forward and not in the next."""

    class Outer(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), self.w * self.scale, padding=1)

    model = Outer().eval()
    patched = fill_(ccp.patch(model, "all", example_inputs=x))
    expected = patched(x)
    with torch.no_grad():
        for image in (x, x, x[..., :5]):
            patched(image)
        assert torch.equal(patched(x), expected)
    again = ccp.unpatch(ccp.patch(ccp.patch(model, "conv"), "conv2d", example_inputs=x))
    assert torch.equal(again(x), model(x))


def test_other_functions_of_the_owner_and_its_parts_stay_plain(x: Tensor) -> None:
    class Mixed(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.randn(3, 3, 3, 3))
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            parametrize.register_parametrization(self.conv, "weight", nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(F.conv2d(x, self.other, padding=1))
            return self.conv(F.conv2d(x, self.w * self.scale, padding=1))

    model = Mixed()
    patched = fill_(ccp.patch(model, "conv2d", example_inputs=x))
    before = model.conv(F.conv2d(x, model.other, padding=1))
    own = concatenated(before, model.w * 0.5, ccp.coord_parameters(patched)[0])
    torch.testing.assert_close(patched(x), model.conv(own), rtol=1e-4, atol=1e-4)
