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
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from coordconv_patch.export.graph_passes.order_additions import (
    is_branch,
    is_own_weight,
    is_read_once,
    stored_numbers,
    values_without_inputs,
)

__all__ = ["carry_coordinates_"]

_BLOCK = 16
"""Channels that ONNX Runtime's CPU kernels handle at a time, on processors with AVX-512."""

_ALIGNMENT = 4
"""ONNX Runtime keeps activations in blocks only if their channels are a multiple of this."""


def carry_coordinates_(graph: ir.Graph) -> int:
    """Let narrow activations carry coordinates to the 1x1 convolutions that read them, in place.

    Meant for graphs as they are exported, before their additions are ordered.

    Returns:
        How many branches became part of a convolution.
    """
    independent = values_without_inputs(graph)
    found = (_patched_convolution(node, independent) for node in graph)
    sites = _Sites([site for site in found if site is not None])
    count = 0
    for first in sites.by_total.values():
        stream = _stream_from(first, sites)
        if stream is not None:
            _carry_(graph, stream)
            sites.taken.update((first, *stream.narrow, *(site for site, _ in stream.readers)))
            count += len(stream.readers)
    return count


@dataclass(frozen=True, eq=False)
class _Site:
    """A convolution, its 1x1 branch, and the sum of both."""

    conv: ir.Node
    branch: ir.Node
    addition: ir.Node

    @property
    def total(self) -> ir.Value:
        return self.addition.outputs[0]

    @property
    def channels(self) -> ir.Value:
        """The coordinate channels that the branch reads."""
        value = self.branch.inputs[0]
        assert value is not None
        return value


class _Sites:
    """The sites of a graph, by their sums and by their convolutions; those done are taken."""

    def __init__(self, sites: list[_Site]) -> None:
        self.by_total = {site.total: site for site in sites}
        self.by_conv = {site.conv: site for site in sites}
        self.taken: set[_Site] = set()

    def with_total(self, value: ir.Value) -> _Site | None:
        site = self.by_total.get(value)
        return None if site in self.taken else site

    def with_conv(self, node: ir.Node) -> _Site | None:
        site = self.by_conv.get(node)
        return None if site in self.taken else site


@dataclass
class _Stream:
    """An activation that residual sums hand on, and what reads it.

    Attributes:
        first: The site that it begins with.
        narrow: The other sites whose outputs are summed up in it.
        terms: By value of the stream, the narrow sites among its terms.
        readers: The wide sites, each with the value that it reads.
    """

    first: _Site
    narrow: list[_Site] = field(default_factory=list)
    terms: dict[ir.Value, tuple[_Site, ...]] = field(default_factory=dict)
    readers: list[tuple[_Site, ir.Value]] = field(default_factory=list)


def _patched_convolution(node: ir.Node, independent: set[ir.Value]) -> _Site | None:
    """The site whose sum a node computes, if all of its weights are stored and its own."""
    if node.op_type != "Add" or node.domain:
        return None
    for branch_value, conv_value in (node.inputs, node.inputs[::-1]):
        assert branch_value is not None
        branch, conv = branch_value.producer(), conv_value.producer() if conv_value else None
        if branch is not None and conv is not None and is_branch(branch_value, independent):
            usable = (
                _is_pointwise(branch)
                and len(branch.inputs) == 2
                and conv.op_type == "Conv"
                and is_read_once(conv.outputs[0])
                and all(value is not None and is_own_weight(value) for value in conv.inputs[1:])
            )
            return _Site(conv, branch, node) if usable else None
    return None


def _stream_from(first: _Site, sites: _Sites) -> _Stream | None:
    """The stream that begins with a site, if everything that reads it can take coordinates."""
    if first in sites.taken or not _is_ungrouped(first.conv) or not _has_room(first):
        return None
    stream = _Stream(first, terms={first.total: ()})
    pending = [first.total]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return None
        for user, position in value.uses():
            reader = sites.with_conv(user)
            if reader is not None and position == 0:
                if (
                    reader.channels is not first.channels
                    or not _is_pointwise(user)
                    or reader.total.is_graph_output()
                ):
                    return None
                stream.readers.append((reader, value))
                continue
            narrow = _other_term(user, value, sites)
            if (
                narrow is None
                or narrow.channels is not first.channels
                or _width(narrow) != _width(first)  # a sum that repeats it over the channels
            ):
                return None
            stream.narrow.append(narrow)
            stream.terms[user.outputs[0]] = (*stream.terms[value], narrow)
            pending.append(user.outputs[0])
    # A convolution without an activation behind it may read the stream and be added to it.
    readers = {reader for reader, _ in stream.readers}
    return stream if readers and readers.isdisjoint(stream.narrow) else None


def _width(site: _Site) -> int:
    """Channels that a site puts out."""
    return len(stored_numbers(site.branch.inputs[1]))


def _has_room(site: _Site) -> bool:
    """Whether coordinates fit into the last block of the channels that a site puts out."""
    channels, count = stored_numbers(site.branch.inputs[1]).shape[:2]
    return channels % _BLOCK + count <= _BLOCK and channels % _BLOCK != 0


def _other_term(node: ir.Node, value: ir.Value, sites: _Sites) -> _Site | None:
    """The site whose output a residual sum adds to a value, and nothing else reads."""
    if node.op_type != "Add" or node.domain:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    assert other is not None
    site = sites.with_total(other)
    if site is None or not is_read_once(other) or not _is_ungrouped(site.conv):
        return None
    return site


def _is_ungrouped(conv: ir.Node) -> bool:
    group = conv.attributes.get("group")
    return group is None or group.as_int() == 1


def _is_pointwise(conv: ir.Node) -> bool:
    """Whether a convolution mixes channels pixel by pixel: 1x1, one group, stride 1, unpadded."""
    weight = conv.inputs[1]
    if conv.op_type != "Conv" or weight is None or not is_own_weight(weight):
        return False
    auto_pad = conv.attributes.get("auto_pad")
    strides, pads = (conv.attributes.get(name) for name in ("strides", "pads"))
    return (
        all(length == 1 for length in stored_numbers(weight).shape[2:])
        and _is_ungrouped(conv)
        and (auto_pad is None or auto_pad.as_string() == "NOTSET")
        and (strides is None or all(step == 1 for step in strides.as_ints()))
        and (pads is None or not any(pads.as_ints()))
    )


def _carry_(graph: ir.Graph, stream: _Stream) -> None:
    first_weight = stored_numbers(stream.first.branch.inputs[1])
    channels, count = first_weight.shape[:2]
    added = count + -(channels + count) % _ALIGNMENT
    identity = np.eye(added, count, dtype=np.float32).reshape(added, *first_weight.shape[1:])
    moved = {site: stored_numbers(site.branch.inputs[1]) for site in stream.narrow}
    for site, value in stream.readers:
        weight, own = stored_numbers(site.conv.inputs[1]), stored_numbers(site.branch.inputs[1])
        columns = own.astype(np.float64)
        for term in stream.terms[value]:
            columns += np.einsum("ec...,ck...->ek...", *_doubles(weight, moved[term]))
        unused = np.zeros_like(own, shape=(len(own), added - count, *own.shape[2:]))
        joined = np.concatenate((weight, columns.astype(np.float32), unused), axis=1)
        _set(site.conv.inputs[1], joined)
        _drop_branch(graph, site)
    for site in (stream.first, *stream.narrow):
        for parameter in site.conv.inputs[1:]:
            rows = stored_numbers(parameter)
            _set(parameter, np.concatenate((rows, np.zeros_like(rows[:1].repeat(added, 0)))))
        _widen(site.conv.outputs[0], added)
    _set(stream.first.branch.inputs[1], np.concatenate((first_weight, identity)))
    _widen(stream.first.branch.outputs[0], added)
    for site in stream.narrow:
        _drop_branch(graph, site)
    for value in stream.terms:
        _widen(value, added)


def _doubles(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array.astype(np.float64) for array in arrays)


def _set(value: ir.Value | None, array: np.ndarray) -> None:
    assert value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)


def _widen(value: ir.Value, count: int) -> None:
    """Record that an activation has more channels."""
    if value.shape is not None:
        batch, channels, *rest = value.shape
        value.shape = ir.Shape(
            [batch, channels + count if isinstance(channels, int) else None, *rest]
        )


def _drop_branch(graph: ir.Graph, site: _Site) -> None:
    """Let the convolution's output take the place of the sum with its branch."""
    site.total.replace_all_uses_with(site.conv.outputs[0])
    graph.remove([site.addition, site.branch], safe=True)
