"""Gains and their intervals against scipy and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from coordconv_patch.ranking.gains import gain_of, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9999])
def test_quantiles_are_scipys(probability: float, freedom: int) -> None:
    expected = scipy.stats.t.ppf(probability, freedom)
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-6)


def test_an_interval_is_the_formulas() -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(0.1, 0.02, (2, 6))
    gain = gain_of(torch.from_numpy(differences), comparisons=3)
    ends = [
        scipy.stats.t.interval(1 - 0.05 / 3, 5, loc=run.mean(), scale=scipy.stats.sem(run))
        for run in differences
    ]
    assert gain.value == pytest.approx(differences.mean())
    assert gain.low == pytest.approx(min(low for low, _ in ends))
    assert gain.high == pytest.approx(max(high for _, high in ends))


@pytest.mark.parametrize("runs", [1, 2])
def test_nothing_stands_out_of_noise_in_19_of_20_rankings(runs: int) -> None:
    """All intervals of a ranking hold at once: that is what "nowhere" needs."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(400):
        noise = torch.randn(5, runs, 6, generator=generator)
        wrong += any(gain_of(one, comparisons=5).low > 0 for one in noise)
    assert wrong <= 400 * 0.05


def test_what_gains_in_one_run_alone_does_not_stand_out() -> None:
    """Training noise moves all held-out batches of a run together."""
    generator = torch.Generator().manual_seed(0)
    batches = 0.1 * torch.randn(2, 8, generator=generator)
    runs = torch.tensor([[2.0], [-0.5]]) + batches
    assert gain_of(runs[:1]).low > 0
    assert gain_of(runs).value > 0.5
    assert gain_of(runs).low < 0
