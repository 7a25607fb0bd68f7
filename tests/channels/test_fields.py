"""What blocks and lists of them may be, and what a file may hold in their place."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_blocks import BLOCKS
from torch import Tensor

import coordconv_patch as ccp
from coordconv_patch import (
    ArgumentError,
    Axes,
    AxisPixels,
    ChannelBlock,
    Coordinates,
    CoordinatesError,
    Fourier,
    Radius,
    Window,
)
from coordconv_patch.channels.registry import BLOCKS as REGISTERED


@pytest.fixture(autouse=True)
def _registry_restored() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


@dataclass(frozen=True)
class Power(ChannelBlock):
    """A block of somebody else's: a power of the fraction i / n along x."""

    kind = "power"

    exponent: float = 2.0
    scales: tuple[float, ...] = (1.0,)

    def names(self, ndim: int) -> tuple[str, ...]:
        return tuple(f"{scale}x^{self.exponent}" for scale in self.scales)

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        index, length = positions[-1]
        return [scale * (index / length) ** self.exponent for scale in self.scales]

    def dims(self, ndim: int) -> list[int | None]:
        return [ndim - 1] * len(self.scales)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_conventions_of_blocks_come_back_equal(block: ChannelBlock) -> None:
    coords = Coordinates(
        channels=(block, Fourier("x", octaves=5)),
        window=Window(offset=(1, 1), size=(2, 2), image_size=(4, 4)),
    )
    for again in (
        Coordinates.from_dict(json.loads(json.dumps(coords.to_dict()))),
        pickle.loads(pickle.dumps(coords)),
        copy.deepcopy(coords),
    ):
        assert again == coords
        assert hash(again) == hash(coords)
        assert torch.equal(again.grid((3, 5)), coords.grid((3, 5)))
    assert coords != Coordinates(channels=(block,), window=coords.window)


def test_usual_conventions_are_saved_as_before() -> None:
    assert Coordinates().to_dict() == {}
    assert Coordinates(order="yx", fourier=1).to_dict() == {"order": "yx", "fourier": 1}
    state = Coordinates(order="yx", fourier=1).__getstate__()
    del state["channels"]  # as it was pickled before there were blocks
    again: Any = object.__new__(Coordinates)
    again.__setstate__(state)
    assert again == Coordinates(order="yx", fourier=1)
    assert torch.equal(again.grid((3, 4)), Coordinates(order="yx", fourier=1).grid((3, 4)))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Axes("xx"), r"axes='xx': write letters of 'xyz'"),
    (lambda: Axes(""), "write letters"),
    (lambda: Axes(("x", "y")), "write letters"),  # type: ignore[arg-type]
    (lambda: Axes("w"), "write letters"),
    (lambda: Axes(centring="corners"), r"centring='corners': write one of 'endpoints'"),
    (lambda: Axes(centring=True), "write one of"),  # type: ignore[arg-type]
    (lambda: Axes(value_range=(1.0, 1.0)), "write two different finite numbers"),
    (lambda: Axes(value_range=(0.0, float("nan"))), "write two different finite numbers"),
    (lambda: Axes(value_range=(0.0, 1.0, 2.0)), "two different"),  # type: ignore[arg-type]
    (lambda: Axes(value_range=(0, 1), centring="pixels"), "leave value_range out"),
    (lambda: Radius(centring="pixels"), "write one of"),
    (lambda: Radius(normalized=1), r"normalized=1: write True or False"),  # type: ignore[arg-type]
    (lambda: Radius(center=(0.0,), axes="xy"), r"center=\(0.0,\): write the finite coordinate"),
    (lambda: Radius(center=float("inf")), "write the finite coordinate"),
    (lambda: Radius(center="x"), "write the finite coordinate"),  # type: ignore[arg-type]
    (lambda: Radius(center=()), "write the finite coordinate"),
    (lambda: Fourier(octaves=0), r"octaves=0: write a number of octaves, 1 or more"),
    (lambda: Fourier(octaves=True), "write a number of octaves"),
    (lambda: Fourier(octaves=33), "at most 32"),
    (lambda: Fourier(period=0.0), r"period=0.0: write the longest period"),
    (lambda: Fourier(period=-1.0), "write the longest period"),
    (lambda: Fourier(centring="pixels"), "write one of"),
    (lambda: Coordinates(channels=Axes()), "write a tuple of"),  # type: ignore[arg-type]
    (lambda: Coordinates(channels=("x",)), "'x' is not a channel block"),  # type: ignore[arg-type]
    (lambda: Coordinates(channels=(Axes,)), "is not a channel block"),  # type: ignore[arg-type]
    (lambda: Coordinates(channels=(Axes(), Axes())), r"Axes\(\) is there twice"),
    (lambda: Coordinates(channels=(Axes(),), order="yx"), "channels and order are given"),
    (lambda: Coordinates(channels=(Axes(),), radius=True), "channels and radius are given"),
    (
        lambda: Coordinates(
            channels=(Axes(centring="swapped endpoints"),),
            window=Window(offset=(0, 0), size=(1, 1), image_size=(2, 2)),
        ),
        "leave the window out",
    ),
    (lambda: Coordinates(channels=(Power(),)), r"call register_channel_block\(Power\) first"),
    (lambda: Coordinates(channels=(Axes("y"),)).grid((4,)), "inputs of 1 spatial dimensions"),
    (lambda: Coordinates(channels=(Radius(center=(0.0, 1.0)),)).grid((4,)), "has 2 numbers"),
    (lambda: Coordinates(channels=(Axes(),)).grid((1, 2, 3, 4)), "know 1, 2 or 3"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_impossible_values_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CoordinatesError, match=message):
        make()


FILES: list[tuple[Any, str]] = [
    ({"kind": "axes"}, "must be a list of at most 32 blocks"),
    ([{"kind": "axes"}] * 33, "must be a list of at most 32 blocks"),
    ([{"kind": "axes"}] * 2, "is there twice"),
    (["axes"], "an object that names its 'kind'"),
    ([{}], "an object that names its 'kind'"),
    ([{"kind": 1}], "an object that names its 'kind'"),
    ([{"kind": "solar"}], "no kind of channel block 'solar' is known here.*import what defines it"),
    ([{"kind": "axes", "color": 1}], r"unknown fields \['color'\]: a newer version"),
    ([{"kind": "axes", "is_affine": True}], "unknown fields"),
    ([{"kind": "axes", "axes": 1}], "write letters"),
    ([{"kind": "axes", "value_range": [0, True]}], "two different finite numbers"),
    ([{"kind": "axes", "value_range": [[[[[0]]]]]}], "files hold"),
    ([{"kind": "axes", "value_range": {"a": 1}}], "files hold"),
    ([{"kind": "axes", "value_range": [0] * 1001}], "files hold"),
    ([{"kind": "axes", "axes": "x" * 1001}], "files hold"),
    ([{"kind": "axes", "axes": "\ud800"}], "files hold"),
    ([{"kind": "fourier", "octaves": 10**400}], "files hold"),
    ([{"kind": "fourier", "octaves": 1.0}], "write a number of octaves"),
    ([{"kind": "fourier", "period": float("nan")}], "files hold"),
    ([{"kind": "radius", "normalized": 1}], "write True or False"),
]


@pytest.mark.parametrize(("channels", "message"), FILES)
def test_what_a_file_may_not_hold(channels: Any, message: str) -> None:
    with pytest.raises(CoordinatesError, match=message):
        Coordinates.from_dict({"channels": channels})


def test_a_registered_block_is_one_like_the_others() -> None:
    ccp.register_channel_block(Power)
    coords = Coordinates(channels=(Axes("y"), Power(3.0, scales=(1.0, -2.0))))
    assert Coordinates.from_dict(json.loads(json.dumps(coords.to_dict()))) == coords
    expected = torch.tensor([0.0, 0.5**3])
    assert torch.equal(coords.grid((1, 2))[1:, 0], torch.stack([expected, -2 * expected]))
    assert coords.channel_names(2) == ("y", "1.0x^3.0", "-2.0x^3.0")
    ccp.register_channel_block(Power)  # a module that is loaded once more


def test_classes_that_cannot_be_blocks() -> None:
    class Bare(Power):
        kind = "bare"

    @dataclass(frozen=True)
    class Taken(Power):
        kind = "axes"

    @dataclass(frozen=True)
    class Spaced(Power):
        kind = "two words"

    @dataclass(frozen=True)
    class Valueless(ChannelBlock):
        kind = "valueless"

        def names(self, ndim: int) -> tuple[str, ...]:
            return ()

    for block, message in (
        (Bare, "write @dataclass"),
        (Taken, "the package's own"),
        (Spaced, "write a word"),
        (Valueless, "has no method values"),
        (Power(), "pass a subclass of ChannelBlock itself"),
        (int, "pass a subclass"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ccp.register_channel_block(block)  # type: ignore[arg-type]


def test_blocks_of_others_that_would_not_come_back() -> None:
    ccp.register_channel_block(Power)
    for block, message in (
        (Power(torch.ones(1)), "files hold finite numbers"),  # type: ignore[arg-type]
        (Power(float("inf")), "files hold finite numbers"),
        (Power(scales=(torch.ones(2),)), "files hold finite numbers"),  # type: ignore[arg-type]
        (Power(scales=[1.0]), "does not come back equal"),  # type: ignore[arg-type]
    ):
        with pytest.raises(CoordinatesError, match=message):
            Coordinates(channels=(block,))


def test_a_block_that_gives_another_number_of_channels_than_it_names() -> None:
    @dataclass(frozen=True)
    class Miscounted(Power):
        kind = "miscounted"

        def names(self, ndim: int) -> tuple[str, ...]:
            return ("a", "b")

    ccp.register_channel_block(Miscounted)
    with pytest.raises(CoordinatesError, match="gives 1 channels, but names 2: a, b"):
        Coordinates(channels=(Miscounted(),)).grid((2, 2))


def test_fields_of_another_kind() -> None:
    assert Fourier.from_dict({"kind": "fourier", "octaves": 2}) == Fourier(octaves=2)
    with pytest.raises(CoordinatesError, match="has another kind"):
        Fourier.from_dict({"kind": "axes"})
