"""The authors' plain net, a stack of transposed convolutions, given its best setting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from not_so_clevr_experiment import Net, Supervised
from not_so_clevr_nets import deconv_stack
from not_so_clevr_training import Recipe

FINALISTS = 2
"""So many of the settings are trained to the end before one is chosen."""


@dataclass(frozen=True)
class DeconvSetting:
    """A size of the transposed convolutions, and how they are trained.

    Attributes:
        kernel: See :func:`deconv_stack`.
        multiplier: Likewise.
        rate: The highest learning rate.
        decay: Decoupled weight decay.
    """

    kernel: int
    multiplier: int
    rate: float
    decay: float = 0.0

    def net(self, epochs: float) -> Net:
        """A stack of this size, trained for so many passes over the centres."""
        recipe = Recipe(epochs, self.rate, self.decay, batch=16, points=20, quick_batch=16)
        return Net(partial(deconv_stack, self.kernel, self.multiplier), recipe)

    def __str__(self) -> str:
        size = f"deconv {self.kernel}x{self.kernel}, width {self.multiplier}, lr {self.rate:g}"
        return size + (f", decay {self.decay:g}" if self.decay else "")


@dataclass(frozen=True)
class Sweep:
    """Settings among which the plain net's best is found.

    Attributes:
        settings: What to choose from.
        epochs: Passes over the training centres until the end.
        brief_epochs: Passes after which most settings are dropped.
    """

    settings: tuple[DeconvSetting, ...]
    epochs: float
    brief_epochs: float

    def best(self, experiment: Supervised, split: str) -> DeconvSetting:
        """The setting that serves the plain net best on a split, with the first seed.

        All are trained briefly, the best few of them to the end. They are compared by a *test*
        score, which favours the plain net. The brief runs stand in the record under
        ``"sweep, SPLIT"``. A quick run has no time for it: it takes the first setting.
        """
        if experiment.options.quick:
            return self.settings[0]
        by_sweep = partial(self._score, experiment, split, f"sweep, {split}", self.brief_epochs)
        finalists = sorted(self.settings, key=by_sweep, reverse=True)[:FINALISTS]
        return max(finalists, key=partial(self._score, experiment, split, split, self.epochs))

    def _score(
        self,
        experiment: Supervised,
        split: str,
        where: str,
        epochs: float,
        setting: DeconvSetting,
    ) -> float:
        """Of the first seed alone, so that later seeds do not change the choice."""
        name = str(setting)
        train = partial(experiment.train, setting.net(epochs), split, name)
        run = experiment.record.run(where, name, 0, train)
        return run.metrics[f"test {experiment.task.score_name}"]
