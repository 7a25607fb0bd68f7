"""Check the promise: a model that was just patched gives the outputs that it gave before.

A patched model is compared with the plain one on the example inputs, bit for bit, in evaluation
and in training mode. That takes two forward passes of each, and leaves both as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from coordconv_patch.errors import PatchError, listing
from coordconv_patch.patching.compared_run import ComparedRun, seeded
from coordconv_patch.patching.convolution_inputs import InputChecksums, first_with_other_input
from coordconv_patch.patching.output_values import MISSING, Uncompared, difference_of
from coordconv_patch.running.inputs import run_model, writable_inputs

__all__ = ["Difference", "Promise"]

Mode = Literal["evaluation", "training"]


@dataclass(frozen=True)
class Difference:
    """Where the outputs of two runs differ first.

    Attributes:
        mode: In which mode.
        place: Which output, such as ``"[0]['boxes']"``; ``""`` for a single tensor.
        what: In which way, in words.
        fails: Why the patched model fails, where the plain one runs; ``""`` if it runs too.
    """

    mode: Mode
    place: str = ""
    what: str = ""
    fails: str = ""


class Promise:
    """What a model gave on its example inputs before it was patched.

    Args:
        model: The model. It is run in evaluation mode alone, as others may be running it. The
            run that recorded its sites does not count: while torch functions are watched,
            nn.MultiheadAttention takes another way, whose last bits differ.
        target: What is to be patched: the model, or a copy. It is run in training mode.
        example_inputs: See :func:`coordconv_patch.running.inputs.split_inputs`.
    """

    def __init__(self, model: nn.Module, target: nn.Module, example_inputs: Any) -> None:
        self._model, self._target = model, target
        self._example_inputs = example_inputs
        self._before = self._plain_runs()
        self._after = self._before
        self._inputs: list[tuple[str, int]] = []
        self.reached: dict[Mode, frozenset[str]] = {}
        """The coordinate layers that the patched model ran, in the modes that were compared."""

    def _plain_runs(self) -> dict[Mode, ComparedRun]:
        return {
            "evaluation": ComparedRun.of(self._model, self._example_inputs, training=False),
            "training": ComparedRun.of(self._target, self._example_inputs, training=True),
        }

    def broken(self) -> Difference | None:
        """Where the target's outputs, now patched, are not the model's; ``None`` if nowhere.

        Modes in which the plain model itself fails on the example inputs are left out.
        """
        after: dict[Mode, ComparedRun] = {
            mode: ComparedRun.of(self._target, self._example_inputs, training=mode == "training")
            for mode in self._before
        }
        self._after = after
        self.reached = {
            mode: run.reached
            for mode, run in after.items()
            if self._before[mode].outputs is not None
        }
        broken = _first_difference(self._before, after)
        if broken is not None:
            self._inputs = self._inputs_of_convolutions(broken.mode)
        return broken

    def uncompared(self) -> str:
        """Which outputs could not be compared, for a warning; empty if all could."""
        kinds = {
            f"output{place}": value.kind
            for run in self._after.values()
            for place, value in (run.outputs or {}).items()
            if isinstance(value, Uncompared)
        }
        if not kinds:
            return ""
        return (
            "parts of the output could not be compared before and after patching: "
            f"{listing(f'{place} ({kind})' for place, kind in kinds.items())}"
        )

    def explain(self, broken: Difference) -> str:
        """Say of a broken promise what is different, and where that begins.

        The target is plain again by now.

        Returns:
            Why nothing can be said, for a warning; empty if the promise is kept after all: the
            plain copy has the outputs of the patched one. Copies of weights that lie unaligned in
            memory, as those do that are mapped from a file, can have other last bits.

        Raises:
            PatchError: Otherwise.
        """
        if _first_difference(self._before, self._plain_runs()) is not None:
            return (
                "the model gives other outputs each time that it is run on the example inputs, so "
                "they could not be compared before and after patching"
            )
        if broken.fails:
            raise PatchError(
                f"patching would make the model fail in {broken.mode} mode on the example inputs: "
                f"{broken.fails}. Nothing was changed. Leave out the convolution concerned "
                "(where=...), or pass check=False if the model never runs this way"
            )
        copy = ComparedRun.of(self._target, self._example_inputs, training=False)
        if _first_difference(self._before | {"evaluation": copy}, self._after) is None:
            return ""
        site = first_with_other_input(self._inputs_of_convolutions(broken.mode), self._inputs)
        where = f"the first convolution whose input differs is {site}"
        if not site:
            where = "the input of every convolution is the same, so it arises at the last or later"
        place = f"output{broken.place}" if broken.place else "the output"
        raise PatchError(
            f"patching would change what the model computes: in {broken.mode} mode {place} is not "
            f"the same bit for bit ({broken.what}); {where}. Nothing was changed. Leave out the "
            "convolutions before it (where=...), or pass check=False to patch all the same; and "
            "please report this model"
        )

    def _inputs_of_convolutions(self, mode: Mode) -> list[tuple[str, int]]:
        """The convolutions that run in one mode, in order, each with a checksum of its input."""
        checksums = InputChecksums(self._target)
        with (
            seeded(self._target, mode == "training"),
            torch.no_grad(),
            checksums,
            # What runs before it fails is what there is to see.
            contextlib.suppress(PatchError),
        ):
            run_model(self._target, writable_inputs(self._example_inputs))
        return checksums.seen


def _first_difference(
    plain: Mapping[Mode, ComparedRun], patched: Mapping[Mode, ComparedRun]
) -> Difference | None:
    for mode, before in plain.items():
        after = patched[mode]
        if before.outputs is None:
            continue
        if after.outputs is None:
            return Difference(mode, fails=after.error)
        for place in dict.fromkeys((*before.outputs, *after.outputs)):
            pair = (run.get(place, MISSING) for run in (before.outputs, after.outputs))
            what = difference_of(*pair)
            if what:
                return Difference(mode, place=place, what=what)
    return None
