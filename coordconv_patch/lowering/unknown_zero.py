"""A zero that an exporter does not know, which keeps coordinates of a fixed batch in the graph.

Where the batch is fixed, coordinates that are expanded to it are constants, and so is all that is
computed from them alone: an exporter folds the branch into a map, with its own rounding, and where
it does not, the runtime does. ONNX Runtime's CPU provider adds such a map outside of the blocks of
channels that its kernels compute in: MobileNetV3-Small with every convolution patched takes 1.47 of
the plain model's time with maps, and 1.13 to 1.16 without (benchmarks/runtimes.py). So the model is
exported with an input more, a zero that is added to the coordinates before they are expanded, and a
graph pass (:mod:`coordconv_patch.export.graph_passes.read_zero`) puts there what is zero, and not
folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from coordconv_patch.running.one_more_argument import OneMoreArgument

__all__ = ["ZERO", "UnknownZero", "WithZero"]

ZERO = "coordinate_zero"
"""Name of the input, which no file has."""


class UnknownZero:
    """Holds the zero while the model runs that it is an input of; otherwise none is added."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    @contextmanager
    def being(self, value: Tensor) -> Iterator[None]:
        """While entered, this scalar is the zero."""
        self._value = value
        try:
            yield
        finally:
            self._value = None

    def added_to(self, tensor: Tensor) -> Tensor:
        """A tensor plus the zero."""
        return tensor if self._value is None else tensor + self._value


class WithZero(OneMoreArgument):
    """A lowered model with one more argument, the zero that it was lowered with.

    Args:
        model: The lowered model.
        zero: What its layers add.

    Raises:
        ExportError: If its forward has an argument of this name already.
    """

    def __init__(self, model: nn.Module, zero: UnknownZero) -> None:
        super().__init__(model, ZERO)
        self.__dict__["_zero"] = zero

    def given(self, value: Tensor) -> AbstractContextManager[None]:
        zero: UnknownZero = self.__dict__["_zero"]
        return zero.being(value)
