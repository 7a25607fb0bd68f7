"""Gains and their intervals against scipy and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from coordconv_patch.ranking.gains import gains_of, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9999])
def test_quantiles_are_scipys(probability: float, freedom: int) -> None:
    expected = scipy.stats.t.ppf(probability, freedom)
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-6)


def test_an_interval_is_the_formulas() -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(0.1, 0.02, (3, 2, 6))
    over_seeds = differences.mean(2).var(1, ddof=1)
    over_batches = differences.mean(1).var(1, ddof=1)
    factor = scipy.stats.t.ppf(1 - 0.025 / 3, 3)
    for index, gain in enumerate(gains_of([torch.from_numpy(each) for each in differences])):
        variance = max(over_seeds[index], over_seeds.mean()) / 2 + over_batches[index] / 6
        half = factor * variance**0.5
        assert gain.value == pytest.approx(differences[index].mean())
        assert gain.low == pytest.approx(gain.value - half)
        assert gain.high == pytest.approx(gain.value + half)


def test_nothing_stands_out_of_noise_in_19_of_20_rankings() -> None:
    """All intervals of a ranking hold at once: that is what "nowhere" needs."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(400):
        seeds = torch.randn(5, 2, 1, generator=generator)
        batches = torch.randn(5, 1, 6, generator=generator)
        gains = gains_of(list(seeds + batches))
        wrong += any(gain.low > 0 for gain in gains)
    assert wrong <= 400 * 0.05
