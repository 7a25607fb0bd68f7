"""What the supervised experiments have in common: nets and controls, trained over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from experiment import Options, Record, Run
from not_so_clevr import SPLITS, Split
from not_so_clevr_training import Recipe, Task, fit
from torch import nn
from variants import as_variant


@dataclass(frozen=True)
class Net:
    """A network, and how it is trained.

    Attributes:
        build: Makes it, freshly initialised.
        recipe: Its training.
    """

    build: Callable[[], nn.Module]
    recipe: Recipe

    def variant(self, variant: str) -> Net:
        """The same, its first convolution as :func:`as_variant` has it."""
        return replace(self, build=lambda: as_variant(self.build(), variant, "first"))


@dataclass(frozen=True)
class Supervised:
    """One experiment: a task, its record, and what its picture needs of a trained net.

    Attributes:
        record: Where the runs go.
        options: What was asked for.
        task: What the nets are to learn.
        kept: By name, text that is made from the trained net and the centres.
    """

    record: Record
    options: Options
    task: Task
    kept: dict[str, Callable[[nn.Module, Split], str]]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are run; one is enough to show the mechanism."""
        return ("uniform",) if self.options.quick else tuple(SPLITS)

    @property
    def controls(self) -> tuple[str, ...]:
        """Variants of the patched net that should learn nothing."""
        return ("plain",) if self.options.quick else ("plain", "scrambled")

    def train(self, net: Net, split: str, label: str) -> Run:
        """Train a net from its initialisation and score it.

        Args:
            net: Which.
            split: Name of the split.
            label: Shown beside the progress bar.
        """
        centers = SPLITS[split]()
        model = net.build()
        run = fit(model, centers, self.task, net.recipe, self.options, f"{label}, {split}")
        return replace(run, extra={name: keep(model, centers) for name, keep in self.kept.items()})

    def compare(
        self,
        patchable: Net,
        others: Mapping[str, Mapping[str, Net]],
        control_splits: Iterable[str],
    ) -> None:
        """Run what the record lacks: the patched net and others, on all splits and seeds.

        Args:
            patchable: The net that is patched.
            others: By split, the nets that it is compared with, by their name in the record.
            control_splits: Where ``patchable`` is trained plain and with scrambled coordinates
                as well: with one seed, for neither gets anywhere.
        """
        for seed in self.options.seeds:
            for split in self.splits:
                nets = {"patched": patchable.variant("patched"), **others[split]}
                for name, net in nets.items():
                    self.record.run(split, name, seed, partial(self.train, net, split, name))
        for split in control_splits:
            for name in self.controls:
                net = patchable.variant(name)
                self.record.run(split, name, 0, partial(self.train, net, split, name))
