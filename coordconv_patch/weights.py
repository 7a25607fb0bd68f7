"""Save and load coordinate weights: one safetensors file, a few kilobytes to a few megabytes.

The file holds the coordinate weights by site name, and in its metadata what is
needed to put them onto a fresh copy of the pretrained model, or to refuse:
format and package version, each site's geometry and convention, a
fingerprint of the base weights, and a checksum. It is never a pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from coordconv_patch.arguments import check_flag, check_path
from coordconv_patch.atomic import replacing
from coordconv_patch.branch import ChosenCalls, CoordBranch
from coordconv_patch.conversion import check_not_wrapped
from coordconv_patch.coords_header import FORMAT, Header, SiteRecord, refuse_newer
from coordconv_patch.errors import (
    CoordConvPatchError,
    WeightsError,
    excerpt,
    listing,
)
from coordconv_patch.geometry import ConvGeometry
from coordconv_patch.inputs import check_is_module
from coordconv_patch.layers import CoordConvNd, coord_layers
from coordconv_patch.owned_calls import OwnedCalls, owned_calls, owner_obstacle, watched_geometry
from coordconv_patch.patching import apply_plan_, copied
from coordconv_patch.plan import Plan, plan_sites
from coordconv_patch.programs import why_not_patched
from coordconv_patch.rollback import unchanged_on_failure, values_restored_on_failure
from coordconv_patch.sites import Site, SiteMap, find_sites
from coordconv_patch.tensor_file import check_storable, read_tensor_file, tensor_file_bytes
from coordconv_patch.training import coord_parameters, coord_parameters_of

__all__ = ["fingerprint", "load_coords", "load_coords_", "save_coords"]

_COORD_SUFFIX = ".coord_weight"
_WRAPPER_NAMES = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Name components that wrappers put into qualified names, wherever they stand."""
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
"""They hold the model as ``module``."""
_WRAPPERS_ELSEWHERE = frozenset(
    {"timm.utils.model_ema.ModelEmaV2", "timm.utils.model_ema.ModelEmaV3"}
)
"""Likewise, of libraries that this package does without."""


@dataclass(frozen=True)
class _CoordsFile:
    """A coordinate-weights file, read and checked in itself."""

    path: Path
    sites: Mapping[str, SiteRecord]
    weights: dict[str, Tensor]
    batch_norm: dict[str, Tensor]
    fingerprint: str


def save_coords(
    model: nn.Module, path: str | os.PathLike[str], *, include_batch_norm: bool = False
) -> Path:
    """Write the coordinate weights of a patched model to a safetensors file.

    Wrappers (DistributedDataParallel, torch.compile, AveragedModel, ...) are seen
    through: the names in the file are those of the bare model. Weights that
    ``fully_shard`` spread over processes are gathered: call it on every process then.

    Args:
        model: A patched model.
        path: The file to write. An existing one is replaced, whole or not at all.
        include_batch_norm: Store the running statistics of the norm layers too; they
            move when a model is fine-tuned in training mode.

    Returns:
        The path written.

    Raises:
        WeightsError: If the model is not patched, if a wrapper has taken its coordinate
            weights apart, if a weight is not finite, or if the file cannot be written.
    """
    check_is_module(model)
    path = check_path("path", path)
    model = unwrapped(model)
    layers = {clean_name(name): layer for name, layer in coord_layers(model).items()}
    if not layers:
        raise WeightsError(f"there is nothing to save: {why_not_patched(model)}")
    _check_whole(layers)
    tensors: dict[str, Tensor] = {
        name + _COORD_SUFFIX: layer.coord_weight for name, layer in layers.items()
    }
    if include_batch_norm:
        tensors |= _norm_statistics(model)
    stored = {name: _gathered(tensor).contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        check_storable(name, tensor)
    functions = _clean_functions(model)
    records = {
        name: SiteRecord(
            _geometry_of(layer), layer.coords, _chosen_calls_of(layer), functions.get(layer)
        )
        for name, layer in layers.items()
    }
    try:
        header = Header(records, fingerprint(model)).to_json()
        Header.from_json(header)  # what cannot be read again must not be written
    except CoordConvPatchError as error:
        raise WeightsError(f"the coordinate weights cannot be saved: {error}") from error
    raw = tensor_file_bytes(header, stored, FORMAT)
    with replacing(path, WeightsError) as temporary:
        temporary.write_bytes(raw)
    return path


def load_coords(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> nn.Module:
    """A patched copy of a model, filled with saved coordinate weights.

    Args:
        model: The pretrained model, fresh or patched at exactly the file's sites.
        path: A file that :func:`save_coords` wrote.
        check_base: Refuse a model whose own weights are not those that the coordinate
            weights were trained with.

    Returns:
        The copy.

    Raises:
        WeightsError: If the file is truncated, damaged or foreign, if a site is missing or
            extra, if a geometry or convention differs, or if the base weights differ; with
            the reason.

    Warns:
        UserWarning: If the file has no checksum, as those of early versions: damage to its
            numbers would go unnoticed.
    """
    return _load(model, path, check_base, in_place=False)


def load_coords_(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> nn.Module:
    """Patch a model in place and fill it; see :func:`load_coords`.

    Nothing is changed if the file is refused.

    Returns:
        The model itself.
    """
    return _load(model, path, check_base, in_place=True)


def _load(
    model: nn.Module, path: str | os.PathLike[str], check_base: bool, in_place: bool
) -> nn.Module:
    check_is_module(model)
    check_flag("check_base", check_base)
    bare = unwrapped(model)
    file = _read(check_path("path", path))
    site_map = find_sites(bare)
    site_map = _with_recorded_functions(site_map, file, bare)
    sites = {clean_name(site.name): site for site in site_map.sites}
    _check_sites(file, sites, bare)
    if check_base:
        _check_fingerprint(file, bare)
    _check_norms(file, bare)
    plans = _plans(file, site_map, sites)
    if plans:
        check_not_wrapped(model)
    if not in_place:
        model = copied(model)
        bare = unwrapped(model)
    with unchanged_on_failure(bare):
        _apply(bare, plans)
        _fill(bare, file)
    return model


def _clean_functions(model: nn.Module) -> dict[nn.Module, OwnedCalls]:
    """The calls that branches in plain modules are for, as names of the bare model."""
    return {
        branch: dataclasses.replace(calls, owner=clean_name(calls.owner))
        for branch, calls in owned_calls(model).items()
    }


def _with_recorded_functions(site_map: SiteMap, file: _CoordsFile, model: nn.Module) -> SiteMap:
    """The sites of a model, with functional ones that a trace alone does not tell.

    They were found by running the model when it was patched, and the file knows what was seen.
    """
    known = {clean_name(site.name): site for site in site_map.sites}
    recorded = []
    for name, record in file.sites.items():
        site = known.get(name)
        if record.function is not None and (site is None or (site.obstacle and not site.patched)):
            recorded.append(_recorded_site(file, name, record, record.function, model))
    names = {site.name for site in recorded}
    others = [site for site in site_map.sites if clean_name(site.name) not in names]
    return dataclasses.replace(site_map, sites=(*others, *recorded))


def _recorded_site(
    file: _CoordsFile, name: str, record: SiteRecord, function: OwnedCalls, model: nn.Module
) -> Site:
    try:
        owner = model.get_submodule(function.owner)
        weight = next(model.parameters(), None)
        if function.weight is not None:
            weight = operator.attrgetter(function.weight)(owner)
    except AttributeError as error:
        raise WeightsError(
            f"{file.path} has coordinate weights for {excerpt(name)}, a convolution function that "
            f"{excerpt(function.owner or 'the model')} calls, which this model does not have: "
            f"{error}"
        ) from error
    return Site(
        name=name,
        kind="function",
        class_name=function.function,
        geometry=record.geometry,
        padding=function.padding.rule,
        obstacle=owner_obstacle(owner),
        patched=watched_geometry(owner, function) is not None,
        owned=function,
        weight=torch.empty(0) if weight is None else weight,
    )


def _plans(file: _CoordsFile, site_map: SiteMap, sites: dict[str, Site]) -> list[Plan]:
    """How to patch what is not patched yet: one plan for each convention in the file."""
    plans = []
    for coords in dict.fromkeys(record.coords for record in file.sites.values()):
        # A regular expression: a site may be called "first" or "all".
        names = [
            f"re:{re.escape(sites[name].name)}"
            for name, record in file.sites.items()
            if record.coords == coords and not sites[name].patched
        ]
        if names:
            plans.append(_with_chosen_calls(plan_sites(site_map, names, coords), file))
    return plans


def _with_chosen_calls(plan: Plan, file: _CoordsFile) -> Plan:
    """The plan for the calls that the file names: a site's other calls stay plain."""
    records = file.sites
    return dataclasses.replace(
        plan,
        rows=tuple(
            dataclasses.replace(row, calls=records[clean_name(row.site.name)].chosen_calls)
            if row.chosen
            else row
            for row in plan.rows
        ),
    )


def _apply(model: nn.Module, plans: list[Plan]) -> nn.Module:
    for plan in plans:
        model = apply_plan_(model, plan)
    return model


def _read(path: Path) -> _CoordsFile:
    stored = read_tensor_file(path, FORMAT)
    try:
        if stored.is_intact is False:
            refuse_newer(stored.header)  # whose checksum may be another one
            raise WeightsError(
                "it is damaged: its content is not what its checksum was made from. Take an "
                "intact copy, or save the weights again"
            )
        header = Header.from_json(stored.header)
        if header.needs_checksum and stored.is_intact is None:
            raise WeightsError("it is damaged: its checksum is missing")
        weights = _weights(header.sites, stored.tensors)
        for name, tensor in stored.tensors.items():
            check_storable(name, tensor)
    except CoordConvPatchError as error:
        raise WeightsError(f"{path}: {error}") from error
    if stored.is_intact is None:
        warnings.warn(
            f"{path} has no checksum, because an early version of coordconv_patch wrote it: damage "
            "to its numbers would go unnoticed. To add one, save the loaded model with "
            "save_coords",
            stacklevel=4,
        )
    others = {name: tensor for name, tensor in stored.tensors.items() if name not in weights}
    return _CoordsFile(
        path,
        header.sites,
        {name.removesuffix(_COORD_SUFFIX): tensor for name, tensor in weights.items()},
        others,
        header.fingerprint,
    )


def _weights(sites: Mapping[str, SiteRecord], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The coordinate weights among a file's tensors, by their names there."""
    weights = {}
    for name, record in sites.items():
        weight = tensors.get(name + _COORD_SUFFIX)
        if weight is None:
            raise WeightsError(f"it holds no weight for the site {excerpt(name)}")
        if not weight.dtype.is_floating_point:
            raise WeightsError(f"the weight of {name} has dtype {weight.dtype}, not one of floats")
        if tuple(weight.shape) != record.weight_shape:
            raise WeightsError(
                f"the weight of {name} has shape {tuple(weight.shape)}, its header says "
                f"{record.weight_shape}"
            )
        weights[name + _COORD_SUFFIX] = weight
    return weights


def _check_sites(file: _CoordsFile, sites: dict[str, Site], model: nn.Module) -> None:
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
        if layer is not None and tuple(layer.coord_weight.shape) != record.weight_shape:
            raise WeightsError(
                f"the coordinate weight of {name} has shape {tuple(layer.coord_weight.shape)} in "
                f"the model, not {record.weight_shape}: has a wrapper flattened it?"
            )
        if layer is not None and layer.coords != record.coords:
            raise WeightsError(
                f"{name}: the file uses coordinates {record.coords}, the model is patched with "
                f"{layer.coords}"
            )
        _check_chosen_calls(file, name, site, layer, model)
        if layer is None and site.obstacle:
            raise WeightsError(f"{name} cannot be patched: {site.obstacle}")


def _check_chosen_calls(
    file: _CoordsFile,
    name: str,
    site: Site,
    layer: CoordConvNd | CoordBranch | None,
    model: nn.Module,
) -> None:
    wanted = file.sites[name].chosen_calls
    found = None if layer is None else _chosen_calls_of(layer)
    if layer is not None and (wanted and wanted.indices) != (found and found.indices):
        raise WeightsError(
            f"{name}: the file has coordinates at {wanted or 'all calls'}, the model is patched at "
            f"{found or 'all calls'}: load onto the unpatched model"
        )
    if wanted is None:
        return
    calls = _calls_in_graph(site)
    if calls is not None and calls != wanted.total:
        raise WeightsError(
            f"{name}: the file has coordinates at {wanted}, this model's graph has {calls} calls"
        )
    if layer is None and wanted.caller not in dict(model.named_modules()):
        raise WeightsError(
            f"{name}: its calls are counted while {excerpt(wanted.caller)} runs, which this model "
            "does not have"
        )


def _calls_in_graph(site: Site) -> int | None:
    """How often a site is called, as far as its graph tells."""
    if site.nodes:
        return len(site.nodes)
    if site.region is None or site.module is None:
        return None
    modules = dict(site.region.module.named_modules(remove_duplicate=False))
    nodes = site.region.graph.find_nodes(op="call_module", sort=False)
    return sum(modules.get(str(node.target)) is site.module for node in nodes) or None


def _check_fingerprint(file: _CoordsFile, model: nn.Module) -> None:
    found = fingerprint(model)
    if found != file.fingerprint:
        raise WeightsError(
            f"{file.path} belongs to a model with other weights (fingerprint "
            f"{file.fingerprint[:12]}, this model's is {found[:12]}). Load the checkpoint that the "
            "coordinate weights were trained with first; if the base was fine-tuned too, or its "
            "dtype changed, that is the fine-tuned state_dict. check_base=False loads regardless"
        )


def _check_norms(file: _CoordsFile, model: nn.Module) -> None:
    buffers = _norm_statistics(model)
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


@torch.no_grad()
def _fill(model: nn.Module, file: _CoordsFile) -> None:
    values = file.weights | file.batch_norm
    targets: dict[str, Tensor] = {
        clean_name(name): layer.coord_weight for name, layer in coord_layers(model).items()
    }
    targets |= {n: buffer for n, buffer in _norm_statistics(model).items() if n in values}
    for name, target in targets.items():
        if target.is_meta:
            raise WeightsError(
                f"{name} is on the meta device: load the model's own weights first, so that it has "
                "memory"
            )
        if not values[name].to(target.dtype).isfinite().all():
            raise WeightsError(
                f"{name}: values of up to {values[name].abs().max():.3g} do not fit into the "
                f"model's {target.dtype}"
            )
    with values_restored_on_failure(targets.values()):
        for name, target in targets.items():
            target.copy_(_spread_like(target, values[name]))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's own parameters: names, dtypes, shapes and values, without coordinates.

    Buffers do not count: running statistics move while a model is fine-tuned.

    Returns:
        64 hexadecimal digits; equal for a model and its patched copy.
    """
    digest = hashlib.sha256()
    model = unwrapped(model)
    coords = {id(weight) for weight in coord_parameters(model)} if coord_layers(model) else set()
    for name, parameter in model.named_parameters():
        if id(parameter) in coords:
            continue
        header = f"{clean_name(name)} {parameter.dtype} {tuple(parameter.shape)}\n"
        digest.update(header.encode())
        if not parameter.is_meta:
            # A copy: memory that NumPy has seen cannot be resized any more, as FSDP does.
            values = _gathered(parameter).contiguous().clone()
            digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _gathered(tensor: Tensor) -> Tensor:
    """A whole tensor in the processor's memory, also of one that is sharded over processes."""
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor().cpu() if _is_sharded(tensor) else tensor.cpu()


def _spread_like(weight: Tensor, whole: Tensor) -> Tensor:
    """The values of a whole tensor, sharded over processes if and as another one is."""
    if not _is_sharded(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, weight)
    return distribute_tensor(
        whole.to(weight.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor; not every torch has the class


def _check_whole(layers: dict[str, CoordConvNd | CoordBranch]) -> None:
    """Refuse what wrappers that flatten or offload parameters leave in their place."""
    for name, layer in layers.items():
        geometry = _geometry_of(layer)
        shape = geometry.coord_weight_shape(layer.coords.num_channels(geometry.ndim))
        if layer.coord_weight.is_meta:
            raise WeightsError(
                f"the coordinate weight of {name} has no values here, it is on the meta device. "
                "If a library has moved the weights away, let it bring them back first "
                "(accelerate.hooks.remove_hook_from_submodules)"
            )
        if tuple(layer.coord_weight.shape) != shape or not coord_parameters_of(layer):
            raise WeightsError(
                f"the coordinate weight of {name} is not a whole parameter: a wrapper has "
                "flattened it and holds its values elsewhere. Gather the parameters "
                "first (FullyShardedDataParallel.summon_full_params, "
                "deepspeed.zero.GatheredParameters), or shard with fully_shard"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The bare model inside DistributedDataParallel, DataParallel, torch.compile or an EMA."""
    while True:
        if _is_compiled(model):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, _WRAPPERS) or _qualified_class(model) in _WRAPPERS_ELSEWHERE:
            model = model.get_submodule("module")
        else:
            return model


def _is_compiled(model: nn.Module) -> bool:
    # torch.compile has loaded its compiler then; to import it takes as long as torch itself.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(model, compiler.OptimizedModule)


def _qualified_class(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def clean_name(name: str) -> str:
    """A qualified name without the components that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def _geometry_of(layer: CoordConvNd | CoordBranch) -> ConvGeometry:
    return layer.geometry if isinstance(layer, CoordBranch) else ConvGeometry.of(layer)


def _chosen_calls_of(layer: CoordConvNd | CoordBranch) -> ChosenCalls | None:
    return layer.chosen_calls if isinstance(layer, CoordBranch) else None


def _norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics of the norm layers, by qualified buffer name."""
    return {
        clean_name(f"{name}.{key}" if name else key): buffer
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for key, buffer in module.named_buffers(recurse=False)
    }
