"""Tilers that call a module on one tile after the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

import coordconv_patch as ccp

Window = ccp.Window
X = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(2))
LEFT, RIGHT = Window((0, 0), (16, 12), (16, 24)), Window((0, 12), (16, 12), (16, 24))


def randomised(model: nn.Module) -> nn.Module:
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.1)
    return model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Cuts the picture in two itself."""
        return self.last(torch.cat([self.body(half) for half in x.split(12, dim=3)], dim=3))


def patched() -> Any:
    torch.manual_seed(0)
    coords = ccp.Coordinates(align_corners=False)
    return randomised(ccp.patch(Net().eval(), "all", coords=coords, example_inputs=X))


def whole(model: Any) -> Tensor:
    return model.last(model.body(X))


def test_each_call_has_its_place_and_others_have_none() -> None:
    model = patched()
    before = hooks(model)
    with torch.no_grad():
        expected = whole(model)
        assert (model(X) - expected).abs().max() > 0.02
        for places in ([LEFT, RIGHT], [LEFT.theta(), [RIGHT]]):
            with ccp.places_in_turn(model.body, places):
                torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)
        with ccp.places_in_turn(model.body, [LEFT, RIGHT]), ccp.places(model, LEFT):
            outer = model(X)
        with ccp.places(model, LEFT):
            torch.testing.assert_close(outer, model.last(model.body(X) * 0 + body(model)))
        assert hooks(model) == before


def hooks(model: Any) -> list[Any]:
    return [*model.body._forward_hooks, *model.body._forward_pre_hooks]


def body(model: Any) -> Tensor:
    halves = []
    for window, half in zip((LEFT, RIGHT), X.split(12, dim=3), strict=True):
        with ccp.places(model, window):
            halves.append(model.body(half))
    return torch.cat(halves, dim=3)


def test_another_number_of_calls_is_an_error() -> None:
    model = patched()
    with (
        pytest.raises(ccp.PatchError, match=r"was called 2 times, and there are 3 places"),
        ccp.places_in_turn(model.body, [LEFT, RIGHT, LEFT]),
    ):
        model(X)
    with (
        pytest.raises(ccp.PatchError, match="is called more often than there are places, 1"),
        ccp.places_in_turn(model.body, [LEFT]),
    ):
        model(X)
    with (
        pytest.raises(ZeroDivisionError),  # not an error about calls that it prevented
        ccp.places_in_turn(model.body, [LEFT, RIGHT]),
    ):
        raise ZeroDivisionError
    with torch.no_grad():
        expected = whole(model)
        with ccp.places_in_turn(model.body, [LEFT, RIGHT]):
            torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)


def test_a_call_that_fails_leaves_no_place_behind() -> None:
    model = patched()
    with torch.no_grad(), ccp.places_in_turn(model.body, [LEFT, LEFT, RIGHT]):
        expected = model.body[0](X)
        with pytest.raises(RuntimeError, match="channels"):
            model.body(X[:, :2])
        assert torch.equal(model.body[0](X), expected)
        model(X)


def test_calls_in_other_threads_are_not_counted() -> None:
    model = patched()
    outputs: list[Tensor] = []
    with torch.no_grad():
        expected, other = whole(model), model.body(X)
        with ccp.places_in_turn(model.body, [LEFT, RIGHT]):
            thread = threading.Thread(target=lambda: outputs.append(model.body(X).detach()))
            thread.start()
            thread.join()
            torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)
    assert torch.equal(outputs[0], other)


def test_calls_in_other_tasks_are_not_counted() -> None:
    model = patched()
    expected, other = whole(model), model.body(X)

    async def tile() -> None:
        halves = X.split(12, dim=3)
        with ccp.places_in_turn(model.body, [LEFT, RIGHT]):
            left = model.body(halves[0])
            await asyncio.sleep(0)
            right = await asyncio.create_task(call(halves[1]))  # a part of this one
        torch.testing.assert_close(
            model.last(torch.cat([left, right], dim=3)), expected, rtol=0, atol=1e-6
        )

    async def call(x: Tensor) -> Any:
        return model.body(x)

    async def both() -> None:
        tiled = asyncio.create_task(tile())
        assert torch.equal((await asyncio.gather(tiled, call(X)))[1], other)

    with torch.no_grad():
        asyncio.run(both())


@pytest.mark.filterwarnings("ignore:.*Dynamo:UserWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_calls_of_a_compiled_module_have_their_places(in_place: bool) -> None:
    torch._dynamo.reset()
    model = patched()
    with torch.no_grad():
        expected = whole(model)
        if in_place:
            model.body.compile(backend="eager")
        else:
            model.body = torch.compile(model.body, backend="eager")
        for _ in range(2):
            with ccp.places_in_turn(model.body, [LEFT, RIGHT]):
                torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole(model), expected, rtol=0, atol=1e-6)


def test_a_plain_module_and_other_places_are_refused() -> None:
    model = patched()
    before = hooks(model)
    with pytest.raises(ccp.PatchError, match="not patched"), ccp.places_in_turn(Net(), [LEFT]):
        pass
    with (
        pytest.raises(ccp.CoordinatesError, match="places=None"),
        ccp.places_in_turn(model.body, [None]),
    ):
        pass
    with (
        pytest.raises(ccp.CoordinatesError, match=r"places=Window.*write a list of places"),
        ccp.places_in_turn(model.body, LEFT),
    ):
        pass
    assert hooks(model) == before


# --- diffusers' tiled autoencoder -----------------------------------------------------------------


def tiles(height: int, width: int, tile: int, step: int) -> Iterator[Window]:
    """The order in which diffusers cuts: rows first, tiles at the end are smaller."""
    for top in range(0, height, step):
        for left in range(0, width, step):
            size = (min(tile, height - top), min(tile, width - left))
            yield Window((top, left), size, (height, width))


def autoencoder() -> Any:
    """Without norms and attention, which see all of a tile: a plain one then has no seam."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    vae.tile_latent_min_size, vae.tile_sample_min_size = 64, 128
    vae.enable_tiling()
    return vae


def clean(tiled: Tensor, whole: Tensor) -> Tensor:
    """Where a plain model has no seam, nor does within 4 pixels; shape (H, W)."""
    is_seam = (seam(tiled, whole) > 1e-6).float()
    is_clean = F.max_pool2d(is_seam[None], 9, 1, 4)[0] == 0
    assert float(is_clean.float().mean()) > 0.5
    return is_clean


def seam(tiled: Tensor, whole: Tensor) -> Tensor:
    return (tiled - whole).abs().amax((0, 1)) / whole.abs().max()


def test_diffusers_tiled_decoder_has_no_seam_where_the_plain_one_has_none() -> None:
    vae = autoencoder()
    model = randomised(ccp.patch(vae, "all"))
    latents = torch.randn(2, 4, 96, 96)
    windows = list(tiles(96, 96, tile=64, step=48))
    with torch.no_grad():
        whole = model.decoder(model.post_quant_conv(latents))
        plain = vae.decoder(vae.post_quant_conv(latents))
        is_clean = clean(vae.decode(latents).sample, plain)
        assert float(seam(model.decode(latents).sample, whole)[is_clean].max()) > 0.05
        with (
            ccp.places_in_turn(model.post_quant_conv, windows),
            ccp.places_in_turn(model.decoder, windows),
        ):
            tiled = model.decode(latents).sample
    assert float(seam(tiled, whole)[is_clean].max()) < 2e-6


@pytest.mark.parametrize(("where", "limit"), [("encoder.conv_in", 2e-6), ("encoder.*", 1e-3)])
def test_diffusers_tiled_encoder_has_no_seam_where_the_plain_one_has_none(
    where: str, limit: float
) -> None:
    """Convolutions after a lopsided ``F.pad`` see the place of the padded input, hence 1e-3."""
    vae = autoencoder()
    model = randomised(ccp.patch(vae, where))
    images = torch.randn(1, 3, 192, 192)
    windows = list(tiles(192, 192, tile=128, step=96))
    with torch.no_grad():
        whole = model.quant_conv(model.encoder(images))
        plain = vae.quant_conv(vae.encoder(images))
        is_clean = clean(vae.encode(images).latent_dist.parameters, plain)
        alone = model.encode(images).latent_dist.parameters
        assert float(seam(alone, whole)[is_clean].max()) > 0.05
        with ccp.places_in_turn(model.encoder, windows):
            tiled = model.encode(images).latent_dist.parameters
    assert float(seam(tiled, whole)[is_clean].max()) < limit
