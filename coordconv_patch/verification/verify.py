"""Compare an ONNX file, as ONNX Runtime runs it, with the torch model.

Differences are relative to the largest magnitude in the output compared, so
that one number suits logits, boxes and masks. What a detector finds is compared
as a set, see :mod:`coordconv_patch.verification.detections`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.arguments import check_example_inputs, check_names, check_number, check_path
from coordconv_patch.errors import ExportError
from coordconv_patch.running.inputs import (
    check_is_module,
    describe_inputs,
    in_signature_order,
    run_model,
)
from coordconv_patch.running.untouched import evaluating
from coordconv_patch.runtime.providers import make_session, working_providers
from coordconv_patch.verification.bfloat16 import has_bfloat16, in_float32
from coordconv_patch.verification.detections import (
    Detections,
    Fields,
    compare_detections,
    find_fields,
)
from coordconv_patch.verification.rounding import in_float64, other_roundings

__all__ = [
    "Check",
    "TorchRun",
    "Verifier",
    "compare",
    "run_torch",
    "tensors_in",
    "to_array",
    "torch_outputs",
    "verify_onnx",
]


@dataclass(frozen=True)
class Check:
    """One comparison of the ONNX file with the torch model.

    Attributes:
        inputs: What it was run on.
        difference: Largest absolute difference over all outputs, each relative to the
            largest magnitude of that output in torch; between matched detections, where
            the outputs are such.
        tolerance: What was allowed.
        noise: The float32 torch model's own difference from float64; only measured when
            ``difference`` is above the tolerance asked for.
        detections: Detections that the file and torch share; ``None`` if the model is no
            detector. With 0 of them nothing was compared.
        unstable: Further detections that rounding makes appear, vanish or jump in torch
            itself.
    """

    inputs: str
    difference: float
    tolerance: float
    noise: float | None = None
    detections: int | None = None
    unstable: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the difference is within what is allowed; an infinite one never is."""
        return math.isfinite(self.difference) and self.difference <= self.allowed

    @property
    def allowed(self) -> float:
        """The tolerance, or three times the rounding noise where that is more."""
        noise = self.noise or 0.0
        return max(self.tolerance, 3 * noise) if math.isfinite(noise) else self.tolerance


@dataclass(frozen=True)
class TorchRun:
    """What the torch model gave on one input.

    Attributes:
        tensors: The output tensors, in pytree order.
        fields: Which of them are detections, one entry a picture.
    """

    tensors: list[Tensor]
    fields: tuple[Fields, ...]


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any,
    *,
    providers: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    disabled_optimizers: Sequence[str] = (),
) -> Check:
    """Run an ONNX file and the torch model on the same inputs and compare every output.

    Detections (``boxes``, ``scores`` and what goes with them) are matched one to one; one
    that only the file or only torch has is accepted if torch itself finds or loses it when
    it is computed with other rounding, and reported in ``Check.unstable``.

    Args:
        path: The ONNX file.
        model: The torch model; it is run in evaluation mode.
        example_inputs: As for :func:`coordconv_patch.plan`; a detector of torchvision takes
            a list of images: ``[image]``, each (C, H, W).
        providers: Execution providers; ``None``: those that work here.
        tolerance: Largest difference allowed, relative to the largest output.
        disabled_optimizers: ONNX Runtime graph optimizers to leave out.

    Returns:
        The comparison.

    Raises:
        ArgumentError: If an argument is impossible.
        ExportError: If the outputs differ by more, with the figures (or the detections)
            and, where it can be found, the cause; or if the file cannot be loaded, or run
            on these inputs.
        PatchError: If the torch model fails on these inputs.
    """
    check_is_module(model)
    check_example_inputs(example_inputs, optional=False)
    check_number("tolerance", tolerance)
    check_names("disabled_optimizers", disabled_optimizers)
    verifier = Verifier(
        check_path("path", path),
        model,
        providers=providers,
        tolerance=tolerance,
        disabled_optimizers=disabled_optimizers,
    )
    return verifier.check(example_inputs)


class Verifier:
    """An ONNX file beside its torch model: one session, for any number of inputs.

    The arguments are those of :func:`verify_onnx`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        providers: Sequence[str] | None = None,
        tolerance: float = 1e-4,
        disabled_optimizers: Sequence[str] = (),
    ) -> None:
        self._path = path
        self._model = model
        self._providers = working_providers(providers)
        self._tolerance = tolerance
        self._disabled = list(disabled_optimizers)
        self.runs_bfloat16_in_float32 = False
        """Whether the provider had no bfloat16, so that the float32 twin of the graph ran."""

    @functools.cached_property
    def _session(self) -> Any:
        return self._make_session(disabled_optimizers=self._disabled)

    def _make_session(self, **options: Any) -> Any:
        """A session of the file, or of its float32 twin where the runtime lacks bfloat16."""
        if not self.runs_bfloat16_in_float32:
            try:
                return make_session(self._path, self._providers, **options)
            except ExportError:
                if not has_bfloat16(self._path):
                    raise
                self.runs_bfloat16_in_float32 = True
        return make_session(in_float32(self._path), self._providers, **options)

    def check(self, example_inputs: Any, expected: TorchRun | None = None) -> Check:
        """Compare on one input, see :func:`verify_onnx`.

        Args:
            example_inputs: The input.
            expected: What torch gives on it, if that is known already.
        """
        run = expected or run_torch(self._model, example_inputs)
        comparison = _Comparison(self._model, example_inputs, run, self._tolerance)
        feeds = tensors_in(in_signature_order(self._model, example_inputs))
        check, problems = comparison.compare(run_session(self._session, feeds))
        if check.agrees and not problems:
            return check

        def agrees(**options: Any) -> bool:
            session = self._make_session(**options)
            other, other_problems = comparison.compare(run_session(session, feeds))
            return other.agrees and not other_problems

        found = (
            f"in what they detect: {'; '.join(problems)}"
            if problems
            else f"by {check.difference:.3g} of the largest output"
        )
        raise ExportError(
            f"ONNX Runtime ({self._providers[0]}) and torch differ on {check.inputs} {found}; "
            f"allowed are {check.tolerance:g}, float32 rounding accounts for "
            f"{check.noise or 0.0:.2g}. {_cause(agrees, self._disabled)}"
        )


class _Comparison:
    """Compares what a session gives on one input with torch; keeps torch's other roundings."""

    def __init__(self, model: nn.Module, inputs: Any, run: TorchRun, tolerance: float) -> None:
        self._model, self._inputs, self._run, self._tolerance = model, inputs, run, tolerance
        self._expected = [to_array(tensor) for tensor in run.tensors]
        self._drawn: list[list[np.ndarray[Any, Any]]] = []
        self._source = other_roundings(torch_outputs, model, inputs)
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
            found = Detections.take(fields, actual)
            assert expected is not None
            if found is None:
                shapes = ", ".join(
                    f"{name} {actual[index][part].shape}" for name, (index, part) in fields.items()
                )
                problems.append(f"picture {picture}: the file gives no detections, but {shapes}")
                continue
            agreement = compare_detections(
                expected, found, self._roundings(fields), self._tolerance
            )
            differences.append(agreement.difference)
            noises.append(agreement.noise)
            matched += agreement.matched
            unstable += agreement.unstable
            problems += [f"picture {picture}: {problem}" for problem in agreement.problems]
        measured = [noise for noise in noises if noise is not None]
        return (
            Check(
                check.inputs,
                max(differences),
                check.tolerance,
                max(measured) if measured else None,
                matched,
                unstable,
            ),
            problems,
        )

    def _roundings(self, fields: Fields) -> Iterator[Detections]:
        """Torch's detections in one picture with other rounding; computed once for all."""
        number = 0
        while True:
            if number == len(self._drawn):
                outputs = next(self._source, None)
                if outputs is None:
                    return
                self._drawn.append([to_array(tensor) for tensor in outputs])
            found = Detections.take(fields, self._drawn[number])
            number += 1
            if found is not None:
                yield found


def _cause(agrees: Callable[..., bool], disabled: Sequence[str]) -> str:
    """A sentence about what is to blame, found by leaving optimizers out."""
    if agrees(disabled_optimizers=[*disabled, "Pad_Fusion"]):
        return (
            "The cause is ONNX Runtime's own optimizer Pad_Fusion, not the file: pass "
            'disabled_optimizers=["Pad_Fusion"] here and to onnxruntime.InferenceSession'
        )
    if agrees(graph_optimization=False):
        return (
            "Without graph optimisation ONNX Runtime agrees, so one of its optimizers is to "
            "blame, not the file: lower graph_optimization_level in its SessionOptions"
        )
    return "The graph itself is different: try another lowering= or exporter="


def run_torch(model: nn.Module, example_inputs: Any) -> TorchRun:
    """The model's outputs in evaluation mode.

    Raises:
        PatchError: If the model fails on these inputs.
    """
    with evaluating(model):
        outputs = _plain(run_model(model, example_inputs))
    return TorchRun(tensors_in(outputs), find_fields(outputs))


def torch_outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The model's output tensors in evaluation mode, in pytree order."""
    return run_torch(model, example_inputs).tensors


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and output classes, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(_plain(values)) if isinstance(leaf, Tensor)]


def _plain(values: Any) -> Any:
    """A mapping of a class that pytree does not know, as a dict."""
    if isinstance(values, Mapping) and type(values) not in pytree.SUPPORTED_NODES:
        return dict(values)
    return values


def to_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as ONNX Runtime's Python interface takes it; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    array: np.ndarray[Any, Any] = (
        tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    ).numpy()
    return array


def run_session(session: Any, feeds: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Feed tensors to a session's inputs in order and return its outputs.

    Raises:
        ExportError: If the number of inputs does not fit, or the run fails.
    """
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(feeds):
        raise ExportError(
            f"the ONNX graph has inputs {names}, but the example has {len(feeds)} tensors; a model "
            "of a list of images is exported for the number of images in its example"
        )
    arrays = {name: to_array(tensor) for name, tensor in zip(names, feeds, strict=True)}
    try:
        return list(session.run(None, arrays))
    except Exception as error:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ExportError(f"ONNX Runtime cannot run the graph on {shapes}: {error}") from error


def compare(expected: Sequence[Tensor], actual: Sequence[np.ndarray[Any, Any]]) -> float:
    """Largest difference over all outputs, each relative to its largest magnitude.

    Not-a-number agrees with itself; a difference in number or shape is infinite.
    """
    if len(expected) != len(actual):
        return float("inf")
    worst = 0.0
    for reference, array in zip(expected, actual, strict=True):
        left = reference.detach().cpu().to(torch.float64).numpy()
        right = np.asarray(array).astype(np.float64)
        if left.shape != right.shape or not np.array_equal(np.isnan(left), np.isnan(right)):
            return float("inf")
        if not left.size:
            continue
        finite = np.where(np.isfinite(left), np.abs(left), 0.0)
        with np.errstate(invalid="ignore"):
            apart = np.where(left == right, 0.0, np.abs(left - right))
        apart = np.where(np.isnan(left), 0.0, apart)
        scale = max(float(finite.max()), float(np.finfo(np.float32).tiny))
        worst = max(worst, float(apart.max()) / scale)
    return worst


def rounding_noise(
    model: nn.Module, example_inputs: Any, outputs: Sequence[int] | None = None
) -> float:
    """How far the model's outputs move when it is computed in float64 instead.

    0 if it cannot be computed in float64. ``outputs`` are the numbers of those to
    look at; ``None``: all.
    """
    try:
        exact = in_float64(torch_outputs, model, example_inputs)
        own = torch_outputs(model, example_inputs)
        chosen = range(len(own)) if outputs is None else outputs
        return compare([exact[i] for i in chosen], [to_array(own[i]) for i in chosen])
    except Exception:
        return 0.0
