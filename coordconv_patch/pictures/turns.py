"""Places for code that calls a model on one tile after the other, in an order that one knows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from coordconv_patch.errors import CoordinatesError, PatchError, excerpt
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.places import entered, shared_places
from coordconv_patch.layers.window import Window
from coordconv_patch.patching.places import check_places
from coordconv_patch.running.per_context import PerContext

__all__ = ["places_in_turn"]


@contextmanager
def places_in_turn(
    module: nn.Module, places: Sequence[Tensor | Any | Window | Sequence[Window]] | Tensor
) -> Iterator[None]:
    """While entered, the first call of a module has the first place, the second the second, ...

    For tilers that cut a picture themselves and do not say where: diffusers'
    ``vae.enable_tiling()``, slicing libraries for detectors. Outside of that module, places are
    what they were; calls in other threads and asyncio tasks are not counted.

    Args:
        module: A patched model, or the part of one that is called once a tile, such as
            ``vae.decoder``.
        places: For each call a theta, Window, or list of Windows, as :func:`coordconv_patch.places`
            takes them.

    Raises:
        PatchError: If the module is not patched; if it is called more often than there are places,
            or, at the end, less often.
        CoordinatesError: As :func:`coordconv_patch.places`.

    Example:
        >>> Window = coordconv_patch.Window
        >>> windows = [Window((0, left), (64, 64), (64, 128)) for left in (0, 64)]
        >>> with coordconv_patch.places_in_turn(model, windows):
        ...     tiles = [model(tile) for tile in torch.rand(1, 3, 64, 128).split(64, dim=3)]
    """
    layers = require_coord_layers(module)
    is_number = isinstance(places, Tensor) and places.dim() == 0
    if is_number or not isinstance(places, (Sequence, Tensor)):
        raise CoordinatesError(
            f"places_in_turn: places={excerpt(places)}: write a list of places, one for each call"
        )
    turn = _Turn([check_places(layers, each) for each in places], layers.values())
    handles = (
        module.register_forward_pre_hook(turn.begin),
        module.register_forward_hook(turn.end, always_call=True),
    )
    token = turn.here.set([True])
    try:
        yield
    finally:
        turn.here.is_of_this_context(token)
        for handle in handles:
            handle.remove()
    if turn.count != len(turn.thetas):
        raise PatchError(
            f"places_in_turn: {type(module).__name__} was called {turn.count} times, and there are "
            f"{len(turn.thetas)} places: give one place for each call, in their order"
        )


class _Turn:
    """Hooks around a module's calls in the thread and the task that made this.

    Attributes:
        here: Set in that task, and in those that it begins meanwhile.
    """

    def __init__(self, thetas: list[Tensor], layers: Any) -> None:
        self.thetas = thetas
        self.count = 0
        self._shared = shared_places(layers)
        self.here = PerContext()
        self._thread = threading.get_ident()
        self._now = ExitStack()

    def begin(self, module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() != self._thread or self.here.held[0] is None:
            return
        if self.count == len(self.thetas):
            raise PatchError(
                f"places_in_turn: {type(module).__name__} is called more often than there are "
                f"places, {len(self.thetas)}: give one place for each call, in their order"
            )
        self._now.enter_context(entered(self._shared, self.thetas[self.count]))
        self.count += 1

    def end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if threading.get_ident() == self._thread and self.here.held[0] is not None:
            self._now.close()
