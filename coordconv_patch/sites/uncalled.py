"""Convolution modules that are never called, because other code convolves with their weight.

``F.conv2d(x, self.conv.weight)`` and ``self.conv.forward(x)`` leave out the module's call, so
that a coordinate layer in its place would have no effect, or one for the second time. Who writes
``where="conv"`` means the convolution that is there.
"""

from __future__ import annotations

from dataclasses import replace

from coordconv_patch.sites.site import ModuleSite, SiteMap

__all__ = ["joined_with_uncalled"]


def joined_with_uncalled(site_map: SiteMap) -> SiteMap:
    """Sites without the modules that are never called while a function has their weight.

    The functional site takes their names. A module stays if the function's calls cannot carry
    coordinates, if it has coordinates itself, and where it is unknown which modules are called.
    """
    if not site_map.order_known:
        return site_map
    functions = {site.name: site for site in site_map.sites if site.kind == "function"}
    taken: dict[str, tuple[str, ...]] = {}
    for site in site_map.sites:
        if isinstance(site, ModuleSite) and site.order is None and not site.patched:
            used = [f"{name}.weight" for name in site.names]
            function = next((functions[name] for name in used if name in functions), None)
            if function is not None and not function.obstacle and function.order is not None:
                taken[function.name] = site.names
    gone = {names[0] for names in taken.values()}
    joined = (
        replace(site, aliases=(*site.aliases, *taken.get(site.name, ())))
        for site in site_map.sites
        if not (isinstance(site, ModuleSite) and site.name in gone)
    )
    return replace(site_map, sites=tuple(joined))
