"""What a convolution's own forward did with its input, to see whether it does the same again.

A forward that torch did not write may pad by anything: a global, a setting in a dict, another
module. No assignment on the layer tells when that changes, but the functions that the forward
calls on its input do, with their numbers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from coordconv_patch.layers.geometry import CONV_FUNCTIONS

__all__ = ["CallRecord", "ForwardWatch"]

_MOST_SIZES = 64
"""Input sizes that a watch remembers."""

Calls = list[tuple[Any, Any]]


class ForwardWatch:
    """The calls of a layer's forward, for each input size and mode for which its padding is known.

    It is not part of the layer's state: copies and pickles know nothing yet.

    Attributes:
        written: Attributes of the layer that a look at its forward has seen it write.
    """

    def __init__(self) -> None:
        self.written: set[str] = set()
        self._known: dict[Any, Calls] = {}

    def knows(self, key: Any, calls: Calls) -> bool:
        """Whether these are the calls that were noted for a size and mode."""
        return self._known.get(key) == calls

    def note(self, key: Any, calls: Calls) -> None:
        """Remember the calls for a size and mode."""
        if len(self._known) >= _MOST_SIZES:
            self._known = {}
        self._known[key] = calls

    def __reduce__(self) -> tuple[type[ForwardWatch], tuple[()]]:
        return ForwardWatch, ()


class CallRecord(TorchFunctionMode):
    """While entered, records the functions that are called on a tensor and on what comes of it.

    Args:
        source: The tensor.

    Attributes:
        calls: Each function with its arguments, in which tensors are told by their shape only.
    """

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.calls: Calls = []
        self._derived = {id(source): source}  # alive, so that no other tensor has its identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _CONVOLUTIONS or self._is_derived([*args, *kwargs.values()]):
            self.calls.append((func, [_described(args), _described(kwargs)]))
            # Also the tensors of a list, such as torch.split gives.
            for value in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(value, Tensor):
                    self._derived[id(value)] = value
        return output

    def _is_derived(self, values: Any) -> bool:
        return any(
            id(value) in self._derived
            if isinstance(value, Tensor)
            else isinstance(value, (tuple, list)) and self._is_derived(value)
            for value in values
        )


_CONVOLUTIONS = frozenset(CONV_FUNCTIONS.values())


def _described(value: Any) -> Any:
    """A value that can be compared, for an argument that may be a tensor or hold some."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [_described(each) for each in value]
    if isinstance(value, dict):
        return [(key, _described(each)) for key, each in value.items()]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return value if isinstance(value, (int, float, str, type(None))) else repr(type(value))
