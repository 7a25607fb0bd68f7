"""The pictures' colours: a variant has the same one in all of them."""

from __future__ import annotations

# Okabe and Ito's colours, which people with any colour vision can tell apart.
VERMILION, BLUE, GREEN, PURPLE, ORANGE = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"
VIOLET = "#6A3D9A"  # Not theirs, but far from all of these.
MUTED, INK = "#6B7280", "#1F2933"
GRID = "#E5E7EB"

BY_VARIANT = {"plain": VERMILION, "patched": BLUE, "scrambled": PURPLE}
