"""The convolution modules of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.call_hooks import chosen_calls_of
from coordconv_patch.layers.conversion import check_convertible
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import DECLARED, ConvGeometry
from coordconv_patch.sites.obstacles import adapter_obstacle, quantization_obstacle
from coordconv_patch.sites.regions import Regions
from coordconv_patch.sites.site import ModuleSite

__all__ = ["module_sites"]


def module_sites(model: nn.Module, regions: Regions) -> Iterator[ModuleSite]:
    """The convolution modules of torch.nn and its subclasses, in order of registration."""
    for module, (name, *aliases) in regions.names.items():
        if not isinstance(module, _ConvNd):
            continue
        patched = isinstance(module, CoordConvNd) or chosen_calls_of(module) is not None
        lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
        obstacle = quantization_obstacle(module) or adapter_obstacle(model, name)
        padding = DECLARED
        if patched:
            padding = getattr(module, "coord_padding", DECLARED)
        elif not obstacle:
            try:
                padding = check_convertible(module)
            except PatchError as error:
                obstacle = str(error)
        yield ModuleSite(
            name=name,
            class_name=type(module).__name__,
            geometry=None if lazy else ConvGeometry.of(module),
            padding=padding,
            obstacle=obstacle,
            patched=patched,
            module=module,
            aliases=tuple(aliases),
            region=regions.around(name),
        )
