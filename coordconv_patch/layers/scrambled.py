"""The control for coordinates: channels that tell pixels apart, but not where they are."""

from __future__ import annotations

import dataclasses

from coordconv_patch.errors import CoordinatesError
from coordconv_patch.layers.coordinates import Coordinates

__all__ = ["scrambled"]


def scrambled(coords: Coordinates | str | None = None, seed: int = 0) -> Coordinates:
    """A convention with its places permuted: the control for what coordinates bring.

    A model that is patched with it has every parameter of one that is patched with ``coords``, and
    pixels that can be told apart, but neither left nor right nor near. What it gains is owed to
    telling places apart, or to more parameters; only what it does not gain is owed to coordinates.

    At every size the values are those of ``coords``, in an order that depends on the size and on
    ``seed`` alone: the same in every process, on every device, and in exported files. As any other
    convention, it is saved with the weights and compared when they are loaded.

    Args:
        coords: The convention, or the name of a preset; ``None``: the paper's.
        seed: Which permutation, 0 to 2^31 - 1.

    Raises:
        CoordinatesError: If the seed is not such a number, there is no such convention, or it has
            maps that come with the call (``Given``): permute those yourself.

    Example:
        >>> import coordconv_patch as ccp
        >>> coords = ccp.scrambled()
        >>> coords.grid((2, 2))[0].flatten().sort().values.tolist()
        [-1.0, -1.0, 1.0, 1.0]
        >>> model = ccp.patch(model, coords=coords)          # doctest: +SKIP
    """
    if seed is None:  # which says of a Coordinates that its places are not permuted
        raise CoordinatesError("seed=None: write the seed of a permutation, such as seed=0")
    return dataclasses.replace(Coordinates.of(coords), scrambled=seed)
