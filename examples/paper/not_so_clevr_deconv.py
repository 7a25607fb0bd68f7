"""The authors' plain net, a stack of transposed convolutions, given its best setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from experiment import Record, Run
from not_so_clevr_nets import deconv_stack
from torch import nn

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

    def build(self) -> nn.Sequential:
        """A fresh stack of this size."""
        return deconv_stack(self.kernel, self.multiplier)

    def __str__(self) -> str:
        size = f"deconv {self.kernel}x{self.kernel}, width {self.multiplier}, lr {self.rate:g}"
        return size + (f", decay {self.decay:g}" if self.decay else "")


def best_setting(
    record: Record,
    settings: Sequence[DeconvSetting],
    train_briefly: Callable[[DeconvSetting], Run],
    train_fully: Callable[[DeconvSetting], Run],
    metric: str,
) -> DeconvSetting:
    """The setting that serves the plain net best on the uniform split, with the first seed.

    All are trained briefly, the best few of them to the end. They are compared by a *test*
    score, which favours the plain net.

    Args:
        record: Where the runs go: the brief ones under ``"sweep"``, the others under
            ``"uniform"``; the variant is the setting's text.
        settings: What to choose from.
        train_briefly: Trains a setting on the uniform split for a fraction of the time.
        train_fully: Trains it for as long as the experiment does.
        metric: The test score, higher is better.
    """
    for setting in settings:
        record.run("sweep", str(setting), 0, partial(train_briefly, setting))
    by_sweep = partial(_score, record, "sweep", metric)
    finalists = sorted(settings, key=by_sweep, reverse=True)[:FINALISTS]
    for setting in finalists:
        record.run("uniform", str(setting), 0, partial(train_fully, setting))
    return max(finalists, key=partial(_score, record, "uniform", metric))


def _score(record: Record, where: str, metric: str, setting: DeconvSetting) -> float:
    """Of the first seed alone, so that later seeds do not change the choice."""
    return record.of(where, str(setting))[0].metrics[metric]
