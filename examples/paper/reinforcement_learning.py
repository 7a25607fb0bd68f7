"""Reinforcement learning with stable-baselines3: its convolutional policies, plain and patched.

    python examples/paper/reinforcement_learning.py --seeds 3

The task is to go to a target (:mod:`go_to_target`), where learning finishes: A2C and PPO, with the
library's NatureCNN, and as an ablation with a net that looks at each cell alone and pools over all
of them. NatureCNN's flatten layer knows positions already, so no gain is expected there; the pooled
net cannot tell where anything is, unless coordinates say so. Its control is patched with scrambled
coordinates. The paper's Atari game is in :mod:`ms_pacman`.

A policy is patched in its features extractor, where stable-baselines3 expects a net of one's own.
"""

from __future__ import annotations

from functools import partial
from itertools import permutations, product
from typing import Any

import gymnasium
import numpy as np
import torch
from experiment import Options, Record, Run, count_parameters, parse_options
from go_to_target import CELL_PIXELS, CELLS, GoToTarget
from palette import BY_VARIANT
from policy_training import learn
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from variants import coordinate_size

import coordconv_patch as ccp


class PooledCNN(BaseFeaturesExtractor):
    """Convolutions that see one cell of the grid each, pooled, and a fully connected layer.

    The pool takes the maximum over all cells, as the paper's regression does. Windows that
    overlapped would leak places: what is near a border, they see on one side of them only.

    Args:
        observation_space: Of pictures ``(C, H, W)``.
        features_dim: Features that the policy gets.
    """

    def __init__(self, observation_space: gymnasium.spaces.Box, features_dim: int = 64) -> None:
        super().__init__(observation_space, features_dim)
        channels = observation_space.shape[0]
        self.cnn = nn.Sequential(
            *(nn.Conv2d(channels, 32, CELL_PIXELS, stride=CELL_PIXELS), nn.ReLU()),
            *(nn.Conv2d(32, 32, 1), nn.ReLU()),
            *(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        )
        self.linear = nn.Sequential(nn.Linear(32, features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.linear(self.cnn(observations))


class PatchedNatureCNN(NatureCNN):
    """stable-baselines3's NatureCNN, every convolution of which also sees coordinates."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ccp.patch_(self.cnn, "all")


class PatchedPooledCNN(PooledCNN):
    """:class:`PooledCNN`, every convolution of which also sees coordinates."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ccp.patch_(self.cnn, "all")


class ScrambledPooledCNN(PooledCNN):
    """The control: :class:`PatchedPooledCNN` with coordinates that say nothing of places."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ccp.patch_(self.cnn, "all", coords=ccp.scrambled())


EXTRACTORS: dict[tuple[str, str], type[BaseFeaturesExtractor]] = {
    ("NatureCNN", "plain"): NatureCNN,
    ("NatureCNN", "patched"): PatchedNatureCNN,
    ("pooled", "plain"): PooledCNN,
    ("pooled", "patched"): PatchedPooledCNN,
    ("pooled", "scrambled"): ScrambledPooledCNN,
}
ALGORITHMS = ("A2C", "PPO")
COMPARED = [
    (f"{algorithm}, {net}", variant) for net, variant in EXTRACTORS for algorithm in ALGORITHMS
]


def learner(algorithm: str, env: VecEnv, extractor: type, seed: int) -> OnPolicyAlgorithm:
    """A2C or PPO for :class:`GoToTarget`, whose policy sees through the given extractor."""
    policy: dict[str, Any] = {
        "features_extractor_class": extractor,
        "features_extractor_kwargs": {"features_dim": 64},
        "optimizer_class": torch.optim.Adam,
        "net_arch": [],
    }
    common: dict[str, Any] = {
        **{"policy": "CnnPolicy", "env": env, "seed": seed, "device": "cpu"},
        **{"learning_rate": 1e-3, "ent_coef": 0.01, "policy_kwargs": policy},
        # Every step is rewarded, so what is far ahead only adds noise.
        **{"gamma": 0.9, "gae_lambda": 0.95},
    }
    if algorithm == "A2C":
        return A2C(n_steps=5, normalize_advantage=True, **common)
    return PPO(n_steps=64, batch_size=256, n_epochs=4, **common)


def evaluate(model: OnPolicyAlgorithm) -> dict[str, float]:
    """Success rate and mean return over one episode from every start, actions drawn as in training.

    The likeliest actions alone would be no fair measure of a net that cannot see where it is: it
    repeats one of them until the episode is cut off.
    """
    episodes = [GoToTarget.starting(agent, target) for agent, target in permutations(CELLS, 2)]
    returns = torch.zeros(len(episodes))
    arrived = torch.zeros(len(episodes), dtype=torch.bool)
    running = list(range(len(episodes)))
    while running:
        pictures = np.stack([episodes[index].picture() for index in running])
        actions, _ = model.predict(pictures)
        for index, action in zip(tuple(running), actions, strict=True):
            _, reward, terminated, truncated, _ = episodes[index].step(action)
            returns[index] += reward
            arrived[index] = terminated
            if terminated or truncated:
                running.remove(index)
    return {"success": arrived.float().mean().item(), "return": returns.mean().item()}


def train(setting: str, variant: str, seed: int, options: Options) -> Run:
    """Train on going to the target."""
    algorithm, net = setting.split(", ")
    steps = options.length(60_000, 256)
    env = make_vec_env(GoToTarget, n_envs=4 if options.quick else 16, seed=1_000 * seed)
    model = learner(algorithm, env, EXTRACTORS[net, variant], seed)
    progress, stopwatch = learn(model, steps, f"{setting}, {variant}")
    return Run(
        parameters=count_parameters(model.policy),
        steps=model.num_timesteps,
        cpu_seconds=stopwatch.seconds,
        metrics={
            **evaluate(model),
            "steps_per_second": model.num_timesteps / stopwatch.seconds,
            "coordinate_size": coordinate_size(model.policy),
        },
        curves=progress.curves,
    )


def draw_picture(record: Record) -> None:
    """Learning curves of every run."""
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(setting for setting, _ in COMPARED))
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.8), layout="constrained")
    panel = dict(zip(settings, panels, strict=True))
    for setting, variant in COMPARED:
        for run in record.of(setting, variant):
            label = variant if run.seed == 0 else None
            thousands = [step / 1_000 for step in run.curves["step"]]
            panel[setting].plot(
                thousands, run.curves["success"], color=BY_VARIANT[variant], label=label
            )
    for setting, axes in panel.items():
        axes.set(title=setting, xlabel="thousand steps")
        axes.set(ylim=(-0.02, 1.02), ylabel="success, last 100 episodes")
        axes.legend(fontsize=9)
    figure.suptitle(headline(record), fontsize=12)
    figure.savefig(record.path.with_suffix(".png"), dpi=80)
    plt.close(figure)


def headline(record: Record) -> str:
    """What came out, in one line."""
    shares = [
        sum(record.mean(f"{algorithm}, {net}", variant, "success") for algorithm in ALGORITHMS) / 2
        for net, variant in EXTRACTORS
    ]
    return (
        "Going to a target: success with NatureCNN {:.0%}, patched {:.0%}; "
        "with a pooled net {:.0%}, patched {:.0%}, scrambled {:.0%}"
    ).format(*shares)


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("reinforcement_learning", options)
    for seed, (setting, variant) in product(options.seeds, COMPARED):
        one = partial(train, setting, variant, seed, options)
        record.run(setting, variant, seed, one)
    record.print_table()
    draw_picture(record)
    return record


if __name__ == "__main__":
    main()
