"""The graph of a model in any lowering, rewritten for the runtime; nothing is written to disk."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from coordconv_patch.export.auto_lowering import MAX_GROWTH, Chooser
from coordconv_patch.export.autotune import Trial, autotune
from coordconv_patch.export.axes import ExportRequest, batch_size
from coordconv_patch.export.default_place import give_default_place_
from coordconv_patch.export.exporters import Exported, export_graph
from coordconv_patch.export.graph_passes.refusals import Refusal
from coordconv_patch.export.model_file import write_model
from coordconv_patch.export.rewrites import passes_for, rewrite_
from coordconv_patch.export.targets import BY_PROVIDER, Target
from coordconv_patch.followers.follower import followers_of
from coordconv_patch.lowering.lower import Lowered, lower_
from coordconv_patch.lowering.map import Map
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite, lowering_sites
from coordconv_patch.lowering.unknown_zero import UnknownZero, WithZero
from coordconv_patch.lowering.unstored import Computed
from coordconv_patch.patching.placed_model import PlacedModel
from coordconv_patch.running.inputs import tensors_in
from coordconv_patch.runtime.binding import BoundRun
from coordconv_patch.runtime.providers import make_session
from coordconv_patch.verification.differences import to_array

__all__ = ["GraphMaker", "PatchedGraph"]


@dataclass(frozen=True)
class PatchedGraph(Exported):
    """The graph of a patched model, the lowering of each site, and what graph passes left alone."""

    lowerings: dict[str, str]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class GraphMaker:
    """Makes the graph of one model, whose batch norms are folded, in any lowering.

    Attributes:
        providers: The execution providers to run on, best first.
        target: What the graph is meant for.
        is_asked_for: Whether the caller named a lowering, which then stays what it is.
    """

    folded: nn.Module
    request: ExportRequest
    exporter: str
    providers: tuple[str, ...]
    target: Target
    is_asked_for: bool

    @property
    def written_for(self) -> str:
        """The provider whose lowerings ``"auto"`` takes."""
        return self.target.provider or self.providers[0]

    def make(self, choose: Callable[[LoweringSite], str]) -> PatchedGraph:
        """Lower, export and rewrite; the model is left as it was."""
        model, request = copy.deepcopy(self.folded), self.request
        example = request.example_inputs
        zero = None if request.dynamic_batch else UnknownZero()
        lowered = lower_(model, example, choose, zero)
        if zero is not None and _expands_to_batch(lowered):
            model, request = WithZero(model, zero), request.with_zero()
        if request.places:
            model = PlacedModel(model)
        exported = export_graph(model, request, self.exporter)
        if request.places:
            give_default_place_(exported.model, request.places)
        rewrites_for = None if self.is_asked_for else self.written_for
        passes = passes_for(rewrites_for, lowered, batch_size(example), self.target)
        refusals = rewrite_(exported.model, passes)
        return PatchedGraph(**vars(exported), lowerings=lowered.lowerings, refusals=refusals)

    def rule(self, lowering: str) -> Callable[[LoweringSite], str]:
        """The lowering of each site: the one asked for, or by the rule of ``"auto"``."""
        request = self.request
        if request.places or followers_of(self.folded):
            return lambda site: Computed.name  # from the places, and constants of the sizes
        if lowering == "auto" and self.target.lowering != BY_PROVIDER:
            lowering = Computed.name if request.dynamic_size else self.target.lowering
        if lowering == "auto" and not request.dynamic_size and _is_too_old_to_expand(request.opset):
            lowering = Map.name
        if lowering == "auto":
            weights = sum(t.nbytes for t in self.folded.parameters())
            return Chooser(self.written_for, request.dynamic_size, map_budget=MAX_GROWTH * weights)
        return lambda site: lowering

    def tuned(
        self, disabled_optimizers: Sequence[str]
    ) -> tuple[tuple[Trial, ...], Callable[[LoweringSite], str]]:
        """The trials on the provider, and the lowerings that were the fastest."""
        request = self.request
        arrays = [to_array(tensor) for tensor in tensors_in(request.example_inputs)]

        def make_run(lowerings: Mapping[str, str]) -> BoundRun:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trial.onnx"
                write_model(self.make(lambda site: lowerings[site.name]).model, path)
                session = make_session(
                    path,
                    self.providers,
                    disabled_optimizers=disabled_optimizers,
                    rests_between_runs=True,
                )
            return BoundRun(session, arrays)

        tuning = autotune(
            lowering_sites(copy.deepcopy(self.folded), request.example_inputs),
            self.rule("auto"),
            make_run,
        )
        return tuning.trials, lambda site: tuning.lowerings[site.name]


def _is_too_old_to_expand(opset: int | None) -> bool:
    """Whether the TorchScript exporter cannot write an ``expand`` in an operator set."""
    return opset is not None and opset < 9


def _expands_to_batch(lowered: Lowered) -> bool:
    """Whether any site got a form that is computed for each sample of a batch."""
    forms = {LOWERINGS.get(name) for name in lowered.lowerings.values()}
    return any(form is not None and form.expands_to_batch for form in forms)
