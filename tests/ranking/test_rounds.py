"""How many steps a ranking has for each of its rows, and what it costs."""

from __future__ import annotations

import pytest

from coordconv_patch.ranking.rounds import Rounds, rounds_within


@pytest.mark.parametrize("parts", range(1, 40))
@pytest.mark.parametrize("held_out", [2, 6, 8])
def test_the_budget_is_spent_and_not_more(parts: int, held_out: int) -> None:
    rounds = rounds_within(100 * parts, parts, 2, held_out)
    cost = rounds.cost(parts, held_out)
    assert cost <= 100 * parts
    if rounds.steps < 100:
        assert cost > 100 * parts - 2 * (rounds.finalists + 2)
    assert rounds.finalists == max(min(parts, 2), parts // 4)


def test_a_cost_is_counted_run_by_run() -> None:
    """Four rows and the plain model; then two of them, the plain model and the control."""
    rounds = Rounds(first=20, finalists=2, steps=30, seeds=2)
    runs = [20] * 5 + [30] * 2 * 4
    assert rounds.training_steps(4) == sum(runs)
    assert rounds.cost(4, 6) == pytest.approx(sum(runs) + len(runs) * 6 / 3)


def test_two_rows_need_no_first_round() -> None:
    assert rounds_within(200, 2, 2, 3).first == 0
    assert rounds_within(100, 1, 2, 3).finalists == 1


def test_short_runs_are_no_longer_than_long_ones() -> None:
    assert rounds_within(400, 4, 2, 3, steps=3) == Rounds(3, 2, 3, 2)
