"""What users pass in and models give back: example inputs, and the tensors among values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from coordconv_patch.arguments import not_a_module
from coordconv_patch.errors import CoordConvPatchError, ExampleInputsError, PatchError

__all__ = [
    "as_plain_dict",
    "check_is_module",
    "check_not_scripted",
    "describe_inputs",
    "in_signature_order",
    "run_model",
    "split_inputs",
    "takes_image_list",
    "tensors_in",
]


def check_is_module(model: Any) -> None:
    """Check that a model is a module.

    Raises:
        PatchError: If it is an exported program.
        ArgumentError: If it is something else.
    """
    if isinstance(model, ExportedProgram):
        raise PatchError(
            "the model is an exported program: coordconv_patch.from_exported(program) makes a "
            "module of it"
        )
    if not isinstance(model, nn.Module):
        raise not_a_module("model", model)


def check_not_scripted(model: nn.Module, failure: type[CoordConvPatchError], advice: str) -> None:
    """Check that a model is not TorchScript's, whose code and parameters nobody may change.

    Args:
        model: The model.
        failure: The error to raise.
        advice: What to do instead.

    Raises:
        CoordConvPatchError: As ``failure`` says.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise failure(f"the model is a TorchScript module ({type(model).__name__}): {advice}")


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments.

    A tensor is one argument; a tuple is the positional arguments, where a dict at
    its end is keyword arguments; anything else (a list of images) is one argument.
    """
    if not isinstance(example_inputs, tuple):
        return (example_inputs,), {}
    if example_inputs and isinstance(example_inputs[-1], dict):
        return example_inputs[:-1], dict(example_inputs[-1])
    return example_inputs, {}


def takes_image_list(example_inputs: Any) -> bool:
    """Whether the first argument is a list of images (C, H, W), as detectors take them."""
    args, _ = split_inputs(example_inputs)
    return bool(args) and isinstance(args[0], (list, tuple))


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output on example inputs, see :func:`split_inputs`; an ExampleInputsError
    if it fails.
    """
    args, kwargs = split_inputs(example_inputs)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise ExampleInputsError(
            f"the model failed on the example inputs ({describe_inputs(example_inputs)}): "
            f"{type(error).__name__}: {error}"
        ) from error


def in_signature_order(model: nn.Module, example_inputs: Any) -> Any:
    """Example inputs with their keyword arguments in the order of the forward's signature.

    Graph inputs come in that order.
    """
    args, kwargs = split_inputs(example_inputs)
    if not kwargs:
        return example_inputs
    known = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return (*args, {name: kwargs[name] for name in dict.fromkeys((*known, *kwargs))})


def describe_inputs(example_inputs: Any) -> str:
    """Example inputs in words, for messages: shapes and dtypes."""
    if isinstance(example_inputs, Tensor):
        return f"a tensor of shape {tuple(example_inputs.shape)}, {example_inputs.dtype}"
    if isinstance(example_inputs, (tuple, list)):
        return ", ".join(describe_inputs(part) for part in example_inputs)
    if isinstance(example_inputs, dict):
        return ", ".join(f"{name}={describe_inputs(part)}" for name, part in example_inputs.items())
    return type(example_inputs).__name__


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and output classes, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(as_plain_dict(values)) if isinstance(leaf, Tensor)]


def as_plain_dict(values: Any) -> Any:
    """A mapping of a class that pytree does not know, as a dict; anything else as it is."""
    if isinstance(values, Mapping) and type(values) not in pytree.SUPPORTED_NODES:
        return dict(values)
    return values
