"""Reinforcement learning with stable-baselines3: its convolutional policies, plain and patched.

    python examples/paper/reinforcement_learning.py --seeds 3

Two tasks:

- ``go to the target`` (:mod:`go_to_target`), where learning finishes: A2C and PPO, with the
  library's NatureCNN, and as an ablation with a net that looks at each cell alone and pools over
  all of them. NatureCNN's flatten layer knows positions already, so no gain is expected there; the
  pooled net cannot tell where anything is, unless coordinates say so. Its control is patched with
  scrambled coordinates.
- ``Ms. Pac-Man``, as in the paper: A2C on Atari through ale-py. What is recorded, three quarters
  of an hour for each, is a tenth of what is usual on Atari: it shows that patching works there,
  what it costs in frames per second, and how the first returns go.

A policy is patched in its features extractor, where stable-baselines3 expects a net of one's own.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import permutations, product
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from go_to_target import CELL_PIXELS, CELLS, GoToTarget
from palette import BY_VARIANT
from scrambled_coordinates import scramble_
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from torch import Tensor, nn
from tqdm import tqdm
from variants import coordinate_size

import coordconv_patch as ccp

GAME = "MsPacmanNoFrameskip-v4"
FRAMES_A_STEP = 4
"""Frames of the game that one step of an agent takes, as usual on Atari."""
PACMAN_VARIANTS = ("plain", "patched")
PACMAN_SEEDS = 2
"""At most: a run takes three quarters of an hour."""


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


class ScrambledPooledCNN(PatchedPooledCNN):
    """The control: :class:`PatchedPooledCNN` with coordinates that say nothing of places."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        scramble_(self.cnn)


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
ATARI = "A2C, Ms. Pac-Man"


class Progress(BaseCallback):
    """A progress bar, and the mean return and success of the last episodes over the training.

    Args:
        steps: Of the environment, in all.
        title: Of the bar.
        points: How many points the curves have at most.
    """

    def __init__(self, steps: int, title: str, points: int = 25) -> None:
        super().__init__()
        self.bar = tqdm(total=steps, desc=title, disable=None)
        self.interval = math.ceil(steps / points)
        self.curves: dict[str, list[float]] = {"step": [], "return": [], "success": []}
        self.episodes = 0

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)
        self.episodes += int(self.locals["dones"].sum())
        if self.num_timesteps >= self.interval * (len(self.curves["step"]) + 1):
            self.note()
        return True

    def _on_training_end(self) -> None:
        self.bar.close()

    def note(self) -> None:
        """Add a point: means over the last episodes (at most 100), if one has ended."""
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        successes = list(self.model.ep_success_buffer or ())
        if returns:
            self.curves["step"].append(self.num_timesteps)
            self.curves["return"].append(round(float(sum(returns)) / len(returns), 3))
            self.curves["success"].append(round(sum(successes) / max(1, len(successes)), 3))


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


def pacman_learner(env: VecEnv, extractor: type, seed: int) -> OnPolicyAlgorithm:
    """A2C with the settings that stable-baselines3's zoo uses for Atari."""
    return A2C(
        *("CnnPolicy", env),
        **{"seed": seed, "device": "cpu", "ent_coef": 0.01, "vf_coef": 0.25},
        policy_kwargs={
            "features_extractor_class": extractor,
            "optimizer_class": torch.optim.RMSprop,
            "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0},
        },
    )


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


def learn(model: OnPolicyAlgorithm, steps: int, title: str) -> tuple[Progress, Stopwatch]:
    """Train; the curves, and the time (the environment's included)."""
    progress = Progress(steps, title)
    stopwatch = Stopwatch()
    with stopwatch:
        model.learn(steps, callback=progress)
    progress.note()
    return progress, stopwatch


def train_target(setting: str, variant: str, seed: int, options: Options) -> Run:
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


def pacman(environments: int, seed: int) -> VecEnv:
    """Ms. Pac-Man as usual: 84 x 84, grey, four frames, rewards clipped for learning."""
    gymnasium.register_envs(ale_py)
    return VecFrameStack(make_atari_env(GAME, n_envs=environments, seed=seed), n_stack=4)


def train_pacman(variant: str, seed: int, options: Options) -> Run:
    """Train on Ms. Pac-Man; returns are the game's own points."""
    steps = options.length(1_200_000, 160)
    env = pacman(2 if options.quick else 16, 1_000 * seed)
    model = pacman_learner(env, EXTRACTORS["NatureCNN", variant], seed)
    progress, stopwatch = learn(model, steps, f"{ATARI}, {variant}")
    env.close()
    curves = {name: progress.curves[name] for name in ("step", "return")}
    metrics = {
        "frames_per_second": FRAMES_A_STEP * model.num_timesteps / stopwatch.seconds,
        "coordinate_size": coordinate_size(model.policy),
        "episodes": float(progress.episodes),
    }
    if curves["return"]:
        metrics["return"] = curves["return"][-1]
    return Run(
        parameters=count_parameters(model.policy),
        steps=model.num_timesteps,
        cpu_seconds=stopwatch.seconds,
        metrics=metrics,
        curves=curves,
    )


def draw_picture(record: Record) -> None:
    """Learning curves of every run: success on the small task, points in Ms. Pac-Man."""
    import matplotlib.pyplot as plt

    compared = [*COMPARED, *((ATARI, variant) for variant in PACMAN_VARIANTS)]
    settings = list(dict.fromkeys(setting for setting, _ in compared))
    figure, panels = plt.subplots(1, 5, figsize=(15, 3.8), layout="constrained")
    panel = dict(zip(settings, panels, strict=True))
    for setting, variant in compared:
        for run in record.of(setting, variant):
            label = variant if run.seed == 0 else None
            values = run.curves["return" if setting == ATARI else "success"]
            thousands = [step / 1_000 for step in run.curves["step"]]
            panel[setting].plot(thousands, values, color=BY_VARIANT[variant], label=label)
    for setting, axes in panel.items():
        axes.set(title=setting, xlabel="thousand steps")
        if setting == ATARI:
            axes.set_ylabel("points, mean of 100 episodes")
        else:
            axes.set(ylim=(-0.02, 1.02), ylabel="success, last 100 episodes")
        axes.legend(fontsize=9)
    figure.suptitle(headline(record), fontsize=14)
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
        one = partial(train_target, setting, variant, seed, options)
        record.run(setting, variant, seed, one)
    for seed, variant in product(options.seeds[:PACMAN_SEEDS], PACMAN_VARIANTS):
        record.run(ATARI, variant, seed, partial(train_pacman, variant, seed, options))
    record.print_table()
    draw_picture(record)
    return record


if __name__ == "__main__":
    main()
