"""Agents of stable-baselines3 whose policies see coordinates: built, trained, saved, loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from concat_model import concatenating
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, dqn
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.ppo import CnnPolicy, MultiInputPolicy
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.stable_baselines3 import CoordPolicy

TESTS = Path(__file__).parents[1]
RADIUS = ccp.Coordinates(radius=True)
PICTURE = spaces.Box(0, 255, (1, 36, 36), np.uint8)


class Noise(gymnasium.Env):
    """Five steps of noise; one of three actions is rewarded."""

    observation_space: spaces.Space = PICTURE
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.picture(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        return self.picture(), float(action == 1), False, self.steps >= 5, {}

    def picture(self) -> Any:
        return self.np_random.integers(0, 256, PICTURE.shape, dtype=np.uint8)


class NoiseAndSpeed(Noise):
    """The same, and a vector beside each picture."""

    observation_space = spaces.Dict(picture=PICTURE, speed=spaces.Box(-1, 1, (3,)))

    def picture(self) -> Any:
        return {"picture": super().picture(), "speed": np.zeros(3, np.float32)}


class CoordCnnPolicy(CoordPolicy, CnnPolicy):
    """PPO's and A2C's policy for pictures, with coordinates."""


class CoordMultiInputPolicy(CoordPolicy, MultiInputPolicy):
    """Their policy for observations of several parts."""


class CoordDQNPolicy(CoordPolicy, dqn.CnnPolicy):
    """DQN's policy for pictures."""


PLAIN: dict[type[BaseAlgorithm], type[BasePolicy]] = {
    PPO: CnnPolicy,
    A2C: CnnPolicy,
    DQN: dqn.CnnPolicy,
}
COORD: dict[type[BaseAlgorithm], type[BasePolicy]] = {
    PPO: CoordCnnPolicy,
    A2C: CoordCnnPolicy,
    DQN: CoordDQNPolicy,
}
SHORT: dict[type[BaseAlgorithm], dict[str, Any]] = {
    PPO: {"n_steps": 8, "batch_size": 4, "n_epochs": 1},
    A2C: {"n_steps": 5},
    DQN: {"learning_starts": 4, "train_freq": 1, "batch_size": 4, "target_update_interval": 6}
    | {"buffer_size": 32},
}
algorithms = pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])


def agent(
    algorithm: type[BaseAlgorithm], policy: type[BasePolicy], env: Any = None, **kwargs: Any
) -> BaseAlgorithm:
    kwargs["features_extractor_kwargs"] = {} if env else {"features_dim": 16}
    options: dict[str, Any] = {"seed": 3, "device": "cpu", "policy_kwargs": kwargs}
    return algorithm(policy, env or Noise(), **options, **SHORT[algorithm])


def patched(algorithm: type[BaseAlgorithm], *, non_zero: bool = True) -> BaseAlgorithm:
    """An agent all of whose convolutions see coordinates."""
    model = agent(algorithm, COORD[algorithm], where="all", coords=RADIUS)
    if non_zero:
        for weight in ccp.coord_parameters(model.policy):
            nn.init.normal_(weight, std=0.1)
    return model


def pictures() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 1, 36, 36), np.uint8))


def acts(model: BaseAlgorithm) -> dict[str, Tensor]:
    """What an agent makes of the pictures: its actions, and its values of states or actions."""
    actions, _ = model.predict(pictures().numpy(), deterministic=True)
    policy: Any = model.policy
    with torch.no_grad():
        if isinstance(model, DQN):
            values = {"q": policy.q_net(pictures()), "target": policy.q_net_target(pictures())}
        else:
            logits = policy.get_distribution(pictures()).distribution.logits
            values = {"value": policy.predict_values(pictures()), "logits": logits}
    return {"actions": torch.from_numpy(actions), **values}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))


def optimized(model: BaseAlgorithm) -> set[int]:
    groups = model.policy.optimizer.param_groups
    return {id(parameter) for group in groups for parameter in group["params"]}


@algorithms
def test_a_new_policy_acts_as_the_plain_one_until_it_has_learned(algorithm: Any) -> None:
    plain, model = agent(algorithm, PLAIN[algorithm]), patched(algorithm, non_zero=False)
    assert same(acts(plain), acts(model))
    model.learn(10)
    assert all(bool(w.any()) for w in ccp.coord_parameters(model.policy))


@algorithms
def test_a_policy_computes_what_the_concatenating_one_does(algorithm: Any) -> None:
    model = agent(algorithm, COORD[algorithm], where="all")
    before = acts(model)
    for weight in ccp.coord_parameters(model.policy):
        nn.init.normal_(weight, std=0.1)
    after = acts(model)
    model.policy = concatenating(model.policy)
    for name, values in acts(model).items():
        assert torch.allclose(after[name].double(), values.double(), atol=1e-5), name
        assert name == "actions" or not torch.allclose(before[name], values, atol=1e-3)


@algorithms
def test_the_optimizer_holds_the_coordinate_weights_of_what_learns(algorithm: Any) -> None:
    model = patched(algorithm)
    learning = model.policy.q_net if algorithm is DQN else model.policy
    weights = ccp.coord_parameters(learning)
    assert len(weights) == 3
    assert {id(weight) for weight in weights} <= optimized(model)
    if algorithm is DQN:
        targets = ccp.coord_parameters(model.policy.q_net_target)
        assert not {id(weight) for weight in targets} & optimized(model)


LOAD = """
import sys, torch
from tools.test_stable_baselines3 import A2C, DQN, PPO, acts
for algorithm in (A2C, DQN, PPO):
    path = f"{sys.argv[1]}/{algorithm.__name__}"
    torch.save(acts(algorithm.load(path, device="cpu")), f"{path}.pt")
"""


def test_saved_agents_act_alike_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for algorithm in (A2C, DQN, PPO):
        model = patched(algorithm)
        model.learn(10)
        model.save(tmp_path / algorithm.__name__)
        expected[algorithm.__name__] = acts(model)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    # Sums of another number of threads are rounded otherwise, in a plain network too.
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    for name, before in expected.items():
        assert same(before, torch.load(tmp_path / f"{name}.pt")), name


@algorithms
def test_a_loaded_agent_goes_on_where_the_saved_one_stopped(algorithm: Any, tmp_path: Path) -> None:
    model = patched(algorithm)
    model.learn(10)
    model.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent", Noise(), device="cpu")
    assert same(acts(model), acts(loaded))
    assert loaded.policy.coords == RADIUS
    state, again = (each.policy.optimizer.state_dict()["state"] for each in (model, loaded))
    assert len(state) == len(optimized(loaded)) == len(again)
    for index, moments in state.items():
        assert all(torch.equal(moments[key], again[index][key]) for key in moments)
    weights = ccp.coord_parameters(loaded.policy)
    before = [weight.detach().clone() for weight in weights]
    loaded.learn(10)
    assert not any(map(torch.equal, before, weights))


def test_a_plain_agent_stays_plain(tmp_path: Path) -> None:
    plain = agent(PPO, CnnPolicy)
    plain.learn(8)
    plain.save(tmp_path / "plain")
    loaded = PPO.load(tmp_path / "plain", device="cpu")
    assert type(loaded.policy) is CnnPolicy
    assert ccp.layer_status(loaded.policy) == ()
    assert same(acts(plain), acts(loaded))


def test_a_trained_plain_agent_gets_coordinates_as_the_documentation_says() -> None:
    plain = agent(PPO, CnnPolicy)
    plain.learn(8)
    kwargs = {**plain.policy_kwargs, "where": "all"}
    model = PPO(CoordCnnPolicy, Noise(), device="cpu", policy_kwargs=kwargs, **SHORT[PPO])
    assert not same(acts(plain), acts(model))
    model.policy.load_state_dict(plain.policy.state_dict())
    assert same(acts(plain), acts(model))


def test_a_policy_alone_is_saved_and_loaded(tmp_path: Path) -> None:
    model = patched(PPO)
    before = acts(model)
    model.policy.save(tmp_path / "policy.pt")
    model.policy = CoordCnnPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert same(before, acts(model))


def test_extractors_of_their_own_and_of_several_inputs_are_patched() -> None:
    apart = agent(A2C, CoordCnnPolicy, where="cnn.2", share_features_extractor=False)
    names = [status.name for status in ccp.layer_status(apart.policy)]
    assert names == ["features_extractor.cnn.2", "vf_features_extractor.cnn.2"]
    several = agent(PPO, CoordMultiInputPolicy, NoiseAndSpeed())
    (status,) = ccp.layer_status(several.policy)
    assert status.name == "features_extractor.extractors.picture.cnn.0"
    several.learn(8)


def test_a_class_that_would_stay_plain_is_refused() -> None:
    message = r"class Wrong\(CoordPolicy, ActorCriticCnnPolicy\)"
    with pytest.raises(ccp.PatchError, match=message):

        class Wrong(CnnPolicy, CoordPolicy):
            pass

    with pytest.raises(ccp.PatchError, match=r"class Alone\(CoordPolicy, CnnPolicy\)"):

        class Alone(CoordPolicy):
            pass


def test_wrong_places_are_refused_when_the_agent_is_built() -> None:
    with pytest.raises(ccp.SelectionError, match=r"cnn\.0"):
        agent(PPO, CoordCnnPolicy, where="cnn.9")
    with pytest.raises(ccp.CoordinatesError, match="solo"):
        agent(PPO, CoordCnnPolicy, coords="sol")
