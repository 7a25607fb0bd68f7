"""Other libraries' folding: coordinates go along, or it is refused; they are never lost."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from old_torch import BEFORE_2_11
from timm.utils import reparameterize_model
from torch import Tensor, fx, nn
from torch.ao.quantization import fuse_modules
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import quantization

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.folding import method_names
from coordconv_patch.folding.other_libraries import FoldingMethod
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd

TIMM_MODELS = {
    # name: image size; every family in timm 1.0 whose modules fold themselves.
    "repvgg_a0": 64,
    "mobileone_s0": 64,
    "fastvit_t8": 64,
    "repvit_m0_9": 64,
    "levit_128s": 224,
    "levit_conv_128s": 224,
    "repghostnet_050": 64,
    "ghostnetv3_050": 64,
    "efficientvit_m0": 224,
    "tiny_vit_5m_224": 224,
    "iformer_t": 64,
    "shvit_s1": 224,
    "efficientvim_m1": 64,
    "lcnetv2_small": 64,
}


def trained(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with batch norms and coordinate weights as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
        for layer in coord_layers(model).values():
            layer.coord_weight.normal_(0, 0.1, generator=generator)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of ``a``."""
    return float(((a - b).abs().max() / a.abs().max()).detach())


@torch.no_grad()
def assert_same_outputs(patched: nn.Module, folded: nn.Module, input: Tensor) -> None:
    """The folded model computes what the patched one does, to which coordinates matter."""
    before, after = patched(input), folded(input)
    without = ccp.unpatch(patched, discard=True)(input)
    assert difference(before, without) > 3e-4
    assert difference(before, after) < 3e-6


class ConvBN(nn.Module):
    """A block as many repositories write it, with its own fuse()."""

    def __init__(self, *args: Any, conv: type[nn.Module] = nn.Conv2d, **kwargs: Any) -> None:
        super().__init__()
        self.conv: Any = conv(*args, bias=False, **kwargs)
        norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        self.bn: nn.Module = norms[len(self.conv.kernel_size)](self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def fuse(self) -> None:
        transposed = isinstance(self.conv, nn.modules.conv._ConvTransposeNd)
        self.conv = fuse_conv_bn_eval(self.conv, self.bn, transpose=transposed)  # type: ignore[type-var,arg-type]
        self.bn = nn.Identity()


@pytest.mark.parametrize(("name", "size"), TIMM_MODELS.items())
def test_timm_reparameterize_model_carries_coordinates(name: str, size: int) -> None:
    model = trained(ccp.patch(timm.create_model(name), "all"))
    kept = copy.deepcopy(model.state_dict())
    folded = reparameterize_model(model)
    assert_same_outputs(model, folded, torch.randn(1, 3, size, size))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert len(list(folded.modules())) < len(list(model.modules()))


def test_the_list_of_timm_families_is_complete() -> None:
    """A family of a new timm version shows here."""
    own = [
        module
        for module in vars(timm.models).values()
        if getattr(module, "__name__", "").startswith("timm.models.")
    ]
    folding = {
        module.__name__.rpartition(".")[2]
        for module in own
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and any(name in vars(value) for name in ("fuse", "reparameterize", "switch_to_deploy"))
    }
    assert folding <= {
        *("byobnet", "fastvit", "repvit", "levit", "repghost", "ghostnet", "efficientvit_msra"),
        *("tiny_vit", "iformer", "shvit", "efficientvim", "lcnetv2", "nextvit"),
    }


def test_a_batch_norm_before_the_convolution_is_refused() -> None:
    """Its scale belongs to the image's channels, not to the coordinates."""
    model = trained(ccp.patch(timm.create_model("nextvit_small"), "all"))
    with pytest.raises(PatchError, match="treat all input channels alike"):
        reparameterize_model(model)


@pytest.mark.parametrize("where", ["first", "*.conv_1x1.conv", "*.conv_kxk.conv"])
def test_branches_patched_in_part_are_merged_right(where: str) -> None:
    model = trained(ccp.patch(timm.create_model("repvgg_a0"), where))
    assert_same_outputs(model, reparameterize_model(model), torch.randn(1, 3, 64, 64))


def test_inplace_reparameterize_folds_the_model_itself() -> None:
    model = trained(ccp.patch(timm.create_model("repvgg_a0"), "all"))
    before = copy.deepcopy(model)
    assert reparameterize_model(model, inplace=True) is model
    assert_same_outputs(before, model, torch.randn(1, 3, 64, 64))
    assert all("reparam" in name or "stem" in name for name in coord_layers(model))


def test_a_fuse_that_returns_a_new_module_leaves_the_old_one_patched() -> None:
    model = trained(ccp.patch(timm.create_model("levit_128s"), "all"))
    block = model.get_submodule("stem.conv1")
    kept = copy.deepcopy(block)
    folded = block.fuse()  # type: ignore[operator]
    assert isinstance(folded, ccp.CoordConv2d)
    assert_same_outputs(kept, folded, torch.randn(1, 3, 16, 16))
    assert_same_outputs(block, folded, torch.randn(1, 3, 16, 16))


CONVS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.Conv1d, (2, 4, 9), {"padding": 1, "stride": 2}),
    "2d": (nn.Conv2d, (2, 4, 9, 8), {"padding": "same", "dilation": 2}),
    "2d grouped": (nn.Conv2d, (2, 4, 9, 8), {"groups": 2, "padding": 1}),
    "2d circular": (nn.Conv2d, (2, 4, 9, 8), {"padding": 1, "padding_mode": "circular"}),
    "3d": (nn.Conv3d, (2, 4, 5, 6, 7), {"padding": 1}),
    "transposed 1d": (nn.ConvTranspose1d, (2, 4, 9), {"stride": 2}),
    "transposed 2d": (nn.ConvTranspose2d, (2, 4, 9, 8), {"stride": 2, "output_padding": 1}),
    "transposed 3d": (nn.ConvTranspose3d, (2, 4, 3, 4, 5), {"stride": 2}),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("coords", [None, "mkocabas", ccp.Coordinates(radius=True, fourier=1)])
def test_every_kind_of_convolution_folds(kind: str, coords: Any) -> None:
    conv, shape, options = CONVS[kind]
    if coords == "mkocabas" and not kind.startswith("2d"):
        coords = ccp.Coordinates(align_corners=False)
    block = trained(ccp.patch(ConvBN(4, 6, 3, conv=conv, **options), "all", coords=coords))
    folded = copy.deepcopy(block)
    folded.fuse()  # type: ignore[operator]
    assert isinstance(folded.bn, nn.Identity)
    assert_same_outputs(block, folded, torch.randn(shape))


def test_transposed_convolution_with_groups_folds() -> None:
    """torch's own fuse_conv_bn_eval is wrong for these, so the block scales by itself."""

    class Deconv(ConvBN):
        def fuse(self) -> None:
            bn: Any = self.bn
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            conv = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
            weight = self.conv.weight.view(2, 2, 3, 3, 3) * scale.view(2, 1, 3, 1, 1)
            conv.weight.data.copy_(weight.reshape(4, 3, 3, 3))
            conv.bias.data.copy_(bn.bias - bn.running_mean * scale)  # type: ignore[union-attr]
            self.conv = conv
            self.bn = nn.Identity()

    block = trained(ccp.patch(Deconv(4, 6, 3, conv=nn.ConvTranspose2d, stride=2, groups=2), "all"))
    folded = copy.deepcopy(block)
    folded.fuse()  # type: ignore[operator]
    assert_same_outputs(block, folded, torch.randn(2, 4, 5, 6))


def test_convolutions_of_several_dimensions_fold_together() -> None:
    """A Conv1d has fewer coordinate channels than a Conv2d under the same convention."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = ConvBN(3, 3, 3, conv=nn.Conv1d, padding=1)
            self.area = ConvBN(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.area(self.line(x.flatten(2)).view_as(x))

        def fuse(self) -> None:
            self.line.fuse()
            self.area.fuse()

    model = trained(ccp.patch(Mixed(), "all"))
    folded = copy.deepcopy(model)
    folded.fuse()  # type: ignore[operator]
    assert_same_outputs(model, folded, torch.randn(1, 3, 6, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_gradient_flags_follow_the_folded_weight(dtype: torch.dtype) -> None:
    block = trained(ccp.patch(ConvBN(3, 4, 3), "all")).to(dtype)
    block.conv.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    folded = ccp.fold_with(block, lambda plain: plain.fuse())
    assert folded.conv.coord_weight.dtype is dtype
    assert not folded.conv.coord_weight.requires_grad


def test_untrained_coordinates_stay_patched() -> None:
    block = ccp.patch(ConvBN(3, 4, 3), "all").eval()
    folded = ccp.fold_with(block, lambda plain: plain.fuse())
    assert isinstance(folded.conv, ccp.CoordConv2d)
    assert not folded.conv.coord_weight.any()


class TestDirectCalls:
    """Functions that are given the convolution itself."""

    def test_fuse_conv_bn_eval_is_refused_and_changes_nothing(self) -> None:
        block = trained(ccp.patch(ConvBN(3, 4, 3), "all"))
        kept = copy.deepcopy(block.state_dict())
        with pytest.raises(PatchError, match=r"coordconv_patch\.fold_with"):
            fuse_conv_bn_eval(block.conv, block.bn)  # type: ignore[type-var,arg-type]
        assert all(torch.equal(block.state_dict()[key], value) for key, value in kept.items())

    def test_fuse_conv_bn_eval_by_fold_with(self) -> None:
        pair = trained(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "all"))
        folded = ccp.fold_with(pair, lambda pair: fuse_conv_bn_eval(*pair))
        assert isinstance(folded, ccp.CoordConv2d)
        assert_same_outputs(pair, folded, torch.randn(2, 3, 8, 8))

    def test_fx_optimization_fuse_leaves_patched_convolutions_alone(self) -> None:
        model = trained(ccp.patch(timm.create_model("resnet18"), "layer1.*"))
        assert_same_outputs(model, optimization.fuse(model), torch.randn(1, 3, 64, 64))

    def test_fx_optimization_fuse_by_fold_with_folds_them(self) -> None:
        model = trained(ccp.patch(timm.create_model("resnet18"), "layer1.*"))
        folded = ccp.fold_with(model, optimization.fuse)
        assert isinstance(folded, fx.GraphModule)
        assert not any(node.target == "layer1.0.bn1" for node in folded.graph.nodes)
        assert_same_outputs(model, folded, torch.randn(1, 3, 64, 64))

    def test_quantization_fuse_modules_refuses(self) -> None:
        model = trained(ccp.patch(ConvBN(3, 4, 3), "all"))
        with pytest.raises(AssertionError, match="did not find fuser method"):
            fuse_modules(model, ["conv", "bn"])

    def test_fusing_for_quantization_by_the_models_own_method_refuses(self) -> None:
        """What torch.ao makes of the fused modules would have no coordinates."""
        plain = quantization.mobilenet_v2(weights=None, quantize=False)
        model: Any = trained(ccp.patch(plain, "all"))
        before = type(model.features[0][0])
        with pytest.raises(PatchError, match="knows nothing of coordinates"):
            model.fuse_model()
        assert type(model.features[0][0]) is before

    def test_the_same_weight_again_is_no_folding(self) -> None:
        layer: Any = trained(ccp.patch(nn.Conv2d(3, 4, 3), "all"))
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.weight = nn.Parameter(layer.weight.detach().bfloat16())

    def test_a_new_weight_is_taken_where_no_coordinates_are_lost(self) -> None:
        layer: Any = ccp.patch(nn.Conv2d(3, 4, 3), "all")
        new = nn.Parameter(torch.randn(4, 3, 3, 3))
        layer.weight = new
        assert layer.weight is new

    def test_checkpoints_may_assign(self) -> None:
        layer = trained(ccp.patch(nn.Conv2d(3, 4, 3), "all"))
        other = trained(ccp.patch(nn.Conv2d(3, 4, 3), "all"))
        layer.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(layer.weight, other.weight)  # type: ignore[arg-type]
        with pytest.raises(PatchError, match="about to be replaced"):
            layer.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def test_reparametrizing_tools_may_replace_the_weight(self) -> None:
        layer: Any = trained(ccp.patch(nn.Conv2d(3, 4, 3), "all"))
        prune.l1_unstructured(layer, "weight", amount=0.5)
        prune.remove(layer, "weight")
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


class _Summed(nn.Module):
    """A step of the forward that has the name of a folding method, and does not get the module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        sum_of: Any = self.fuse
        out: Tensor = sum_of(self.a(x), self.b(x))
        return out


class _Static(_Summed):
    @staticmethod
    def fuse(x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _OfTheClass(_Summed):
    @classmethod
    def fuse(cls, x: Tensor, y: Tensor) -> Tensor:
        assert issubclass(cls, _Summed)
        return x + y


class _Builtin(_Summed):
    fuse = torch.add


class _Object(_Summed):
    fuse = functools.partial(torch.add, alpha=2)


@pytest.mark.parametrize("kind", [_Static, _OfTheClass, _Builtin, _Object])
def test_functions_that_do_not_get_the_module_are_called_as_they_are(
    kind: type[_Summed],
) -> None:
    plain, x = kind().eval(), torch.randn(1, 3, 4, 4)
    model = ccp.patch(plain, "all")
    assert torch.equal(model(x), plain(x))
    assert "fuse" not in vars(model)


class TestTheGuard:
    """The object that stands before a module's own method."""

    def patched(self) -> nn.Module:
        return trained(ccp.patch(nn.Sequential(ConvBN(3, 4, 3), ConvBN(4, 4, 3)), "all"))

    def test_it_is_on_modules_that_hold_patched_convolutions_alone(self) -> None:
        model = ccp.patch(nn.Sequential(ConvBN(3, 4, 3), ConvBN(4, 4, 3)), "0.conv")
        assert isinstance(vars(model[0])["fuse"], FoldingMethod)  # type: ignore[index]
        assert "fuse" not in vars(model[1])  # type: ignore[index]

    def test_unpatch_takes_it_away(self) -> None:
        plain = ccp.unpatch(self.patched(), discard=True)
        assert all("fuse" not in vars(module) for module in plain.modules())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_it_belongs_to_the_copy(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        model = self.patched()
        other: Any = copied(model)
        assert vars(other[0])["fuse"].module is other[0]
        other[0].fuse()
        assert isinstance(other[0].bn, nn.Identity)
        assert vars(other[0])["fuse"].module is other[0]  # still there, for a second step
        assert isinstance(model[0].bn, nn.BatchNorm2d)  # type: ignore[index,union-attr]
        assert_same_outputs(model, other, torch.randn(1, 3, 9, 9))

    def test_the_original_of_a_shallow_copy_is_not_folded_in_its_place(self) -> None:
        model = self.patched()[0]  # type: ignore[index]
        shallow: Any = copy.copy(model)
        shallow._modules = dict(shallow._modules)
        with pytest.raises(PatchError, match=r"shallow copy of this ConvBN.*deepcopy"):
            shallow.fuse()
        assert isinstance(model.bn, nn.BatchNorm2d)
        del shallow
        model.fuse()
        assert isinstance(model.bn, nn.Identity)

    def test_it_says_what_it_is(self) -> None:
        assert repr(vars(self.patched()[0])["fuse"]) == "ConvBN.fuse, carrying coordinates"  # type: ignore[index]

    def test_a_users_own_replacement_stays(self) -> None:
        model = nn.Sequential(ConvBN(3, 4, 3))
        mine = lambda: "mine"  # noqa: E731
        model[0].fuse = mine  # type: ignore[assignment]
        assert ccp.patch_(model, "all")[0].fuse is mine  # type: ignore[index]
        assert ccp.unpatch_(model)[0].fuse is mine  # type: ignore[index]

    def test_a_forward_pass_that_calls_its_own_fuse_is_left_alone(self) -> None:
        class Pyramid(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def fuse(self, *, high: Tensor, low: Tensor) -> Tensor:
                return self.conv(high + low)

            def forward(self, x: Tensor) -> Tensor:
                return self.fuse(high=x, low=x)

        plain = Pyramid()
        x = torch.randn(1, 3, 8, 8)
        model = ccp.patch(plain, "all")
        assert torch.equal(model(x), plain(x))
        assert torch.equal(fx.symbolic_trace(model)(x), plain(x))

    @pytest.mark.parametrize("outside", [False, True])
    @pytest.mark.parametrize("way", ["call", "compile", "export", "strict", "jit", "fx", "thread"])
    def test_a_step_of_the_forward_by_such_a_name_is_just_the_method(
        self, way: str, outside: bool
    ) -> None:
        class Neck(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.low, self.high = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

            def fuse(self) -> Tensor:
                return self.features[0] + self.features[1]

            def look(self, x: Tensor) -> None:
                self.features = [self.low(x), self.high(x)]

            def forward(self, x: Tensor) -> Tensor:
                self.look(x)
                return self.fuse()

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.neck = Neck()

            def forward(this, x: Tensor) -> Tensor:  # noqa: N805
                this.neck.look(x)
                return this.neck.fuse()

        x = torch.randn(1, 3, 8, 8)
        plain = (Outer if outside else Neck)().eval()
        if BEFORE_2_11 and (way == "strict" or (way == "export" and not outside)):
            with pytest.raises((ValueError, AssertionError)):  # the plain model neither
                torch.export.export(plain, (x,), strict=way == "strict")
            return
        model = ccp.patch(plain, "all")
        found: list[Tensor] = []
        if way == "call":
            found += [model(x), model.forward(x)]
        elif way == "compile":
            torch._dynamo.reset()
            found += [torch.compile(model, backend="eager", fullgraph=True)(x)]
        elif way in ("export", "strict"):
            found += [torch.export.export(model, (x,), strict=way == "strict").module()(x)]
        elif way == "jit":
            found += [torch.jit.trace(model, x)(x)]
        elif way == "fx":
            found += [fx.symbolic_trace(model)(x)]
        else:
            threads = [threading.Thread(target=lambda: found.append(model(x))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 4
        assert all(torch.equal(output, plain(x)) for output in found)

    def test_a_replica_of_data_parallel_runs_its_own_method(self) -> None:
        """A replica shares the guard with the module that it was made of."""

        class Step(ConvBN):
            def fuse(self) -> Any:
                return self

            def forward(self, x: Tensor) -> Any:
                return self.fuse()

        model = ccp.patch(nn.Sequential(Step(3, 4, 3)), "all")[0]  # type: ignore[index]
        replica = copy.copy(model)
        assert replica(torch.randn(1, 3, 8, 8)) is replica


class TestNames:
    """Which methods are guarded."""

    @pytest.mark.parametrize(
        "name",
        [
            *("optimize_for_deployment", "reparameterize_layer", "partial_fusion", "full_fusion"),
            *("fuse_block_residual_branches", "fuse_repvgg_block", "structural_reparam"),
        ],
    )
    def test_those_of_libraries_are(self, name: str) -> None:
        block = type("Block", (ConvBN,), {name: ConvBN.fuse})(3, 4, 3)
        model = trained(ccp.patch(nn.Sequential(block), "all"))
        folded: Any = copy.deepcopy(model)
        getattr(folded[0], name)()
        assert isinstance(folded[0].bn, nn.Identity)
        assert_same_outputs(model, folded, torch.randn(1, 3, 9, 9))

    def test_a_registered_one_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = dict(method_names._FOLDING_METHODS)
        monkeypatch.setattr(method_names, "_FOLDING_METHODS", names)

        class Block(ConvBN):
            def to_inference_form(self) -> None:
                self.fuse()

        before = ccp.patch(nn.Sequential(Block(3, 4, 3)), "all")
        assert "to_inference_form" not in vars(before[0])  # type: ignore[index]
        ccp.register_folding_method("to_inference_form")
        model = trained(ccp.patch(nn.Sequential(Block(3, 4, 3)), "all"))
        folded: Any = copy.deepcopy(model)
        folded[0].to_inference_form()
        assert_same_outputs(model, folded, torch.randn(1, 3, 9, 9))
        plain = ccp.unpatch(model, discard=True)
        assert "to_inference_form" not in vars(plain[0])  # type: ignore[index]

    @pytest.mark.parametrize("name", ["", "a.b", "class", "forward", "eval", "__call__", 3, None])
    def test_what_is_not_a_folding_methods_name_is_refused(self, name: Any) -> None:
        with pytest.raises(ArgumentError, match="name="):
            ccp.register_folding_method(name)


class TestNewWeights:
    """What a tool is told that gives a layer with trained coordinates another weight."""

    def layer(self) -> Any:
        return trained(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3)), "all"))[0]  # type: ignore[index]

    @pytest.mark.parametrize(
        ("change", "says"),
        {
            "folding": (lambda w: w * torch.rand(4, 1, 1, 1), r"fold_with"),
            "channels in another order": (lambda w: w[[2, 1]], r"2 output channels instead of 4"),
            "more channels": (lambda w: w.repeat(2, 1, 1, 1), r"8 output channels instead of 4"),
            "an LRP rule": (lambda w: w + 0.25 * w.clamp(min=0), r"concatenated_weight\(\)"),
        }.values(),
        ids=["folding", "order", "more channels", "relevance"],
    )
    def test_each_its_own(self, change: Callable[[Tensor], Tensor], says: str) -> None:
        layer = self.layer()
        before = layer.weight
        with pytest.raises(PatchError, match=says) as raised:
            layer.weight = nn.Parameter(change(before.detach()))
        assert str(raised.value).startswith("the weight of 0 is about to be replaced")
        assert ("folds" in str(raised.value)) is ("fold_with" in says)
        assert layer.weight is before

    @pytest.mark.parametrize(
        "change",
        [lambda w: w[:, [0, 2]], lambda w: w * (w > 0), lambda w: w.double()],
        ids=["fewer input channels", "a mask", "another dtype"],
    )
    def test_coordinates_stay_beside(self, change: Callable[[Tensor], Tensor]) -> None:
        layer = self.layer()
        layer.weight = nn.Parameter(change(layer.weight.detach()))


class TestRefusals:
    """What coordinates cannot follow is refused, and nothing is changed."""

    def refused(self, model: nn.Module, function: Callable[[Any], Any], match: str) -> None:
        trained(model)
        kept = copy.deepcopy(model.state_dict())
        with pytest.raises(PatchError, match=match):
            ccp.fold_with(model, function)
        assert model.state_dict().keys() == kept.keys()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())

    def test_plain_model(self) -> None:
        self.refused(ConvBN(3, 4, 3), lambda plain: plain.fuse(), "not patched")

    def test_product_of_two_patched_weights(self) -> None:
        def merge(pair: Any) -> nn.Module:
            conv = nn.Conv2d(3, 5, 1)
            weight = torch.einsum("omij,mcij->ocij", pair[1].weight, pair[0].weight)
            conv.weight.data.copy_(weight)
            return conv

        model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)), "all")
        self.refused(model, merge, "not linear")

    def test_weights_that_become_a_linear_layer(self) -> None:
        def flatten(model: Any) -> nn.Module:
            linear = nn.Linear(3, 4)
            linear.weight.data.copy_(model.weight.flatten(1))
            return linear

        self.refused(
            ccp.patch(nn.Conv2d(3, 4, 1), "all"),
            flatten,
            "makes weight depend on a convolution's weight",
        )

    def test_mixed_input_channels(self) -> None:
        def flip(model: Any) -> None:
            model.weight.data.copy_(model.weight.data.flip(1))

        self.refused(ccp.patch(nn.Conv2d(3, 4, 1), "all"), flip, "mixes the input channels")

    def test_branches_with_different_coordinates(self) -> None:
        model = ccp.patch(timm.create_model("repvgg_a0"), "stages.0.0.conv_1x1.conv")
        ccp.patch_(model, "stages.0.0.conv_kxk.conv", coords=ccp.Coordinates(radius=True))
        self.refused(model, reparameterize_model, "different coordinates")

    def test_different_coordinates_in_different_layers_fold(self) -> None:
        model = ccp.patch(timm.create_model("repvgg_a0"), "stages.0.0.*")
        ccp.patch_(model, "stages.1.0.*", coords=ccp.Coordinates(radius=True))
        trained(model)
        assert_same_outputs(model, reparameterize_model(model), torch.randn(1, 3, 64, 64))

    def test_functional_convolution(self) -> None:
        class Functional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(4, 3, 3, 3))

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.conv2d(x, self.w)

        self.refused(ccp.patch(Functional(), "all"), lambda plain: None, "in a graph or at chosen")

    def test_parametrized_weight(self) -> None:
        block = ConvBN(3, 4, 3)
        parametrizations.weight_norm(block.conv)
        self.refused(ccp.patch(block, "all"), lambda plain: plain.fuse(), "parametrized")

    def test_tied_weights(self) -> None:
        model = nn.Sequential(ConvBN(3, 3, 3), ConvBN(3, 3, 3))
        model[1].conv.weight = model[0].conv.weight  # type: ignore[union-attr]
        self.refused(ccp.patch(model, "all"), lambda plain: None, "shares its weight")

    def test_errors_of_the_function_itself_come_through(self) -> None:
        block: Any = trained(ccp.patch(ConvBN(3, 4, 3), "all")).train()
        with pytest.raises(AssertionError, match="only for eval"):
            block.fuse()
        assert isinstance(block.conv, CoordConvNd)
        assert isinstance(block.bn, nn.BatchNorm2d)


def _fails(plain: Any) -> Any:
    raise KeyError("stem")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_fails, "function failed on a plain copy of the model: KeyError: 'stem'"),
        (lambda: None, "function failed on a plain copy of the model: TypeError"),
        (lambda plain: nn.MSELoss(), "function returned a MSELoss in which no weight depends on"),
        (lambda plain: nn.Identity(), "function returned a Identity in which no weight"),
    ],
)
def test_a_function_that_fails_or_loses_the_coordinates_is_told(
    function: Any, message: str
) -> None:
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "all")
    with pytest.raises(ccp.PatchError, match=message):
        ccp.fold_with(model, function)
