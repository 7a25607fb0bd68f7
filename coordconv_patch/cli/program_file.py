"""Models in files of ``torch.export.save``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from coordconv_patch.cli.loaded import LoadedModel
from coordconv_patch.errors import ModelSourceError
from coordconv_patch.graphs.programs import from_exported

__all__ = ["model_of_program"]


def model_of_program(path: Path, trusted: bool) -> LoadedModel:
    """The GraphModule of a program in a file.

    Raises:
        ModelSourceError: If the file cannot be loaded, or is not trusted.
    """
    if not path.is_file():
        raise ModelSourceError(f"there is no file {path}")
    if not trusted:
        raise ModelSourceError(
            f"{path} is not loaded: torch unpickles parts of a .pt2 file, and that runs any code "
            "that its maker put into it. If you know where it comes from, pass --trust (in "
            "Python: trusted=True)"
        )
    try:
        program: ExportedProgram = torch.export.load(path)
    except Exception as error:
        raise ModelSourceError(
            f"{path} is not a torch.export program ({type(error).__name__}: {error}); "
            "torch.export.save writes them"
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    example = (*args, dict(kwargs)) if kwargs else tuple(args)
    model = from_exported(program)
    axes = _dynamic_axes(program)
    return LoadedModel(
        model,
        example,
        trained=True,
        dynamic_shapes=_by_argument(model, axes, args, kwargs) if any(axes) else None,
        batch_is_fixed=not any(0 in dynamic for dynamic in axes),
    )


def _dynamic_axes(program: ExportedProgram) -> list[dict[int, Any]]:
    """For each input of a program, which of its axes are dynamic."""
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    values = [
        inputs[str(name)].meta.get("val")
        for name in program.graph_signature.user_inputs
        if str(name) in inputs
    ]
    return [
        {
            dim: _axis(program, length)
            for dim, length in enumerate(getattr(value, "shape", ()))
            if isinstance(length, torch.SymInt)
        }
        for value in values
    ]


def _axis(program: ExportedProgram, length: torch.SymInt) -> Any:
    """A dynamic axis as it was when the program was exported, its range included."""
    symbol = length.node.expr
    if symbol not in program.range_constraints:
        return Dim.AUTO  # a multiple of another axis, say
    values = program.range_constraints[symbol]
    largest = None if values.upper == int_oo else int(values.upper)
    return Dim(str(symbol), min=int(values.lower), max=largest)


def _by_argument(
    model: nn.Module, axes: list[dict[int, Any]], args: Any, kwargs: Any
) -> dict[str, Any]:
    """Axes of a program's inputs in the structure of its forward's arguments."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    remaining = iter(axes)
    each = [(next(remaining) or None) for _ in leaves]
    return cast("dict[str, Any]", pytree.tree_unflatten(each, spec))
