"""Models in files of ``torch.export.save``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from coordconv_patch.cli.loaded import LoadedModel
from coordconv_patch.errors import ModelSourceError, path_text
from coordconv_patch.export.dynamo import dynamic_shapes
from coordconv_patch.graphs.programs import from_exported
from coordconv_patch.running.silence import output_silenced

__all__ = ["model_of_program"]


def model_of_program(path: Path, trusted: bool) -> LoadedModel:
    """The GraphModule of a program in a file, which must be trusted; or a ModelSourceError."""
    if not os.path.isfile(path):
        raise ModelSourceError(f"there is no file {path_text(path)}")
    if not trusted:
        raise ModelSourceError(
            f"{path} is not loaded: torch unpickles parts of a .pt2 file, and that runs any code "
            "that its maker put into it. If you know where it comes from, pass --trust (in "
            "Python: trusted=True)"
        )
    try:
        with output_silenced():  # of a damaged file torch logs a traceback of its own
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
        dynamic_shapes=dynamic_shapes(model, axes, args, kwargs),
        batch_is_fixed=not any(0 in dynamic for dynamic in axes),
    )


def _dynamic_axes(program: ExportedProgram) -> list[dict[int, Any]]:
    """For each input tensor of a program, which of its axes are dynamic."""
    names = program.graph_signature.user_inputs
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs: list[Any] = [node.meta.get("val") for node in placeholders if node.name in names]
    return [
        {
            dim: _axis(program, length)
            for dim, length in enumerate(value.shape)
            if isinstance(length, torch.SymInt)
        }
        for value in inputs
        if isinstance(value, Tensor)
    ]


def _axis(program: ExportedProgram, length: Any) -> Any:
    """A dynamic axis as it was when the program was exported, its range included."""
    from torch.utils._sympy.numbers import int_oo  # sympy takes a second to import

    symbol = length.node.expr
    if symbol not in program.range_constraints:
        return Dim.AUTO  # a multiple of another axis, say
    values = program.range_constraints[symbol]
    largest = None if values.upper == int_oo else int(values.upper)
    return Dim(str(symbol), min=int(values.lower), max=largest)
