"""Compare what an ONNX Runtime session gives on one input with what torch gives."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from coordconv_patch.running.inputs import describe_inputs
from coordconv_patch.verification.check import Check
from coordconv_patch.verification.detections import Detections, Fields
from coordconv_patch.verification.differences import compare, to_array
from coordconv_patch.verification.match_detections import compare_detections
from coordconv_patch.verification.rounding import other_roundings, rounding_noise
from coordconv_patch.verification.torch_run import TorchRun

__all__ = ["Comparison"]


class Comparison:
    """Compares what a session gives on one input with torch; keeps torch's other roundings."""

    def __init__(self, model: nn.Module, inputs: Any, run: TorchRun, tolerance: float) -> None:
        self._model, self._inputs, self._run, self._tolerance = model, inputs, run, tolerance
        self._expected = [to_array(tensor) for tensor in run.tensors]
        self._drawn: list[list[np.ndarray[Any, Any]]] = []
        self._source = other_roundings(model, inputs)
        detected = {index for fields in run.fields for index, _ in fields.values()}
        self._others = [index for index in range(len(run.tensors)) if index not in detected]

    @functools.cached_property
    def _noise(self) -> float:
        return rounding_noise(self._model, self._inputs, outputs=self._others)

    def compare(self, actual: Sequence[np.ndarray[Any, Any]]) -> tuple[Check, list[str]]:
        """The check, and what is wrong with the detections."""
        inputs = describe_inputs(self._inputs)
        if len(actual) != len(self._expected):
            return Check(inputs, math.inf, self._tolerance, 0.0), []
        expected = [self._run.tensors[index] for index in self._others]
        difference = compare(expected, [actual[index] for index in self._others])
        noise = None if difference <= self._tolerance else self._noise
        check = Check(inputs, difference, self._tolerance, noise)
        if not check.agrees or not self._run.fields:
            return check, []
        return self._with_detections(check, actual)

    def _with_detections(
        self, check: Check, actual: Sequence[np.ndarray[Any, Any]]
    ) -> tuple[Check, list[str]]:
        differences, noises = [check.difference], [check.noise]
        matched = unstable = 0
        problems: list[str] = []
        for picture, fields in enumerate(self._run.fields):
            expected = Detections.take(fields, self._expected)
            detections = Detections.take(fields, actual)
            assert expected is not None
            if detections is None:
                shapes = ", ".join(
                    f"{name} {actual[index][part].shape}" for name, (index, part) in fields.items()
                )
                problems.append(f"picture {picture}: the file gives no detections, but {shapes}")
                continue
            agreement = compare_detections(
                expected, detections, self._roundings(fields), self._tolerance
            )
            differences.append(agreement.difference)
            noises.append(agreement.noise)
            matched += agreement.matched
            unstable += agreement.unstable
            problems += [f"picture {picture}: {problem}" for problem in agreement.problems]
        measured = [noise for noise in noises if noise is not None]
        judged = replace(
            check,
            difference=max(differences),
            noise=max(measured, default=None),
            detections=matched,
            unstable=unstable,
        )
        return judged, problems

    def _roundings(self, fields: Fields) -> Iterator[Detections]:
        """Torch's detections in one picture with other rounding; computed once for all."""
        for number in itertools.count():
            if number == len(self._drawn):
                outputs = next(self._source, None)
                if outputs is None:
                    return
                self._drawn.append([to_array(tensor) for tensor in outputs])
            detections = Detections.take(fields, self._drawn[number])
            if detections is not None:
                yield detections
