"""Compare an ONNX file, as ONNX Runtime runs it, with the torch model.

Differences are relative to the largest magnitude in the output compared, so
that one number suits logits, boxes and masks. What a detector finds is compared
as a set, see :mod:`coordconv_patch.verification.match_detections`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from coordconv_patch.arguments import check_example_inputs, check_names, check_number, check_path
from coordconv_patch.errors import ExportError, listing
from coordconv_patch.layers.place_of import theta_of
from coordconv_patch.patching.placed_model import PlacedModel, with_places
from coordconv_patch.running.inputs import check_is_module, in_signature_order, tensors_in
from coordconv_patch.runtime.providers import make_session, working_providers
from coordconv_patch.verification.bfloat16 import has_bfloat16, in_float32
from coordconv_patch.verification.check import Check
from coordconv_patch.verification.comparison import Comparison, Verdict
from coordconv_patch.verification.differences import to_array
from coordconv_patch.verification.torch_run import TorchRun, run_torch

__all__ = ["Verifier", "run_session", "verify_onnx"]

_LOG = logging.getLogger(__name__)


def verify_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    providers: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    disabled_optimizers: Sequence[str] = (),
    places: Tensor | Any | None = None,
) -> Check:
    """Run an ONNX file and the torch model on the same inputs and compare every output.

    Detections (``boxes``, ``scores`` and what goes with them) are matched one to one; one
    that only the file or only torch has is accepted if torch itself finds or loses it when
    it is computed with other rounding, and reported in ``Check.unstable``.

    Args:
        model: The torch model; it is run in evaluation mode.
        path: The ONNX file.
        example_inputs: As for :func:`coordconv_patch.plan`; a detector of torchvision takes
            a list of images: ``[image]``, each (C, H, W).
        providers: Execution providers; ``None``: those that work here.
        tolerance: Largest difference allowed, relative to the largest output.
        disabled_optimizers: ONNX Runtime graph optimizers to leave out.
        places: For a file with places, those of the samples, see :func:`coordconv_patch.places`;
            ``None``: the file takes samples for whole pictures.

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
    if places is not None:
        example_inputs = with_places(
            in_signature_order(model, example_inputs), theta_of(places).float()
        )
        model = PlacedModel(model)
    verifier = Verifier(
        model,
        check_path("path", path),
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
        model: nn.Module,
        path: str | os.PathLike[str],
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

        ``expected`` is what torch gives on it, if that is known already.
        """
        run = expected or run_torch(self._model, example_inputs)
        comparison = Comparison(self._model, example_inputs, run, self._tolerance)
        feeds = tensors_in(in_signature_order(self._model, example_inputs))
        verdict = comparison.compare(run_session(self._session, feeds))
        _LOG.debug(
            "%s on %s: differs from torch by %.2g of the largest output on %s",
            self._path,
            self._providers[0],
            verdict.check.difference,
            verdict.check.inputs,
        )
        if verdict.agrees:
            return verdict.check

        def agrees(**options: Any) -> bool:
            session = self._make_session(**options)
            return comparison.compare(run_session(session, feeds)).agrees

        raise ExportError(self._difference(verdict, agrees))

    def _difference(self, verdict: Verdict, agrees: Callable[..., bool]) -> str:
        """What differs, by how much, and why, in words."""
        check = verdict.check
        if verdict.misfits:
            return (
                f"{os.fspath(self._path)} does not fit the model: {listing(verdict.misfits)} (on "
                f"{check.inputs}). Is it the file of another model?"
            )
        how = f"by {check.difference:.3g} of the largest output"
        if verdict.problems:
            how = f"in what they detect: {'; '.join(verdict.problems)}"
        elif math.isinf(check.difference):
            how = "in which outputs are infinite or not a number"
        return (
            f"ONNX Runtime ({self._providers[0]}) and torch differ on {check.inputs} {how}; "
            f"allowed are {check.tolerance:g}, float32 rounding accounts for "
            f"{check.noise or 0.0:.2g}. {verdict.undecided or _cause(agrees, self._disabled)}"
        )


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
    return (
        "The file computes something else, with every optimizer off too. Is it of this model, with "
        "these weights? If it was just exported: try another lowering= or exporter="
    )


def run_session(session: Any, feeds: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """The outputs of a session on tensors in the order of its inputs; or an ExportError."""
    names = [value.name for value in session.get_inputs()]
    if len(names) < len(feeds):  # those that the file has a value for itself: places
        names += [value.name for value in session.get_overridable_initializers()]
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
