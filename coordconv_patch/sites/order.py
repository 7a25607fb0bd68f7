"""The order in which a model runs its convolutions, as far as its graphs tell it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.graphs.functional import join_names
from coordconv_patch.sites.regions import Regions, may_hold_sites
from coordconv_patch.sites.site import GraphFunctionSite, OwnedFunctionSite

__all__ = ["execution_order"]


def execution_order(
    regions: Regions, functions: Iterable[GraphFunctionSite | OwnedFunctionSite]
) -> list[str] | None:
    """Names of the sites in the order in which a model runs them; ``None`` if it is unknown.

    ``functions`` are the functional sites in the model's regions.
    """
    by_node = {node: site.name for site in functions for node in site.nodes}

    def order_in(name: str, module: nn.Module) -> list[str] | None:
        if isinstance(module, _ConvNd):
            return [regions.names[module][0]]
        if name not in regions.by_name:
            return None
        order: list[str] = []
        for node in regions.by_name[name].graph.nodes:
            if node in by_node:
                order.append(by_node[node])
            elif node.op == "call_module":
                target = join_names(name, node.target)
                leaf = regions.modules[target]
                if isinstance(leaf, _ConvNd) or may_hold_sites(leaf):
                    inner = order_in(target, leaf)
                    if inner is None:
                        return None
                    order += inner
        return order

    return order_in("", regions.modules[""])
