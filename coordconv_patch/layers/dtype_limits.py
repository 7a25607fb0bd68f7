"""Whether coordinates fit the dtype that they are convolved in.

float16 ends at 65,504. A coordinate above it, such as the index of a pixel of a long signal, is
infinite there, and a coordinate weight of zero then adds 0 * inf, which is not a number: patching
would change outputs. Every other float dtype that convolutions know holds all coordinates that a
convention may have.

Where a layer's input is the whole picture, or a window of it, convention and size tell the largest
coordinate; it is computed once for each and remembered. Places and maps come as tensors: on the
CPU they are looked at, and on other devices, where to look is to wait for the device, what
is beyond the dtype's largest number becomes that number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.errors import CoordinatesError
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.pixel_positions import pixel_positions
from coordconv_patch.layers.window import Window
from coordconv_patch.running.torch_versions import is_exporting

__all__ = ["Convention", "check_fits", "convolved_dtype", "fitted", "is_checked", "limited"]


class Convention(Protocol):
    """What is asked of a :class:`coordconv_patch.Coordinates`, whose module asks here itself."""

    @property
    def window(self) -> Window | None: ...

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]: ...

    def __hash__(self) -> int: ...


def convolved_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that coordinates are convolved in with a weight, which autocast may change."""
    device = weight.device.type
    # Autocast leaves float64 alone, and does not know the meta device.
    if weight.dtype is torch.float64 or weight.is_meta or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def is_checked(dtype: torch.dtype) -> bool:
    """Whether coordinates may not fit a dtype, and somebody looks: not under TorchDynamo."""
    return _is_narrow(dtype) and not torch.compiler.is_dynamo_compiling()


def check_fits(coords: Convention, size: Sequence[object], dtype: torch.dtype, site: str) -> None:
    """Check that the coordinates of an input fit a dtype.

    Not where the sizes are symbolic, nor where TorchDynamo looks on, see :func:`limited`.

    Args:
        coords: The convention.
        size: Spatial size of the input, in pixels.
        dtype: The dtype that the coordinates are convolved in.
        site: What gets the input, for the message.

    Raises:
        CoordinatesError: If one of them is beyond the dtype's largest number.
    """
    if not is_checked(dtype):
        return
    if any(type(length) is not int or length < 0 for length in size):
        return
    largest = _largest(coords, tuple(size))
    if not _fits(largest, dtype):
        lengths = " x ".join(map(str, size))
        raise _too_large(f"{site} gets an input of {lengths} pixels", largest, dtype)


def limited(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Coordinates for code that torch.compile makes, none beyond the dtype's largest number."""
    is_compiled = torch.compiler.is_dynamo_compiling() and not is_exporting()
    return _within_limits(values, dtype) if is_compiled and _is_narrow(dtype) else values


def fitted(channels: Sequence[Tensor], dtype: torch.dtype, site: str) -> list[Tensor]:
    """Channels made of places and of maps, such that they fit a dtype.

    Args:
        channels: Their values.
        dtype: The dtype that they are convolved in.
        site: What gets them, for the message.

    Returns:
        The same; where nobody can look, limited to the dtype's numbers.

    Raises:
        CoordinatesError: If one of them is beyond the dtype's largest number.
    """
    if not _is_narrow(dtype):
        return list(channels)
    if is_capturing() or is_transforming():
        return [limited(channel, dtype) for channel in channels]
    if any(not channel.is_cpu for channel in channels):
        return [_within_limits(channel, dtype) for channel in channels]
    largest = max(_largest_of(channel) for channel in channels)
    if not _fits(largest, dtype):
        raise _too_large(f"{site} gets samples with places or maps", largest, dtype)
    return list(channels)


def _within_limits(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit)


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype has no room for every coordinate that a convention may have."""
    return dtype.is_floating_point and torch.finfo(dtype).max < 1e18


def _fits(largest: float, dtype: torch.dtype) -> bool:
    limits = torch.finfo(dtype)
    # Up to half a step above the dtype's largest number, a number is rounded to that.
    return largest < limits.max * (1 + limits.eps / 4)


@functools.lru_cache(maxsize=4096)
def _largest(coords: Convention, size: tuple[int, ...]) -> float:
    """The largest absolute coordinate of an input."""
    # In a thread of its own, where none of torch's modes hold that this one may be in: they make
    # tensors fake, record what is computed, or forbid to look at it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_compute_largest, coords, size).result()


def _compute_largest(coords: Convention, size: tuple[int, ...]) -> float:
    positions = pixel_positions(size, coords.window, torch.device("cpu"), torch.float64)
    return max(map(_largest_of, coords.values(positions)), default=0.0)


def _largest_of(values: Tensor) -> float:
    return values.detach().abs().max().item() if values.numel() else 0.0


def _too_large(what: str, largest: float, dtype: torch.dtype) -> CoordinatesError:
    return CoordinatesError(
        f"{what}, whose largest coordinate is {largest:.9g}; {dtype} ends at "
        f"{torch.finfo(dtype).max:g}. Write coords= with smaller values, such as Coordinates(), "
        "which has -1 to 1 inside of the picture, or run the model in bfloat16 or float32"
    )
