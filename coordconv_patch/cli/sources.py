"""Models named on the command line: of a zoo, a function in a Python file, or a program."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from coordconv_patch.arguments import check_example_inputs
from coordconv_patch.cli.loaded import LoadedModel, random_image
from coordconv_patch.cli.model_sources import MODEL_SOURCES, model_source
from coordconv_patch.cli.program_file import model_of_program
from coordconv_patch.cli.zoo_models import close_names
from coordconv_patch.errors import (
    ArgumentError,
    CoordConvPatchError,
    ModelSourceError,
    excerpt,
    first_line,
    path_text,
)
from coordconv_patch.running.inputs import takes_image_list

__all__ = ["failures_told", "load_model", "parse_shape", "result_of_function"]


def load_model(
    source: str,
    *,
    pretrained: bool = False,
    input_shape: tuple[int, ...] | None = None,
    trusted: bool = False,
) -> LoadedModel:
    """Load the model that a command-line name means.

    Args:
        source: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or another prefix of
            :data:`.model_sources.MODEL_SOURCES`, with arguments behind the name if need be
            (``timm:resnet18?num_classes=12``), ``path/to/file.py:FUNCTION`` (the function
            takes no arguments and returns a module, or a module and its example inputs) or
            ``model.pt2`` (a torch.export program).
        pretrained: Download the zoo's pretrained weights.
        input_shape: Shape of a random example input; ``None``: what the model suggests.
        trusted: Load a ``.pt2`` file, which runs any code that its maker put into it.

    Raises:
        ModelSourceError: If there is no such model, or it cannot be loaded; says why.
    """
    prefix, _, name = source.partition(":")
    if source.endswith(".pt2"):
        loaded = model_of_program(Path(source), trusted)
    elif ".py:" in source:
        loaded = _model_of_function(source)
    elif name and (load := model_source(prefix)) is not None:
        loaded = load(name, pretrained)
    else:
        known = ", ".join(f"{known}:NAME" for known in MODEL_SOURCES)
        raise ModelSourceError(
            f"model {excerpt(source)}: write {known}, path/to/file.py:FUNCTION or model.pt2"
        )
    if input_shape is None:
        return loaded
    try:
        example: Any = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise ModelSourceError(
            f"shape {excerpt(input_shape)}: an input of that size cannot be made here "
            f"({first_line(error)})"
        ) from error
    if takes_image_list(loaded.example_inputs):
        example = ([example],)
    return dataclasses.replace(loaded, example_inputs=example)


def _model_of_function(source: str) -> LoadedModel:
    result = result_of_function(source)
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"{source} returned a {type(model).__name__}; it must return a torch.nn.Module, or "
            "one and its example inputs"
        )
    try:
        check_example_inputs(example)
    except ArgumentError as error:
        raise ModelSourceError(
            f"{source} returned a model, and {excerpt(example)} as its example inputs: return a "
            "tensor, or a tuple of arguments"
        ) from error
    example = random_image((1, 3, 224, 224)) if example is None else example
    return LoadedModel(model.eval(), example, True)


def result_of_function(source: str) -> Any:
    """What the function of ``path/to/file.py:FUNCTION`` returns.

    Raises:
        ModelSourceError: If there is no such file or function, or one of them fails.
    """
    file_name, _, function_name = source.rpartition(":")
    path = Path(file_name)
    if not os.path.isfile(path):
        raise ModelSourceError(f"there is no file {path_text(path)}")
    module = _run_file(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        close = close_names(function_name, names)
        hint = f"; {close}" if close else ""
        raise ModelSourceError(f"{path} has no function {excerpt(function_name)}{hint}")
    with failures_told(source, path, "; it must take no arguments"):
        return function()


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_coordconv_patch_source_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ModelSourceError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered, so that what the file defines can be pickled and copied, under a name that
    # shadows no other module; its folder is importable, as for a script.
    sys.modules[spec.name] = module
    sys.path.insert(0, os.fspath(path.resolve().parent))
    try:
        with failures_told(str(path), path):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@contextmanager
def failures_told(source: str, path: Path, hint: str = "") -> Iterator[None]:
    """While entered, what a user's own code raises becomes an error that names it.

    Args:
        source: What failed, for the message.
        path: The file that the code is in, whose line is told where it is known.
        hint: What else to say.

    Raises:
        ModelSourceError: If the code fails, or ends the process.
    """
    try:
        yield
    except CoordConvPatchError:
        raise
    except SystemExit as error:
        raise ModelSourceError(
            f"{source} ends the process (sys.exit({excerpt(error.code)})){_line_of(error, path)}: "
            'write that below `if __name__ == "__main__":`'
        ) from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ModelSourceError(f"{source} failed: {said}{_line_of(error, path)}{hint}") from error


def _line_of(error: BaseException, path: Path) -> str:
    """Where a file raised an error; empty if it did not."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)
    ]
    return f" (line {lines[-1]})" if lines else ""


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape written as ``1,3,224,224`` or ``1x3x224x224``; or a ModelSourceError."""
    try:
        shape = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelSourceError(f"shape {excerpt(text)}: write numbers like 1,3,224,224")
    return shape
