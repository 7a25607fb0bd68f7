"""Pictures in a padded batch see coordinates of their own extent, as they do alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from small_detectors import Masked, mask_rcnn, outputs_of, patched, retinanet
from torch import Tensor, nn

import coordconv_patch as ccp

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SMALL, TALL, WIDE = torch.rand(3, 64, 96), torch.rand(3, 150, 64), torch.rand(3, 64, 140)
"""The first is a whole number of times 32 each way, so by itself it is not padded."""


def first_of(model: nn.Module, pictures: list[Tensor], size: Any = (32, 48)) -> Tensor:
    """What the first convolution gives for the first picture."""
    (output,) = outputs_of(model.backbone.first, lambda: model(pictures))
    return output[0, :, : size[0], : size[1]]


# --- torchvision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_a_picture_beside_others_sees_what_it_sees_alone(build: Any) -> None:
    model = patched(build())
    alone = first_of(model, [SMALL])  # whole: nothing is padded, and nothing followed
    assert (first_of(model, [SMALL, TALL]) - alone).abs().max() > 0.1
    assert ccp.follow_padding_(model) is model
    for pictures in ([SMALL], [SMALL, TALL], [SMALL, WIDE, TALL]):
        torch.testing.assert_close(first_of(model, pictures), alone, rtol=0, atol=2e-6)
    ccp.follow_padding_(model, False)
    assert (first_of(model, [SMALL, TALL]) - alone).abs().max() > 0.1


def test_the_channels_are_those_of_the_definition() -> None:
    """Of a picture that is padded by itself: 70 x 96 in 96 x 96, seen at a stride of 2."""
    model = ccp.follow_padding_(patched(retinanet(min_size=70), "backbone.second"))
    layer = model.backbone.second
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_(), layer.coord_weight.zero_()
        layer.coord_weight[0, 0, 1, 1] = layer.coord_weight[1, 1, 1, 1] = 1.0
    (seen,) = outputs_of(layer, lambda: model([torch.rand(3, 70, 96)]))
    place = torch.tensor([[1.0, 0, 0], [0, 96 / 70, 96 / 70 - 1]], dtype=torch.float64)
    grid = reference.placed_grid(place, (48, 48))[:, ::2, ::2].float()
    grid[:, 18:] = 0  # the map's row 34 is the last whose centre, at 69, is in the picture
    torch.testing.assert_close(seen[0, :2], grid, rtol=0, atol=1e-6)


def test_whole_results_depend_on_others_no_more_than_plain_ones() -> None:
    """Deeper convolutions see a picture's edge smeared into its padding; plain ones too."""
    model = patched(retinanet())
    plain = ccp.unpatch(model, discard=True)

    def apart(model: nn.Module) -> float:
        (alone,) = outputs_of(model.backbone.third, lambda: model([SMALL]))
        (beside,) = outputs_of(model.backbone.third, lambda: model([SMALL, TALL]))
        return float((alone[0] - beside[0, :, :8, :12]).abs().max() / alone.abs().max())

    today, unavoidable = apart(model), apart(plain)
    assert apart(ccp.follow_padding_(model)) < 2 * unavoidable < today / 2


@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_at_zero_weights_outputs_are_the_plain_ones(build: Any) -> None:
    plain = build().eval()
    model = ccp.follow_padding_(ccp.patch(plain, "all"))
    with torch.no_grad():
        for own, theirs in zip(model([SMALL, TALL]), plain([SMALL, TALL]), strict=True):
            assert own.keys() == theirs.keys()
            assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_training_resizes_at_random_and_is_followed() -> None:
    """Each picture's valid area as the transform made it in that very pass."""
    model = ccp.follow_padding_(patched(retinanet(min_size=(48, 64, 80)), "backbone.first"))
    model.train()
    layer, sizes = model.backbone.first, []
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_(), layer.coord_weight.zero_()
        layer.coord_weight[:, 0, 2, 2] = 1.0
    hook = model.transform.register_forward_hook(
        lambda module, args, output: sizes.append((output[0].image_sizes, output[0].tensors.shape))
    )
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    for _ in range(4):
        (seen,) = outputs_of(layer, lambda: model([SMALL, TALL], [target, target]))
        image_sizes, canvas = sizes[-1]
        for picture, (height, width) in zip(seen[:, 0], image_sizes, strict=True):
            pixels = torch.arange(0, canvas[-1], 2, dtype=torch.float64)
            line = (2 * pixels + 1 - width) / (width - 1) * (pixels < width)
            rows = torch.arange(0, canvas[-2], 2)[:, None] < height
            torch.testing.assert_close(picture, (line * rows).float(), rtol=0, atol=1e-6)
    hook.remove()
    assert len({tuple(each[0]) for each in sizes}) > 1


def test_own_places_are_those_of_the_pictures_without_their_padding() -> None:
    model = patched(retinanet())
    window = ccp.Window((10, 20), (64, 96), (200, 300))
    with ccp.places(model, window):
        expected = first_of(model, [SMALL])
    ccp.follow_padding_(model)
    whole = ccp.Window((0, 0), (150, 64), (150, 64))
    for given in (window, [window, whole]):
        with ccp.places(model, given):
            actual = first_of(model, [SMALL, TALL])
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    wrong = pytest.raises(ccp.PatchError, match="gets 2 pictures, and there are places for 3")
    with wrong, ccp.places(model, [window] * 3):
        model([SMALL, TALL])
    ccp.set_places_(model, window)
    torch.testing.assert_close(first_of(model, [SMALL, TALL]), expected, rtol=0, atol=2e-6)


# --- pixel masks ----------------------------------------------------------------------------------


def masked_batch() -> tuple[Tensor, Tensor]:
    """One picture at the top left, one in the middle, and one that is all of the canvas."""
    images, mask = torch.zeros(3, 3, 40, 48), torch.zeros(3, 40, 48, dtype=torch.long)
    for index, (top, left, height, width) in enumerate(AREAS):
        area = (slice(top, top + height), slice(left, left + width))
        images[index][(slice(None), *area)] = torch.rand(3, height, width)
        mask[index][area] = 1
    return images, mask


AREAS = [(0, 0, 24, 32), (8, 16, 20, 30), (0, 0, 40, 48)]


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_mask_tells_where_pictures_are(as_keyword: bool) -> None:
    model = patched(Masked())
    images, mask = masked_batch()
    expected = []
    for image, (top, left, height, width) in zip(images, AREAS, strict=True):
        picture = image[None, :, top : top + height, left : left + width]
        expected.append(outputs_of(model.first, lambda x=picture: model(x))[0][0])
    whole = model(images)
    ccp.follow_padding_(model)

    def run() -> None:
        model(images, pixel_mask=mask) if as_keyword else model(images, mask)

    (seen,) = outputs_of(model.first, run)
    for actual, alone, (top, left, _, _) in zip(seen, expected, AREAS, strict=True):
        rows, columns = slice(top // 2, None), slice(left // 2, None)
        inside = actual[:, rows, columns][:, : alone.shape[1], : alone.shape[2]]
        torch.testing.assert_close(inside, alone, rtol=0, atol=2e-6)
    assert torch.equal(model(images), whole)  # no mask: all of it
    torch.testing.assert_close(model(images, mask * 0), whole, rtol=0, atol=2e-6)


def test_a_subclass_that_passes_arguments_on_is_followed() -> None:
    class Passes(Masked):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    model = ccp.follow_padding_(patched(Passes()))
    images, mask = masked_batch()
    assert not torch.allclose(model(images, mask), model(images))


def test_another_mask_is_refused_by_name() -> None:
    model = ccp.follow_padding_(patched(Masked()))
    images, mask = masked_batch()
    whole = model(images)
    with pytest.raises(ccp.PatchError, match=r"pixel_mask=\(40, 48\): .*of shape \(N, H, W\)"):
        model(images, mask[0])
    assert torch.equal(model(images), whole)


def tiny_detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    layers = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=16,
        num_queries=5,
        **layers,
        **heads,
        **widths,
    )
    return DetrForObjectDetection(config).eval()


def test_hugging_faces_detr_depends_on_others_no_more_than_the_plain_one() -> None:
    plain = tiny_detr()
    model = patched(plain)
    picture = torch.randn(1, 3, 64, 96)
    batch, mask = torch.zeros(2, 3, 128, 128), torch.zeros(2, 128, 128, dtype=torch.long)
    batch[0, :, :64, :96], batch[1] = picture[0], torch.randn(3, 128, 128)
    mask[0, :64, :96], mask[1] = 1, 1

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            alone = model(picture, torch.ones(1, 64, 96, dtype=torch.long)).logits[0]
            beside = model(pixel_values=batch, pixel_mask=mask).logits[0]
        return float((alone - beside).abs().max() / alone.abs().max())

    today, unavoidable = apart(model), apart(plain)
    followed = apart(ccp.follow_padding_(model))
    assert followed < 2 * unavoidable < today / 2


# --- what is refused ------------------------------------------------------------------------------


def test_other_models_and_conventions_are_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ccp.PatchError, match="has no coordinate"):
        ccp.follow_padding_(plain)
    with pytest.raises(
        ccp.PatchError,
        match=r"Sequential does not pad .*GeneralizedRCNNTransform.*pixel_mask.*places",
    ):
        ccp.follow_padding_(patched(plain))
    with pytest.raises(ccp.ArgumentError, match="follow="):
        ccp.follow_padding_(patched(Masked()), "yes")  # type: ignore[arg-type]
    with pytest.raises(ccp.CoordinatesError, match="has swap_sizes"):
        ccp.follow_padding_(patched(Masked(), coords="reference"))
    model = ccp.set_window_(patched(Masked()), ccp.Window((0, 0), (8, 8), (16, 16)))
    before = copy.deepcopy(model)
    with pytest.raises(ccp.CoordinatesError, match="has a window already"):
        ccp.follow_padding_(model)
    assert model._forward_pre_hooks.keys() == before._forward_pre_hooks.keys()
    letterboxed = ccp.follow_letterbox_(patched(Masked()))
    with pytest.raises(ccp.PatchError, match=r"follow_letterbox_\(model, False\)"):
        ccp.follow_padding_(letterboxed)
