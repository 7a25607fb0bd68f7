"""Scrambled coordinates: those of a convention, at other pixels, and in everything else like it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import reference as conv_reference
import torch
from old_torch import BEFORE_2_9
from torch import Tensor, nn

import coordconv_patch as ccp

CPU = ["CPUExecutionProvider"]
SIZES = [(1,), (13,), (1, 6), (9, 14), (3, 4, 5)]


def numbers(seed: int) -> list[int]:
    """SplitMix64's, as the shuffle takes them: 1 to 2^31 - 2."""
    drawn = []
    for at in range(1, 49):
        z = (seed + at * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        drawn.append((z ^ (z >> 31)) % (2**31 - 2) + 1)
    return drawn


def shuffled(size: tuple[int, ...], seed: int) -> list[tuple[int, ...]]:
    """The pixel whose place each pixel gets, in order; in Python's whole numbers."""
    pixels = list(itertools.product(*map(range, size)))
    count = len(pixels)
    drawn = numbers(seed)
    gets = []
    for number in range(count):
        for key, factor, shift in zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True):
            partner = (key - number) % count
            bits = (max(number, partner) * factor + shift) % (2**31 - 1)
            if bits**2 % (2**31 - 1) > 2**30 - 1:
                number = partner
        gets.append(pixels[number])
    return gets


def reference_grid(coords: ccp.Coordinates, size: tuple[int, ...], seed: int) -> Tensor:
    """The convention's own grid, its pixels in the order of the shuffle."""
    ordered = coords.grid(size, dtype=torch.float64)
    columns = [ordered[(slice(None), *pixel)] for pixel in shuffled(size, seed)]
    return torch.stack(columns, dim=1).reshape(ordered.shape)


class Net(nn.Module):
    """A stem with stride, and a padded convolution with another padding mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.body = nn.Conv2d(6, 4, (3, 2), padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).relu())


def patched() -> Any:
    torch.manual_seed(0)
    model = ccp.patch(Net().eval(), "all", coords=ccp.scrambled("mkocabas", seed=3))
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.3)
    return model


def images(*size: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, *size)


def concatenated(model: Any, x: Tensor) -> Tensor:
    """The model's output by convolutions of concatenated, shuffled coordinates."""
    return concatenated_layer(model.body, concatenated_layer(model.stem, x).relu())


def concatenated_layer(layer: Any, x: Tensor) -> Tensor:
    return conv_reference.concatenating_conv(
        x,
        reference_grid(ccp.Coordinates.preset("mkocabas"), tuple(x.shape[2:]), 3),
        layer.weight.double(),
        layer.coord_weight.double(),
        layer.bias.double(),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_the_values_are_the_conventions_in_the_order_of_the_shuffle(
    size: tuple[int, ...], seed: int
) -> None:
    coords = ccp.Coordinates(radius=True, order="yx", align_corners=False)
    scrambled = ccp.scrambled(coords, seed).grid(size, dtype=torch.float64)
    assert torch.equal(scrambled, reference_grid(coords, size, seed))


def test_the_order_is_the_same_for_ever() -> None:
    """Weights are trained for it: another one is another convention."""
    pixels = ccp.Coordinates(channels=(ccp.Axes(centring="pixels"),))
    x, y = ccp.scrambled(pixels).grid((3, 4)).long()
    assert (4 * y + x).flatten().tolist() == [0, 5, 11, 7, 4, 9, 3, 6, 1, 10, 2, 8]


@pytest.mark.parametrize("size", [(16, 16), (64, 48)])
def test_no_pixel_is_lost_and_nothing_tells_left_or_near(size: tuple[int, int]) -> None:
    ordered = ccp.Coordinates().grid(size)
    draws = [ccp.scrambled(seed=seed).grid(size) for seed in range(8)]
    places = sorted(map(tuple, ordered.flatten(1).T.tolist()))
    for grid in draws:
        assert sorted(map(tuple, grid.flatten(1).T.tolist())) == places
        # Of independent values: 1 / sqrt(n), so 5 of these.
        limit = 5 / ordered[0].numel() ** 0.5
        for mixed, true in itertools.product(grid, ordered):
            assert abs(correlation(mixed, true)) < limit
        for mixed in grid:
            assert abs(correlation(mixed[:, 1:], mixed[:, :-1])) < limit
            assert abs(correlation(mixed[1:], mixed[:-1])) < limit
    assert len({tuple(grid[0].flatten().tolist()) for grid in draws}) == len(draws)


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


def test_patched_at_zero_nothing_changes() -> None:
    torch.manual_seed(0)
    plain, x = Net().eval(), images(9, 14)
    assert torch.equal(ccp.patch(plain, "all", coords=ccp.scrambled())(x), plain(x))


def test_outputs_are_those_of_concatenated_coordinates() -> None:
    model, x = patched(), images(9, 14)
    torch.testing.assert_close(
        model(x).double(), concatenated(model, x.double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("lowering", ["auto", "channels", "map", "branch"])
def test_files_have_it_in_every_form(lowering: str, tmp_path: Path) -> None:
    model, x = patched(), images(9, 14)
    report = ccp.export_onnx(model, tmp_path / "m.onnx", x, lowering=lowering, providers=CPU)
    assert run(report.path, x) == pytest.approx(concatenated(model, x.double()).detach(), abs=1e-4)


def test_a_form_for_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ccp.ExportError, match=r"scrambled=3\) do not each depend on one axis"):
        ccp.export_onnx(patched(), tmp_path / "m.onnx", images(9, 14), lowering="separable")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_files_of_dynamic_sizes_shuffle_at_run_time(exporter: Any, tmp_path: Path) -> None:
    layer = patched().stem
    call = (layer, tmp_path / "m.onnx", images(9, 14))
    options = {"dynamic_size": True, "exporter": exporter, "providers": CPU}
    if BEFORE_2_9 and exporter == "dynamo":  # it has no sizes as floating point numbers
        with pytest.raises(ccp.ExportError, match=r"sym_float"):
            ccp.export_onnx(*call, **options)
        return
    report = ccp.export_onnx(*call, **options)
    for x in (images(12, 7), images(5, 20)):
        expected = concatenated_layer(layer, x.double()).detach()
        assert run(report.path, x) == pytest.approx(expected, abs=1e-4)


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=CPU)
    (values,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(values)


def test_exported_programs_and_files_tell_it(tmp_path: Path) -> None:
    model, x = patched(), images(9, 14)
    program = torch.export.export(model, (x,))
    again = ccp.from_exported(program)
    assert {layer.coords for layer in again.modules() if hasattr(layer, "coords")} == {
        ccp.scrambled("mkocabas", seed=3)
    }
    torch.testing.assert_close(again(x), model(x))
    ccp.save_coords(model, tmp_path / "coords.safetensors")
    torch.manual_seed(0)
    loaded = ccp.load_coords(Net().eval(), tmp_path / "coords.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert loaded.stem.coords == ccp.scrambled("mkocabas", seed=3)


@pytest.mark.parametrize("other", [ccp.Coordinates.preset("mkocabas"), ccp.scrambled("mkocabas")])
def test_weights_of_another_order_are_refused(other: ccp.Coordinates) -> None:
    model = ccp.patch(Net(), "all", coords=other)
    with pytest.raises(RuntimeError, match=r"trained with coordinates \(y, x\).* scrambled=3"):
        model.load_state_dict(patched().state_dict())


def test_crops_and_windows_have_the_values_of_the_whole_picture() -> None:
    """Also where each sample of a batch is cut from elsewhere."""
    coords = ccp.scrambled(seed=5)
    whole = coords.grid((12, 10))
    window = ccp.Window(offset=(3, 2), size=(6, 5), image_size=(12, 10))
    cut = whole[:, 3:9, 2:7]
    assert torch.equal(dataclasses.replace(coords, window=window).grid((6, 5)), cut)

    layer = ccp.patch(nn.Conv2d(1, 2, 1, bias=False), coords=coords)
    with torch.no_grad():
        layer.coord_weight.copy_(torch.eye(2)[:, :, None, None])
    black = torch.zeros(2, 1, 6, 5)
    other = ccp.Window(offset=(0, 5), size=(6, 5), image_size=(12, 10))
    with ccp.places(layer, [window, other]), torch.no_grad():
        seen = layer(black)
    torch.testing.assert_close(seen, torch.stack([cut, whole[:, :6, 5:]]))


def test_blocks_are_scrambled_too_and_a_plan_says_so() -> None:
    coords = ccp.scrambled(ccp.Coordinates(channels=(ccp.Axes("y"), ccp.Radius())), seed=1)
    assert coords.channel_names(2) == ("y", "r")
    assert str(coords) == "(Axes(axes='y'), Radius()) scrambled=1"
    assert "scrambled=1" in str(ccp.plan(Net(), coords=coords))
    assert ccp.scrambled(coords, 2) == dataclasses.replace(coords, scrambled=2)


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, True, "0"])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(ccp.CoordinatesError, match="write the seed of a permutation"):
        ccp.scrambled(seed=seed)


def test_maps_that_come_with_the_call_have_no_places() -> None:
    coords = ccp.Coordinates(channels=(ccp.Axes(), ccp.Given("depth")))
    with pytest.raises(ccp.CoordinatesError, match=r"Given\('depth'\).*permute the maps"):
        ccp.scrambled(coords)
