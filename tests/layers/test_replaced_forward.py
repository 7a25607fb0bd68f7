"""A forward, or a class, that other code gives to one coordinate layer: no loss without a word."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError

LEFT_OUT = "but leaves its coordinates out: let it call the"


def patched(conv: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1) if conv is None else conv
    model = ccp.patch_(nn.Sequential(conv), "all")  # a pruned one cannot be copied
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_()
    return model


def conv_of(weight: Callable[[Any], Tensor]) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    return lambda layer: lambda x: F.conv2d(x, weight(layer), layer.bias, padding=1)


def aten(layer: Any) -> Callable[[Tensor], Tensor]:
    numbers = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return lambda x: torch.ops.aten.convolution(x, layer.weight, layer.bias, *numbers)


def by_columns(layer: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        return (layer.weight.flatten(1) @ columns).unflatten(2, x.shape[2:])

    return forward


def merged_before(layer: Any) -> Callable[[Tensor], Tensor]:
    merged = layer.weight.detach() + 0.1
    return lambda x: F.conv2d(x, weight=merged, padding=1)


FORWARDS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "an adapter's sum": conv_of(lambda layer: layer.weight + 0.1),
    "a multiple": conv_of(lambda layer: layer.weight * 2),
    "a cast weight": conv_of(lambda layer: layer.weight.double().float()),
    "the weight": conv_of(lambda layer: layer.weight),
    "aten": aten,
    "no convolution": by_columns,
    "merged before": merged_before,
}


def by_dict(layer: Any, name: str, value: Any) -> None:
    layer.__dict__[name] = value


@pytest.mark.parametrize("put", [setattr, by_dict, object.__setattr__])
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_without_the_coordinates_is_refused(
    forward: str, put: Callable[..., None]
) -> None:
    model, x = patched(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        want = model(x)
    put(model[0], "forward", FORWARDS[forward](model[0]))
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients), pytest.raises(PatchError, match=LEFT_OUT):
            model(x)
    del model[0].forward
    torch.testing.assert_close(model(x), want)


def test_weights_that_are_computed_are_known_too() -> None:
    for make in (spectral_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)):
        model = patched(make(nn.Conv2d(3, 4, 3, padding=1)))
        x = torch.randn(2, 3, 6, 6)
        old = model[0].forward
        model[0].forward = FORWARDS["a multiple"](model[0])
        with pytest.raises(PatchError, match=LEFT_OUT):
            model(x)
        model[0].forward = lambda x, old=old: old(x) * 2
        assert torch.isfinite(model(x)).all()
    model = patched()
    parametrize.register_parametrization(model[0], "coord_weight", nn.Identity())
    old = model[0].forward
    model[0].forward = lambda x: old(x) + F.conv2d(x, model[0].weight * 0.1, padding=1)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("put", [setattr, by_dict, object.__setattr__])
def test_a_forward_that_calls_the_old_one_is_looked_at_once(put: Callable[..., None]) -> None:
    model, x = patched(), torch.randn(2, 3, 6, 6)
    want, old = model(x), model[0].forward

    def with_adapter(x: Tensor) -> Tensor:
        return old(x.to(model[0].weight.dtype)) + F.conv2d(x, 0.0 * model[0].weight, padding=1)

    put(model[0], "forward", with_adapter)
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            torch.testing.assert_close(model(x), want)
            assert vars(model[0])["forward"] is with_adapter
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), want)
    assert vars(ccp.unpatch_(model, discard=True)[0]).keys() & {"forward", "_accepted_forward"} == {
        "forward"
    }


def test_a_forward_in_the_dict_is_copied_and_pickled() -> None:
    model, x = patched(), torch.randn(2, 3, 6, 6)
    want = model(x)
    vars(model[0])["forward"] = model[0].forward
    assert torch.equal(model(x), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
        assert vars(other[0])["forward"].__self__ is other[0]


class Mine(nn.Conv2d):
    """A class that somebody gives to convolutions in place."""


def test_another_class_is_refused_and_changes_nothing() -> None:
    model, x = patched(), torch.randn(2, 3, 6, 6)
    want, kind = model(x), type(model[0])
    for other in (Mine, nn.Conv2d):
        with pytest.raises(PatchError, match=r"the class \w+ knows nothing: unpatch the model"):
            model[0].__class__ = other
        assert type(model[0]) is kind
    assert torch.equal(model(x), want)
    assert "0.coord_weight" in model.state_dict()
    plain = ccp.unpatch(model, discard=True)
    plain[0].__class__ = Mine
    assert type(ccp.patch(plain, "all")[0])._plain_class is Mine


def test_a_class_beneath_is_taken() -> None:
    model, x = patched(), torch.randn(2, 3, 6, 6)
    want = model(x)
    spectral_norm(model[0])  # which gives the module another class, and takes it back
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    model[0].__class__ = type("Beneath", (type(model[0]),), {})
    torch.testing.assert_close(model(x), want)
