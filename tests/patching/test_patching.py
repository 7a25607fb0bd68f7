"""Patch and unpatch: what the patched model keeps, what is refused, and that failures undo."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import coordconv_patch as ccp
from coordconv_patch.errors import CoordinatesError, PatchError, SelectionError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.patching import apply
from coordconv_patch.sites.find import find_sites


class Net(nn.Module):
    """Batch norm, dropout, an alias, a method and a convolution that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6))
        self.block = nn.Conv2d(6, 6, 3, padding="same", groups=3)
        self.same_block = self.block
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.same_block(self.block(self.stem(x).relu()))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.fc(self.dropout(self.features(x).mean((2, 3)))) * scale


class Functional(nn.Module):
    def __init__(self, channels: int = 3, out_channels: int = 4) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(out_channels, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


class Named(nn.Module):
    """A functional convolution whose parameters are called as those of nn.Conv2d."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class EveryFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 3, 3))
        self.w2 = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.w3 = nn.Parameter(torch.randn(4, 3, 1, 2, 3))
        self.t = nn.Parameter(torch.randn(3, 2, 3, 3))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            F.conv1d(x.flatten(2), self.w1, stride=2),
            F.conv2d(x, self.w2, padding="same", dilation=2),
            F.conv3d(x.unsqueeze(2), self.w3),
            F.conv_transpose2d(x, self.t, stride=2, output_padding=1, groups=3),
            self.conv(x),
        )


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 9, 12)


def fill_coords_(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_()
    return model


def sum_of(output: Any) -> Tensor:
    return sum(leaf.float().square().sum() for leaf in torch.utils._pytree.tree_leaves(output))


def assert_equal(left: Any, right: Any) -> None:
    left, right = map(torch.utils._pytree.tree_leaves, (left, right))
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def coordinate_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("coord_weight")]


# --- what the patched model keeps ----------------------------------------------------------------


def test_patched_model_keeps_class_methods_and_outputs(x: Tensor) -> None:
    model = Net().eval()
    patched = ccp.patch(model, "all")
    assert type(patched) is Net
    assert_equal(patched(x), model(x))
    assert_equal(patched.features(x), model.features(x))
    assert_equal(patched(x, scale=2.0), model(x, scale=2.0))
    assert repr(type(patched.block)) == repr(ccp.CoordConv2d)


def test_original_is_untouched(x: Tensor) -> None:
    model = Net()
    state = copy.deepcopy(model.state_dict())
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    patched = ccp.patch(model, "all", example_inputs=x)
    fill_coords_(patched)
    assert patched is not model
    assert {n: (m, type(m)) for n, m in model.named_modules()} == modules
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.data_ptr() != patched.state_dict()[name].data_ptr()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_b0", "resnet18"])
def test_state_of_an_original_in_training_mode_is_untouched(name: str) -> None:
    model = timm.create_model(name).train()
    state = copy.deepcopy(model.state_dict())
    patched = ccp.patch(model, "all")
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(patched.state_dict()[key], value), key


def test_patch_in_place_returns_the_model_and_keeps_every_object() -> None:
    model = Net()
    block, weight, modules = model.block, model.block.weight, list(model.modules())
    assert ccp.patch_(model, "all") is model
    assert model.block is block is model.same_block
    assert model.block.weight is weight
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]


def test_convolution_under_two_names_stays_one() -> None:
    patched = ccp.patch(Net(), "all")
    assert patched.block is patched.same_block
    assert coordinate_names(patched) == [
        "stem.0.coord_weight",
        "block.coord_weight",
        "unused.coord_weight",
    ]


def test_hooks_run_once_and_stay_removable(x: Tensor) -> None:
    model = Net().eval()
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.stem[0].register_forward_pre_hook(lambda *_: seen.append("before conv"))
    handle = model.stem[0].register_forward_hook(lambda *_: seen.append("after conv"))
    ccp.patch_(model, "all", example_inputs=x)
    seen.clear()
    model(x)
    assert seen == ["before conv", "after conv", "model"]
    handle.remove()
    seen.clear()
    ccp.unpatch_(model)(x)
    assert seen == ["before conv", "model"]


def test_hook_may_replace_the_output_that_carries_coordinates(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    patched = ccp.patch(model, "all")
    assert_equal(patched(x), model(x))
    with torch.no_grad():
        patched[0].coord_weight.fill_(1.0)
    branch = patched[0].compute_branch((9, 12), ())
    torch.testing.assert_close(patched(x), model(x) + 2 * branch)


def test_training_flags_and_gradient_flags_stay() -> None:
    model = Net()
    model.stem.eval()
    model.dropout.training = False
    model.block.weight.requires_grad_(False)
    model.fc.requires_grad_(False)
    patched = ccp.patch(model, "all")
    assert [m.training for m in patched.modules()] == [m.training for m in model.modules()]
    flags = {name: p.requires_grad for name, p in patched.named_parameters()}
    assert {n: flags[n] for n, _ in model.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    assert all(flags[name] for name in coordinate_names(patched))


def test_state_dict_has_the_original_names_in_their_order() -> None:
    model = Net()
    names = list(model.state_dict())
    patched_names = list(ccp.patch(model, "all").state_dict())
    assert [name for name in patched_names if name in names] == names
    added = [name for name in patched_names if name not in names]
    assert added == [f"{conv}.coord_weight" for conv in ("stem.0", "block", "same_block", "unused")]


def make_everything(kind: str, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """A model and its patched form, of each kind that patch takes."""
    if kind == "modules":
        model: nn.Module = Net().eval()
        return model, ccp.patch(model, "all")
    model = EveryFunction()
    if kind == "plain":
        return model, ccp.patch(model, "all")
    if kind == "traced":
        return model, ccp.patch(fx.symbolic_trace(model), "all")
    exported = torch.export.export(model, (x,))
    if kind == "decomposed":
        exported = exported.run_decompositions()
    return model, ccp.patch(exported, "all")


EVERY_KIND = ["modules", "plain", "traced", "exported", "decomposed"]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_plain_checkpoint_loads_strictly_with_coordinates_at_zero(kind: str, x: Tensor) -> None:
    model, patched = make_everything(kind, x)
    fill_coords_(patched)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    result = patched.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    assert not any(weight.any() for weight in ccp.coord_parameters(patched))
    assert_equal(patched(x), model(x))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_missing_keys_of_a_plain_checkpoint_are_the_coordinate_weights(
    kind: str, x: Tensor
) -> None:
    model, patched = make_everything(kind, x)
    result = patched.load_state_dict(model.state_dict(), strict=False)
    added = [name for name in patched.state_dict() if name not in model.state_dict()]
    assert sorted(result.missing_keys) == sorted(added)
    assert all(name.endswith("coord_weight") for name in added)
    assert result.unexpected_keys == []


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_keeps_outputs_trains_and_copies(kind: str, x: Tensor) -> None:
    model, patched = make_everything(kind, x)
    assert_equal(patched(x), model(x))
    fill_coords_(patched)
    output = patched(x)
    sum_of(output).backward()
    reached = [
        weight.grad is not None and bool(weight.grad.any())
        for weight in ccp.coord_parameters(patched)
    ]
    assert reached == ([True, True, False] if kind == "modules" else [True] * 5)
    assert_equal(copy.deepcopy(patched)(x), output)
    unpatched = ccp.unpatch(patched, discard=True)
    assert_equal(unpatched(x), model(x))
    assert coordinate_names(unpatched) == []
    assert_equal(patched(x), output)
    with pytest.raises(PatchError, match="it has no coordinate layers"):
        ccp.unpatch(unpatched)


@pytest.mark.parametrize("kind", ["modules", "plain", "traced"])
def test_every_kind_pickles(kind: str, x: Tensor) -> None:
    model, patched = make_everything(kind, x)
    fill_coords_(patched)
    if kind == "traced" and torch.__version__ < "2.14":  # which cannot pickle the plain one either
        for traced in (fx.symbolic_trace(model), patched):
            with pytest.raises(AttributeError, match="'str' object has no attribute '__name__'"):
                pickle.dumps(traced)
        return
    assert_equal(pickle.loads(pickle.dumps(patched))(x), patched(x))


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "nf_resnet26", "mobilenetv3_small_050"])
def test_whole_timm_model_is_saved_and_loaded(name: str) -> None:
    x = torch.randn(1, 3, 40, 56)
    patched = fill_coords_(ccp.patch(timm.create_model(name, num_classes=2).eval(), "all"))
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in patched.modules()]
    with torch.no_grad():
        expected = patched(x)
        assert_equal(loaded(x), expected)
        assert_equal(copy.deepcopy(patched)(x), expected)
    assert type(ccp.unpatch(loaded, discard=True)) is type(patched)


@pytest.mark.parametrize(
    "backend", ["aot_eager"] + ["inductor"] * (shutil.which("g++") is not None)
)
def test_compiled_model_equals_eager(backend: str, x: Tensor) -> None:
    patched = fill_coords_(ccp.patch(Net().eval(), "all"))
    compiled = torch.compile(patched, backend=backend, fullgraph=True)
    expected = patched(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    fill_coords_(patched)
    assert not torch.allclose(patched(x), expected, atol=1e-3)
    torch.testing.assert_close(compiled(x), patched(x), rtol=1e-5, atol=1e-5)


def test_compiled_model_can_be_patched(x: Tensor) -> None:
    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1)), backend="eager")
    patched = ccp.patch(model, "all")
    assert type(patched) is type(model)
    assert_equal(patched(x), model(x))
    assert coordinate_names(patched) == ["_orig_mod.0.coord_weight"]


def test_patched_model_trains_with_batch_norm_and_dropout_alive(x: Tensor) -> None:
    patched = ccp.patch(Net().train(), "all")
    statistics = patched.stem[1].running_mean.clone()
    outputs = [patched(x) for _ in range(2)]
    assert not torch.equal(*outputs)
    assert not torch.equal(patched.stem[1].running_mean, statistics)
    assert patched.stem[1].num_batches_tracked == 2
    outputs[0].square().sum().backward()
    optimizer = torch.optim.SGD(ccp.param_groups(patched, lr=0.1))
    optimizer.step()
    assert patched.stem[0].coord_weight.any()
    assert patched.block.coord_weight.any()


# --- unpatch -------------------------------------------------------------------------------------


def test_unpatch_gives_classes_names_and_outputs_back(x: Tensor) -> None:
    model = timm.create_model("tf_efficientnet_b0", num_classes=2).eval()
    patched = ccp.patch(model, "all")
    unpatched = ccp.unpatch(patched)
    assert [type(m) for m in unpatched.modules()] == [type(m) for m in model.modules()]
    assert [set(vars(m)) for m in unpatched.modules()] == [set(vars(m)) for m in model.modules()]
    assert list(unpatched.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert_equal(unpatched(x), model(x))
    assert len(ccp.coord_parameters(patched)) == 81
    assert ccp.unpatch_(patched) is patched
    assert [type(m) for m in patched.modules()] == [type(m) for m in model.modules()]


def test_unpatch_refuses_to_drop_trained_coordinates() -> None:
    patched = ccp.patch(Net(), "all")
    with torch.no_grad():
        patched.block.coord_weight[0, 0, 0, 0] = 1e-30
    message = "coordinate weights are not zero at block: without them the outputs change. Save"
    for undo in (ccp.unpatch, ccp.unpatch_):
        with pytest.raises(PatchError, match=message):
            undo(patched)
    assert len(ccp.coord_parameters(patched)) == 3
    ccp.unpatch_(patched, discard=True)
    assert type(patched.block) is nn.Conv2d


def test_unpatch_refuses_a_plain_model() -> None:
    for undo in (ccp.unpatch, ccp.unpatch_):
        with pytest.raises(PatchError, match="the model is not patched"):
            undo(Net())


def test_unpatch_leaves_submodules_that_the_graph_does_not_use() -> None:
    graph_module = fx.symbolic_trace(Functional())
    graph_module.add_submodule("auxiliary", nn.Linear(2, 2))
    unpatched = ccp.unpatch(ccp.patch(graph_module, "all"))
    assert list(unpatched.state_dict()) == ["kernel", "auxiliary.weight", "auxiliary.bias"]


# --- twice, and in parts -------------------------------------------------------------------------


def test_patching_twice_is_refused_with_the_reason() -> None:
    patched = ccp.patch(Net(), "all")
    weights = ccp.coord_parameters(patched)
    with pytest.raises(SelectionError, match=r"'all': already patched: stem\.0, block, unused"):
        ccp.patch_(patched, "all")
    assert all(a is b for a, b in zip(ccp.coord_parameters(patched), weights, strict=True))


@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_patching_a_graph_twice_is_refused(kind: str, x: Tensor) -> None:
    _, patched = make_everything(kind, x)
    with pytest.raises(SelectionError, match="already patched"):
        ccp.patch(patched, "all")


def test_rest_of_a_partly_patched_model_is_patched(x: Tensor) -> None:
    model = Net().eval()
    patched = fill_coords_(ccp.patch(model, "first"))
    expected = patched(x)
    ccp.patch_(patched, "all", coords=ccp.Coordinates(radius=True))
    assert_equal(patched(x), expected)
    shapes = {name: tuple(patched.get_parameter(name).shape) for name in coordinate_names(patched)}
    assert shapes == {
        "stem.0.coord_weight": (6, 2, 3, 3),
        "block.coord_weight": (6, 3, 3, 3),
        "unused.coord_weight": (6, 3, 1, 1),
    }


def test_rest_of_a_partly_patched_graph_is_patched(x: Tensor) -> None:
    model = EveryFunction()
    patched = ccp.patch(fx.symbolic_trace(model), ["w1", "conv"])
    assert coordinate_names(patched) == ["conv.coord_weight", "w1_coord_branch.coord_weight"]
    ccp.patch_(patched, "all")
    assert len(coordinate_names(patched)) == 5
    assert_equal(patched(x), model(x))


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["convert", "attach"])
def test_failure_at_a_later_site_undoes_the_earlier_ones(
    failing: str, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)])
    attributes = [set(vars(conv)) for conv in model]
    expected = model(x)
    owner, name = {"convert": (apply, "convert_"), "attach": (CoordConvNd, "_attach")}[failing]
    real, calls = getattr(owner, name), []

    def fails_at_the_third(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room")
        real(*args)

    monkeypatch.setattr(owner, name, fails_at_the_third)
    with pytest.raises(MemoryError):
        ccp.patch_(model, "all")
    assert len(calls) == 3
    assert [type(conv) for conv in model] == [nn.Conv2d] * 4
    assert [set(vars(conv)) for conv in model] == attributes
    assert coordinate_names(model) == []
    assert_equal(model(x), expected)


def test_failure_at_a_later_site_changes_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Functional())

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("coordconv_patch.patching.apply.add_to_owner_", fail)
    with pytest.raises(MemoryError):
        ccp.patch_(model, "all")
    assert [type(part) for part in model] == [nn.Conv2d, Functional]
    assert coordinate_names(model) == []


def test_model_that_cannot_be_copied_says_what_to_use(x: Tensor) -> None:
    class Uncopyable(Net):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            raise RuntimeError("holds a file")

    model = Uncopyable()
    with pytest.raises(
        PatchError, match=re.escape("(holds a file): use the in-place form, patch_")
    ):
        ccp.patch(model)
    ccp.patch_(model)
    assert coordinate_names(model) == ["stem.0.coord_weight"]


# --- unusual convolutions ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_convolution_is_patched_and_unpatched(name: str, x: Tensor) -> None:
    register = getattr(parametrizations, name)
    model = nn.Sequential(register(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 1)).eval()
    patched = ccp.patch(model, "all")
    assert_equal(patched(x), model(x))
    fill_coords_(patched)
    expected = patched(x)
    assert not torch.equal(expected, model(x))
    assert_equal(copy.deepcopy(patched)(x), expected)
    unpatched = ccp.unpatch(patched, discard=True)
    assert_equal(unpatched(x), model(x))
    parametrize.remove_parametrizations(unpatched[0], "weight")
    assert type(unpatched[0]) is nn.Conv2d
    parametrize.remove_parametrizations(patched[0], "weight")
    assert isinstance(patched[0], ccp.CoordConv2d)
    torch.testing.assert_close(patched(x), expected)


def test_every_convolution_class_is_patched() -> None:
    for ndim in (1, 2, 3):
        for name in (f"Conv{ndim}d", f"ConvTranspose{ndim}d"):
            model = nn.Sequential(getattr(nn, name)(3, 4, 2))
            patched = ccp.patch(model, "all")
            x = torch.randn(2, 3, *range(4, 4 + ndim))
            assert isinstance(patched[0], getattr(ccp, f"Coord{name}"))
            assert type(patched[0]).__name__ == f"Coord{name}"
            assert_equal(patched(x), model(x))


def test_bare_convolution_is_patched(x: Tensor) -> None:
    model = nn.Conv2d(3, 4, 3)
    patched = ccp.patch(model)
    assert isinstance(patched, ccp.CoordConv2d)
    assert coordinate_names(patched) == ["coord_weight"]
    assert_equal(patched(x), model(x))
    ccp.patch_(model, "all")
    assert isinstance(model, ccp.CoordConv2d)


def test_meta_model_is_patched() -> None:
    with torch.device("meta"):
        model = Net()
    patched = ccp.patch(model, "all")
    assert all(weight.is_meta for weight in ccp.coord_parameters(patched))


def test_lists_and_keywords_reach_the_patched_model() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, images: list[Tensor], *, flip: bool = False) -> dict[str, Any]:
            found = [self.conv(input=image.flip(-1) if flip else image) for image in images]
            return {"found": found, "first": (found[0],)}

    model, images = Lists(), [torch.rand(3, 8, 9), torch.rand(1, 3, 5, 6)]
    patched = ccp.patch(model, "first", example_inputs=(images, {"flip": True}))
    assert_equal(patched(images), model(images))
    assert_equal(patched(images=images, flip=True), model(images, flip=True))


# --- functional convolutions in plain modules ----------------------------------------------------


class Holder(nn.Module):
    """Only `inner` calls a functional convolution."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.outer = nn.Sequential(inner, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.conv(x))


def test_only_the_module_that_calls_the_function_is_changed(x: Tensor) -> None:
    model = Holder(Functional())
    patched = ccp.patch(model, "all")
    assert [type(part) for part in (patched, patched.outer)] == [Holder, nn.Sequential]
    assert isinstance(patched.outer[0], Functional)
    assert type(patched.outer[0]).__qualname__ == Functional.__qualname__
    assert coordinate_names(patched) == [
        "conv.coord_weight",
        "outer.0.kernel_coord_branch.coord_weight",
    ]
    assert_equal(patched(x), model(x))
    inner, kernel = model.outer[0], model.outer[0].kernel
    assert ccp.patch_(model, "all") is model
    assert model.outer[0] is inner
    assert model.outer[0].kernel is kernel
    ccp.unpatch_(model)
    assert type(inner) is Functional
    assert coordinate_names(model) == []


def test_submodule_without_chosen_functions_stays_as_it_is() -> None:
    assert type(ccp.patch(Holder(Functional()), "conv").outer[0]) is Functional


def test_model_that_calls_the_function_itself_is_patched_in_place(x: Tensor) -> None:
    model = Functional()
    before = model(x)
    assert ccp.patch_(model, "all") is model
    assert_equal(model(x), before)
    fill_coords_(model)
    assert not torch.equal(model(x), before)
    assert_equal(ccp.unpatch_(model, discard=True)(x), before)


def test_exported_program_is_refused_in_place_and_stays_unchanged(x: Tensor) -> None:
    exported = torch.export.export(EveryFunction(), (x,))
    code, keys = exported.graph_module.code, list(exported.state_dict)
    with pytest.raises(PatchError, match=re.escape("cannot be patched in place: use patch(...)")):
        ccp.patch_(exported, "all")
    patched = fill_coords_(ccp.patch(exported, "all"))
    assert isinstance(patched, fx.GraphModule)
    assert exported.graph_module.code == code
    assert list(exported.state_dict) == keys
    assert not torch.equal(patched(x)[0], exported.module()(x)[0])


def test_function_on_its_own_weight_gets_a_well_formed_name(x: Tensor) -> None:
    model = Holder(Named())
    patched = ccp.patch(model, "all")
    assert coordinate_names(patched) == [
        "conv.coord_weight",
        "outer.0.coord_branch.coord_weight",
    ]
    assert list(coord_layers(patched)) == ["conv", "outer.0"]
    assert_equal(patched(x), model(x))


def test_root_function_on_its_own_weight_gets_a_well_formed_name(x: Tensor) -> None:
    model = Named()
    patched = ccp.patch(model, "all")
    (site,) = find_sites(model).sites
    (name,) = coordinate_names(patched)
    assert not name.startswith(".")
    assert list(coord_layers(patched)) == [site.name]
    assert_equal(patched(x), model(x))


def test_shared_functional_weight_is_one_site_with_one_coordinate_weight(x: Tensor) -> None:
    class Twice(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.max_pool2d(super().forward(x), 2))

    model = Twice(3, 3)
    patched = ccp.patch(model, "all")
    assert coordinate_names(patched) == ["kernel_coord_branch.coord_weight"]
    assert_equal(patched(x), model(x))
    fill_coords_(patched)

    def with_branch(image: Tensor) -> Tensor:
        size = image.shape[2:]
        row = torch.linspace(-1, 1, size[0]).view(-1, 1).expand(size)
        column = torch.linspace(-1, 1, size[1]).expand(size)
        coords = torch.stack((column, row)).expand(len(image), 2, *size)
        weight = torch.cat((model.kernel, patched.kernel_coord_branch.coord_weight), dim=1)
        return F.conv2d(torch.cat((image, coords), dim=1), weight, padding=1)

    expected = with_branch(F.max_pool2d(with_branch(x), 2))
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)


def test_submodule_under_two_names_stays_one(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Functional(3, 3)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    patched = ccp.patch(Tied(), "all")
    assert patched.a is patched.b
    assert len(ccp.coord_parameters(patched)) == 1


def test_nested_functional_convolutions_all_get_coordinates(x: Tensor) -> None:
    class Nested(Functional):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.inner = Functional(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(super().forward(x))

    model = Holder(Nested())
    plan = ccp.plan(model, "all")
    patched = ccp.patch(model, "all")
    assert len(plan.chosen) == 3
    assert len(ccp.coord_parameters(patched)) == 3
    assert_equal(patched(x), model(x))
    sum_of(patched(x)).backward()
    assert all(weight.grad is not None for weight in ccp.coord_parameters(patched))


def test_hooks_of_a_module_that_calls_the_function_still_run(x: Tensor) -> None:
    model = Holder(Functional())
    seen: list[int] = []
    model.outer[0].register_forward_hook(lambda *_: seen.append(1))
    patched = ccp.patch(model, "all")
    seen.clear()
    patched(x)
    assert seen == [1]


def test_module_that_calls_the_function_keeps_its_state(x: Tensor) -> None:
    class Stateful(Functional):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.auxiliary = nn.Linear(2, 2)

    model = Holder(Stateful())
    patched = ccp.patch(model, "all")
    assert set(model.state_dict()) <= set(patched.state_dict())
    patched.load_state_dict(model.state_dict(), strict=False)


def test_submodule_keeps_batch_norm_dropout_and_flags(x: Tensor) -> None:
    class Normed(Functional):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dropout = nn.BatchNorm2d(4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.norm(super().forward(x)))

    model = Holder(Normed())
    model.outer[0].norm.eval()
    patched = ccp.patch(model, "all")
    inner = patched.outer[0]
    assert (inner.training, inner.norm.training, inner.dropout.training) == (True, False, True)
    outputs = []
    for each in (model, patched):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert_equal(*outputs)
    assert_equal(patched.eval()(x), model.eval()(x))


def test_optional_argument_of_a_module_that_calls_the_function(x: Tensor) -> None:
    class Scaled(Functional):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, scale=2.0)

    model = Caller()
    assert_equal(ccp.patch(model, "all")(x), model(x))


def test_weight_computed_from_the_input_is_refused_with_the_reason(x: Tensor) -> None:
    class Computed(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel * x.mean())

    with pytest.raises(SelectionError, match=re.escape("pass example_inputs=..., on which it")):
        ccp.patch(Computed(), "all")
    with pytest.raises(SelectionError, match="its weight is computed from the model's input"):
        ccp.patch(Computed(), "all", example_inputs=x)


def test_tied_autoencoder_gets_both_coordinate_weights(x: Tensor) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.conv(x), self.conv.weight)

    model = Autoencoder()
    patched = ccp.patch(model, "all")
    assert_equal(patched(x), model(x))
    shapes = sorted(tuple(weight.shape) for weight in ccp.coord_parameters(patched))
    assert shapes == [(2, 3, 3, 3), (4, 2, 3, 3)]
    assert len(coordinate_names(patched)) == 2
    unpatched = ccp.unpatch(fill_coords_(patched), discard=True)
    assert list(unpatched.state_dict()) == list(model.state_dict())
    assert_equal(unpatched(x), model(x))


def test_graph_modules_inside_a_plain_module_are_patched_in_place(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.modules_only = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
            self.functions = fx.symbolic_trace(EveryFunction())

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.functions(self.modules_only(self.conv(x)))

    model = Outer()
    before = model(x)
    inner = model.functions
    ccp.patch_(model, "all")
    assert type(model) is Outer
    assert model.functions is inner
    assert len(ccp.coord_parameters(model)) == 7
    assert_equal(model(x), before)
    fill_coords_(model)
    assert not torch.equal(model(x)[1], before[1])
    assert_equal(ccp.unpatch_(model, discard=True)(x), before)


def test_functional_coordinates_equal_the_layers(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, (3, 2), stride=2, padding=(1, 2), groups=3))
    patched = fill_coords_(ccp.patch(model, "all"))
    exported = ccp.patch(torch.export.export(model, (x,)), "all")
    with torch.no_grad():
        ccp.coord_parameters(exported)[0].copy_(patched[0].coord_weight)
    assert_equal(exported(x), patched(x))


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
def test_window_holds_for_every_layer_until_it_is_taken_away(traced: bool, x: Tensor) -> None:
    model = nn.Sequential(Functional(3, 5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    patched = ccp.patch(fx.symbolic_trace(model) if traced else model, "all")
    fill_coords_(patched).double()
    image = x.double()
    with torch.no_grad():
        whole = patched(image)
        window = ccp.Window((2, 3), (9, 12), (20, 30))
        assert ccp.set_window_(patched, window) is patched
        found = [layer.coords.window for layer in coord_layers(patched).values()]
        assert found == [window, window]
        assert not torch.allclose(patched(image), whole, atol=1e-3)
        ccp.set_window_(patched, None)
        assert_equal(patched(image), whole)


def test_tiles_of_an_image_make_the_whole(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    patched = fill_coords_(ccp.patch(model, "all")).double()
    image = x.double()
    with torch.no_grad():
        whole = patched(image)
        for top, left in ((0, 0), (0, 5), (4, 0), (4, 5)):
            tile = image[..., top : top + 5, left : left + 7]
            ccp.set_window_(patched, ccp.Window((top, left), (5, 7), (9, 12)))
            torch.testing.assert_close(
                patched(tile), whole[..., top : top + 5, left : left + 7], rtol=1e-12, atol=1e-12
            )


def test_window_on_a_plain_model_is_an_error() -> None:
    with pytest.raises(PatchError, match="no coordinate layers: patch it first"):
        ccp.set_window_(Net(), None)


def test_window_that_a_convention_does_not_know_changes_nothing() -> None:
    patched = ccp.patch(Net(), "stem.0")
    ccp.patch_(patched, "block", coords="reference")
    with pytest.raises(CoordinatesError, match="swap_sizes"):
        ccp.set_window_(patched, ccp.Window((0, 0), (2, 2), (4, 4)))
    assert [layer.coords.window for layer in coord_layers(patched).values()] == [None, None]


@pytest.mark.parametrize("plain", [nn.Conv2d, timm.layers.Conv2dSame])
def test_another_layer_of_a_patched_layers_class_is_a_plain_one(plain: type[nn.Conv2d]) -> None:
    """PEFT writes type(conv)(8, 8, 3) for its adapters, and means a convolution like that."""
    patched = ccp.patch_(plain(3, 4, 3), "all")
    another = type(patched)(4, 8, kernel_size=1, bias=False)
    assert type(another) is plain
    assert another.out_channels == 8
    assert another.bias is None
    assert isinstance(copy.deepcopy(patched), CoordConvNd)
    assert type(ccp.CoordConv2d(3, 4, 3)) is ccp.CoordConv2d
