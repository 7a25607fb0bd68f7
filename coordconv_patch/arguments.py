"""Checks of arguments: what was given, which argument it was, and what to write instead."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.errors import ArgumentError

__all__ = [
    "check_callable",
    "check_example_inputs",
    "check_flag",
    "check_names",
    "check_number",
    "check_path",
    "check_text",
    "check_word",
    "given",
    "not_a_module",
]


def given(name: str, value: Any) -> str:
    """An argument as the caller wrote it, and its type: ``lr='x' is a str``."""
    if value is None:
        return f"{name}=None"
    if isinstance(value, type):
        return f"{name}={value.__name__} is a class"
    plain = isinstance(value, (str, bytes, bool, int, float, list, tuple, dict, set))
    try:
        text = repr(value) if plain else "..."
    except Exception:  # of an item, or of an integer of thousands of digits
        text = "..."
    if len(text) > 60:
        text = text[:57] + "..." if isinstance(value, (str, bytes)) else "..."
    shown = f"{name}={text}"
    kind = type(value).__name__
    return f"{shown} is {'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def not_a_module(name: str, value: Any) -> ArgumentError:
    """The error for an argument that should have been a module."""
    if isinstance(value, str):
        hint = f"pass the module itself, such as timm.create_model({value[:60]!r})"
    elif isinstance(value, type) and issubclass(value, nn.Module):
        hint = f"pass an instance of it, {value.__name__}(...)"
    elif isinstance(value, Mapping):
        hint = "is it a state_dict? Build the module, call its load_state_dict(...), and pass that"
    elif isinstance(value, (list, tuple)):
        hint = "pass one module, such as torch.nn.Sequential(*modules)"
    else:
        hint = "pass a torch.nn.Module"
    return ArgumentError(f"{given(name, value)}: {hint}")


def check_flag(name: str, value: Any) -> None:
    """Check that an argument is True or False.

    Raises:
        ArgumentError: If it is something else, which Python would take for one of them.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"{given(name, value)}: write True or False")


def check_number(name: str, value: Any, *, optional: bool = False) -> None:
    """Check that an argument is a finite number, 0 or more; a tensor of one number will do.

    Raises:
        ArgumentError: If it is not.
    """
    if value is None and optional:
        return
    number = value
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        number = value.item()
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number < 0:
        or_none = ", or None" if optional else ""
        raise ArgumentError(f"{given(name, value)}: write a finite number, 0 or more{or_none}")


def check_names(name: str, value: Any) -> None:
    """Check that an argument is a list of names, or None.

    Raises:
        ArgumentError: If it is not; a single string too, which is a list of its letters.
    """
    if value is None:
        return
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return
    example = f"[{value!r}]" if isinstance(value, str) else "['...']"
    raise ArgumentError(f"{given(name, value)}: write a list of names, such as {example}")


def check_callable(name: str, value: Any) -> None:
    """Check that an argument can be called.

    Raises:
        ArgumentError: If it cannot.
    """
    if not callable(value):
        raise ArgumentError(f"{given(name, value)}: pass a function")


def check_word(name: str, value: Any) -> None:
    """Check that an argument is one word, such as a name that others are to write.

    Raises:
        ArgumentError: If it is not.
    """
    if not isinstance(value, str) or not value.isidentifier():
        raise ArgumentError(f"{given(name, value)}: write a word of letters, digits and _")


def check_text(name: str, value: Any, example: str) -> None:
    """Check that an argument is a text, such that a file can hold it.

    Args:
        name: The argument's name.
        value: What was given.
        example: What may be written instead.

    Raises:
        ArgumentError: If it is not a string, or has half a character (a lone surrogate).
    """
    try:
        if isinstance(value, str):
            value.encode()
            return
    except UnicodeEncodeError:
        pass
    raise ArgumentError(f"{given(name, value)}: write a text, such as {example!r}")


def check_path(name: str, value: Any) -> Path:
    """An argument that names a file, as a path.

    Raises:
        ArgumentError: If it is not a string or a path.
    """
    try:
        path = os.fspath(value)
        os.fsencode(path)  # a lone surrogate is a name that no file can have
    except (TypeError, UnicodeEncodeError):
        path = None
    if not isinstance(path, str) or not path or "\0" in path:
        raise ArgumentError(f"{given(name, value)}: write a file name")
    return Path(path)


def check_example_inputs(value: Any, *, optional: bool = True) -> None:
    """Check that example inputs can be what a model is called with.

    Raises:
        ArgumentError: If they surely are not: arrays, a shape, a file name, a module.
    """
    if value is None:
        if optional:
            return
        raise ArgumentError("example_inputs=None: pass a tensor, or a tuple of arguments")
    arrays = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, np.ndarray)]
    if arrays:
        raise ArgumentError(
            f"example_inputs hold a NumPy array of shape {arrays[0].shape}: pass a tensor, "
            "torch.from_numpy(array)"
        )
    if _is_shape(value):
        raise ArgumentError(
            f"example_inputs={tuple(value)}: is it a shape? Pass a tensor, "
            f"torch.zeros({', '.join(map(str, value))})"
        )
    if isinstance(value, (str, bytes, bool, int, float, nn.Module, type, os.PathLike)):
        raise ArgumentError(
            f"{given('example_inputs', value)}: pass a tensor, or a tuple of arguments"
        )


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list, torch.Size))
        and len(value) > 0
        and all(type(length) is int for length in value)
    )
