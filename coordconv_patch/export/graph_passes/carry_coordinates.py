"""Let coordinates ride along in the activations between linear 1x1 convolutions.

In networks of inverted bottlenecks (MobileNets, EfficientNets) a narrow activation t, with no
nonlinearity behind it, goes to wide 1x1 convolutions, and to sums with the next such
activation. Where t carries the K coordinate channels c as channels of its own, the wide
convolution's branch is part of the convolution::

    conv(t, W_E) + conv(c, V_E)    ->   conv([t ; c], [W_E ; V_E])

t gets them from the convolution that it begins with: K output channels more, whose weights
are zero, in the sum with a branch whose weights there are the identity. Residual sums hand
them on, as the other terms are zero in these channels. The branches of the narrow
convolutions themselves need no sum either: all their readers are linear, so V_P moves on::

    W_E conv(c, V_P) = conv(c, W_E V_P)

What it saves is a pass over every wide activation. ONNX Runtime's CPU kernels handle channels
in blocks of 16, so coordinates ride for nothing where the last block has room for them, as in
24 or 40 channels; elsewhere a further block costs about what it saves, and t is left alone.
OpenVINO's kernels take any number of channels; there they ride everywhere.
"""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RefusedError, RewriteResult, Tally
from coordconv_patch.export.graph_passes.streams import (
    Site,
    Sites,
    Stream,
    check_room,
    stream_from,
)
from coordconv_patch.export.graph_passes.vocabulary import store_, stored_numbers

__all__ = ["CarryCoordinates"]

_ALIGNMENT = 4
"""ONNX Runtime keeps activations in blocks only if their channels are a multiple of this."""


class CarryCoordinates(ir.passes.InPlacePass):
    """Lets narrow activations carry coordinates to the 1x1 convolutions that read them.

    Meant for graphs as they are exported, before their additions are ordered. Leaves nodes that
    nothing reads any more.

    Args:
        in_blocks: Whether the runtime keeps activations in blocks of channels, as ONNX Runtime's
            CPU kernels do: coordinates then ride only where the last block has room for them,
            and the number of channels stays a multiple of 4.
    """

    def __init__(self, in_blocks: bool = True) -> None:
        super().__init__()
        self._in_blocks = in_blocks

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("carry_coordinates")
        sites = Sites(graph)
        for first in sites:
            # What no such convolution reads need not carry anything.
            is_meant = any(sites.with_conv(*use) is not None for use in first.total.uses())
            with tally.attempt(first.conv) if is_meant else contextlib.suppress(RefusedError):
                if self._in_blocks:
                    check_room(first)
                stream = stream_from(first, sites)
                _carry_(graph, stream, _ALIGNMENT if self._in_blocks else 1)
                sites.take(stream)
                tally.count += len(stream.readers)
        return tally.result(model)


def _carry_(graph: ir.Graph, stream: Stream, alignment: int) -> None:
    first_weight = stored_numbers(stream.first.branch.inputs[1])
    channels, count = first_weight.shape[:2]
    added = count + -(channels + count) % alignment
    identity = np.eye(added, count, dtype=np.float32).reshape(added, *first_weight.shape[1:])
    moved = {site: stored_numbers(site.branch.inputs[1]) for site in stream.narrow}
    for site, value in stream.readers:
        weight, own = stored_numbers(site.conv.inputs[1]), stored_numbers(site.branch.inputs[1])
        columns = own.astype(np.float64)
        for term in stream.terms[value]:
            columns += np.einsum("ec...,ck...->ek...", weight, moved[term], dtype=np.float64)
        unused = np.zeros_like(own, shape=(len(own), added - count, *own.shape[2:]))
        joined = np.concatenate((weight, columns.astype(np.float32), unused), axis=1)
        store_(site.conv.inputs[1], joined)
        _drop_branch(graph, site)
    for site in (stream.first, *stream.narrow):
        for parameter in site.conv.inputs[1:]:
            rows = stored_numbers(parameter)
            store_(parameter, np.concatenate((rows, np.zeros_like(rows[:1].repeat(added, 0)))))
        _widen(site.conv.outputs[0], added)
    store_(stream.first.branch.inputs[1], np.concatenate((first_weight, identity)))
    _widen(stream.first.branch.outputs[0], added)
    for site in stream.narrow:
        _drop_branch(graph, site)
    for value in stream.terms:
        _widen(value, added)


def _widen(value: ir.Value, count: int) -> None:
    """Record that an activation has more channels."""
    if value.shape is not None:
        batch, channels, *rest = value.shape
        value.shape = ir.Shape(
            [batch, channels + count if isinstance(channels, int) else None, *rest]
        )


def _drop_branch(graph: ir.Graph, site: Site) -> None:
    """Let the convolution's output take the place of the sum with its branch."""
    site.total.replace_all_uses_with(site.conv.outputs[0])
    graph.remove([site.addition, site.branch], safe=True)
