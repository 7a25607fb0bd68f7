"""What a watched module had at the last look, and what may have inherited weights since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.graphs.functional import join_names
from coordconv_patch.graphs.norms import is_batch_norm
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.weight_marks import is_plain, is_same, rows_of, sample_of
from coordconv_patch.left_behind.heir_modules import Heir, tensors_of, weights_being_exported
from coordconv_patch.left_behind.last_weights import mark_of, site_of, weight_of

__all__ = ["Inventory", "LastWeights"]

LastWeights: TypeAlias = "dict[str, tuple[Tensor, Tensor | None]]"
"""The weight and the coordinate weight that layers had last, by qualified name."""


@dataclass
class Inventory:
    """The convolutions and batch norms of a module, with the weights that they had last.

    Attributes:
        prefix: The module's qualified name, for messages.
        layers: The convolutions, coordinate branches and batch norms by qualified name.
        weights: The weight of each convolution among them. Held beside the layers, since a
            library that replaces a layer may empty it (optimum-quanto).
        coords: The coordinate weights, held for the same reason.
        samples: Some values of each plain convolution's weight; of coordinate layers a mark
            on the layer has them.
    """

    prefix: str
    layers: dict[str, nn.Module] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    coords: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, prefix: str, parts: Iterable[Inventory] = ()) -> Inventory:
        """What a module has now; puts marks on its coordinate layers.

        Args:
            module: The module.
            prefix: Its qualified name, for messages.
            parts: Inventories of parts of it as they are now, whose layers have marks already.
        """
        marked = {part.layers[name] for part in parts for name in part.weights}
        layers = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, (_ConvNd, CoordBranch)) or is_batch_norm(layer)
        }
        inventory = cls(prefix, layers)
        for name, layer in layers.items():
            weight = weight_of(module, name, layer)
            if weight is not None:
                inventory._note(name, layer, weight)
                if isinstance(layer, CoordLayer) and layer not in marked:
                    layer.__dict__["weight_mark"] = mark_of(layer, weight)
        return inventory

    def _note(self, name: str, layer: nn.Module, weight: Tensor) -> None:
        self.weights[name] = weight
        coords = layer._parameters.get("coord_weight")
        if coords is not None:
            self.coords[name] = coords
        if isinstance(layer, CoordLayer):
            layer.__dict__["site_name"] = join_names(self.prefix, site_of(name))
        elif isinstance(layer, _ConvNd):
            rows = rows_of(weight, transposed=layer.transposed, groups=layer.groups)
            self.samples[name] = sample_of(rows)

    def without_gone(self, module: nn.Module) -> Inventory:
        """The same without layers and weights that are not in the module any more.

        It makes no tensor, and puts no marks.
        """
        present, parameters = set(module.modules()), set(module.parameters())
        layers = {name: layer for name, layer in self.layers.items() if layer in present}
        weights, coords = (
            {name: w for name, w in kept.items() if name in layers and w in parameters}
            for kept in (self.weights, self.coords)
        )
        samples = {name: sample for name, sample in self.samples.items() if name in weights}
        return Inventory(self.prefix, layers, weights, coords, samples)

    def last_weights_of(self, layers: Mapping[str, nn.Module]) -> LastWeights:
        """The weight and coordinate weight that layers had last, of those that can be read."""
        last: LastWeights = {}
        for name, layer in layers.items():
            weight, coords = map(layer._parameters.get, ("weight", "coord_weight"))
            kept: Tensor | None = self.weights.get(name) if weight is None else weight
            if kept is not None and is_plain(kept) and not is_batch_norm(layer):
                last[name] = (kept, self.coords.get(name) if coords is None else coords)
        return last

    def heirs_in(self, module: nn.Module) -> Iterator[Heir]:
        """What may have inherited weights: new tensors, and weights that have changed.

        Convolutions with coordinates come first: they may have inherited both.
        """
        named = dict(module.named_modules())
        known = {layer: name for name, layer in self.layers.items()}
        exported = weights_being_exported()
        changed: list[Heir] = []
        for name, inner in sorted(
            named.items(), key=lambda item: not isinstance(item[1], CoordConvNd)
        ):
            if isinstance(inner, CoordBranch) or (inner in known and is_batch_norm(inner)):
                continue
            if inner not in known:
                owner = name.split(".parametrizations.")[0]  # whose weight is computed of it
                for tensor in tensors_of(inner, exported):
                    yield Heir(owner, named[owner], tensor)
            elif isinstance(inner, _ConvNd) and is_plain(inner._parameters.get("weight")):
                mark = inner.__dict__.get("weight_mark")
                before = self.samples.get(known[inner]) if mark is None else mark.weight
                weight = inner._parameters["weight"]
                assert weight is not None
                rows = rows_of(weight, transposed=inner.transposed, groups=inner.groups)
                if before is not None and not is_same(before, sample_of(rows)):
                    coords = None if mark is None else mark.coords
                    changed.append(Heir(name, inner, weight, before, coords))
        yield from changed

    def sites(self, layers: Mapping[str, str]) -> dict[str, str]:
        """What is said of layers, by their sites and not by their own names."""
        return {join_names(self.prefix, site_of(name)): what for name, what in layers.items()}
