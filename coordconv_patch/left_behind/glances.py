"""What a quick look at a model compares: where modules are, and a few numbers of their weights.

It runs before every forward, so it is made of sequences that C code runs through.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coordconv_patch.layers.call_hooks import places_of_hook
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.weight_marks import glance_at
from coordconv_patch.left_behind.last_weights import Place, place_of, weight_of
from coordconv_patch.running.version_counters import version_of, versions_of

__all__ = ["Glance"]


class Glance(NamedTuple):
    """What a look at a module compares, prepared: sequences that C code runs through."""

    module: weakref.ref[nn.Module]
    holders: Sequence[dict[Any, Any]]
    names: Sequence[Any]
    children: Sequence[Any]
    """``holder[name] is child`` in every module around a convolution or a batch norm.

    And in hooks: the one that adds a branch to chosen calls is where it was.
    """
    ways: Sequence[dict[str, nn.Module | None]]
    lengths: Sequence[int]
    """How many children those modules have: none is new."""
    convs: Sequence[CoordLayer]
    """The coordinate layers on the CPU, whose convolutions' values are looked at."""
    owners: Sequence[dict[str, nn.Parameter | None]]
    keys: Sequence[str]
    weights: Sequence[Tensor]
    """``owner[key] is weight`` of each of them."""
    pointers: Sequence[int]
    views: Sequence[Tensor]
    """A few numbers of each weight; the weights of one dtype stand together."""
    values: Sequence[Tensor]
    """What they were: one tensor for all the views of a dtype."""
    versions: Sequence[int]
    """Version counters of the coordinate weights."""

    @classmethod
    def at(cls, module: nn.Module, layers: Mapping[str, nn.Module]) -> Glance:
        """A glance at a module as it is now."""
        on_the_way = [around._modules for around in _modules_around(layers.values(), module)]
        edges: list[tuple[dict[Any, Any], Any, Any]] = [
            (holder, name, child) for holder in on_the_way for name, child in holder.items()
        ]
        edges += itertools.chain.from_iterable(map(places_of_hook, layers.values()))
        on_cpu: list[tuple[CoordLayer, Place, Tensor]] = []
        for name, layer in layers.items():
            place, weight = place_of(module, name, layer), weight_of(module, name, layer)
            if isinstance(layer, CoordLayer) and place is not None and weight is not None:
                on_cpu += [(layer, place, weight)] if weight.is_cpu else []
        on_cpu.sort(key=lambda each: str(each[2].dtype))
        convs, weights = [conv for conv, _, _ in on_cpu], [weight for _, _, weight in on_cpu]
        glance = cls(
            module=weakref.ref(module),
            holders=[holder for holder, _, _ in edges],
            names=[name for _, name, _ in edges],
            children=[child for _, _, child in edges],
            ways=on_the_way,
            lengths=list(map(len, on_the_way)),
            convs=convs,
            owners=[owner for _, (owner, _), _ in on_cpu],
            keys=[key for _, (_, key), _ in on_cpu],
            weights=weights,
            pointers=[weight.data_ptr() for weight in weights],
            views=[glance_at(weight) for weight in weights],
            values=[],
            versions=[],
        )
        return glance.renewed()

    def shows_other_structure(self) -> bool:
        """Whether a module is not where it was, or is new."""
        there = map(dict.get, self.holders, self.names)
        is_same = all(map(operator.is_, there, self.children))
        return not is_same or list(map(len, self.ways)) != self.lengths

    def shows_other_weights(self) -> bool:
        """Whether weights were replaced, or have other memory."""
        if all(map(operator.is_, self.weights_there(), self.weights)):
            return list(map(Tensor.data_ptr, self.weights)) != self.pointers
        return True

    def weights_there(self) -> Iterator[nn.Parameter | None]:
        """What is in the places of the weights."""
        return map(dict.get, self.owners, self.keys)

    def shows_other_values(self) -> bool:
        """Whether weights have other values."""
        return not all(map(torch.equal, self._values(), self.values))

    def shows_silent_change(self) -> bool:
        """Whether values have changed that autograd was not told of."""
        before = itertools.chain.from_iterable(
            torch.split(values, [len(view) for view in views])
            for values, views in zip(self.values, self._by_dtype(), strict=True)
        )
        marks = [conv.__dict__.get("weight_mark") for conv in self.convs]
        return any(
            mark is not None and version_of(weight) == mark.version and not torch.equal(view, kept)
            for mark, weight, view, kept in zip(
                marks, self.weights, self.views, before, strict=True
            )
        )

    def shows_new_bias(self) -> bool:
        """Whether convolutions have got a bias since their weights were marked."""
        marks = [conv.__dict__.get("weight_mark") for conv in self.convs]
        return any(
            mark is not None and not mark.has_bias and conv._parameters.get("bias") is not None
            for mark, conv in zip(marks, self.convs, strict=True)
        )

    def shows_other_coords(self) -> bool:
        """Whether coordinate weights have changed, and autograd was told."""
        return self._versions() != self.versions

    def renewed(self) -> Glance:
        """The same with the values of now."""
        values = [value.clone() for value in self._values()]
        return self._replace(values=values, versions=self._versions())

    def _versions(self) -> list[int]:
        return versions_of([conv._parameters.get("coord_weight") for conv in self.convs])

    def _values(self) -> list[Tensor]:
        views_of_dtypes = self._by_dtype()
        return [torch.cat(views) if len(views) > 1 else views[0] for views in views_of_dtypes]

    def _by_dtype(self) -> Iterator[list[Tensor]]:
        for _, views in itertools.groupby(self.views, operator.attrgetter("dtype")):
            yield list(views)


def _modules_around(layers: Iterable[nn.Module], module: nn.Module) -> list[nn.Module]:
    """The modules in a module, itself counted, that are or hold one of some layers."""
    wanted, holds = set(layers), dict[nn.Module, bool]()

    def look(inner: nn.Module) -> bool:
        if inner not in holds:
            holds[inner] = inner in wanted  # at once: a child may hold it in a circle
            for child in inner._modules.values():
                if child is not None and look(child):
                    holds[inner] = True
        return holds[inner]

    look(module)
    return [inner for inner, holding in holds.items() if holding]
