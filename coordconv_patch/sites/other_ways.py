"""Whether a trace has taken another way through a model than its forward pass takes.

Symbolic tracing runs the model's code on proxies, and Python asks them what they are:
``type(x) is Tensor``, ``hasattr(x, "image")``, ``x.dtype is torch.float32``. The answers are those
for a proxy, and nothing raises. What is left is a graph that does not call the convolution that
really runs. Most convolutions that a graph never calls never run (auxiliary heads in evaluation,
leftovers), so only those count that might stand in the place of the first.
"""

from __future__ import annotations

from torch import fx

from coordconv_patch.graphs.functional import join_names
from coordconv_patch.sites.site import ModuleSite, OwnedFunctionSite, Site, SiteMap

__all__ = ["may_run_before", "unread_weights"]


def may_run_before(first: Site, site_map: SiteMap) -> list[str]:
    """Names of convolutions that may run in place of the one that a trace calls first.

    They are never called in the trace, and are registered before that one, as what runs earlier
    mostly is, or take as many input channels, as what takes the same input must. For functional
    convolutions these are other weights of the module that holds the weight.

    Args:
        first: The site that runs first as far as the trace tells.
        site_map: All sites, found without example inputs.
    """
    if site_map.model is None or _is_its_own_code(first):
        return []
    positions = {name: index for index, (name, _) in enumerate(site_map.model.named_modules())}
    names = [
        site.name
        for site in site_map.sites
        if site.order is None
        and isinstance(site, ModuleSite)
        and not _is_its_own_code(site)
        and (_is_before(site, first, positions) or _takes_the_same(site, first))
    ]
    return [*names, *unread_weights(first, site_map)]


def _is_its_own_code(site: Site) -> bool:
    """Whether a site lies in a GraphModule, which runs the graph itself and has no other way."""
    return site.region is not None and isinstance(site.region.module, fx.GraphModule)


def _is_before(site: Site, first: Site, positions: dict[str, int]) -> bool:
    holder = first.owned.owner if isinstance(first, OwnedFunctionSite) else first.name
    return positions[site.name] < positions[holder]


def _takes_the_same(site: Site, first: Site) -> bool:
    one, other = site.geometry, first.geometry
    if one is None or other is None:  # lazy ones take anything
        return True
    return (one.in_channels, one.ndim) == (other.in_channels, other.ndim)


def unread_weights(site: Site, site_map: SiteMap) -> list[str]:
    """Parameters beside the weight of a functional site, like it, that the graph never reads.

    Args:
        site: Any site; those that are not functional have none.
        site_map: All sites, found without example inputs.
    """
    if not isinstance(site, OwnedFunctionSite) or site.weight is None or not site.nodes:
        return []
    assert site_map.model is not None
    assert site.region is not None
    root = site.region.module
    names = {str(node.target) for node in site.region.graph.find_nodes(op="get_attr")}
    read = {
        id(each) for name, each in root.named_parameters(remove_duplicate=False) if name in names
    }
    holder = join_names(site.owned.owner, site.owned.weight or "").rpartition(".")[0]
    return [
        join_names(holder, name)
        for name, each in site_map.model.get_submodule(holder).named_parameters(recurse=False)
        if each.dim() == site.weight.dim() and id(each) not in read
    ]
