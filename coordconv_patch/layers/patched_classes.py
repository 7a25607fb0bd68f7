"""The classes that patching gives to convolutions, made at run time, one for each plain class.

They are not attributes of a module, so a pickle cannot name them: it names the plain class.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.layers.coordconv import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvNd,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
)

__all__ = ["patched_class"]

_COORD_CLASSES: dict[type[_ConvNd], type[CoordConvNd]] = {
    nn.Conv1d: CoordConv1d,
    nn.Conv2d: CoordConv2d,
    nn.Conv3d: CoordConv3d,
    nn.ConvTranspose1d: CoordConvTranspose1d,
    nn.ConvTranspose2d: CoordConvTranspose2d,
    nn.ConvTranspose3d: CoordConvTranspose3d,
}

_PATCHED_CLASSES: dict[type[_ConvNd], type[CoordConvNd]] = {}


def patched_class(plain: type[_ConvNd]) -> type[CoordConvNd]:
    """The class of a patched convolution, by the class that it had; the same one every time.

    A subclass of :class:`CoordConv2d` or one of the others. Called with arguments it makes a
    plain convolution: ``type(conv)(8, 8, 3)``, which PEFT writes to make its adapters, asks
    for another convolution like the one that it was written for.
    """
    if plain not in _PATCHED_CLASSES:
        base = _COORD_CLASSES.get(plain)
        patched = type(
            f"Coord{plain.__name__}",
            (CoordConvNd, plain) if base is None else (base,),
            {
                "_plain_class": plain,
                "_output_is_fresh": base is not None,
                "__module__": CoordConvNd.__module__,
                "__new__": _plain_layer_or_empty,
                "__reduce_ex__": _rebuilt_from_plain_class,
                "__doc__": f"{plain.__name__} with a coordinate branch, made by patching.",
            },
        )
        _PATCHED_CLASSES.setdefault(plain, patched)  # another thread may have been faster
    return _PATCHED_CLASSES[plain]


def _plain_layer_or_empty(cls: type[CoordConvNd], *args: Any, **kwargs: Any) -> _ConvNd:
    if args or kwargs:
        return cls._plain_class(*args, **kwargs)
    return object.__new__(cls)  # for copying and unpickling


def _new_layer(plain: type[_ConvNd]) -> CoordConvNd:
    """An empty layer of the class that patching gives to ``plain``, for unpickling."""
    patched = patched_class(plain)
    return patched.__new__(patched)


def _rebuilt_from_plain_class(layer: CoordConvNd, protocol: Any) -> Any:
    """How a layer of such a class is copied and pickled; a subclass of one is as it always is."""
    if type(layer) is _PATCHED_CLASSES.get(layer._plain_class):
        return _new_layer, (layer._plain_class,), layer.__dict__
    return super(CoordConvNd, layer).__reduce_ex__(protocol)
