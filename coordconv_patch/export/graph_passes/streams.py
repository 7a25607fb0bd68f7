"""Narrow activations that could carry coordinates, and what stands in the way where they cannot.

See :mod:`coordconv_patch.export.graph_passes.carry_coordinates`, which makes them do so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RefusedError
from coordconv_patch.export.graph_passes.vocabulary import (
    is_addition,
    is_branch,
    is_own_weight,
    is_read_once,
    stored_numbers,
    values_without_inputs,
)

__all__ = ["Site", "Sites", "Stream", "check_room", "stream_from"]

_BLOCK = 16
"""Channels that ONNX Runtime's CPU kernels handle at a time, on processors with AVX-512."""


@dataclass(frozen=True, eq=False)
class Site:
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


class Sites:
    """The sites of a graph whose weights are stored and their own; those done are taken."""

    def __init__(self, graph: ir.Graph) -> None:
        independent = values_without_inputs(graph)
        sites = [site for node in graph if (site := _site_of(node, independent)) is not None]
        self._by_total = {site.total: site for site in sites}
        self._by_conv = {site.conv: site for site in sites}
        self._taken: set[Site] = set()

    def __iter__(self) -> Iterator[Site]:
        """The sites that are not taken when their turn comes."""
        return (site for site in self._by_total.values() if site not in self._taken)

    def with_total(self, value: ir.Value) -> Site | None:
        """The site whose sum a value is."""
        site = self._by_total.get(value)
        return None if site in self._taken else site

    def with_conv(self, node: ir.Node, position: int) -> Site | None:
        """The site whose convolution a node is, where that reads a value as its data."""
        site = self._by_conv.get(node) if position == 0 else None
        return None if site in self._taken else site

    def take(self, stream: Stream) -> None:
        """Leave the sites of a stream out from now on."""
        self._taken.update((stream.first, *stream.narrow, *(site for site, _ in stream.readers)))


@dataclass
class Stream:
    """An activation that residual sums hand on, and what reads it.

    It begins with the first site; the outputs of the narrow ones are summed up in it. ``terms``
    are the narrow sites among the terms of each of its values, ``readers`` the wide sites, each
    with the value that it reads.
    """

    first: Site
    narrow: list[Site] = field(default_factory=list)
    terms: dict[ir.Value, tuple[Site, ...]] = field(default_factory=dict)
    readers: list[tuple[Site, ir.Value]] = field(default_factory=list)


def _site_of(node: ir.Node, independent: set[ir.Value]) -> Site | None:
    """The site whose sum a node computes, if all of its weights are stored and its own."""
    if not is_addition(node):
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
                and all(is_own_weight(value) for value in conv.inputs[1:])
            )
            return Site(conv, branch, node) if usable else None
    return None


def stream_from(first: Site, sites: Sites) -> Stream:
    """The stream of a site; a RefusedError if something that reads it cannot take coordinates."""
    if not _is_ungrouped(first.conv):
        raise RefusedError("it is grouped")
    stream = Stream(first, terms={first.total: ()})
    pending = [first.total]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            raise RefusedError("its sum is an output of the graph")
        for user, position in value.uses():
            reader = sites.with_conv(user, position)
            if reader is not None:
                _check_reader(reader, first)
                stream.readers.append((reader, value))
                continue
            narrow = _other_term(user, value, sites)
            _check_narrow(narrow, first)
            stream.narrow.append(narrow)
            total = user.outputs[0]
            stream.terms[total] = (*stream.terms[value], narrow)
            pending.append(total)
    readers = {reader for reader, _ in stream.readers}
    if not readers:
        raise RefusedError("no 1x1 convolution with coordinates reads it")
    if not readers.isdisjoint(stream.narrow):  # without an activation behind it
        raise RefusedError("a convolution that reads it is added to it")
    return stream


def check_room(site: Site) -> None:
    """Check that coordinates fit into the last block of the channels that a site puts out."""
    channels, count = stored_numbers(site.branch.inputs[1]).shape[:2]
    if channels % _BLOCK == 0 or channels % _BLOCK + count > _BLOCK:
        raise RefusedError(
            f"its {channels} channels leave no room for {count} more in blocks of {_BLOCK}"
        )


def _check_reader(reader: Site, first: Site) -> None:
    name = reader.conv.name
    if reader.channels is not first.channels:
        raise RefusedError(f"{name} reads it with other coordinates")
    if not _is_pointwise(reader.conv):
        raise RefusedError(f"{name} reads it, and is not a plain 1x1 convolution")
    if reader.total.is_graph_output():
        raise RefusedError(f"the sum behind {name} is an output of the graph")


def _other_term(node: ir.Node, value: ir.Value, sites: Sites) -> Site:
    """The site whose output a residual sum adds to a value, and nothing else reads."""
    if not is_addition(node):
        raise RefusedError(f"{node.name} reads it, and is not a 1x1 convolution with coordinates")
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    assert other is not None
    site = sites.with_total(other)
    if site is None or not is_read_once(other) or not _is_ungrouped(site.conv):
        raise RefusedError(f"what {node.name} adds to it cannot carry coordinates")
    return site


def _check_narrow(narrow: Site, first: Site) -> None:
    if narrow.channels is not first.channels:
        raise RefusedError(f"{narrow.conv.name} is added to it with other coordinates")
    if _width(narrow) != _width(first):
        raise RefusedError(f"{narrow.conv.name} is added to it and has other channels")


def _width(site: Site) -> int:
    """Channels that a site puts out."""
    return len(stored_numbers(site.branch.inputs[1]))


def _is_ungrouped(conv: ir.Node) -> bool:
    group = conv.attributes.get("group")
    return group is None or group.as_int() == 1


def _is_pointwise(conv: ir.Node) -> bool:
    """Whether a convolution mixes channels pixel by pixel: 1x1, one group, stride 1, unpadded."""
    if conv.op_type != "Conv" or not is_own_weight(conv.inputs[1]):
        return False
    auto_pad = conv.attributes.get("auto_pad")
    strides, pads = (conv.attributes.get(name) for name in ("strides", "pads"))
    return (
        all(length == 1 for length in stored_numbers(conv.inputs[1]).shape[2:])
        and _is_ungrouped(conv)
        and (auto_pad is None or auto_pad.as_string() == "NOTSET")
        and (strides is None or all(step == 1 for step in strides.as_ints()))
        and (pads is None or not any(pads.as_ints()))
    )
