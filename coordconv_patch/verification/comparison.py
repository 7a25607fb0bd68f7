"""Compare what an ONNX Runtime session gives on one input with what torch gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from coordconv_patch.running.inputs import describe_inputs
from coordconv_patch.verification.check import Check
from coordconv_patch.verification.detections import Detections, Fields
from coordconv_patch.verification.differences import compare, to_array
from coordconv_patch.verification.match_detections import compare_detections
from coordconv_patch.verification.rounding import other_roundings, rounding_noise
from coordconv_patch.verification.torch_run import TorchRun

__all__ = ["Comparison", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """How a file compares on one input.

    Attributes:
        check: The figures.
        misfits: Outputs that cannot be compared at all, in words: the file is that of another
            model.
        problems: What is wrong with the detections, in words.
        undecided: Why these problems say nothing against the file, in words; else empty.
    """

    check: Check
    misfits: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    undecided: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the file gives what torch gives, as far as rounding lets it."""
        return self.check.agrees and not self.misfits and not self.problems


class Comparison:
    """Compares what a session gives on one input with torch; keeps torch's other roundings."""

    def __init__(self, model: nn.Module, inputs: Any, run: TorchRun, tolerance: float) -> None:
        self._inputs, self._run, self._tolerance = inputs, run, tolerance
        self._expected = [to_array(tensor) for tensor in run.tensors]
        self._drawn: list[list[Tensor]] = []
        self._source = other_roundings(model, inputs)
        detected = {index for fields in run.fields for index, _ in fields.values()}
        self._others = [index for index in range(len(run.tensors)) if index not in detected]

    def compare(self, actual: Sequence[np.ndarray[Any, Any]]) -> Verdict:
        """The verdict on a session's outputs."""
        inputs = describe_inputs(self._inputs)
        misfits = self._misfits(actual)
        if misfits:
            return Verdict(Check(inputs, math.inf, self._tolerance, 0.0), misfits)
        expected = [self._run.tensors[index] for index in self._others]
        difference = compare(expected, [actual[index] for index in self._others])
        noise = None if difference <= self._tolerance else self._noise(expected, difference)
        check = Check(inputs, difference, self._tolerance, noise)
        if not check.agrees or not self._run.fields:
            return Verdict(check)
        return self._with_detections(check, actual)

    def _misfits(self, actual: Sequence[np.ndarray[Any, Any]]) -> tuple[str, ...]:
        """Outputs of other shapes than torch's; of detections, how many there are may differ."""
        if len(actual) != len(self._expected):
            return (f"the file gives {len(actual)} outputs, torch {len(self._expected)}",)
        return tuple(
            f"output {index} of the file has the shape {actual[index].shape}, that of torch "
            f"{self._expected[index].shape}"
            for index in self._others
            if actual[index].shape != self._expected[index].shape
        )

    def _noise(self, expected: Sequence[Tensor], difference: float) -> float:
        """How far the worst of several roundings moves the outputs; no more than are needed."""
        noise = 0.0
        for rounded in self._rounded():
            chosen = [rounded[index] for index in self._others if index < len(rounded)]
            noise = max(noise, rounding_noise(expected, chosen))
            if Check("", difference, self._tolerance, noise).agrees:
                break
        return noise

    def _with_detections(self, check: Check, actual: Sequence[np.ndarray[Any, Any]]) -> Verdict:
        differences, noises = [check.difference], [check.noise]
        matched = unstable = 0
        problems: list[str] = []
        undecided: set[str] = set()
        for picture, fields in enumerate(self._run.fields):
            expected = Detections.take(fields, self._expected)
            detections = Detections.take(fields, actual)
            assert expected is not None
            if detections is None:
                shapes = ", ".join(
                    f"{name} {actual[index][part].shape}" for name, (index, part) in fields.items()
                )
                problems.append(f"picture {picture}: the file gives no detections, but {shapes}")
                undecided.add("")
                continue
            agreement = compare_detections(
                expected, detections, self._roundings(fields), self._tolerance
            )
            differences.append(agreement.difference)
            noises.append(agreement.noise)
            matched += agreement.matched
            unstable += agreement.unstable
            problems += [f"picture {picture}: {problem}" for problem in agreement.problems]
            undecided |= {agreement.undecided} if agreement.problems else set()
        measured = [noise for noise in noises if noise is not None]
        judged = replace(
            check,
            difference=max(differences),
            noise=max(measured, default=None),
            detections=matched,
            unstable=unstable,
        )
        return Verdict(judged, (), tuple(problems), "" if "" in undecided else ". ".join(undecided))

    def _roundings(self, fields: Fields) -> Iterator[Detections]:
        """Torch's detections in one picture with other rounding."""
        for outputs in self._rounded():
            detections = Detections.take(fields, [to_array(tensor) for tensor in outputs])
            if detections is not None:
                yield detections

    def _rounded(self) -> Iterator[list[Tensor]]:
        """Torch's outputs with other rounding; computed once for all."""
        for number in itertools.count():
            if number == len(self._drawn):
                outputs = next(self._source, None)
                if outputs is None:
                    return
                self._drawn.append(outputs)
            yield self._drawn[number]
