"""Compare an ONNX file, as ONNX Runtime runs it, with the torch model.

Differences are relative to the largest magnitude in the output compared, so
that one number suits logits, boxes and masks.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.errors import ExportError
from coordconv_patch.export.providers import make_session, working_providers
from coordconv_patch.inputs import describe_inputs, in_signature_order, run_model
from coordconv_patch.modes import evaluating

__all__ = ["Check", "compare", "tensors_in", "verify_onnx"]


@dataclass(frozen=True)
class Check:
    """One comparison of the ONNX file with the torch model.

    Attributes:
        inputs: What it was run on.
        difference: Largest absolute difference over all outputs, each relative to the
            largest magnitude of that output in torch.
        tolerance: What was allowed.
        noise: The float32 torch model's own difference from float64; only measured when
            ``difference`` is above the tolerance asked for.
    """

    inputs: str
    difference: float
    tolerance: float
    noise: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the difference is within what is allowed; an infinite one never is."""
        return math.isfinite(self.difference) and self.difference <= self.allowed

    @property
    def allowed(self) -> float:
        """The tolerance, or three times the rounding noise where that is more."""
        noise = self.noise or 0.0
        return max(self.tolerance, 3 * noise) if math.isfinite(noise) else self.tolerance


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

    Args:
        path: The ONNX file.
        model: The torch model; it is run in evaluation mode.
        example_inputs: As for :func:`coordconv_patch.plan`.
        providers: Execution providers; ``None``: those that work here.
        tolerance: Largest difference allowed, relative to the largest output.
        disabled_optimizers: ONNX Runtime graph optimizers to leave out.

    Returns:
        The comparison.

    Raises:
        ExportError: If the outputs differ by more, with the figures and, where it can
            be found, the cause; or if the file cannot be loaded, or run on these inputs.
        PatchError: If the torch model fails on these inputs.
    """
    working = working_providers(providers)
    expected = torch_outputs(model, example_inputs)
    feeds = tensors_in(in_signature_order(model, example_inputs))

    def difference(**options: Any) -> float:
        session = make_session(path, working, **options)
        return compare(expected, run_session(session, feeds))

    found = difference(disabled_optimizers=disabled_optimizers)
    check = Check(describe_inputs(example_inputs), found, tolerance)
    if not check.agrees:
        noise = rounding_noise(model, example_inputs)
        check = Check(check.inputs, found, tolerance, noise)
    if check.agrees:
        return check
    cause = _cause(difference, check, disabled_optimizers)
    raise ExportError(
        f"ONNX Runtime ({working[0]}) and torch differ on {check.inputs} by {found:.3g} of the "
        f"largest output; allowed are {tolerance:g}, float32 rounding accounts for "
        f"{check.noise:.2g}. {cause}"
    )


def _cause(difference: Any, check: Check, disabled: Sequence[str]) -> str:
    """A sentence about what is to blame, found by leaving optimizers out."""
    if difference(disabled_optimizers=[*disabled, "Pad_Fusion"]) <= check.allowed:
        return (
            "The cause is ONNX Runtime's own optimizer Pad_Fusion, not the file: pass "
            'disabled_optimizers=["Pad_Fusion"] here and to onnxruntime.InferenceSession'
        )
    if difference(graph_optimization=False) <= check.allowed:
        return (
            "Without graph optimisation ONNX Runtime agrees, so one of its optimizers is to "
            "blame, not the file: lower graph_optimization_level in its SessionOptions"
        )
    return "The graph itself is different: try another lowering= or exporter="


def torch_outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The model's output tensors in evaluation mode, in pytree order."""
    with evaluating(model):
        return tensors_in(run_model(model, example_inputs))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and output classes, in pytree order."""
    if isinstance(values, Mapping) and type(values) not in pytree.SUPPORTED_NODES:
        values = dict(values)
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def run_session(session: Any, feeds: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Feed tensors to a session's inputs in order and return its outputs.

    Raises:
        ExportError: If the number of inputs does not fit, or the run fails.
    """
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(feeds):
        raise ExportError(
            f"the ONNX graph has inputs {names}, but the example has {len(feeds)} tensors"
        )
    arrays = {
        name: tensor.detach().cpu().numpy() for name, tensor in zip(names, feeds, strict=True)
    }
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


def rounding_noise(model: nn.Module, example_inputs: Any) -> float:
    """How far the model's outputs move when it is computed in float64 instead.

    0 if it cannot be computed in float64.
    """
    try:
        double = copy.deepcopy(model).double()
        exact = torch_outputs(double, _map_floats(example_inputs, torch.float64))
        return compare(exact, [tensor.numpy() for tensor in torch_outputs(model, example_inputs)])
    except Exception:
        return 0.0


def _map_floats(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values
    )
