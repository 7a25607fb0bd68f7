"""Calls that a mode could miss, or see twice: coordinates are right there, or it is an error.

Cases that people's code has and torch function modes do not show by themselves: checkpoints,
autograd Functions, compiled parts, other methods, other classes, weights of another kind.
"""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from function_owners import Owner, concatenated, fill_
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError, SelectionError
from coordconv_patch.layers.coord_layer import coord_layers


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 12)


class Computed(Owner):
    """By a weight that it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w * self.scale, padding=1)


def patched(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    return fill_(ccp.patch(model, "all", example_inputs=x, **options))


class CheckpointedComputed(Computed):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_method_with_a_computed_weight_is_refused(
    reentrant: bool, x: Tensor
) -> None:
    model = CheckpointedComputed()
    model.reentrant = reentrant
    with pytest.raises(PatchError, match="conv2d: gradient checkpointing of a function inside the"):
        ccp.patch(model, "all", example_inputs=x)
    computes = patched(model, x, check=False)
    with pytest.raises(PatchError, match=r"checkpoint the module$"):
        computes(x.clone().requires_grad_())
    with torch.no_grad():
        (weight,) = ccp.coord_parameters(computes)
        torch.testing.assert_close(computes(x), concatenated(x, model.w * 0.5, weight))


class Convolver(Owner):
    """An owner whose parent may give it another weight."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, w, padding=1), self.w, padding=1)


class Parent(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.child = Convolver()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.child, x, self.w, use_reentrant=False)


def test_a_checkpointed_child_that_is_an_owner_does_not_hide_its_parents_calls(x: Tensor) -> None:
    computes = patched(Parent(), x, check=False)
    with pytest.raises(PatchError, match="w: gradient checkpointing of a function inside the mod"):
        computes(x.clone().requires_grad_())


class OwnCheckpoint(torch.autograd.Function):
    """As guided-diffusion has one."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class OwnConvolution(torch.autograd.Function):
    """In torch's newer form, whose forward has no context."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class ByOwnCheckpoint(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return OwnCheckpoint.apply(lambda t: F.conv2d(t, self.w, padding=1), x, self.w)


class ByOwnConvolution(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return OwnConvolution.apply(x, self.w)


class Frozen(Owner):
    """No autograd Function: what is not to have gradients has none, coordinates neither."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.conv2d(x, self.w, padding=1)


@pytest.mark.parametrize("kind", [ByOwnCheckpoint, ByOwnConvolution])
def test_calls_in_an_autograd_function_are_refused_where_gradients_are_wanted(
    kind: type[Owner], x: Tensor
) -> None:
    model = kind()
    computes = patched(model, x, check=False)
    with pytest.raises(PatchError, match=r"w: an autograd Function .* inside the model"):
        computes(x.clone().requires_grad_())
    with torch.no_grad():
        expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
        torch.testing.assert_close(computes(x), expected)


def test_a_block_without_gradients_is_no_autograd_function(x: Tensor) -> None:
    model = Frozen()
    computes = patched(model, x)
    expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
    torch.testing.assert_close(computes(x.clone().requires_grad_()), expected)


class CheckpointedFunction(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: F.conv2d(t, self.w, padding=1), x, use_reentrant=False)


class CheckpointedBlock(Owner):
    """A checkpoint in a forward, around something else."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, F.conv2d(x, self.w, padding=1), use_reentrant=False)


def test_torch_compile_does_not_lose_coordinates_in_a_checkpoint(x: Tensor) -> None:
    model = CheckpointedFunction()
    computes = patched(model, x, check=False)
    compiled = torch.compile(computes, backend="aot_eager")
    with torch.no_grad():
        expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
        torch.testing.assert_close(compiled(x), expected)
    with pytest.raises(PatchError, match="w: gradient checkpointing of a function"):
        compiled(x.clone().requires_grad_())
    block = fill_(ccp.patch(CheckpointedBlock(), "all", example_inputs=x))
    output = torch.compile(block, backend="aot_eager")(x)
    torch.testing.assert_close(output, block(x))


def test_a_checkpointed_coordinate_layer_compiles_in_one_graph(x: Tensor) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.conv, x, use_reentrant=False)

    computes = patched(Checkpointed(), x)
    compiled = torch.compile(computes, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), computes(x))


class CompiledPart(Owner):
    """A child that is given the weight; and a second call behind a break of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.child = GivenWeight()

    def forward(self, x: Tensor) -> Tensor:
        x = self.child(x, self.w)
        torch._dynamo.graph_break()
        return F.conv2d(x, self.w, padding=1)


class GivenWeight(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)


def _by_interpreter(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return torch.fx.Interpreter(graph).run


@pytest.mark.parametrize("backend", ["eager", "aot_eager", _by_interpreter])
def test_parts_that_are_compiled_see_coordinates_once(backend: Any, x: Tensor) -> None:
    model = CompiledPart()
    computes = patched(model, x)
    weight = ccp.coord_parameters(computes)[0]
    expected = concatenated(concatenated(x, model.w, weight), model.w, weight)
    torch.testing.assert_close(computes(x), expected)
    torch.testing.assert_close(torch.compile(computes, backend=backend)(x), expected)
    computes.child.compile(backend=backend)
    torch.testing.assert_close(computes(x), expected)


def test_a_computed_weight_that_is_stored_now_is_told(x: Tensor) -> None:
    model = nn.Sequential(parametrizations.weight_norm(Owner(), "w"))
    computes = patched(model, x)
    parametrize.remove_parametrizations(computes[0], "w")
    with pytest.raises(PatchError, match="now calls conv2d with one that it stores"):
        computes(x)


def test_a_cast_that_does_nothing_any_more_is_told(x: Tensor) -> None:
    class Cast(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w.to(x.dtype), padding=1)

    computes = patched(Cast(), x.bfloat16())
    with pytest.raises(PatchError, match="now calls conv2d with one that it stores"):
        computes(x)


def test_another_method_cannot_place_what_is_counted(x: Tensor) -> None:
    computes = patched(Computed(), x)
    with pytest.raises(PatchError, match=r"inner\(\) was called without one: call the module"):
        computes.inner(x)
    assert torch.equal(computes(x), computes(x))  # nothing stays behind


def test_another_method_cannot_place_the_second_of_two(x: Tensor) -> None:
    class Two(Computed):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(F.conv2d(x, self.w * 2, padding=1))

    computes = fill_(ccp.patch(Two(), "conv2d_1", example_inputs=x))
    with pytest.raises(PatchError, match=r"inner\(\) was called without one: call the module"):
        computes.inner(x)


class Twice(nn.Module):
    """One head with a computed weight at two levels, as equalised learning rates have it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Computed()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.head(x[..., ::2, ::2])


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_shared_module_with_a_computed_weight_is_one_site(x: Tensor) -> None:
    model = Twice()
    computes = patched(model, x)
    (site,) = ccp.plan(model, "all", example_inputs=x).chosen
    assert site.name == "head.conv2d"
    assert len(site.calls) == 2
    (weight,) = ccp.coord_parameters(computes)
    for actual, given in zip(computes(x), (x, x[..., ::2, ::2]), strict=True):
        torch.testing.assert_close(actual, concatenated(given, model.head.w * 0.5, weight))


def test_stored_weights_are_not_counted_when_they_are_no_parameters(x: Tensor) -> None:
    class WithConvolution(Computed):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.conv(x))

    computes = patched(WithConvolution(), x)
    values = {name: value.detach() for name, value in computes.state_dict().items()}
    actual = torch.func.functional_call(computes, values, (x,))
    torch.testing.assert_close(actual, computes(x))


class Members(nn.Sequential):
    """Stores a weight beside its members."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))


class ByItsSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Members()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.conv2d(x, self.block.weight, padding=1))


class ThroughItsChildren(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w, padding=1)
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("kind", [ByItsSequential, ThroughItsChildren])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_a_branch_never_becomes_a_member_that_is_run(
    kind: type[nn.Module], with_inputs: bool, x: Tensor
) -> None:
    with pytest.raises(SelectionError, match="whose members are run one by one"):
        ccp.patch(kind(), "all", example_inputs=x if with_inputs else None)


def test_a_forward_that_is_the_call_itself(x: Tensor) -> None:
    class Called(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, padding=1)

        __call__ = forward

    model = Called()
    computes = fill_(ccp.patch(model, "all"))
    expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
    torch.testing.assert_close(computes(x), expected)


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("operator", ["default", "packet"])
def test_operators_of_aten(operator: str, with_inputs: bool, x: Tensor) -> None:
    aten = torch.ops.aten.conv2d

    class ByOperator(Owner):
        def forward(self, x: Tensor) -> Tensor:
            call = aten.default if operator == "default" else aten
            return call(x, self.w, None, [1, 1], [1, 1])

    model = ByOperator()
    if operator == "packet" and not with_inputs:
        with pytest.raises(SelectionError):  # torch.fx has another name for it
            ccp.patch(model, "all")
        return
    computes = fill_(ccp.patch(model, "all", example_inputs=x if with_inputs else None))
    expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
    torch.testing.assert_close(computes(x), expected)


def test_another_class_keeps_the_coordinates(x: Tensor) -> None:
    class Merged(Owner):
        """As ToMe gives blocks another class."""

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x.flip(0), self.w, padding=1)

    model = Owner()
    computes = patched(model, x)
    computes.__class__ = Merged
    assert isinstance(computes, Merged)
    (weight,) = ccp.coord_parameters(computes)
    expected = concatenated(x.flip(0), model.w, weight)
    torch.testing.assert_close(computes(x), expected)
    torch.testing.assert_close(copy.deepcopy(computes)(x), expected)
    assert type(ccp.unpatch(computes, discard=True)) is Merged


class _Doubled:
    """A forward that somebody puts on a module; it calls the one before."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        self.before = before

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.before(x)


def test_another_forward_on_the_instance_keeps_the_coordinates(x: Tensor) -> None:
    model = nn.Sequential(Owner())
    computes = patched(model, x)
    (weight,) = ccp.coord_parameters(computes)
    expected = concatenated(x, model[0].w, weight)

    def convolve(self: Owner, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, padding=1)

    computes[0].forward = types.MethodType(convolve, computes[0])
    torch.testing.assert_close(computes(x), expected)
    copied = copy.deepcopy(computes)
    with torch.no_grad():
        copied[0].w.mul_(2)
    torch.testing.assert_close(copied(x), concatenated(x, 2 * model[0].w, weight))
    torch.testing.assert_close(computes(x), expected)
    del computes[0].forward
    computes[0].forward = _Doubled(computes[0].forward)
    torch.testing.assert_close(computes(x), 2 * expected)
    file = io.BytesIO()
    torch.save(computes.state_dict(), file)
    plain = ccp.unpatch(computes, discard=True)
    assert isinstance(plain[0].forward, _Doubled)


def test_attributes_set_in_a_compiled_forward(x: Tensor) -> None:
    class Counting(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.total = self.total + 1
            return F.conv2d(x, self.w, padding=1)

    model = Counting()
    computes = patched(model, x)
    expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
    compiled = torch.compile(computes, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert (computes.count, float(computes.total)) == (1, 1)


def test_numbers_of_numpy(x: Tensor) -> None:
    class Strided(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, stride=np.int64(2), padding=1)

    model = Strided()
    computes = patched(model, x)
    expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])[..., ::2, ::2]
    torch.testing.assert_close(computes(x), expected)


def _hidden() -> nn.Module:
    class Hidden(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.kept = [nn.Parameter(torch.randn(3, 3, 1, 1))]

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kept[0])

    return Hidden()


def _scripted() -> nn.Module:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class ByScript(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = torch.jit.trace(Held(), torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.held(F.conv2d(x, self.held.w, padding=1))

    return ByScript()


def _property() -> nn.Module:
    class ByProperty(Owner):
        def _convolve(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, padding=1)

        @property
        def forward(self) -> Any:  # type: ignore[override]
            return self._convolve

    return ByProperty()


def _uninitialised() -> nn.Module:
    class Lazy(nn.modules.lazy.LazyModuleMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.UninitializedParameter()

        def initialize_parameters(self, x: Tensor) -> None:
            raise NotImplementedError

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, padding=1)

    return Lazy()


def _without_subclasses() -> nn.Module:
    made = []

    class Once(type):
        def __new__(cls, *args: Any) -> Any:
            if made:
                raise TypeError("there is one already")
            made.append(args)
            return super().__new__(cls, *args)

    class Only(Owner, metaclass=Once):
        pass

    return Only()


@pytest.mark.parametrize(
    ("make", "reason", "with_inputs"),
    [
        (_hidden, "its weight is a Parameter that the model does not register", True),
        (_scripted, "stores its weight and is TorchScript", True),
        (_property, "the forward of ByProperty is not a method", True),
        (_uninitialised, "its weight is not initialised: run the model once", False),
        (_without_subclasses, "has a metaclass that refuses one: there is one already", True),
    ],
)
def test_what_cannot_be_patched_is_said(
    make: Callable[[], nn.Module], reason: str, with_inputs: bool, x: Tensor
) -> None:
    model = make()
    before = dict(model.named_modules())
    with pytest.raises((PatchError, SelectionError), match=reason):
        ccp.patch_(model, "all", example_inputs=x if with_inputs else None)
    assert dict(model.named_modules()) == before
    assert not coord_layers(model)


def test_a_frozen_module_is_patched_and_unpatched(x: Tensor) -> None:
    class Immutable(Owner):
        def __setattr__(self, name: str, value: Any) -> None:
            if name != "training" and self.__dict__.get("frozen"):
                raise AttributeError(f"{name} is frozen")
            super().__setattr__(name, value)

    model = Immutable()
    model.__dict__["frozen"] = True
    computes = patched(model, x)
    expected = concatenated(x, model.w, ccp.coord_parameters(computes)[0])
    torch.testing.assert_close(computes(x), expected)
    assert type(ccp.unpatch(computes, discard=True)) is Immutable
