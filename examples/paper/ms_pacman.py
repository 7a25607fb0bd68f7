"""A2C of stable-baselines3 on Ms. Pac-Man, as in the paper: which part of a patched net matters?

    python examples/paper/ms_pacman.py --seeds 2

stable-baselines3 leaves out the hidden layers between the features and the outputs for policy and
value only where ``features_extractor_class == NatureCNN``. A subclass that patches its own
convolutions silently gets two hidden layers of 64 units (tanh) for each of these outputs, 69,504
more parameters. The long runs of this record compare such a net with a plain one that had none.
The short runs take coordinates and hidden layers apart.

Nets are patched by :class:`coordconv_patch.stable_baselines3.CoordPolicy`, which leaves
``features_extractor_class`` alone, and every net is told its ``net_arch``.

The long runs, three quarters of an hour each, are a tenth of what is usual on Atari. Their plain
net is that of the short ones: it was run again for 48,000 steps, and gave the same returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import ale_py
import gymnasium
import torch
from experiment import Options, Record, Run, count_parameters, parse_options
from palette import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from policy_training import learn
from stable_baselines3 import A2C
from stable_baselines3.a2c import CnnPolicy
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from variants import coordinate_size

from coordconv_patch.stable_baselines3 import CoordPolicy

GAME = "MsPacmanNoFrameskip-v4"
FRAMES_A_STEP = 4
"""Frames of the game that one step of an agent takes, as usual on Atari."""
SHORT_STEPS, LONG_STEPS = 240_000, 1_200_000
SHORT, LONG = "240,000 steps", "1.2 million steps"
COMPARED_RETURN = "return after 240,000 steps"
"""The metric that runs of both lengths have: points, mean of the last 100 episodes."""


class CoordCnnPolicy(CoordPolicy, CnnPolicy):
    """A2C's convolutional policy, with coordinates."""


@dataclass(frozen=True)
class Net:
    """A policy network.

    Attributes:
        where: Convolutions of the features extractor that see coordinates; ``None``: none.
        hidden: Whether policy and value have two hidden layers of 64 units each.
    """

    where: str | None = None
    hidden: bool = False


NETS = {
    "plain": Net(),
    "patched": Net("all"),
    "patched: first": Net("first"),
    "plain, hidden layers": Net(hidden=True),
    "patched, hidden layers": Net("all", hidden=True),
}
COLOURS = dict(zip(NETS, (VERMILION, BLUE, GREEN, ORANGE, PURPLE), strict=True))
GROUPS = (
    (2, ((LONG, "plain"), (LONG, "patched, hidden layers"))),
    (2, ((SHORT, "patched"), (SHORT, "plain, hidden layers"))),
    (1, ((SHORT, "patched: first"),)),
)
"""What is run, in order, each group with so many seeds at most: the runs take hours together."""
COMPARED = [compared for _, group in GROUPS for compared in group]


def pacman(environments: int, seed: int) -> VecEnv:
    """Ms. Pac-Man as usual: 84 x 84, grey, four frames, rewards clipped for learning."""
    gymnasium.register_envs(ale_py)
    return VecFrameStack(make_atari_env(GAME, n_envs=environments, seed=seed), n_stack=4)


def learner(env: VecEnv, net: Net, seed: int) -> OnPolicyAlgorithm:
    """A2C with the settings that stable-baselines3's zoo uses for Atari."""
    layers = [64, 64] if net.hidden else []
    policy: dict[str, Any] = {
        "net_arch": {"pi": layers, "vf": layers},
        "optimizer_class": torch.optim.RMSprop,
        "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0},
    }
    if net.where is not None:
        policy["where"] = net.where
    return A2C(
        *(CnnPolicy if net.where is None else CoordCnnPolicy, env),
        **{"seed": seed, "device": "cpu", "ent_coef": 0.01, "vf_coef": 0.25},
        policy_kwargs=policy,
    )


def train(setting: str, variant: str, seed: int, options: Options) -> Run:
    """Train; returns are the game's own points."""
    steps = options.length(LONG_STEPS if setting == LONG else SHORT_STEPS, 160)
    env = pacman(2 if options.quick else 16, 1_000 * seed)
    model = learner(env, NETS[variant], seed)
    progress, stopwatch = learn(model, steps, f"{setting}, {variant}, seed {seed}")
    env.close()
    curves = {name: progress.curves[name] for name in ("step", "return")}
    metrics = {
        "frames_per_second": FRAMES_A_STEP * model.num_timesteps / stopwatch.seconds,
        "coordinate_size": coordinate_size(model.policy),
        "episodes": float(progress.episodes),
    }
    if curves["return"]:
        metrics["return"] = curves["return"][-1]
        metrics[COMPARED_RETURN] = return_after(steps if setting == SHORT else steps / 5, curves)
    return Run(
        parameters=count_parameters(model.policy),
        steps=model.num_timesteps,
        cpu_seconds=stopwatch.seconds,
        metrics=metrics,
        curves=curves,
    )


def return_after(steps: float, curves: dict[str, list[float]]) -> float:
    """The curve's first point at that many steps, or later."""
    points = zip(curves["step"], curves["return"], strict=True)
    return next(value for step, value in points if step >= steps)


def draw_picture(record: Record) -> None:
    """Points over the training, of every run; on the right the part that all runs have."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for axes, until in zip(panels, (LONG_STEPS, SHORT_STEPS), strict=True):
        for setting, variant in COMPARED:
            for run in record.of(setting, variant):
                points = zip(run.curves["step"], run.curves["return"], strict=True)
                shown = [(step / 1_000, value) for step, value in points if step <= until]
                label = variant if run.seed == 0 else None
                x, y = [step for step, _ in shown], [value for _, value in shown]
                axes.plot(x, y, color=COLOURS[variant], label=label)
        axes.set(xlabel="thousand steps", ylabel="points, mean of 100 episodes")
    panels[0].legend(fontsize=9)
    figure.suptitle(headline(record), fontsize=13)
    figure.savefig(record.path.with_suffix(".png"), dpi=80)
    plt.close(figure)


def headline(record: Record) -> str:
    """What came out, in one line."""
    if not all(COMPARED_RETURN in run.metrics for run in record.runs):
        return "A2C on Ms. Pac-Man: no episode has ended yet"
    points = [f"{name} {record.mean(of, name, COMPARED_RETURN):.0f}" for of, name in COMPARED]
    return f"A2C on Ms. Pac-Man, points after {SHORT}: {'; '.join(points)}"


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("ms_pacman", options)
    for most, group in GROUPS:
        for seed, (setting, variant) in product(options.seeds[:most], group):
            one = partial(train, setting, variant, seed, options)
            record.run(setting, variant, seed, one)
    record.print_table()
    draw_picture(record)
    return record


if __name__ == "__main__":
    main()
