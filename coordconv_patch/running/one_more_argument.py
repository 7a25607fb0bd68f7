"""A model whose forward takes one more argument: an exporter makes an input of a graph of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from coordconv_patch.errors import ExportError
from coordconv_patch.running.inputs import split_inputs

__all__ = ["OneMoreArgument", "with_argument"]


class OneMoreArgument(nn.Module):
    """A model with one more argument, the last one.

    It shares the model's modules and parameters, under the same names, so that graphs made
    from it name their initializers as those of the model do.

    Args:
        model: A model.
        argument: The argument's name.

    Raises:
        ExportError: If the model's forward has an argument of this name already.
    """

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(model, name)
        self.training = model.training
        self.__dict__["_model"] = model
        self.argument = argument
        self._signature = _with_parameter(inspect.signature(model.forward), argument)
        vars(self)["forward"] = _forward_of(self)

    def given(self, value: Any) -> AbstractContextManager[Any]:
        """While entered, the model runs with a value of the argument."""
        raise NotImplementedError

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs; the argument is the last one, or by name."""
        bound = self._signature.bind(*args, **kwargs)
        value = bound.arguments.pop(self.argument)
        model: nn.Module = self.__dict__["_model"]
        with self.given(value):
            return model(*bound.args, **bound.kwargs)


def with_argument(example_inputs: Any, argument: str, value: Tensor) -> Any:
    """Inputs of a model as those of one with one more argument."""
    args, kwargs = split_inputs(example_inputs)
    return (*args, {**kwargs, argument: value})


def _forward_of(wrapper: OneMoreArgument) -> Callable[..., Any]:
    """A forward with the wrapper's signature: exporters call by that."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper.run(*args, **kwargs)

    forward.__signature__ = wrapper._signature  # type: ignore[attr-defined]
    return forward


def _with_parameter(signature: inspect.Signature, argument: str) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    if argument in signature.parameters:
        raise ExportError(
            f"the model's forward has an argument {argument!r} of its own, which would be that of "
            "the export: give it another name"
        )
    has_rest = any(p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY) for p in parameters)
    kind = inspect.Parameter.KEYWORD_ONLY if has_rest else inspect.Parameter.POSITIONAL_OR_KEYWORD
    at = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters.insert(at, inspect.Parameter(argument, kind, default=None))
    return signature.replace(parameters=parameters)
