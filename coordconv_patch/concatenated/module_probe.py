"""Modules that join coordinates and a convolution, tried out without the model around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.concatenated.example_images import other_images
from coordconv_patch.concatenated.recognition import Recognised, Recognition, RunPair, recognise
from coordconv_patch.concatenated.recorded_run import record
from coordconv_patch.concatenated.sightings import convolution_in, may_be_rewritten
from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import join_names
from coordconv_patch.layers.geometry import ndim_of

__all__ = ["recognise_alone"]

_SIZES = ((23, 17, 9), (16, 30, 12))
"""Two sizes, last dimension first, on which every ordinary kernel has an output."""

_MOST_CHANNELS = 5


def recognise_alone(model: nn.Module) -> Recognition:
    """What :func:`~coordconv_patch.concatenated.recognition.recognise` says of modules alone."""
    result = Recognition()
    for name, module in model.named_modules():
        conv = convolution_in(module) if name and may_be_rewritten(module) else None
        if conv is None:
            continue
        inner = next(inner for inner, each in module.named_modules() if each is conv)
        own = recognise_one(module, conv)
        for each in own.convolutions.values():
            if each.places[0].kind == "layer":
                inside = each.places[0].name.partition(".")[2]
                result.convolutions[join_names(name, inner)] = _renamed(each, name, inner, inside)
        result.refused |= {join_names(name, inner): why for why in own.refused.values()}
    return result


def _renamed(each: Recognised, name: str, inner: str, inside: str) -> Recognised:
    place = replace(each.places[0], name=join_names(name, inside))
    return replace(each, conv=join_names(name, inner), places=(place,))


def recognise_one(module: nn.Module, conv: _ConvNd) -> Recognition:
    """What is recognised in a module with one convolution, by running it on random images."""
    # Its own name would be empty, and the model itself cannot be replaced.
    holder = nn.Sequential(module)
    for count in range(1, _MOST_CHANNELS + 1):
        channels = conv.in_channels - count
        if channels < 1:
            break
        with contextlib.suppress(PatchError):
            return recognise(holder, list(_runs(holder, conv, channels)))
    return Recognition()


def _runs(holder: nn.Module, conv: _ConvNd, channels: int) -> Iterator[RunPair]:
    ndim = ndim_of(conv)
    for sizes in _SIZES:
        size = sizes[:ndim][::-1]
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(2, channels, *size, generator=generator)
        image = image.to(conv.weight.device, conv.weight.dtype)
        first = record(holder, image, may_be_rewritten)
        yield first, record(holder, other_images(image), may_be_rewritten)
