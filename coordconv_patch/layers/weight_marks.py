"""What a convolution's weight was when it was last known to fit its coordinate weight.

Code that folds a batch norm into a convolution multiplies each output channel of the weight
by a factor of its own. Written through ``.data``, that moves no version counter and calls
nothing of this package. A *mark* is a small sample of the weight and of the coordinate weight,
taken while they belonged together; comparing it with the weights of today tells whether output
channels were scaled, and the coordinates were not.

Training moves the weights of a channel each by its own amount, so it never looks like that.
Three things do without being a folding: a scale by next to nothing (weight decay, one step of it),
filters that were set to zero (pruning), and filters that were brought to one norm (max-norm
constraints).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coordconv_patch.running.version_counters import version_of

__all__ = ["Scaling", "WeightMark", "glance_at", "is_plain", "is_same", "rows_of", "sample_of"]

_MAX_ROWS = 32
"""Output channels in a sample; a folding scales all of them."""
_POSITIONS = 8
"""Weights sampled of each output channel, half of them in the kernel's centre."""
_LEAST = 1e-2
"""Factors this near to 1 are taken for a step of weight decay, or for no scale at all."""
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3}


class Scaling(NamedTuple):
    """A scale of output channels.

    Attributes:
        least: The smallest factor.
        largest: The largest factor.
        is_followed: Whether the coordinate weight has the same factors, or is zero.
    """

    least: float
    largest: float
    is_followed: bool


@dataclass(frozen=True)
class WeightMark:
    """A sample of a weight and of its coordinate weight.

    Attributes:
        weight: Shape ``(rows, positions)``: some weights of some output channels.
        coords: The same of the coordinate weight.
        version: The weight's version counter, which ``.data`` does not move.
        coord_version: The coordinate weight's.
        has_bias: Whether the convolution had a bias.
        is_outdated: Whether a training has ended since.
    """

    weight: Tensor
    coords: Tensor
    version: int
    coord_version: int
    has_bias: bool
    is_outdated: bool = False

    @classmethod
    def of(
        cls, weight: Tensor, coord_weight: Tensor, *, transposed: bool, groups: int, has_bias: bool
    ) -> WeightMark:
        """The mark of a weight and coordinate weight as they are now, on their device.

        Nothing waits for the device.

        Args:
            weight: Shape ``(C_out, C_in / groups, *kernel_size)``, or ``(C_in, C_out / groups,
                *kernel_size)`` of a transposed convolution.
            coord_weight: As of :class:`coordconv_patch.CoordConv2d`.
            transposed: Whether the convolution is a transposed one.
            groups: Its groups.
            has_bias: Whether it has a bias.
        """
        with torch.no_grad(), torch.inference_mode(False):
            return cls(
                sample_of(rows_of(weight, transposed=transposed, groups=groups)),
                sample_of(rows_of(coord_weight, transposed=transposed, groups=1)),
                version_of(weight),
                version_of(coord_weight),
                has_bias,
            )

    def after_training(self, now: WeightMark) -> WeightMark:
        """The mark at the end of a training: renewed as far as autograd was told of the changes.

        Of a weight that was written through ``.data`` this one is still needed, and where a bias
        is new: with the training not over yet, a batch norm may have been folded in.

        Args:
            now: The mark of the same layer's weights of today.
        """
        if self.shows_new_bias(now):
            return replace(self, is_outdated=True)
        if self.version != now.version:
            return now
        if self.coord_version == now.coord_version:
            return self
        if self.weight.is_cpu and not self.has_same_weight(now):
            return self
        return replace(self, coords=now.coords, coord_version=now.coord_version)

    def shows_new_bias(self, now: WeightMark) -> bool:
        """Whether the convolution has got a bias since."""
        return now.has_bias and not self.has_bias

    def has_same_weight(self, now: WeightMark) -> bool:
        """Whether the weight is what it was, as far as the samples tell."""
        return is_same(self.weight, now.weight)

    def has_same_coords(self, now: WeightMark) -> bool:
        """Whether the coordinate weight is what it was, as far as the samples tell."""
        return is_same(self.coords, now.coords)

    def shows_trained_coords(self, now: WeightMark) -> bool:
        """Whether the coordinate weight has changed, and autograd was told."""
        return self.coord_version != now.coord_version and not self.has_same_coords(now)

    def scaling_until(self, now: WeightMark, rows: Tensor) -> Scaling | None:
        """How output channels were scaled since.

        Args:
            now: The mark of the same layer's weights of today.
            rows: Its weight of today by output channel, see :func:`rows_of`.

        Returns:
            ``None`` if the weights are the same, or changed otherwise.
        """
        if self.weight.shape != now.weight.shape:
            return None
        before, after = _values(self.weight), _values(now.weight)
        tolerance = max(_tolerance(self.weight.dtype), _tolerance(now.weight.dtype))
        scaled, factors = _ratios(before, after, tolerance)
        changed = (factors - 1).abs() > max(_LEAST, 10 * tolerance)
        alive = (before.count_nonzero(dim=1) > 1) & (after.count_nonzero(dim=1) > 1)
        if not alive.any() or (scaled & alive).sum() < 0.9 * alive.sum():
            return None
        at = scaled & alive & changed
        if not at.any():
            return None
        if _is_norm_constraint(_values(_some(rows).flatten(1).norm(dim=1)), at):
            return None
        return Scaling(
            least=float(factors[at].min()),
            largest=float(factors[at].max()),
            is_followed=self._coords_follow(now, factors, at, tolerance),
        )

    def _coords_follow(
        self, now: WeightMark, factors: Tensor, at: Tensor, tolerance: float
    ) -> bool:
        """Whether the coordinate weight was scaled by the same factors, or is zero."""
        if self.coords.shape != now.coords.shape:
            return False
        before, after = _values(self.coords)[at], _values(now.coords)[at]
        expected = before * factors[at].unsqueeze(1)
        size = max(float(expected.abs().max()), float(after.abs().max()))
        return float((after - expected).abs().max()) <= 10 * tolerance * size


def is_plain(weight: Tensor | None) -> bool:
    """Whether a weight is a whole Parameter with values.

    Not a shard or a flattened one, which wrappers leave in its place, not a fake tensor, and
    nothing computed.
    """
    if type(weight) is not nn.Parameter:
        return False
    if weight.is_meta or weight.dim() < 3 or weight.numel() == 0:
        return False
    return weight.data_ptr() != 0  # else a wrapper has freed its memory


def rows_of(weight: Tensor, *, transposed: bool, groups: int) -> Tensor:
    """A convolution's weight by output channel, shape ``(C_out, C_in / groups, *kernel_size)``."""
    weight = weight.detach()
    if not transposed:
        return weight
    if groups == 1:
        return weight.transpose(0, 1)
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return grouped.transpose(1, 2).flatten(0, 1)


def glance_at(weight: Tensor) -> Tensor:
    """A view of a few weights, at most 4 that stand together in memory; shape ``(n,)``.

    Of the first output channel that is not zero: a folding scales every channel, so one tells,
    and what stands together is compared in a sixth of the time.
    """
    weight = weight.detach()
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    flat = weight.permute(order).flatten()  # as it stands in memory
    if flat.data_ptr() != weight.data_ptr():
        return weight[(0,) * (weight.dim() - 1)][:4]  # it has gaps
    start = 0 if flat[:1].any() else int((flat[: 2**16] != 0).to(torch.uint8).argmax())
    return flat[start : start + 4]


def sample_of(rows: Tensor) -> Tensor:
    """Some weights of some output channels, copied on their device, of shape ``(n, positions)``.

    Args:
        rows: A weight by output channel, see :func:`rows_of`.
    """
    return _positions(_some(rows))


def is_same(before: Tensor, now: Tensor) -> bool:
    """Whether two samples are equal, in the dtype and on the device of the later one."""
    return before.shape == now.shape and torch.equal(before.to(now), now)


def _some(rows: Tensor) -> Tensor:
    return rows.detach()[:: -(-rows.shape[0] // _MAX_ROWS)]


def _positions(rows: Tensor) -> Tensor:
    places: list[slice | Tensor] = [slice(None), *_places(tuple(rows.shape[1:]))]
    return rows[tuple(places)]


@functools.lru_cache(maxsize=256)
def _places(lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices of the sampled weights of a channel, one tensor for each dimension.

    On the CPU: another device copies so few without being waited for.
    """
    inputs, kernel = lengths[0], lengths[1:]
    spread = _spread(inputs * math.prod(kernel), _POSITIONS // 2)
    places = torch.stack(torch.unravel_index(spread, lengths)).T.tolist()
    centre = [length // 2 for length in kernel]
    places += [[index, *centre] for index in _spread(inputs, _POSITIONS // 2).tolist()]
    distinct = sorted(set(map(tuple, places)))
    with torch.inference_mode(False):
        return tuple(torch.tensor(index) for index in zip(*distinct, strict=True))


def _spread(count: int, most: int) -> Tensor:
    """Numbers below ``count``, evenly spaced, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def _values(sample: Tensor) -> Tensor:
    return sample.to("cpu", torch.float64)


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCES.get(dtype, 2e-2)


def _ratios(before: Tensor, after: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which rows are multiples of what they were, and the factor of each."""
    factors = (before * after).sum(1) / before.square().sum(1).clamp_min(1e-300)
    residual = (after - before * factors.unsqueeze(1)).abs().amax(1)
    return residual <= tolerance * after.abs().amax(1), factors


def _is_norm_constraint(norms: Tensor, at: Tensor) -> bool:
    """Whether the scaled rows have one norm now, and no other row a larger one."""
    scaled = norms[at]
    if len(scaled) < 3 and len(norms) > 1:
        return False
    largest = float(norms.max())
    return bool((scaled > largest * (1 - 1e-3)).all())
