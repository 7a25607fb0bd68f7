"""Save and load coordinate weights: one safetensors file, a few kilobytes to a few megabytes.

The file holds the coordinate weights by site name, and in its metadata what is
needed to put them onto a fresh copy of the pretrained model, or to refuse:
format and package version, each site's geometry and convention, and a
fingerprint of the base weights. It is never a pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from coordconv_patch.atomic import obstacle_to_writing, replacing
from coordconv_patch.branch import ChosenCalls, CoordBranch
from coordconv_patch.conversion import check_not_wrapped
from coordconv_patch.coords import Coordinates
from coordconv_patch.errors import PatchError, WeightsError, listing
from coordconv_patch.geometry import ConvGeometry
from coordconv_patch.layers import CoordConvNd, coord_layers
from coordconv_patch.left_behind import check_left_behind
from coordconv_patch.patching import apply_plan_, copied
from coordconv_patch.plan import Plan, plan_sites
from coordconv_patch.programs import why_not_patched
from coordconv_patch.sites import Site, SiteMap, find_sites
from coordconv_patch.training import coord_parameters, coord_parameters_of
from coordconv_patch.version import __version__

__all__ = ["fingerprint", "load_coords", "load_coords_", "save_coords"]

FORMAT = "coordconv_patch"
FORMAT_VERSION = 2
"""2 added chosen calls; files without them are written as version 1."""
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
class _SiteRecord:
    geometry: ConvGeometry
    coords: Coordinates
    chosen_calls: ChosenCalls | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        channels = self.coords.channel_names(self.geometry.ndim)
        return self.geometry.coord_weight_shape(len(channels))


@dataclass(frozen=True)
class _CoordsFile:
    """A coordinate-weights file, read and checked in itself."""

    path: Path
    sites: dict[str, _SiteRecord]
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
            weights apart, or if the folder does not exist.
        PatchError: If other code has left coordinates behind.
    """
    model = unwrapped(model)
    layers = {clean_name(name): layer for name, layer in coord_layers(model).items()}
    check_left_behind(model)
    if not layers:
        raise WeightsError(f"there is nothing to save: {why_not_patched(model)}")
    _check_whole(layers)
    path = Path(path)
    obstacle = obstacle_to_writing(path)
    if obstacle:
        raise WeightsError(obstacle)
    tensors: dict[str, Tensor] = {
        name + _COORD_SUFFIX: layer.coord_weight for name, layer in layers.items()
    }
    if include_batch_norm:
        tensors |= _norm_statistics(model)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if any(map(_chosen_calls_of, layers.values())) else 1,
        "package_version": __version__,
        "fingerprint": fingerprint(model),
        "sites": {
            name: {
                "geometry": _geometry_of(layer).to_dict(),
                "coords": layer.coords.to_dict(),
                **_calls_to_dict(_chosen_calls_of(layer)),
            }
            for name, layer in layers.items()
        },
    }
    stored = {name: _gathered(tensor).contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata={FORMAT: json.dumps(header)})
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
        WeightsError: If the file is truncated or foreign, if a site is missing or extra,
            if a geometry or convention differs, or if the base weights differ; with
            the reason.
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
    bare = unwrapped(model)
    file = _read(Path(path))
    site_map = find_sites(bare)
    sites = {clean_name(site.name): site for site in site_map.sites}
    _check_sites(file, sites, coord_layers(bare))
    if check_base:
        _check_fingerprint(file, bare)
    _check_norms(file, bare)
    plans = _plans(file, site_map, sites)
    if plans:
        check_not_wrapped(model)
    if in_place and len(plans) > 1:
        # The second plan could fail when the first is carried out already, so both are tried.
        rehearsal = copied(bare)
        if _apply(rehearsal, plans) is not rehearsal:
            raise PatchError("the model has to become a GraphModule: use load_coords(...)")
    target = model if in_place else copied(model)
    filled = _apply(unwrapped(target), plans)
    _fill(filled, file)
    return target if filled is unwrapped(target) else filled


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
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is no safetensors file, or a truncated one ({error}); save_coords writes them"
        ) from error
    if FORMAT not in metadata:
        raise WeightsError(
            f"{path} is a safetensors file, but not one of coordinate weights; save_coords "
            "writes them (load a whole model's weights with load_state_dict)"
        )
    try:
        header = json.loads(metadata[FORMAT])
        if header["format_version"] > FORMAT_VERSION:
            raise WeightsError(
                f"{path} has format version {header['format_version']}, this package reads up to "
                f"{FORMAT_VERSION}: update coordconv-patch (the file was written by "
                f"{header['package_version']})"
            )
        sites = {
            name: _SiteRecord(
                ConvGeometry.from_dict(record["geometry"]),
                Coordinates.from_dict(record["coords"]),
                ChosenCalls.from_dict(record["calls"]) if "calls" in record else None,
            )
            for name, record in header["sites"].items()
        }
        for record in sites.values():
            record.weight_shape  # noqa: B018  # damaged numbers show here
        weights = {name: tensors.pop(name + _COORD_SUFFIX) for name in sites}
        return _CoordsFile(path, sites, weights, tensors, str(header["fingerprint"]))
    except WeightsError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its header is damaged ({error!r})") from error


def _check_sites(
    file: _CoordsFile, sites: dict[str, Site], present: dict[str, CoordConvNd | CoordBranch]
) -> None:
    missing = [name for name in file.sites if name not in sites]
    if missing:
        raise WeightsError(
            f"{file.path} has coordinate weights for {listing(missing)}, which this model does "
            f"not have; its sites are {listing(sites)}"
        )
    patched = {clean_name(name): layer for name, layer in present.items()}
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
        _check_chosen_calls(file, name, site, layer)
        if layer is None and site.obstacle:
            raise WeightsError(f"{name} cannot be patched: {site.obstacle}")
        if tuple(file.weights[name].shape) != record.weight_shape:
            raise WeightsError(
                f"{file.path}: the weight of {name} has shape {tuple(file.weights[name].shape)}, "
                f"its header says {record.weight_shape}"
            )


def _check_chosen_calls(
    file: _CoordsFile, name: str, site: Site, layer: CoordConvNd | CoordBranch | None
) -> None:
    wanted = file.sites[name].chosen_calls
    found = None if layer is None else _chosen_calls_of(layer)
    if layer is not None and (wanted and wanted.indices) != (found and found.indices):
        raise WeightsError(
            f"{name}: the file has coordinates at {wanted or 'all calls'}, the model is patched at "
            f"{found or 'all calls'}: load onto the unpatched model"
        )
    if wanted is not None and site.kind == "function" and len(site.nodes) != wanted.total:
        raise WeightsError(
            f"{name}: the file has coordinates at {wanted}, this model's graph has "
            f"{len(site.nodes)} calls"
        )


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
        if buffers[name].shape != tensor.shape:
            raise WeightsError(
                f"{name}: shape {tuple(tensor.shape)} in the file, "
                f"{tuple(buffers[name].shape)} in the model"
            )


@torch.no_grad()
def _fill(model: nn.Module, file: _CoordsFile) -> None:
    for name, layer in coord_layers(model).items():
        weight, saved = layer.coord_weight, file.weights[clean_name(name)]
        weight.copy_(_spread_like(weight, saved))
    buffers = _norm_statistics(model)
    for name, tensor in file.batch_norm.items():
        buffers[name].copy_(tensor)


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


def _calls_to_dict(chosen: ChosenCalls | None) -> dict[str, dict[str, object]]:
    return {} if chosen is None else {"calls": chosen.to_dict()}


def _norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics of the norm layers, by qualified buffer name."""
    return {
        clean_name(f"{name}.{key}" if name else key): buffer
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for key, buffer in module.named_buffers(recurse=False)
    }
