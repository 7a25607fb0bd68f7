"""The models that commands work on: loaded, patched, with the weights asked for, and saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coordconv_patch.cli.checkpoint import load_checkpoint_
from coordconv_patch.cli.console import note
from coordconv_patch.cli.loaded import LoadedModel
from coordconv_patch.cli.sources import load_model, parse_shape
from coordconv_patch.errors import ArgumentError, ExportError, PatchError, first_line
from coordconv_patch.files.atomic import replacement
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.patch import patch
from coordconv_patch.running.inputs import split_inputs
from coordconv_patch.verification.torch_run import torch_outputs
from coordconv_patch.weights.save_load import load_coords

__all__ = [
    "batches_of",
    "check_outputs_equal",
    "loaded_model",
    "model_to_export",
    "patched_model",
    "save_program",
]


def loaded_model(
    source: str, pretrained: bool, input_shape: str | None, trusted: bool
) -> LoadedModel:
    """The model that an argument names, with inputs of the shape that ``--input`` asks for."""
    shape = parse_shape(input_shape) if input_shape else None
    return load_model(source, pretrained=pretrained, input_shape=shape, trusted=trusted)


def batches_of(loaded: LoadedModel, batches: list[int]) -> tuple[Any, list[int] | None]:
    """Example inputs, and batch sizes to repeat them to; ``None`` where only their own runs."""
    example = loaded.example_inputs
    image = example[0] if isinstance(example, tuple) and len(example) == 1 else example
    if not isinstance(image, torch.Tensor):
        if batches != [1]:
            raise ArgumentError(f"--batch {batches[-1]}: the model takes more than one tensor")
        return example, None
    if not loaded.batch_is_fixed:
        return image, batches
    if batches != [len(image)]:
        wrong = next((batch for batch in batches if batch != len(image)), batches[0])
        raise ArgumentError(
            f"--batch {wrong}: the program was exported for batches of {len(image)} alone"
        )
    return (image,), None


def patched_model(
    loaded: LoadedModel, where: list[str] | None, coords: str, radius: bool
) -> nn.Module:
    """The model patched by ``--where``; as it is if it is patched already and that is not given."""
    if coord_layers(loaded.model) and not where:
        return loaded.model
    return patch(
        loaded.model,
        where or "first",
        coords=Coordinates.preset(coords, radius=radius),
        example_inputs=loaded.example_inputs,
    )


def model_to_export(
    loaded: LoadedModel,
    where: list[str] | None,
    coords: str,
    radius: bool,
    checkpoint: Path | None,
    coord_weights: Path | None,
) -> nn.Module:
    """The model to export: patched by --where or by a file, with the checkpoint's weights."""
    if coord_weights is not None:
        if where:
            raise ArgumentError(
                "--where and --coord-weights exclude each other: the file names the sites"
            )
        if checkpoint is not None:
            load_checkpoint_(loaded.model, checkpoint)
        return load_coords(loaded.model, coord_weights)
    patched = patched_model(loaded, where, coords, radius)
    if checkpoint is not None:
        load_checkpoint_(patched, checkpoint)
    elif not loaded.trained:
        note("the weights are random; pass --pretrained or --checkpoint")
    return patched


def check_outputs_equal(loaded: LoadedModel, patched: nn.Module) -> str:
    """How much of the outputs is equal, in words; a PatchError if patching has changed them."""
    before = torch_outputs(loaded.model, loaded.example_inputs)
    after = torch_outputs(patched, loaded.example_inputs)
    equal = len(before) == len(after) and all(map(_are_equal, before, after))
    if not equal:
        raise PatchError("the patched model's outputs are not those of the plain model")
    numbers = sum(tensor.numel() for tensor in after)
    undefined = sum(int(tensor.isnan().sum()) for tensor in after)
    but = f", but {undefined:,} of them are not numbers (NaN), before as after" if undefined else ""
    return f"{len(after)} outputs ({numbers:,} numbers) are bit-equal{but}"


def _are_equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    """As torch.equal, which takes no NaN for another."""
    if before.shape != after.shape or before.dtype is not after.dtype:
        return False
    is_nan = before.isnan()
    return torch.equal(is_nan, after.isnan()) and torch.equal(before[~is_nan], after[~is_nan])


def save_program(model: nn.Module, loaded: LoadedModel, path: Path) -> None:
    """Write a patched model as a torch.export program, or raise an ExportError."""
    args, kwargs = split_inputs(loaded.example_inputs)
    try:
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=loaded.dynamic_shapes, strict=False
        )
    except Exception as error:
        raise ExportError(
            f"torch.export cannot export this model ({first_line(error)}): write a .safetensors "
            "file instead"
        ) from error
    saved = io.BytesIO()  # torch tells a full disk by a RuntimeError
    torch.export.save(program, saved)
    with replacement(path, ExportError) as temporary:
        temporary.write_bytes(saved.getbuffer())
