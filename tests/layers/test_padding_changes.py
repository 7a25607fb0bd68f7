"""Padding put on an instance, before and after patching: coordinates follow, or it is refused.

What is right is written anew here: the grid is appended to the input, both are padded by hand,
and torch convolves.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import Padding
from coordconv_patch.layers.padding_probe import padding_of

Pads = list[tuple[tuple[int, ...], str]]
"""Calls of F.pad: amounts, last dimension first, and mode."""


def padding_with(*pads: tuple[tuple[int, ...], str], left: Any = 0) -> Callable[..., Tensor]:
    """A ``_conv_forward`` that pads by these calls of F.pad, and leaves the rest to torch."""

    def conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for amounts, mode in pads:
            input = F.pad(input, amounts, mode=mode)
        convolve = reference.CONVS[weight.dim() - 2, False]
        return convolve(input, weight, bias, self.stride, left, self.dilation, self.groups)

    return conv_forward


def expected(layer: Any, x: Tensor, pads: Pads, left: Any = 0) -> Tensor:
    """The concatenating CoordConv of a layer's weights, with its padding spelled out."""
    grid = reference.paper_grid(x.shape[2:])
    joined = reference.interleave(x, grid, layer.groups)
    for amounts, mode in pads:
        joined = F.pad(joined, amounts, mode=mode)
    per_group = layer.weight.split(layer.out_channels // layer.groups)
    coord = layer.coord_weight.split(layer.out_channels // layer.groups)
    weight = torch.cat([torch.cat(both, dim=1) for both in zip(per_group, coord, strict=True)])
    convolve = reference.CONVS[weight.dim() - 2, False]
    return convolve(joined, weight, layer.bias, layer.stride, left, layer.dilation, layer.groups)


def fill_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(generator=generator)
    return model


def conv2d(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 4, 3, padding=1, **options)


def assert_follows(model: Any, pads: Pads, left: Any = 0, size: tuple[int, ...] = (5, 7)) -> None:
    """The first layer computes the reference, kept map or not, without gradients and with."""
    layer = next(iter(coord_layers(model).values()))
    x = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(2))
    want = expected(layer, x, pads, left)
    for with_gradients in (False, False, True, False):  # a map is kept at the end
        with torch.set_grad_enabled(with_gradients):
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


X_ALONE: Pads = [((1, 1, 0, 0), "circular"), ((0, 0, 1, 1), "constant")]
ZEROS: Pads = [((1, 1, 1, 1), "constant")]
MODES = ("constant", "circular", "reflect", "replicate")


# --- before patching ------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("mode_x", "mode_y"), list(itertools.product(MODES, MODES)))
def test_each_axis_may_be_padded_in_its_own_mode(mode_x: str, mode_y: str, groups: int) -> None:
    pads = [((1, 1, 0, 0), mode_x), ((0, 0, 1, 1), mode_y)]
    conv = conv2d(groups=groups)
    conv._conv_forward = padding_with(*pads).__get__(conv)  # type: ignore[method-assign]
    plain = nn.Sequential(conv)
    model = ccp.patch(plain, "first")
    x = torch.randn(2, 2, 5, 7)
    assert torch.equal(model(x), plain(x))
    assert_follows(fill_(model), pads)


@pytest.mark.parametrize(
    ("pads", "left"),
    [
        ([((1, 1, 0, 0), "circular")], (1, 0)),
        ([((2, 1, 0, 3), "replicate")], 0),
        ([((2, 0, 0, 0), "circular"), ((0, 0, 0, 1), "reflect")], 0),
        ([((0, 0, 1, 1), "constant"), ((2, 2, 0, 0), "circular")], 0),
        ([], (2, 2)),
        ([], 0),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_amounts_may_be_the_instances_own(pads: Pads, left: Any, stride: int) -> None:
    conv = conv2d(stride=stride)
    conv._conv_forward = padding_with(*pads, left=left).__get__(conv)  # type: ignore[method-assign]
    assert_follows(fill_(ccp.patch(nn.Sequential(conv), "first")), pads, left)


@pytest.mark.parametrize("ndim", [1, 3])
def test_signals_and_volumes_are_followed_too(ndim: int) -> None:
    kind: Any = {1: nn.Conv1d, 3: nn.Conv3d}[ndim]
    conv = kind(2, 4, 3, padding=1)
    pads: Pads = [((1, 1) + (0, 0) * (ndim - 1), "circular")]
    pads += [((0, 0) + (1, 1) * (ndim - 1), "constant")] if ndim > 1 else []
    conv._conv_forward = padding_with(*pads).__get__(conv)
    assert_follows(fill_(ccp.patch(nn.Sequential(conv), "first")), pads, size=(5, 4, 6)[:ndim])


def test_a_partial_a_lambda_and_a_method_of_a_copy_are_seen() -> None:
    function = padding_with(*X_ALONE)
    for make in (
        lambda conv: functools.partial(function, conv),
        lambda conv: lambda input, weight, bias: function(conv, input, weight, bias),
        lambda conv: function.__get__(copy.deepcopy(conv)),
    ):
        conv = conv2d()
        conv._conv_forward = make(conv)  # type: ignore[no-untyped-call]
        assert_follows(fill_(ccp.patch(nn.Sequential(conv), "first")), X_ALONE)


def test_a_helper_that_a_subclass_calls_may_be_replaced_on_an_instance() -> None:
    class Padded(nn.Conv2d):
        def _padded(self, x: Tensor) -> Tensor:
            return F.pad(x, (1, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self._padded(x), self.weight, self.bias)

    model = fill_(ccp.patch(nn.Sequential(Padded(2, 4, 3)), "first"))
    assert_follows(model, ZEROS)
    model[0]._padded = lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")
    assert_follows(model, [((1, 1, 1, 1), "circular")])
    del model[0]._padded
    assert_follows(model, ZEROS)

    conv = Padded(2, 4, 3)
    conv._padded = lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")  # type: ignore[method-assign]
    assert_follows(fill_(ccp.patch(nn.Sequential(conv), "first")), [((1, 1, 1, 1), "reflect")])


def test_torchs_list_of_amounts_is_what_counts() -> None:
    conv = conv2d(padding_mode="circular")
    conv._reversed_padding_repeated_twice = [2, 1, 0, 0]
    assert_follows(fill_(ccp.patch(nn.Sequential(conv), "first")), [((2, 1, 0, 0), "circular")])
    conv = conv2d(padding_mode="replicate")
    conv.padding = (0, 0)  # torch pads by its list still
    assert_follows(fill_(ccp.patch(nn.Sequential(conv), "first")), [((1, 1, 1, 1), "replicate")])
    conv._reversed_padding_repeated_twice = [1, 1]
    with pytest.raises(PatchError, match="write two numbers for each of its 2 spatial"):
        padding_of(conv)


def test_what_no_branch_can_follow_is_refused_by_its_instance() -> None:
    conv = conv2d()
    conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), value=2.0), w, b)  # type: ignore[method-assign]
    model = nn.Sequential(conv)
    with pytest.raises(ccp.errors.SelectionError, match="_conv_forward replaced on the instance"):
        ccp.patch_(model, "first")
    assert type(model[0]) is nn.Conv2d
    transposed = nn.ConvTranspose2d(2, 2, 3)
    transposed.forward = lambda x: F.pad(F.conv_transpose2d(x, transposed.weight), (1, 1))  # type: ignore[method-assign]
    with pytest.raises(ccp.errors.SelectionError, match="its forward is replaced on the instance"):
        ccp.patch_(nn.Sequential(transposed), "first")


def test_torchs_own_method_on_the_instance_needs_no_probe() -> None:
    conv = nn.Conv2d(2, 4, 3, padding=1, device="meta")
    conv._conv_forward = nn.Conv2d._conv_forward.__get__(conv)  # type: ignore[method-assign]
    assert padding_of(conv) == Padding()


def test_a_probe_leaves_no_attribute_behind() -> None:
    def conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.padding_x = (1, 1, 0, 0)
        self.seen = tuple(input.shape)
        return F.conv2d(F.pad(input, self.padding_x, mode="circular"), weight, bias, 1, (1, 0))

    conv = conv2d()
    conv.seen = "nothing"
    conv._conv_forward = conv_forward.__get__(conv)  # type: ignore[method-assign]
    padding_of(conv)
    assert conv.seen == "nothing"
    assert not hasattr(conv, "padding_x")


# --- after patching -------------------------------------------------------------------------------


def patched(**options: Any) -> nn.Sequential:
    model = fill_(ccp.patch(nn.Sequential(conv2d(**options)), "first"))
    assert isinstance(model, nn.Sequential)
    assert_follows(model, ZEROS)  # its map is kept now
    return model


def by_dict(layer: nn.Module, name: str, value: Any) -> None:
    layer.__dict__[name] = value


@pytest.mark.parametrize("put", [setattr, by_dict, object.__setattr__])
def test_a_method_put_on_a_patched_layer_is_followed(put: Callable[..., None]) -> None:
    model = patched()
    put(model[0], "_conv_forward", padding_with(*X_ALONE).__get__(model[0]))
    assert_follows(model, X_ALONE)
    put(model[0], "_conv_forward", nn.Conv2d._conv_forward.__get__(model[0]))
    assert_follows(model, ZEROS)
    put(model[0], "_conv_forward", padding_with(*X_ALONE).__get__(model[0]))
    assert_follows(model, X_ALONE)
    del model[0]._conv_forward
    assert_follows(model, ZEROS)


def test_a_method_written_into_the_dict_is_seen_with_gradients_too() -> None:
    model, x = patched(), torch.randn(2, 2, 5, 7)
    by_dict(model[0], "_conv_forward", padding_with(*X_ALONE).__get__(model[0]))
    want = expected(model[0], x, X_ALONE)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_attributes_that_torch_pads_by_are_followed() -> None:
    model = patched()
    model[0].padding_mode = "circular"
    assert_follows(model, [((1, 1, 1, 1), "circular")])
    model[0]._reversed_padding_repeated_twice = (1, 1, 0, 0)
    assert_follows(model, [((1, 1, 0, 0), "circular")])
    model[0].padding = (0, 2)  # says nothing in this mode
    assert_follows(model, [((1, 1, 0, 0), "circular")])
    model[0].padding_mode = "zeros"
    assert_follows(model, [((2, 2, 0, 0), "constant")])


def seamless(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As tools for diffusion models put it on every convolution; reads settings of the layer."""
    amounts = self._reversed_padding_repeated_twice
    self.padding_x = (amounts[0], amounts[1], 0, 0)
    self.padding_y = (0, 0, amounts[2], amounts[3])
    working = F.pad(input, self.padding_x, mode=self.padding_mode_x)
    working = F.pad(working, self.padding_y, mode=self.padding_mode_y)
    return F.conv2d(working, weight, bias, self.stride, (0, 0), self.dilation, self.groups)


def test_settings_that_a_method_reads_are_followed() -> None:
    model = patched()
    layer = model[0]
    layer._conv_forward = seamless.__get__(layer)  # its settings come after it
    layer.padding_mode_x = "circular"
    layer.padding_mode_y = "constant"
    assert_follows(model, X_ALONE)
    layer.padding_mode_x, layer.padding_mode_y = "constant", "circular"
    assert_follows(model, [((0, 0, 1, 1), "circular"), ((1, 1, 0, 0), "constant")])


def test_a_layer_that_writes_into_itself_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from coordconv_patch.layers import padding_follower as layers

    probes: list[Any] = []

    def counted(*arguments: Any) -> Padding:
        probes.append(arguments)
        return padding_of(*arguments)

    monkeypatch.setattr(layers, "padding_of", counted)
    model = patched()
    model[0].padding_mode_x = model[0].padding_mode_y = "circular"
    model[0]._conv_forward = seamless.__get__(model[0])
    model(torch.zeros(1, 2, 5, 5))
    probes.clear()
    for size in (5, 6, 7):
        model(torch.zeros(1, 2, size, 5))
    assert probes == []
    model.train().eval()
    assert probes == []


def test_what_cannot_be_followed_is_refused_at_the_next_forward() -> None:
    model = patched()
    x = torch.randn(2, 2, 5, 7)
    before = model(x)
    model[0]._conv_forward = lambda input, weight, bias: F.conv2d(input * 2, weight, bias)
    for _ in range(2):
        with pytest.raises(PatchError, match=r"CoordConv2d \(2→4 3×3 p1\) was changed after it"):
            model(x)
    with torch.no_grad(), pytest.raises(PatchError, match="Undo the change, or unpatch"):
        model(x)
    del model[0]._conv_forward
    assert torch.equal(model(x), before)


def test_a_followed_layer_copies_pickles_unpatches_and_compiles(tmp_path: Path) -> None:
    model = patched().eval()
    model[0]._conv_forward = functools.partial(padding_with_x, model[0])
    assert_follows(model, X_ALONE)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert_follows(other, X_ALONE)
        assert other[0]._conv_forward.args[0] is other[0]
    x = torch.randn(2, 2, 5, 7)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(copy.deepcopy(model), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    plain = ccp.unpatch(model, discard=True)
    assert not [name for name in vars(plain[0]) if "follow" in name or "written" in name]
    assert type(plain[0]) is nn.Conv2d


def padding_with_x(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return padding_with(*X_ALONE)(self, input, weight, bias)


def test_a_change_that_needs_a_probe_is_refused_while_the_model_is_captured() -> None:
    model = patched().eval()
    model[0].__dict__["_conv_forward"] = padding_with(*X_ALONE).__get__(model[0])
    with pytest.raises(PatchError, match="run the model once before it is compiled"):
        torch.jit.trace(model, torch.randn(2, 2, 5, 7))
    assert_follows(model, X_ALONE)


def test_harmless_attributes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    kept = model[0]._map_cache
    with torch.no_grad():
        model(torch.zeros(2, 2, 5, 7))
    assert len(kept) == 1
    model[0].note = "seen"
    del model[0].note
    model.eval()
    assert len(kept) == 1


def test_transposed_layers_follow_their_numbers() -> None:
    torch.manual_seed(0)
    model = fill_(ccp.patch(nn.Sequential(nn.ConvTranspose2d(2, 4, 3, padding=1)), "first"))
    layer, x = model[0], torch.randn(2, 2, 5, 7)
    for padding in ((1, 1), (0, 1)):
        layer.padding = padding
        grid = reference.paper_grid((5, 7)).to(x)[None].expand(2, -1, -1, -1)
        weight = torch.cat((layer.weight, layer.coord_weight))
        want = F.conv_transpose2d(torch.cat((x, grid), 1), weight, layer.bias, 1, padding)
        with torch.no_grad():
            torch.testing.assert_close(model(x), want)


def test_parametrized_and_odd_classes_follow_too() -> None:
    model = fill_(ccp.patch(nn.Sequential(weight_norm(conv2d())), "first"))
    model[0]._conv_forward = padding_with(*X_ALONE).__get__(model[0])
    assert_follows(model, X_ALONE)
    torch.manual_seed(0)
    model = fill_(ccp.patch(nn.Sequential(Conv2dSame(2, 4, 3)), "first"))
    assert_follows(model, ZEROS)
    model[0].forward_of_class = None
    assert_follows(model, ZEROS)


def test_a_subclass_of_a_coordinate_layer_may_pad_in_its_own_way() -> None:
    class Circular(ccp.CoordConv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return padding_with(*X_ALONE)(self, input, weight, bias)

    torch.manual_seed(0)
    layer = Circular(2, 4, 3)
    assert_follows(fill_(nn.Sequential(layer)), X_ALONE)
    layer._conv_forward = padding_with(*ZEROS).__get__(layer)  # type: ignore[method-assign]
    assert_follows(nn.Sequential(layer), ZEROS)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def test_chosen_calls_follow_their_convolution() -> None:
    x = torch.randn(2, 2, 5, 7)
    model = fill_(ccp.patch(Twice(), "conv@1", example_inputs=x))

    def check(pads: Pads) -> None:
        layer = copy.copy(model.conv)
        layer.coord_weight = model.conv.coord_branch.coord_weight
        inner = x
        for amounts, mode in pads:
            inner = F.pad(inner, amounts, mode=mode)
        inner = F.conv2d(inner, layer.weight, layer.bias)
        torch.testing.assert_close(model(x), expected(layer, inner, pads), rtol=1e-5, atol=1e-5)

    check(ZEROS)
    model.conv._conv_forward = padding_with(*X_ALONE).__get__(model.conv)
    check(X_ALONE)
    model = copy.deepcopy(model)
    check(X_ALONE)
    del model.conv._conv_forward
    model.conv.padding_mode = "reflect"
    check([((1, 1, 1, 1), "reflect")])
    model.conv._conv_forward = lambda input, weight, bias: F.conv2d(input * 2, weight, bias)
    with pytest.raises(PatchError, match="the padding of conv was changed after it got"):
        model(x)


# --- files and graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["channels", "map", "branch", "separable", "computed"])
@pytest.mark.parametrize("left", [0, (1, 0)])
def test_every_lowering_follows(lowering: Any, left: Any, tmp_path: Path) -> None:
    conv = conv2d()
    pads = X_ALONE[:1] if left else X_ALONE
    conv._conv_forward = padding_with(*pads, left=left).__get__(conv)  # type: ignore[method-assign]
    model = fill_(ccp.patch(nn.Sequential(conv, nn.BatchNorm2d(4)), "first"))
    report = ccp.export_onnx(
        *(model, tmp_path / "a.onnx", torch.randn(2, 2, 6, 7)),
        lowering=lowering,
        dynamic_size=lowering == "computed",
        providers=["CPUExecutionProvider"],
    )
    assert report.lowerings == {"0": lowering}
    assert report.worst_difference < 1e-5


@pytest.mark.parametrize(
    ("pads", "left"),
    [
        (X_ALONE, 0),
        (X_ALONE[::-1], 0),
        (X_ALONE[:1], (1, 0)),
        ([((1, 1, 0, 0), "circular"), ((0, 0, 1, 0), "replicate")], 0),
    ],
)
def test_programs_tell_the_padding(pads: Pads, left: Any, tmp_path: Path) -> None:
    conv, x = conv2d(), torch.randn(2, 2, 6, 7)
    conv._conv_forward = padding_with(*pads, left=left).__get__(conv)  # type: ignore[method-assign]
    plain = nn.Sequential(conv).eval()
    model = fill_(ccp.patch(plain, "first")).eval()
    back = ccp.from_exported(torch.export.export(model, (x,)))
    assert isinstance(back, fx.GraphModule)
    torch.testing.assert_close(back(x), model(x))
    file = ccp.save_coords(model, tmp_path / "coords.safetensors")
    assert torch.equal(ccp.load_coords(plain, file)(x), model(x))
    later = ccp.patch(torch.export.export(plain, (x,)), "all")
    with torch.no_grad():
        ccp.coord_parameters(later)[0].copy_(ccp.coord_parameters(model)[0])
    torch.testing.assert_close(later(x), model(x))
    assert isinstance(model[0], CoordConvNd)
    (layer,) = coord_layers(later).values()
    assert layer.coord_padding == model[0].coord_padding


# --- the forward itself ---------------------------------------------------------------------------


def test_a_forward_put_on_a_layer_must_keep_its_coordinates() -> None:
    model = patched()
    layer, x = model[0], torch.randn(2, 2, 5, 7)
    before = layer.forward
    layer.forward = lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, layer.bias)
    for _ in range(2):
        with pytest.raises(PatchError, match="but leaves its coordinates out: let it call the"):
            model(x)
    layer.forward = before
    assert_follows(model, ZEROS)
    del layer.forward
    assert_follows(model, ZEROS)


def wrapping(layer: Any, old: Callable[..., Tensor], x: Tensor) -> Tensor:
    return old(x)


def test_a_forward_that_calls_the_old_one_is_left_as_it_is() -> None:
    model = patched()
    layer = model[0]
    given = functools.update_wrapper(
        functools.partial(wrapping, layer, layer.forward), layer.forward
    )
    layer.forward = given
    assert_follows(copy.deepcopy(model), ZEROS)
    assert_follows(pickle.loads(pickle.dumps(model)), ZEROS)
    assert_follows(model, ZEROS)
    assert layer.forward is given
    layer.forward = given
    plain = ccp.unpatch_(model, discard=True)
    assert plain[0].forward is given  # type: ignore[index]


def test_a_layer_that_is_skipped_is_no_alarm() -> None:
    model, x = patched(), torch.randn(2, 2, 5, 7)
    model[0].forward = lambda x: x
    assert model(x) is x


# --- changes where nothing is assigned on the layer -----------------------------------------------


CIRCULAR: Pads = [((1, 1, 1, 1), "circular")]


def test_methods_put_on_the_class_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    with monkeypatch.context() as hijack:
        hijack.setattr(nn.Conv2d, "_conv_forward", padding_with(*CIRCULAR))
        assert_follows(model, CIRCULAR)
        assert_follows(pickle.loads(pickle.dumps(model)), CIRCULAR)
        meanwhile = patched_in_this_state()
        assert_follows(meanwhile, CIRCULAR)
        stored = pickle.dumps(meanwhile)
    for other in (model, meanwhile, pickle.loads(stored)):
        assert_follows(other, ZEROS)
        assert other[0]._watch is None

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.weight, self.bias)

    stored = pickle.dumps(model)
    with monkeypatch.context() as hijack:
        hijack.setattr(nn.Conv2d, "forward", forward)
        assert_follows(model, CIRCULAR)
        assert_follows(pickle.loads(stored), CIRCULAR)
    assert_follows(model, ZEROS)


def patched_in_this_state() -> Any:
    return fill_(ccp.patch(nn.Sequential(conv2d()), "first"))


def test_methods_put_on_the_class_are_told_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = patched().eval(), torch.randn(2, 2, 5, 7)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", padding_with(*CIRCULAR))
    with pytest.raises(PatchError, match="run the model once before it is compiled"):
        torch.jit.trace(model, x)
    assert_follows(model, CIRCULAR)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


class Settings:
    """Where the forwards below look up how to pad."""

    mode = "constant"


class ByGlobal(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), mode=Settings.mode), weight, bias)


class ByDict(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.settings = {"mode": "constant"}

    def forward(self, input: Tensor) -> Tensor:
        padded = F.pad(input, (1, 1, 1, 1), mode=self.settings["mode"])
        return self._conv_forward(padded, self.weight, self.bias)


class ByModule(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pad: nn.Module = nn.ZeroPad2d(1)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.pad(input), self.weight, self.bias)


def switch_global(layer: Any) -> None:
    Settings.mode = "circular"


def switch_dict(layer: Any) -> None:
    layer.settings["mode"] = "circular"


def replace_module(layer: Any) -> None:
    layer._modules["pad"] = nn.CircularPad2d(1)


def set_on_module(layer: Any) -> None:
    layer.pad.padding = (2, 0, 1, 1)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(
    ("kind", "switch", "pads"),
    [
        (ByGlobal, switch_global, CIRCULAR),
        (ByDict, switch_dict, CIRCULAR),
        (ByModule, replace_module, CIRCULAR),
        (ByModule, set_on_module, [((2, 0, 1, 1), "constant")]),
    ],
)
def test_what_a_forward_reads_elsewhere_is_followed(
    kind: Any, switch: Any, pads: Pads, with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "mode", "constant")
    torch.manual_seed(0)
    model: Any = fill_(ccp.patch(nn.Sequential(kind(2, 4, 3)), "first"))
    assert_follows(model, ZEROS)
    x = torch.randn(2, 2, 5, 7)
    with torch.set_grad_enabled(with_gradients):
        model(x)
        switch(model[0])
        want = expected(model[0], x, pads)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert_follows(model, pads)


def test_a_bound_method_of_another_module_is_followed() -> None:
    other = conv2d(padding_mode="circular")
    model = patched()
    model[0]._conv_forward = other._conv_forward
    assert_follows(model, CIRCULAR)
    other.padding_mode = "reflect"
    assert_follows(model, [((1, 1, 1, 1), "reflect")])


class ByTraining(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mode = "circular" if self.training else "constant"
        return self._conv_forward(F.pad(input, (1, 1, 1, 1), mode=mode), self.weight, self.bias)


def test_a_layer_that_pads_otherwise_in_training_is_followed() -> None:
    torch.manual_seed(0)
    for model in (nn.Sequential(ByTraining(2, 4, 3)), nn.Sequential(ByTraining(2, 4, 3)).eval()):
        patched_model = fill_(ccp.patch(model, "first"))
        for _ in range(2):
            assert_follows(patched_model.train(), CIRCULAR)
            assert_follows(patched_model.eval(), ZEROS)
    patched_model.train()  # the compiler need not see a forward before
    x = torch.randn(2, 2, 5, 7)
    compiled = torch.compile(patched_model, backend="eager", fullgraph=True)
    want = expected(patched_model[0], x, CIRCULAR)  # type: ignore[index]
    torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)


class BySize(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mode = "reflect" if input.shape[-1] > 12 else "constant"
        return self._conv_forward(F.pad(input, (1, 1, 1, 1), mode=mode), self.weight, self.bias)


def test_another_rule_for_large_inputs_is_refused() -> None:
    model = fill_(ccp.patch(nn.Sequential(BySize(2, 4, 3)), "first"))
    assert_follows(model, ZEROS)
    for _ in range(2):
        with pytest.raises(PatchError, match=r"size \(5, 13\) by another rule than smaller ones"):
            model(torch.randn(2, 2, 5, 13))
    assert_follows(model, ZEROS)


def test_zeros_seen_first_do_not_hide_how_images_are_padded() -> None:
    model = fill_(ccp.patch(nn.Sequential(ByDict(2, 4, 3)), "first"))
    with torch.no_grad():
        model(torch.zeros(2, 2, 5, 7))
        switch_dict(model[0])  # type: ignore[index]
        model(torch.zeros(2, 2, 5, 7))
    assert_follows(model, CIRCULAR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_look_works_in_inference_mode_under_autocast_and_at_large_sizes(
    dtype: torch.dtype,
) -> None:
    model: Any = fill_(ccp.patch(nn.Sequential(ByDict(2, 4, 3)).to(dtype), "first")).eval()
    for size in ((9, 251), (251, 9), (502, 300)):
        x = torch.randn(1, 2, *size, dtype=dtype)
        for mode in ("constant", "circular"):
            model[0].settings["mode"] = mode
            with torch.no_grad():
                want = expected(model[0], x, [((1, 1, 1, 1), mode)])
            with torch.inference_mode():
                torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-1)
            model[0].settings["mode"] = "reflect"
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model(x)
            assert model[0].coord_padding.modes == ("reflect", "reflect")


def test_a_look_leaves_random_numbers_and_statistics_alone() -> None:
    class Counting(nn.Conv2d):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, input: Tensor) -> Tensor:
            self.get_buffer("seen").add_(1)
            torch.rand(1)
            return self._conv_forward(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)

    plain = nn.Sequential(Counting(2, 4, 3)).train()
    model: Any = ccp.patch(plain, "first")
    x = torch.randn(2, 2, 5, 7)
    states = []
    for each in (plain, model):
        torch.manual_seed(3)
        each(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert model[0].seen == plain[0].get_buffer("seen") == 1


def test_chosen_calls_follow_methods_of_the_class_and_the_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(2, 2, 5, 7)

    def check(model: Any, pads: Pads) -> None:
        layer = copy.copy(model.conv)
        layer.coord_weight = model.conv.coord_branch.coord_weight
        inner = x
        for amounts, mode in pads:
            inner = F.pad(inner, amounts, mode=mode)
        inner = F.conv2d(inner, layer.weight, layer.bias)
        torch.testing.assert_close(model(x), expected(layer, inner, pads), rtol=1e-5, atol=1e-5)

    model: Any = fill_(ccp.patch(Twice(), "conv@1", example_inputs=x))
    check(model, ZEROS)
    with monkeypatch.context() as hijack:
        hijack.setattr(nn.Conv2d, "_conv_forward", padding_with(*CIRCULAR))
        check(model, CIRCULAR)
    check(model, ZEROS)

    by_training = Twice()
    by_training.conv = ByTraining(2, 2, 3)
    model = fill_(ccp.patch(by_training.eval(), "conv@1", example_inputs=x))
    check(model.eval(), ZEROS)
    check(model.train(), CIRCULAR)
    check(model.eval(), ZEROS)
