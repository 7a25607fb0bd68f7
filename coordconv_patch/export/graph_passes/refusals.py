"""What a pass did to a graph: how many places it rewrote, and which it left alone, and why.

A function that looks at one place raises :class:`RefusedError` where the place cannot be rewritten,
before it changes anything; :meth:`Tally.attempt` around it turns that into a :class:`Refusal`,
which :class:`~coordconv_patch.export.report.ExportReport` shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx_ir as ir

__all__ = ["Refusal", "RefusedError", "RewriteResult", "Tally"]


class RefusedError(Exception):
    """A place cannot be rewritten; the message says why."""


@dataclass(frozen=True)
class Refusal:
    """A place that a pass is meant for, and left as it is.

    Attributes:
        rewrite: What was not done: the name of the pass's module, such as ``"fold_scales"``.
        place: The name of the node, or of the stored value, that stays.
        reason: Why.
    """

    rewrite: str
    place: str
    reason: str


@dataclass
class RewriteResult(ir.passes.PassResult):
    """What a pass returns: how many places it rewrote, and those that it left as they are."""

    count: int
    refusals: tuple[Refusal, ...] = ()


@dataclass
class Tally:
    """Counts what a pass does, place by place; ``rewrite`` is the name of the pass's module."""

    rewrite: str
    count: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    @contextmanager
    def attempt(self, place: ir.Node | ir.Value) -> Iterator[None]:
        """While entered, :class:`RefusedError` is recorded for a place and goes no further."""
        try:
            yield
        except RefusedError as refused:
            self.refusals.append(Refusal(self.rewrite, str(place.name), str(refused)))

    def result(self, model: ir.Model) -> RewriteResult:
        """The result of the pass on a model."""
        return RewriteResult(model, self.count > 0, self.count, tuple(self.refusals))
