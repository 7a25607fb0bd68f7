"""Whether a file of coordinate weights fits a model; nothing of the model is changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from coordconv_patch.errors import WeightsError, excerpt, listing
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.running.wrappers import clean_name
from coordconv_patch.sites.site import GraphFunctionSite, ModuleSite, Site
from coordconv_patch.weights.coords_file import CoordsFile

__all__ = ["check_norms", "check_sites"]


def check_sites(file: CoordsFile, sites: Mapping[str, Site], model: nn.Module) -> None:
    """Raise a WeightsError unless a model, not wrapped, has a file's convolutions as it says.

    The model's sites go by their names without wrappers' components.
    """
    missing = [name for name in file.sites if name not in sites]
    if missing:
        raise WeightsError(
            f"{file.path} has coordinate weights for {listing(missing)}, which this model does "
            f"not have; its sites are {listing(sites)}"
        )
    patched = {clean_name(name): layer for name, layer in coord_layers(model).items()}
    extra = [name for name in patched if name not in file.sites]
    if extra:
        raise WeightsError(
            f"the model is patched at {listing(extra)}, for which {file.path} has no weights: "
            "load onto the unpatched model"
        )
    for name, record in file.sites.items():
        site, layer = sites[name], patched.get(name)
        if site.geometry != record.geometry:
            raise WeightsError(
                f"{name}: the file was saved for a convolution {record.geometry}, this model "
                f"has {site.geometry} there"
            )
        if layer is not None and "coord_weight" not in layer._parameters:
            raise WeightsError(
                f"the coordinate weight of {name} is computed from other parameters (it is pruned "
                "or parametrized): load the file first, then prune or parametrize"
            )
        if layer is not None and layer.coords != record.coords:
            raise WeightsError(
                f"{name}: the file uses coordinates {record.coords}, the model is patched with "
                f"{layer.coords}"
            )
        if layer is not None and tuple(layer.coord_weight.shape) != record.weight_shape:
            raise WeightsError(
                f"the coordinate weight of {name} has shape {tuple(layer.coord_weight.shape)} in "
                f"the model, not {record.weight_shape}: has a wrapper flattened it?"
            )
        _check_chosen_calls(file, name, site, layer, model)
        if layer is None and site.obstacle:
            raise WeightsError(f"{name} cannot be patched: {site.obstacle}")


def _check_chosen_calls(
    file: CoordsFile, name: str, site: Site, layer: CoordLayer | None, model: nn.Module
) -> None:
    wanted = file.sites[name].chosen_calls
    present = None if layer is None else layer.chosen_calls
    if layer is not None and (wanted and wanted.indices) != (present and present.indices):
        raise WeightsError(
            f"{name}: the file has coordinates at {wanted or 'all calls'}, the model is patched at "
            f"{present or 'all calls'}: load onto the unpatched model"
        )
    if wanted is None:
        return
    in_graph = _number_of_calls_in_graph(site)
    if in_graph is not None and in_graph != wanted.total:
        raise WeightsError(
            f"{name}: the file has coordinates at {wanted}, this model's graph has {in_graph} calls"
        )
    if layer is None and wanted.caller not in dict(model.named_modules()):
        raise WeightsError(
            f"{name}: its calls are counted while {excerpt(wanted.caller)} runs, which this model "
            "does not have"
        )


def _number_of_calls_in_graph(site: Site) -> int | None:
    """How often a site is called, as far as its graph tells."""
    if isinstance(site, GraphFunctionSite):
        return len(site.nodes)
    if site.region is None or not isinstance(site, ModuleSite):
        return None
    modules = dict(site.region.module.named_modules(remove_duplicate=False))
    nodes = site.region.graph.find_nodes(op="call_module", sort=False)
    return sum(modules.get(str(node.target)) is site.module for node in nodes) or None


def check_norms(file: CoordsFile, buffers: Mapping[str, Tensor]) -> None:
    """Raise a WeightsError unless a model's norm statistics, by name, hold all of a file's."""
    for name, tensor in file.batch_norm.items():
        if name not in buffers:
            raise WeightsError(f"{file.path} has {name}, which this model does not have")
        buffer = buffers[name]
        if buffer.shape != tensor.shape:
            raise WeightsError(
                f"{name}: shape {tuple(tensor.shape)} in the file, {tuple(buffer.shape)} in the "
                "model"
            )
        if buffer.is_floating_point() != tensor.is_floating_point():
            raise WeightsError(
                f"{name}: dtype {tensor.dtype} in the file, {buffer.dtype} in the model"
            )
