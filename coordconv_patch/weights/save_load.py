"""Save and load coordinate weights: one safetensors file, a few kilobytes to a few megabytes.

The file holds the coordinate weights by site name, and in its metadata what is
needed to put them onto a fresh copy of the pretrained model, or to refuse:
format and package version, each site's geometry and convention, a
fingerprint of the base weights, and a checksum. It is never a pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from coordconv_patch.arguments import check_flag, check_path
from coordconv_patch.errors import CoordConvPatchError, PatchError, WeightsError
from coordconv_patch.files.atomic import replacement
from coordconv_patch.files.tensor_file import check_storable, tensor_file_bytes
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.left_behind.watch import check_left_behind
from coordconv_patch.patching.apply import apply_plan_
from coordconv_patch.patching.plan import Plan, plan_sites
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.running.rollback import unchanged_on_failure, values_restored_on_failure
from coordconv_patch.running.untouched import LOOK, Model, copied
from coordconv_patch.running.wrappers import check_not_wrapped, clean_name, unwrapped
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.site import Site, SiteMap
from coordconv_patch.training import coord_parameters, coord_parameters_of
from coordconv_patch.weights.coords_file import COORD_SUFFIX, CoordsFile, read_coords_file
from coordconv_patch.weights.fit import check_norms, check_sites
from coordconv_patch.weights.header import FORMAT, Header, SiteRecord
from coordconv_patch.weights.recorded_functions import functions_to_record, with_recorded_functions

__all__ = ["fingerprint", "load_coords", "load_coords_", "save_coords"]


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
        PatchError: If other code has left coordinates behind.
        ArgumentError: If another argument makes no sense.
    """
    check_is_module(model)
    check_flag("include_batch_norm", include_batch_norm)
    path = check_path("path", path)
    model = unwrapped(model)
    check_left_behind(model)
    try:
        patched = require_coord_layers(model)
    except PatchError as error:
        raise WeightsError(f"there is nothing to save: {error}") from error
    layers = {clean_name(name): layer for name, layer in patched.items()}
    _check_whole(layers)
    tensors: dict[str, Tensor] = {
        name + COORD_SUFFIX: layer.coord_weight for name, layer in layers.items()
    }
    if include_batch_norm:
        tensors |= _norm_statistics(model)
    stored = {name: _gathered(tensor).contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        check_storable(name, tensor)
    functions = functions_to_record(model)
    records = {
        name: SiteRecord(
            layer.coord_geometry, layer.coords, layer.chosen_calls, functions.get(layer)
        )
        for name, layer in layers.items()
    }
    try:
        header = Header(records, fingerprint(model)).to_json()
        Header.from_json(header)  # what cannot be read again must not be written
    except CoordConvPatchError as error:
        raise WeightsError(f"the coordinate weights cannot be saved: {error}") from error
    raw = tensor_file_bytes(header, stored, FORMAT)
    with replacement(path, WeightsError) as temporary:
        temporary.write_bytes(raw)
    return path


def load_coords(model: Model, path: str | os.PathLike[str], *, check_base: bool = True) -> Model:
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
    with LOOK:
        return _load(model, path, check_base, in_place=False)


def load_coords_(model: Model, path: str | os.PathLike[str], *, check_base: bool = True) -> Model:
    """Patch a model in place and fill it; see :func:`load_coords`.

    Nothing is changed if the file is refused.

    Returns:
        The model itself.
    """
    with LOOK:
        return _load(model, path, check_base, in_place=True)


def _load(model: Model, path: str | os.PathLike[str], check_base: bool, in_place: bool) -> Model:
    check_is_module(model)
    check_flag("check_base", check_base)
    bare = unwrapped(model)
    file = read_coords_file(check_path("path", path))
    site_map = with_recorded_functions(find_sites(bare), file, bare)
    sites = {clean_name(site.name): site for site in site_map.sites}
    check_sites(file, sites, bare)
    if check_base:
        _check_fingerprint(file, bare)
    check_norms(file, _norm_statistics(bare))
    plans = _plans(file, site_map, sites)
    if plans:
        check_not_wrapped(model)
    if not in_place:
        model = copied(model, advice="use the in-place form, load_coords_")
        bare = unwrapped(model)
    with unchanged_on_failure(bare):
        for plan in plans:
            apply_plan_(bare, plan)
        _fill(bare, file)
    return model


def _plans(file: CoordsFile, site_map: SiteMap, sites: dict[str, Site]) -> list[Plan]:
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


def _with_chosen_calls(plan: Plan, file: CoordsFile) -> Plan:
    """The plan for the calls that the file names: a site's other calls stay plain."""
    records = file.sites
    return dataclasses.replace(
        plan,
        rows=tuple(
            row.of_calls(records[clean_name(row.site.name)].chosen_calls) if row.chosen else row
            for row in plan.rows
        ),
    )


def _check_fingerprint(file: CoordsFile, model: nn.Module) -> None:
    own = fingerprint(model)
    if own != file.fingerprint:
        raise WeightsError(
            f"{file.path} belongs to a model with other weights (fingerprint "
            f"{file.fingerprint[:12]}, this model's is {own[:12]}). Load the checkpoint that the "
            "coordinate weights were trained with first; if the base was fine-tuned too, or its "
            "dtype changed, that is the fine-tuned state_dict. check_base=False loads regardless"
        )


@torch.no_grad()
def _fill(model: nn.Module, file: CoordsFile) -> None:
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

    Buffers do not count: running statistics move while a model is fine-tuned. 64 hexadecimal
    digits; equal for a model and its patched copy.
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


def _check_whole(layers: dict[str, CoordLayer]) -> None:
    """Refuse what wrappers that flatten or offload parameters leave in their place."""
    for name, layer in layers.items():
        geometry = layer.coord_geometry
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


def _norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics of the norm layers, by qualified buffer name."""
    return {
        clean_name(f"{name}.{key}" if name else key): buffer
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for key, buffer in module.named_buffers(recurse=False)
    }
