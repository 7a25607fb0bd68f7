"""What is known of the places where a model applies convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, fx, nn

from coordconv_patch.layers.geometry import DECLARED, Call, ConvGeometry, Padding
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.sites.regions import Region

__all__ = ["ForeignSite", "GraphFunctionSite", "ModuleSite", "OwnedFunctionSite", "Site", "SiteMap"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where a convolution is applied; the base of the kinds of sites.

    Attributes:
        kind: ``"module"`` or ``"function"``.
        name: Qualified module name. A functional convolution is named after the module
            that holds its weight, or after its graph node.
        aliases: Further names that it has: those of a module that has several, or of the
            convolution module whose weight only a function uses.
        class_name: Class of the module, or name of the function.
        geometry: Channels, kernel, stride and so on; ``None`` where they are unknown.
        padding: How it pads its input.
        order: Position of its first execution, from 0; ``None`` if it is never
            executed, or if the order cannot be known.
        calls: Its executions on the example inputs; ``None`` without example inputs.
        caller: The innermost module during whose single call all of them happened, ``""``
            for the model; ``None`` if that is unknown or no hook can be put on it.
        obstacle: Why it cannot be patched; empty if it can.
        patched: Whether it already carries coordinates.
        region: The region it was traced in; ``None`` if in none.
        roi_operator: The operator behind which it sees regions of interest, such as
            ``"roi_align"``: its coordinates are then those of a box, not of the picture. Empty if
            it sees pictures, or if that is unknown: what cannot be traced whole needs example
            inputs.
    """

    kind: ClassVar[Literal["module", "function"]] = "module"

    name: str
    aliases: tuple[str, ...] = ()
    class_name: str
    geometry: ConvGeometry | None
    padding: Padding = DECLARED
    order: int | None = None
    calls: tuple[Call, ...] | None = None
    caller: str | None = None
    obstacle: str = ""
    patched: bool = False
    region: Region | None = field(default=None, repr=False, compare=False)
    roi_operator: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that selectors know it by, its own first."""
        return (self.name, *self.aliases)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size, ``(kH, kW)`` for images; ``()`` if unknown."""
        return self.geometry.kernel_size if self.geometry else ()

    @property
    def calls_obstacle(self) -> str:
        """Why coordinates cannot be added to some of its calls alone; empty if they can."""
        return ""


@dataclass(frozen=True, kw_only=True)
class ModuleSite(Site):
    """A convolution module of torch.nn, or of a subclass."""

    module: nn.Module = field(repr=False, compare=False)

    @property
    def calls_obstacle(self) -> str:
        if self.caller is not None:
            return ""
        return (
            f"the calls of {self.name} cannot be counted, because only GraphModules call it, which "
            "lose their hooks when they are copied: choose all calls, or patch the model before it "
            "is traced"
        )


@dataclass(frozen=True, kw_only=True)
class ForeignSite(Site):
    """A convolution module of another kind, TorchScript's or a quantized one: never patched."""


@dataclass(frozen=True, kw_only=True)
class GraphFunctionSite(Site):
    """A functional convolution of a GraphModule, whose graph is rewritten, by its nodes there."""

    kind: ClassVar[Literal["module", "function"]] = "function"

    region: Region = field(repr=False, compare=False)
    nodes: tuple[fx.Node, ...] = field(repr=False, compare=False)

    @property
    def calls_obstacle(self) -> str:
        if self.calls is not None and len(self.nodes) == len(self.calls):
            return ""
        return (
            f"{self.name} is called at {len(self.nodes)} places of a graph that runs several times "
            f"({len(self.calls or ())} calls in all), whose runs cannot be told apart: choose all "
            "calls"
        )


@dataclass(frozen=True, kw_only=True)
class OwnedFunctionSite(Site):
    """A functional convolution that a plain module calls in its own code.

    Attributes:
        owned: Which calls of which module it is.
        weight: Its weight, or one like it where it is computed; ``None`` if none was seen.
        nodes: Its nodes in the region's graph; ``()`` where none shows it.
    """

    kind: ClassVar[Literal["module", "function"]] = "function"

    owned: OwnedCalls
    weight: Tensor | None = field(repr=False, compare=False)
    nodes: tuple[fx.Node, ...] = field(default=(), repr=False, compare=False)

    @property
    def calls_obstacle(self) -> str:
        owner = self.owned.owner
        if self.caller is not None and (not owner or f"{self.caller}.".startswith(f"{owner}.")):
            return ""
        return (
            f"the {len(self.calls or ())} calls of {self.name} happen in several runs of "
            f"{owner or 'the model'}, which cannot be told apart: choose all calls"
        )


@dataclass(frozen=True)
class SiteMap:
    """All sites of a model.

    Attributes:
        sites: In order of execution where it is known (those never executed last),
            else in order of registration.
        regions: The traced regions.
        order_known: Whether the order of execution is known.
        untraced: Why the whole model could not be traced; empty if it could.
        model: The model; ``None`` if only its sites are known.
    """

    sites: tuple[Site, ...]
    regions: tuple[Region, ...]
    order_known: bool
    untraced: str
    model: nn.Module | None = field(default=None, repr=False, compare=False)
