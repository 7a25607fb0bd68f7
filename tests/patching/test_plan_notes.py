"""What a plan notes of a model as a whole: batches that are padded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import coordconv_patch as ccp

DEPENDS = "a picture's coordinates then depend on the pictures that it is padded beside"


class Padding(nn.Module):
    """Pads as torchvision's detectors do, to multiples of 8, and convolves; sizes stay."""

    def __init__(self) -> None:
        super().__init__()
        zeros, ones = [0.0] * 3, [1.0] * 3
        self.pad = GeneralizedRCNNTransform(16, 32, zeros, ones, size_divisible=8)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.conv(self.pad(images)[0].tensors)


class Masked(nn.Module):
    """Is told what is picture, as models of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        return self.conv(pixel_values)


def test_torchvisions_detectors_are_noted_by_the_module_that_pads() -> None:
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    for shown in (ccp.plan(model, "head"), ccp.survey(model)):
        (note,) = shown.notes
        assert note.startswith(f"transform pads its batches: {DEPENDS}")
        assert shown.to_dict()["notes"] == [note]
        assert note in " ".join(str(shown).split())  # folded below the table


def test_transformers_models_are_noted_by_their_mask() -> None:
    from transformers import DetrConfig, DetrModel, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, **sizes, **layers, **heads
    )
    (note,) = ccp.plan(DetrModel(config), "all").notes
    assert note.startswith(f"the model takes padded batches and a pixel_mask: {DEPENDS}")


@pytest.mark.parametrize(
    ("model", "noted"),
    [
        (Masked(), "the model takes"),
        (nn.Sequential(Masked()), "0 takes"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), ""),
    ],
)
def test_others_are_noted_if_a_part_takes_a_mask(model: nn.Module, noted: str) -> None:
    notes = ccp.plan(model, "all").notes
    assert [note[: len(noted)] for note in notes] == ([noted] if noted else [])


def test_patching_does_not_warn_of_it(recwarn: pytest.WarningsRecorder) -> None:
    ccp.patch(Padding(), "all")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("patched", [False, True])
def test_the_note_is_true(patched: bool) -> None:
    """A picture of 16 x 16 alone, and beside one of 16 x 32."""
    model = Padding().eval()
    if patched:
        assert DEPENDS in ccp.plan(model, "all").notes[0]
        model = ccp.patch(model, "all")
        nn.init.normal_(model.conv.coord_weight)
    picture, larger = torch.rand(3, 16, 16), torch.rand(3, 16, 32)
    alone, beside = model([picture])[0], model([picture, larger])[0]
    own = beside[:, :14, :14]
    assert own.shape == alone.shape
    assert torch.allclose(own, alone, atol=1e-6) != patched
