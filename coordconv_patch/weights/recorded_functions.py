"""Functional convolutions of plain modules in coordinate files.

Which calls of a module a site is was seen by running the model when it was patched. The file
keeps what was seen, so that the model need not be run again when it is loaded.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import nn

from coordconv_patch.errors import WeightsError, excerpt
from coordconv_patch.owners.call_owners import geometry_of_calls, owned_calls, owner_obstacle
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.running.wrappers import clean_name
from coordconv_patch.sites.site import OwnedFunctionSite, SiteMap
from coordconv_patch.weights.coords_file import CoordsFile
from coordconv_patch.weights.header import SiteRecord

__all__ = ["functions_to_record", "with_recorded_functions"]


def functions_to_record(model: nn.Module) -> dict[nn.Module, OwnedCalls]:
    """The calls that branches in plain modules are for, by branch; names are those of a file."""
    return {
        branch: dataclasses.replace(calls, owner=clean_name(calls.owner))
        for branch, calls in owned_calls(model).items()
    }


def with_recorded_functions(site_map: SiteMap, file: CoordsFile, model: nn.Module) -> SiteMap:
    """The sites of a model, with the functional ones of a file that a trace alone does not tell.

    A WeightsError if the model does not have the module or the weight of one.
    """
    known = {clean_name(site.name): site for site in site_map.sites}
    recorded = {}
    for name, record in file.sites.items():
        site = known.get(name)
        is_unknown = site is None or (bool(site.obstacle) and not site.patched)
        if record.function is not None and is_unknown:
            recorded[name] = _recorded_site(file, name, record, record.function, model)
    others = [site for site in site_map.sites if clean_name(site.name) not in recorded]
    return dataclasses.replace(site_map, sites=(*others, *recorded.values()))


def _recorded_site(
    file: CoordsFile, name: str, record: SiteRecord, function: OwnedCalls, model: nn.Module
) -> OwnedFunctionSite:
    try:
        owner = model.get_submodule(function.owner)
        weight = next(model.parameters(), torch.empty(0))
        if function.weight is not None:
            weight = operator.attrgetter(function.weight)(owner)
    except AttributeError as error:
        raise WeightsError(
            f"{file.path} has coordinate weights for {excerpt(name)}, a convolution function that "
            f"{excerpt(function.owner or 'the model')} calls, which this model does not have: "
            f"{error}"
        ) from error
    return OwnedFunctionSite(
        name=name,
        class_name=function.function,
        geometry=record.geometry,
        padding=function.padding.rule,
        obstacle=owner_obstacle(owner, function.weight),
        patched=geometry_of_calls(owner, function) is not None,
        owned=function,
        weight=weight,
    )
