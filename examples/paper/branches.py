"""What the fine-tuning experiment compares: its settings, and the branches of each."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET = "EfficientNet-Lite0"
NARROW, WIDE = "narrow view, unpadded", "wide view, unpadded"
NEW_PLACES = "narrow view, unpadded, new places"
NARROW_PADDED, WIDE_PADDED = "narrow view, zero-padded", "wide view, zero-padded"


@dataclass(frozen=True)
class Net:
    """A digit localiser, and what it is tested on.

    Attributes:
        padded: Whether its convolutions pad with zeros.
        strides: Of its convolutions.
        new_places: Whether it is tested where training never shows a digit.
    """

    padded: bool
    strides: tuple[int, ...]
    new_places: bool = False


NETS = {
    NARROW: Net(padded=False, strides=(2, 2, 1)),
    NARROW_PADDED: Net(padded=True, strides=(2, 2, 1)),
    WIDE: Net(padded=False, strides=(2, 2, 2, 2)),
    WIDE_PADDED: Net(padded=True, strides=(2, 2, 2, 2)),
    NEW_PLACES: Net(padded=False, strides=(2, 2, 1), new_places=True),
}

PRETRAINING = "pretraining"
KEPT_ON, FIRST, ALL, SCRAMBLED, ALL_SCRAMBLED, SCRATCH = (
    "plain, kept on",
    "patched: first",
    "patched: all",
    "patched: first, scrambled",
    "patched: all, scrambled",
    "patched: first, from scratch",
)
