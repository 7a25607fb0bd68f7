"""The rewrite as a torch.fx pass: coordinates for the convolutions of a graph.

::

    conv(x, W)  ->  conv(x, W) + conv(c, W_c)  =  conv([x ; c], [W ; W_c])        W_c = 0

where c is the coordinate grid of x, padded as the convolution pads x, and W_c is a
new parameter. At W_c = 0 the right side is conv(x, W) to the last bit.

A ``call_module`` node stays as it is, and its convolution module gets its coordinate
class; after a ``call_function`` node (``F.conv2d``, ``aten.conv2d``, ...) the second
term is added to the graph as a module of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.patch import patch_
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.select import Where, select
from coordconv_patch.sites.site import Site
from coordconv_patch.sites.uncalled import joined_with_uncalled

__all__ = ["CoordConvPass"]


class CoordConvPass(PassBase):
    """Patch a GraphModule in place; for use in a :class:`torch.fx` ``PassManager``.

    The pass can run again: sites that have these coordinates already are left alone,
    and where every selected site has them nothing is modified.

    Args:
        where: Which sites, see :func:`coordconv_patch.patch`.
        coords: The convention, or the name of a preset; ``None``: the paper's.
        example_inputs: See :func:`coordconv_patch.patch`.

    Raises:
        CoordinatesError: If there is no such preset.

    Example:
        >>> from torch import nn
        >>> graph_module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        >>> CoordConvPass()(graph_module).modified, CoordConvPass()(graph_module).modified
        (True, False)
    """

    def __init__(
        self,
        where: Where = "first",
        *,
        coords: Coordinates | str | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.where = where
        self.coords = Coordinates.of(coords)
        self.example_inputs = example_inputs

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Refuse what is not a GraphModule.

        Raises:
            PatchError: If it is none.
        """
        if not isinstance(graph_module, fx.GraphModule):
            raise PatchError(
                f"CoordConvPass works on a GraphModule, not on {type(graph_module).__name__}: "
                "use patch_(model, ...), or trace the model with torch.fx.symbolic_trace"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Patch the selected sites that have no coordinates yet.

        Returns:
            The same GraphModule, and whether any site was patched.

        Raises:
            SelectionError: If a selector matches nothing that can be patched.
            PatchError: If a selected site has coordinates of another convention.
        """
        site_map = joined_with_uncalled(find_sites(graph_module, self.example_inputs))
        # Selection refuses patched sites, so it is asked as if there were none.
        unpatched = tuple(dataclasses.replace(site, patched=False) for site in site_map.sites)
        choices = select(dataclasses.replace(site_map, sites=unpatched), self.where)
        chosen = {choice.site.name for choice in choices if choice.chosen}
        self._check_conventions(graph_module, chosen)
        new = chosen - {site.name for site in site_map.sites if site.patched}
        if new:

            def is_new(site: Site) -> bool:
                return site.name in new

            patch_(graph_module, is_new, coords=self.coords, example_inputs=self.example_inputs)
        return PassResult(graph_module, bool(new))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph is well-formed."""
        graph_module.graph.lint()

    def _check_conventions(self, graph_module: fx.GraphModule, chosen: set[str]) -> None:
        for name, layer in coord_layers(graph_module).items():
            present = dataclasses.replace(layer.coords, window=self.coords.window)
            if name in chosen and present != self.coords:
                raise PatchError(
                    f"{name} has coordinates {layer.coords} already, not {self.coords}: unpatch "
                    "the model first"
                )
