"""The paper's reinforcement learning: the small task, the patched policies, the script."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_checker import check_env

import coordconv_patch as ccp

PAPER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(PAPER))  # the scripts import their neighbours

task: Any = importlib.import_module("go_to_target")
script: Any = importlib.import_module("reinforcement_learning")


def test_the_task_is_a_gymnasium_environment_drawn_as_said() -> None:
    env = task.GoToTarget()
    check_env(env)
    picture, _ = env.reset(seed=3)
    for channel, (x, y) in enumerate((env.agent, env.target)):
        expected = np.zeros((36, 36), np.uint8)
        expected[9 * y : 9 * y + 9, 9 * x : 9 * x + 9] = 255
        assert np.array_equal(picture[channel], expected)


def test_rewards_add_up_to_the_way_and_one_for_arriving() -> None:
    env = task.GoToTarget.starting((0, 0), (2, 1))
    steps = [env.step(action) for action in (3, 2, 3, 3, 1)]
    assert [step[1] for step in steps] == [1, -1, 1, 1, 2]
    assert [step[2] for step in steps] == [False, False, False, False, True]
    assert steps[-1][4] == {"is_success": True}


def test_walls_stop_the_agent_and_episodes_are_cut_off() -> None:
    env = task.GoToTarget.starting((0, 0), (3, 3))
    steps = [env.step(0) for _ in range(env.limit)]
    assert env.agent == (0, 0)
    assert all(step[1] == 0 for step in steps)
    assert [step[3] for step in steps] == [False] * (env.limit - 1) + [True]


def test_patched_extractors_start_from_the_plain_outputs() -> None:
    space = task.GoToTarget().observation_space
    pictures = torch.rand(4, 2, 36, 36)
    for (net, variant), extractor in script.EXTRACTORS.items():
        outputs = []
        for made in (script.EXTRACTORS[net, "plain"], extractor):
            torch.manual_seed(0)
            model = made(space, features_dim=64)
            outputs.append(model(pictures))
        assert torch.equal(*outputs)
        if variant != "plain":
            convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
            assert len(list(ccp.coord_parameters(model))) == len(convs)


def test_every_start_is_evaluated_once_with_the_models_actions() -> None:
    class Rightwards:
        """Walks to the right."""

        seen = 0

        def predict(self, pictures: np.ndarray) -> tuple[np.ndarray, None]:
            Rightwards.seen = max(Rightwards.seen, len(pictures))
            return np.full(len(pictures), 3), None

    measured = script.evaluate(Rightwards())
    assert Rightwards.seen == 16 * 15
    # In each of 4 rows, 3 + 2 + 1 pairs have the target to the right of the agent.
    assert measured["success"] == pytest.approx(24 / 240)
    # Rewards of a start add up to the way that is saved, and 1 for arriving.
    saved = 0.0
    for x, y in task.CELLS:
        for right, row in set(task.CELLS) - {(x, y)}:
            arrives = row == y and right > x
            end = right if arrives else 3
            saved += abs(right - x) - abs(right - end) + arrives
    assert measured["return"] == pytest.approx(saved / 240)


@pytest.mark.parametrize("variant", ["plain", "patched"])
def test_only_coordinates_tell_the_pooled_net_where_the_agent_is(variant: str) -> None:
    episodes = [task.GoToTarget.starting(cell, (3, 3)) for cell in ((0, 0), (2, 1))]
    pictures = [torch.from_numpy(episode.picture()) / 255 for episode in episodes]
    torch.manual_seed(0)
    model = script.EXTRACTORS["pooled", variant](episodes[0].observation_space)
    if variant == "patched":
        for weight in ccp.coord_parameters(model):
            torch.nn.init.normal_(weight, std=0.1)
    here, there = model(torch.stack(pictures))
    assert torch.allclose(here, there, atol=1e-6) == (variant == "plain")


def test_quick_run_trains_every_patched_policy_and_leaves_a_picture(tmp_path: Path) -> None:
    record = script.main(["--quick", "--out", str(tmp_path)])
    for setting, variant in script.COMPARED:
        (run,) = record.of(setting, variant)
        assert (run.metrics["coordinate_size"] > 0) == (variant != "plain")
    assert (tmp_path / "reinforcement_learning.png").stat().st_size > 10_000


def steps_to(success: float, curves: dict[str, list[float]]) -> float:
    """Steps after which the success rate was first reached."""
    return next(
        step
        for step, reached in zip(curves["step"], curves["success"], strict=True)
        if reached >= success
    )


def recorded() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The recorded runs by setting and variant."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in json.loads((PAPER / "results" / "reinforcement_learning.json").read_text())["runs"]:
        runs.setdefault((run["setting"], run["variant"]), []).append(run)
    return runs


def test_recorded_pooled_nets_arrive_only_with_coordinates_and_sooner_with_true_ones() -> None:
    runs = recorded()
    for algorithm in script.ALGORITHMS:
        plain, patched, scrambled = (
            runs[f"{algorithm}, pooled", variant] for variant in ("plain", "patched", "scrambled")
        )
        assert len(plain) == len(patched) == len(scrambled) == 3
        assert max(run["metrics"]["success"] for run in plain) < 0.4
        assert min(run["metrics"]["success"] for run in patched) > 0.95
        assert min(run["metrics"]["success"] for run in scrambled) > 0.9
        for variant in ("plain", "patched"):
            knowing = runs[f"{algorithm}, NatureCNN", variant]
            assert min(run["metrics"]["success"] for run in knowing) > 0.9
        latest = max(steps_to(0.9, run["curves"]) for run in patched)
        assert latest < min(steps_to(0.9, run["curves"]) for run in scrambled)
