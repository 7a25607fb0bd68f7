"""The paper's Ms. Pac-Man: nets that differ by what they are said to differ by, and the record."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.torch_layers import NatureCNN

import coordconv_patch as ccp

PAPER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(PAPER))  # the scripts import their neighbours

script: Any = importlib.import_module("ms_pacman")


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    environments = script.pacman(1, 0)
    yield environments
    environments.close()


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in model.policy.named_parameters()}


def count(model: Any) -> int:
    return sum(each.numel() for each in model.policy.parameters())


@pytest.mark.parametrize("hidden", [False, True])
def test_nets_that_are_compared_differ_by_coordinate_weights_alone(env: Any, hidden: bool) -> None:
    plain = script.learner(env, script.Net(hidden=hidden), seed=3)
    observations = torch.from_numpy(env.reset()).permute(0, 3, 1, 2)
    for where, sites in (("all", 3), ("first", 1)):
        patched = script.learner(env, script.Net(where, hidden=hidden), seed=3)
        own = {name: shape for name, shape in shapes(patched).items() if "coord" not in name}
        assert own == shapes(plain)
        assert len(shapes(patched)) == len(own) + sites
        # Under one seed they begin alike, to the last bit.
        for first, second in zip(
            plain.policy.get_distribution(observations).distribution.logits,
            patched.policy.get_distribution(observations).distribution.logits,
            strict=True,
        ):
            assert torch.equal(first, second)


def test_hidden_layers_are_what_else_the_long_runs_differ_by(env: Any) -> None:
    def parameters(name: str) -> int:
        return count(script.learner(env, script.NETS[name], seed=0))

    coordinates = parameters("patched") - parameters("plain")
    hidden = parameters("plain, hidden layers") - parameters("plain")
    assert (coordinates, hidden) == (7_296, 69_504)
    runs = recorded()
    assert runs[script.LONG, "plain"][0]["parameters"] == parameters("plain")
    assert (
        runs[script.LONG, "patched, hidden layers"][0]["parameters"]
        == parameters("patched, hidden layers")
        == parameters("plain") + coordinates + hidden
    )


class PatchedNatureCNN(NatureCNN):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ccp.patch_(self.cnn, "all")


def test_a_subclass_of_the_extractor_gets_hidden_layers_and_a_coord_policy_does_not(
    env: Any,
) -> None:
    """What docs/training_tools.md warns of."""
    kwargs = {"features_extractor_class": PatchedNatureCNN}
    trap = A2C("CnnPolicy", env, device="cpu", policy_kwargs=kwargs)
    plain = A2C("CnnPolicy", env, device="cpu")
    policy = A2C(script.CoordCnnPolicy, env, device="cpu", policy_kwargs={"where": "all"})
    assert len(trap.policy.mlp_extractor.policy_net) == 4
    assert len(plain.policy.mlp_extractor.policy_net) == 0
    assert count(trap) - count(plain) == 7_296 + 69_504
    assert count(policy) - count(plain) == 7_296


def test_a_point_of_a_curve_is_the_first_that_is_late_enough() -> None:
    curves = {"step": [10, 20, 30], "return": [1.0, 2.0, 3.0]}
    assert [script.return_after(steps, curves) for steps in (5, 10, 11, 30)] == [1.0, 1.0, 2.0, 3.0]


def test_quick_run_trains_every_net_and_leaves_a_picture(tmp_path: Path) -> None:
    record = script.main(["--quick", "--out", str(tmp_path)])
    for setting, variant in script.COMPARED:
        (run,) = record.of(setting, variant)
        assert (run.metrics["coordinate_size"] > 0) == ("patched" in variant)
    assert (tmp_path / "ms_pacman.png").stat().st_size > 10_000


def recorded() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The recorded runs by setting and variant."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in json.loads((PAPER / "results" / "ms_pacman.json").read_text())["runs"]:
        runs.setdefault((run["setting"], run["variant"]), []).append(run)
    return runs


def test_recorded_long_runs_of_unequal_nets_are_better_for_the_plain_one_with_both_seeds() -> None:
    runs = recorded()
    plain, patched = (
        [run["metrics"]["return"] for run in runs[script.LONG, variant]]
        for variant in ("plain", "patched, hidden layers")
    )
    assert len(plain) == len(patched) == 2
    assert min(plain) > max(patched)


def test_recorded_nets_with_hidden_layers_are_worse_and_coordinates_make_no_difference() -> None:
    runs = recorded()
    points = {
        variant: [run["metrics"][script.COMPARED_RETURN] for run in runs[setting, variant]]
        for setting, variant in script.COMPARED
    }
    seeds = {name: len(values) for name, values in points.items()}
    assert seeds == dict.fromkeys(points, 2) | {"patched: first": 1}
    hidden = {name: values for name, values in points.items() if "hidden" in name}
    without = {name: values for name, values in points.items() if "hidden" not in name}
    assert (len(hidden), len(without)) == (2, 3)
    assert max(max(values) for values in hidden.values()) < 600
    assert min(min(values) for values in without.values()) > 600
    # "better with one seed and worse with the other"
    gains = [a - b for a, b in zip(points["patched"], points["plain"], strict=True)]
    assert min(gains) < 0 < max(gains)
