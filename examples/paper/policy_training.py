"""Training a policy of stable-baselines3: the curves and the time that are recorded."""

from __future__ import annotations

import math

from experiment import Stopwatch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tqdm import tqdm


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


def learn(model: OnPolicyAlgorithm, steps: int, title: str) -> tuple[Progress, Stopwatch]:
    """Train; the curves, and the time (the environment's included)."""
    progress = Progress(steps, title)
    stopwatch = Stopwatch()
    with stopwatch:
        model.learn(steps, callback=progress)
    progress.note()
    return progress, stopwatch
