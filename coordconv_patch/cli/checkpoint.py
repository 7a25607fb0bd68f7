"""Weights for a model, from a file that the command line names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from coordconv_patch.errors import ModelSourceError, excerpt, first_line, path_text

__all__ = ["load_checkpoint_"]


def load_checkpoint_(model: nn.Module, path: Path) -> None:
    """Load weights into a model, in place: safetensors, or a torch file of tensors alone.

    A checkpoint of the plain model fits a patched one. Dicts that hold the weights
    under ``state_dict`` or ``model``, and names that begin with ``module.``, are understood.

    Raises:
        ModelSourceError: If the file cannot be read, or its names or shapes do not fit.
    """
    if not os.path.isfile(path):
        raise ModelSourceError(f"there is no file {path_text(path)}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # pickle.UnpicklingError of torch.load
        if not _is_of_torch(path):
            raise ModelSourceError(
                f"{path} is not a file of torch.save ({first_line(error)}): write one of "
                "model.state_dict()"
            ) from error
        raise ModelSourceError(
            f"{path} holds more than tensors, which is not loaded for safety's sake: save "
            f"model.state_dict() instead ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ModelSourceError(f"{path} holds a {type(state).__name__}, not a state_dict")
    strange = next((name for name in state if not isinstance(name, str)), None)
    if strange is not None:
        raise ModelSourceError(
            f"{path} holds a {type(state).__name__} with {excerpt(strange)} among its names, not a "
            "state_dict: save model.state_dict() instead"
        )
    if isinstance(state, dict) and state and all(n.startswith("module.") for n in state):
        consume_prefix_in_state_dict_if_present(state, "module.")  # of the metadata too
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        hint = _other_head(model, state)
        raise ModelSourceError(f"{path} does not fit the model: {error}{hint}") from error


def _is_of_torch(path: Path) -> bool:
    """Whether a file begins as those of torch.save do: a ZIP archive, before torch 1.6 a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _other_head(model: nn.Module, state: Mapping[str, Any]) -> str:
    """A hint where only the number of a head's classes differs; else empty."""
    own = model.state_dict()
    if set(own) != set(state):
        return ""
    pairs = [(own[name].shape, getattr(state[name], "shape", ())) for name in own]
    apart = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    numbers = {theirs[0] for _, theirs in apart if theirs}
    if len(numbers) != 1 or any(ours[1:] != theirs[1:] for ours, theirs in apart):
        return ""
    number = numbers.pop()
    return (
        f"\nIt has a head of {number} outputs: write num_classes={number} (of hf: models "
        f"num_labels) behind the model's name, such as timm:resnet18?num_classes={number}"
    )
