"""What the fine-tuning experiment compares: its settings, and the branches of each."""

from __future__ import annotations

IMAGENET = "EfficientNet-Lite0"
NARROW, WIDE = "narrow view, unpadded", "wide view, unpadded"
NARROW_PADDED, WIDE_PADDED = "narrow view, zero-padded", "wide view, zero-padded"
NETS = {
    NARROW: (False, (2, 2, 1)),
    NARROW_PADDED: (True, (2, 2, 1)),
    WIDE: (False, (2, 2, 2, 2)),
    WIDE_PADDED: (True, (2, 2, 2, 2)),
}
"""Whether the digit localiser of a setting is padded, and the strides of its convolutions."""

PRETRAINING = "pretraining"
KEPT_ON, FIRST, ALL, SCRAMBLED, SCRATCH = (
    "plain, kept on",
    "patched: first",
    "patched: all",
    "patched: first, scrambled",
    "patched: first, from scratch",
)
