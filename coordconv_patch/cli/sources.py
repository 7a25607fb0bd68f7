"""Models named on the command line: zoo names, Python files, exported programs, checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from coordconv_patch.errors import ModelSourceError, first_line
from coordconv_patch.graphs.programs import from_exported
from coordconv_patch.running.inputs import takes_image_list

__all__ = ["LoadedModel", "load_checkpoint_", "load_model", "parse_shape"]

_FORMS = "write timm:NAME, torchvision:NAME, path/to/file.py:FUNCTION or model.pt2"
_INSTALL_TIMM = 'install it with: pip install "coordconv-patch[timm]"'


@dataclass(frozen=True)
class LoadedModel:
    """A model from the command line, in evaluation mode, and inputs that fit it.

    Attributes:
        model: The module; of an exported program, its GraphModule in the program's mode.
        example_inputs: Inputs to run it on, see :func:`coordconv_patch.plan`.
        trained: Whether it came with trained weights.
        dynamic_shapes: Of an exported program, its dynamic axes as ``torch.export.export``
            takes them; ``None`` if it has none.
        batch_is_fixed: Whether the model runs at one batch size only.
    """

    model: nn.Module
    example_inputs: Any
    trained: bool
    dynamic_shapes: dict[str, Any] | None = None
    batch_is_fixed: bool = False


def load_model(
    source: str,
    *,
    pretrained: bool = False,
    input_shape: tuple[int, ...] | None = None,
    trusted: bool = False,
) -> LoadedModel:
    """Load the model that a command-line name means.

    Args:
        source: ``timm:NAME``, ``torchvision:NAME``, ``path/to/file.py:FUNCTION`` (the
            function takes no arguments and returns a module, or a module and its example
            inputs) or ``model.pt2`` (a torch.export program).
        pretrained: Download the zoo's pretrained weights.
        input_shape: Shape of a random example input; ``None``: what the model suggests.
        trusted: Load a ``.pt2`` file, which runs any code that its maker put into it.

    Raises:
        ModelSourceError: If there is no such model, or it cannot be loaded; says why.
    """
    if source.endswith(".pt2"):
        loaded = _from_program(Path(source), trusted)
    elif source.startswith("timm:"):
        loaded = _from_timm(source.removeprefix("timm:"), pretrained)
    elif source.startswith("torchvision:"):
        loaded = _from_torchvision(source.removeprefix("torchvision:"), pretrained)
    elif ".py:" in source:
        loaded = _from_file(source)
    else:
        raise ModelSourceError(f"model {source!r}: {_FORMS}")
    if input_shape is None:
        return loaded
    example: Any = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    if takes_image_list(loaded.example_inputs):
        example = ([example],)
    return dataclasses.replace(loaded, example_inputs=example)


def _random_image(size: tuple[int, ...]) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


def _from_timm(name: str, pretrained: bool) -> LoadedModel:
    timm = _imported("timm")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"close names: {', '.join(close)}" if close else "timm.list_models() has them all"
        raise ModelSourceError(f"timm has no model {name!r}; {hint}")
    model = _created(lambda: timm.create_model(name, pretrained=pretrained), name, pretrained)
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    return LoadedModel(model.eval(), _random_image((1, *size)), pretrained)


def _from_torchvision(name: str, pretrained: bool) -> LoadedModel:
    models = _imported("torchvision").models
    if name not in models.list_models():
        close = difflib.get_close_matches(name, models.list_models(), n=3)
        hint = f"close names: {', '.join(close)}" if close else "see torchvision.models"
        raise ModelSourceError(f"torchvision has no model {name!r}; {hint}")
    if pretrained:
        model = _created(lambda: models.get_model(name, weights="DEFAULT"), name, pretrained)
    else:
        builder = models.get_model_builder(name)
        options: dict[str, Any] = {"weights": None}
        if "weights_backbone" in builder.__annotations__:
            options["weights_backbone"] = None
        model = _created(lambda: builder(**options), name, pretrained)
    place = type(model).__module__
    if ".detection." in place:
        return LoadedModel(model.eval(), ([_random_image((3, 320, 320))],), pretrained)
    if ".video." in place:
        return LoadedModel(model.eval(), _random_image((1, 3, 16, 112, 112)), pretrained)
    if ".optical_flow." in place:
        pair = (_random_image((1, 3, 128, 128)), _random_image((1, 3, 128, 128)))
        return LoadedModel(model.eval(), pair, pretrained)
    side = 299 if name == "inception_v3" else 224
    return LoadedModel(model.eval(), _random_image((1, 3, side, side)), pretrained)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModelSourceError(
            f"{package}: models need the package {package}; {_INSTALL_TIMM}"
        ) from error


def _created(create: Callable[[], nn.Module], name: str, pretrained: bool) -> nn.Module:
    try:
        return create()
    except Exception as error:
        if not pretrained:
            raise ModelSourceError(f"{name} cannot be created: {error}") from error
        raise ModelSourceError(
            f"the pretrained weights of {name} cannot be had ({first_line(error)}). "
            "Is there a network? If you have the weights in a file, leave --pretrained out and "
            "pass --checkpoint FILE"
        ) from error


def _from_file(source: str) -> LoadedModel:
    file_name, _, function_name = source.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise ModelSourceError(f"there is no file {path}")
    module = _run_file(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        close = difflib.get_close_matches(function_name, names, n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ModelSourceError(f"{path} has no function {function_name!r}{hint}")
    try:
        result = function()
    except Exception as error:
        raise ModelSourceError(
            f"{source} failed: {type(error).__name__}: {error}; it must take no arguments"
        ) from error
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"{source} returned a {type(model).__name__}; it must return a torch.nn.Module, or "
            "one and its example inputs"
        )
    example = _random_image((1, 3, 224, 224)) if example is None else example
    return LoadedModel(model.eval(), example, True)


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
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelSourceError(f"{path} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _from_program(path: Path, trusted: bool) -> LoadedModel:
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


def load_checkpoint_(model: nn.Module, path: Path) -> None:
    """Load weights into a model, in place: safetensors, or a torch file of tensors alone.

    A checkpoint of the plain model fits a patched one. Dicts that hold the weights
    under ``state_dict`` or ``model``, and names that begin with ``module.``, are understood.

    Raises:
        ModelSourceError: If the file cannot be read, or its names or shapes do not fit.
    """
    if not path.is_file():
        raise ModelSourceError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # pickle.UnpicklingError of torch.load
        raise ModelSourceError(
            f"{path} holds more than tensors, which is not loaded for safety's sake: save "
            f"model.state_dict() instead ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ModelSourceError(f"{path} holds a {type(state).__name__}, not a state_dict")
    if state and all(str(name).startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelSourceError(f"{path} does not fit the model: {error}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape written as ``1,3,224,224`` or ``1x3x224x224``.

    Raises:
        ModelSourceError: If it is not a list of positive numbers.
    """
    try:
        shape = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelSourceError(f"shape {text!r}: write numbers like 1,3,224,224")
    return shape
