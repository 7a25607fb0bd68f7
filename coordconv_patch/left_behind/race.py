"""One forward decides which of two modules with the same weight runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from coordconv_patch.errors import PatchError
from coordconv_patch.left_behind.heir_modules import Heir
from coordconv_patch.left_behind.inventory import Inventory
from coordconv_patch.left_behind.messages import on_heirs

__all__ = ["Race"]


class Race:
    """One forward in which either layers run, or new modules that have their weights.

    Both are there: a re-parametrisation may keep the branches that it does not run any more,
    and a model may get a second network with the weights of its first.

    Args:
        inventory: What the module had at the last look.
        module: The module whose forward comes next.
        doubles: The new modules, by the names of the layers whose weights they have.
        accept: Called with the module if nothing was lost.

    Raises:
        PatchError: After the forward, if a new module ran, and not the layer that it doubles.
    """

    def __init__(
        self,
        inventory: Inventory,
        module: nn.Module,
        doubles: Mapping[str, Heir],
        accept: Callable[[nn.Module], None],
    ) -> None:
        self.inventory, self.doubles, self.accept = inventory, doubles, accept
        self.ran: set[nn.Module] = set()
        runners = {inventory.layers[name] for name in doubles}
        runners |= {heir.module for heir in doubles.values()}
        self.handles = [each.register_forward_pre_hook(self._note) for each in runners]
        self.handles.append(module.register_forward_hook(self._end, always_call=True))

    def _note(self, module: nn.Module, args: Any) -> None:
        self.ran.add(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        for handle in self.handles:
            handle.remove()
        layers = self.inventory.layers
        lost = {
            name: str(heir)
            for name, heir in self.doubles.items()
            if heir.module in self.ran and layers[name] not in self.ran
        }
        if lost:
            raise PatchError(on_heirs(self.inventory.sites(lost)))
        if self.ran:
            self.accept(module)
