"""See what the coordinates add at each site while a model runs, and leave it out where asked.

For a copy of the user's model, which nobody else has. A patched convolution is asked for its map by
its ``map_for``, which is told the plain convolution's output. A branch beside a plain convolution
(functional ones, chosen calls, graphs) does not know that output: it is seen when the two are
added, by a torch function mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd

__all__ = ["Taps"]

Seen = Callable[[str, Tensor, Tensor], None]
"""Gets a site's name, the plain convolution's output and what the coordinates add to it."""

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_SAME_VALUES = frozenset({"to", "type_as", "float", "half", "bfloat16", "double"})


class Taps:
    """A tap at every site of a patched model; for a copy that is thrown away afterwards.

    Args:
        model: The copy.

    Attributes:
        sites: The sites' names, in order of registration.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = coord_layers(model)
        self.sites = tuple(layers)
        self._off: frozenset[str] = frozenset()
        self._seen: Seen | None = None
        self._additions = _Additions(self._note)
        for name, layer in layers.items():
            if isinstance(layer, CoordConvNd):
                layer.map_for = functools.partial(  # type: ignore[method-assign]
                    self._map_for, name, layer.map_for
                )
            else:
                layer.register_forward_hook(functools.partial(self._branch, name))

    @contextmanager
    def open(
        self, *, off: frozenset[str] = frozenset(), seen: Seen | None = None
    ) -> Iterator[None]:
        """While entered, the coordinates of some sites add nothing, and the others' are shown.

        Args:
            off: Sites whose coordinates are switched off.
            seen: Called at every call of a site that is not.
        """
        self._off, self._seen = off, seen
        try:
            if seen is None:
                yield
            else:
                with self._additions:
                    yield
        finally:
            self._off, self._seen = frozenset(), None
            self._additions.pending.clear()

    def _map_for(
        self,
        site: str,
        map_for: Callable[[Tensor, Tensor, Tensor], Tensor],
        input: Tensor,
        output: Tensor,
        weight: Tensor,
    ) -> Tensor:
        if site in self._off:
            return output.new_zeros(())
        branch = map_for(input, output, weight)
        self._note(site, output, branch)
        return branch

    def _branch(self, site: str, layer: CoordLayer, inputs: Any, branch: Tensor) -> Tensor | None:
        if site in self._off:
            return branch.new_zeros(()).expand_as(branch)
        if self._seen is not None:
            self._additions.pending[id(branch)] = (site, branch)
        return None

    def _note(self, site: str, output: Tensor, branch: Tensor) -> None:
        if self._seen is not None:
            self._seen(site, output, branch)


class _Additions(TorchFunctionMode):
    """Tells where a branch is added, and to what.

    Attributes:
        pending: Branches by the identity of their tensors, which are held so that it is one.
    """

    def __init__(self, note: Seen) -> None:
        self.note = note
        self.pending: dict[int, tuple[str, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]  # add.Tensor in exported graphs
        if self.pending and name in _ADDITIONS and len(args) >= 2:
            for branch, output in (args[:2], args[1::-1]):
                if id(branch) in self.pending and isinstance(output, Tensor):
                    self.note(self.pending[id(branch)][0], output, branch)
        result = func(*args, **(kwargs or {}))
        if self.pending and name in _SAME_VALUES and args and id(args[0]) in self.pending:
            self.pending[id(result)] = (self.pending[id(args[0])][0], result)
        return result
