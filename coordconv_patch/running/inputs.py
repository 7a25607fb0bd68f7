"""What users pass in and models give back: example inputs, and the tensors among values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from coordconv_patch.arguments import not_a_module
from coordconv_patch.errors import CoordConvPatchError, ExampleInputsError, PatchError
from coordconv_patch.running.held_values import tensors_held_by
from coordconv_patch.running.uncompiled import uncompiled

__all__ = [
    "as_plain_dict",
    "check_has_values",
    "check_is_module",
    "check_not_scripted",
    "describe_inputs",
    "in_signature_order",
    "run_model",
    "split_inputs",
    "takes_image_list",
    "tensors_in",
    "writable_inputs",
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


def check_has_values(model: nn.Module) -> None:
    """Check that a model's weights and buffers have values.

    Raises:
        PatchError: If one is on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise PatchError(
                f"{name} is on the meta device, where tensors have no values: load the model's "
                "weights first (where accelerate has moved them away, "
                "accelerate.hooks.remove_hook_from_submodules brings them back)"
            )


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
    if it fails. A compiled model runs uncompiled.
    """
    args, kwargs = split_inputs(example_inputs)
    try:
        with uncompiled(model):
            return model(*args, **kwargs)
    except Exception as error:
        raise ExampleInputsError(
            f"the model failed on the example inputs ({describe_inputs(example_inputs)}): "
            f"{type(error).__name__}: {error}"
        ) from error


def writable_inputs(example_inputs: Any) -> Any:
    """Example inputs that a model may write into: containers, objects and tensors copied.

    Modules are not, nor what cannot be copied. A tensor that is given twice still is one.
    """
    copies: dict[int, Any] = {
        # Not by the tensor's own way to be copied, which refuses those with a history.
        id(each): _copied_tensor(each) if isinstance(each, Tensor) else each
        for each in tensors_held_by(example_inputs)
    }
    return _copied(example_inputs, copies)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a value; of the parts that have copies already, these."""
    if type(value) in (list, tuple):
        return type(value)(_copied(each, copies) for each in value)
    if type(value) is dict:
        return {key: _copied(each, copies) for key, each in value.items()}
    try:
        return copy.deepcopy(value, copies)
    except Exception:  # an open file, a lock: whatever its class raises
        return value


def _copied_tensor(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


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
