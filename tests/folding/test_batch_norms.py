"""fold(): batch norms go into the convolutions before them, and coordinates with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from test_other_libraries import difference, trained
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, StdConv2d
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from coordconv_patch.folding.batch_norms import Folding, fold_batch_norms_
from coordconv_patch.graphs.norms import norm_affine
from coordconv_patch.layers.coord_layer import coord_layers


def batch_norms(model: nn.Module) -> int:
    return sum("BatchNorm" in type(module).__name__ for module in model.modules())


@torch.no_grad()
def assert_folds(model: nn.Module, input: Tensor, *, left: int = 0) -> nn.Module:
    """Fold; outputs stay, and coordinates matter in them. Returns the folded model."""
    folded = ccp.fold(model)
    before, after = model(input), folded(input)
    without = ccp.unpatch(model, discard=True)(input)
    assert difference(before, without) > 3e-4
    assert difference(before, after) < 3e-6
    assert batch_norms(folded) == left
    return folded


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", 0),
        ("tf_efficientnet_b0", 0),  # Conv2dSame, depthwise, BatchNormAct2d
        ("mobilenetv3_small_050", 0),
        ("densenet121", 62),  # batch norm before the convolution
        ("repvgg_a0", 17),  # identity branches
        ("resnetv2_50x1_bit", 0),  # GroupNorm, weight standardisation
    ],
)
def test_timm_models(name: str, left: int) -> None:
    model = trained(ccp.patch(timm.create_model(name), "all"))
    folded = assert_folds(model, torch.rand(1, 3, 64, 64), left=left)
    assert type(folded) is type(model)
    assert coord_layers(folded).keys() == coord_layers(model).keys()


def test_torchvision_model() -> None:
    model = trained(ccp.patch(get_model("mobilenet_v2", weights=None), "all"))
    assert_folds(model, torch.rand(1, 3, 64, 64))


def test_heads_for_training_alone_keep_theirs() -> None:
    model = get_model("googlenet", weights=None, init_weights=False)
    assert_folds(trained(ccp.patch(model, "all")), torch.rand(1, 3, 64, 64), left=2)


def test_a_detector_that_torch_fx_cannot_trace_folds_by_regions() -> None:
    detector = get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None)
    model = trained(ccp.patch(detector, "all")).backbone  # type: ignore[union-attr]
    assert isinstance(model, nn.Module)
    whole = ccp.fold(detector)
    assert batch_norms(whole.backbone) == 0  # type: ignore[arg-type]
    with torch.no_grad():
        before, after = model(torch.rand(1, 3, 64, 64)), ccp.fold(model)(torch.rand(1, 3, 64, 64))
    assert before.keys() == after.keys()


def without_bias(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.register_parameter("bias", None)  # older versions have no bias=False
    return norm


NORMS = {
    "plain": lambda: nn.BatchNorm2d(6),
    "not affine": lambda: nn.BatchNorm2d(6, affine=False),
    "no bias": lambda: without_bias(nn.BatchNorm2d(6, eps=0.1)),
    "with activation": lambda: BatchNormAct2d(6),
    "with drop and activation": lambda: BatchNormAct2d(6, drop_layer=nn.Dropout, act_layer=nn.SiLU),
    "frozen": lambda: FrozenBatchNorm2d(6, eps=0.01),
    "frozen with activation": lambda: FrozenBatchNormAct2d(6),
    "synchronised": lambda: nn.SyncBatchNorm(6),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_batch_norm(kind: str, bias: bool) -> None:
    norm = NORMS[kind]()
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=bias), norm)
    trained(model)
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(norm, name).uniform_(0.5, 2)
    assert_folds(trained(ccp.patch(model, "all")), torch.randn(2, 4, 7, 8))


CONVS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 9)),
    "3d": (nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6), (2, 4, 5, 6, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), (2, 6, 7, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6), (2, 4, 5, 6)),
    "transposed grouped": (
        nn.ConvTranspose2d(4, 6, 3, 2, groups=2),
        nn.BatchNorm2d(6),
        (2, 4, 5, 6),
    ),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6), (2, 4, 5)),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_convolution(kind: str, dtype: torch.dtype) -> None:
    conv, norm, shape = CONVS[kind]
    model = trained(ccp.patch(nn.Sequential(conv, norm), "all")).to(dtype)
    folded = assert_folds(model, torch.randn(shape, dtype=dtype))
    if dtype is torch.float64:
        input = torch.randn(shape, dtype=dtype)
        assert difference(model(input), folded(input)) < 1e-13


class TestWhatIsNotFolded:
    """Each with its reason, and the outputs stay."""

    def obstacle(self, model: nn.Module, input: Tensor) -> str:
        """The one reason that fold gives."""
        trained(model)
        before = model(input)
        (folding,) = fold_batch_norms_(folded := copy.deepcopy(model))
        assert torch.equal(folded(input), before)
        assert folding.convolution == ""
        return folding.obstacle

    def test_output_with_other_users(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                y = self.conv(x)
                return self.bn(y) + y

        model = ccp.patch(Block(), "all")
        assert "other users" in self.obstacle(model, torch.randn(1, 3, 4, 4))

    def test_convolution_that_is_called_twice(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.bn(self.conv(x)) + self.conv(-x)

        model = ccp.patch(Block(), "all")
        assert "several times" in self.obstacle(model, torch.randn(1, 3, 4, 4))

    def test_batch_statistics(self) -> None:
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 1), norm), "all")
        with torch.no_grad():
            for layer in coord_layers(model).values():
                layer.coord_weight.fill_(0.1)
        (folding,) = fold_batch_norms_(model.eval())
        assert "statistics" in folding.obstacle

    def test_training_mode(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        (folding,) = fold_batch_norms_(model.train())
        assert "model.eval()" in folding.obstacle

    def test_weight_that_is_standardised(self) -> None:
        model = ccp.patch(nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)), "all")
        reason = self.obstacle(model, torch.randn(1, 3, 5, 5))
        assert reason == "StdConv2d computes its weight anew in every forward pass"

    def test_parametrized_weight(self) -> None:
        conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        model = ccp.patch(nn.Sequential(conv, nn.BatchNorm2d(4)), "all")
        assert "parametrized" in self.obstacle(model, torch.randn(1, 3, 5, 5))

    def test_hooks(self) -> None:
        model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "all")
        model[0].register_forward_hook(lambda m, i, output: output * 2)  # type: ignore[index]
        assert "hooks" in self.obstacle(model, torch.randn(1, 3, 5, 5))

    def test_batch_norm_before_the_convolution(self) -> None:
        model = ccp.patch(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), "all")
        reason = self.obstacle(model, torch.randn(1, 3, 5, 5))
        assert reason == "no convolution module comes right before it"

    def test_a_subclass_that_computes_something_else(self) -> None:
        class Doubled(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4)), "all")
        reason = self.obstacle(model, torch.randn(1, 3, 5, 5))
        assert reason.startswith("Doubled computes something else")
        with pytest.raises(PatchError, match="something else"):
            norm_affine(model[1])  # type: ignore[index]


class TestTheFoldedModel:
    """A copy for inference."""

    def test_the_model_itself_is_unchanged(self) -> None:
        model = trained(ccp.patch(timm.create_model("resnet18"), "all")).train()
        kept = copy.deepcopy(model.state_dict())
        folded = ccp.fold(model)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in kept.items())
        assert model.training
        assert not folded.training
        assert not any(parameter.requires_grad for parameter in folded.parameters())

    def test_it_says_what_was_folded_where(self) -> None:
        model = timm.create_model("resnet18").eval()
        done = fold_batch_norms_(model)
        assert done[0] == Folding("bn1", convolution="conv1")
        assert len(done) == 20
        assert all(folding.convolution for folding in done)

    def test_a_graph_module_folds(self) -> None:
        model = ccp.patch(fx.symbolic_trace(timm.create_model("resnet18").eval()), "all")
        assert_folds(trained(model), torch.rand(1, 3, 64, 64))

    def test_a_plain_model_folds_too(self) -> None:
        model = trained(timm.create_model("resnet18"))
        x = torch.rand(1, 3, 64, 64)
        assert difference(model(x), ccp.fold(model)(x)) < 3e-6

    def test_maps_are_kept_for_every_size_and_follow_the_dtype(self) -> None:
        model = trained(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "all"))
        folded = ccp.fold(model)
        for size in (5, 8, 5):
            x = torch.randn(2, 3, size, size)
            assert difference(model(x), folded(x)) < 3e-6
        x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
        assert difference(model.double()(x), folded.double()(x)) < 1e-6
        assert len(folded[0]._map_cache) == 1  # type: ignore[index,union-attr,arg-type]

    def test_maps_are_not_compared_with_the_weight_again(self) -> None:
        """What fold() promises: constant maps. Loading a state_dict starts them anew."""
        model = trained(ccp.patch(nn.Conv2d(3, 4, 3), "all"))
        folded: Any = ccp.fold(model)
        x = torch.randn(1, 3, 5, 5)
        first = folded(x)
        folded.coord_weight.data.zero_()
        assert torch.equal(folded(x), first)
        folded.load_state_dict(folded.state_dict())
        assert difference(folded(x), ccp.unpatch(model, discard=True)(x)) == 0

    def test_copies_and_onnx_exports_of_it_work(self, tmp_path: Any) -> None:
        model = trained(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "all"))
        folded = ccp.fold(model)
        x = torch.randn(2, 3, 6, 6)
        assert torch.equal(copy.deepcopy(folded)(x), folded(x))
        ccp.export_onnx(folded, tmp_path / "folded.onnx", x)
        ccp.verify_onnx(model, tmp_path / "folded.onnx", x)


class TiedDecoder(nn.Module):
    """The decoder is the encoder's weight, transposed; only the encoder has a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        code = self.norm(self.encoder(x)).relu()
        return nn.functional.conv_transpose2d(code, self.encoder.weight, padding=1)


@pytest.mark.parametrize("shared", ["weight", "bias", "coord_weight"])
def test_convolutions_that_share_a_parameter_keep_their_batch_norms(shared: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers, *copy.deepcopy(layers), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = trained(ccp.patch(model, "all"))
    setattr(model[2], shared, getattr(model[0], shared))
    assert_folds(model, torch.randn(2, 4, 6, 8), left=2)
    first, second, third = fold_batch_norms_(copy.deepcopy(model))
    assert (
        first.obstacle
        == second.obstacle
        == ("the convolution shares parameters with something else")
    )
    assert third.convolution == "4"


def test_a_weight_that_a_functional_convolution_reads_too_is_not_scaled() -> None:
    torch.manual_seed(0)
    model = trained(ccp.patch(TiedDecoder(), "encoder"))
    assert_folds(model, torch.randn(2, 3, 6, 8), left=1)
