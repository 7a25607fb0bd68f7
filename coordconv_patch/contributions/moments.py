"""Means and variances by channel, summed up over batches."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """The variance of values over positions and samples, the mean over the channels.

    In float64, so that the order and the size of the batches do not matter.
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, values: Tensor, channel_dim: int, weight: float = 1.0) -> None:
        """Take in values.

        Args:
            values: Any shape.
            channel_dim: The dimension of the channels.
            weight: How often each value counts.
        """
        by_channel = values.detach().cpu().double().movedim(channel_dim, 0).flatten(1)
        total, squares = by_channel.sum(1) * weight, by_channel.square().sum(1) * weight
        self._count += by_channel.shape[1] * weight
        self._sum = total if self._sum is None else self._sum + total
        self._squares = squares if self._squares is None else self._squares + squares

    @property
    def variance(self) -> float | None:
        """The variance; ``None`` if no value was taken in."""
        if self._sum is None or self._squares is None or not self._count:
            return None
        mean = self._sum / self._count
        return float((self._squares / self._count - mean.square()).clamp(min=0).mean())
