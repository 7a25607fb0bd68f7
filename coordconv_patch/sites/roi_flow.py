"""Region-of-interest operators in a forward pass: what is computed behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from coordconv_patch.running.inputs import tensors_in
from coordconv_patch.sites.roi_operators import roi_operator, writes_in_place

__all__ = ["RoiFlow"]


class RoiFlow:
    """Follows what region-of-interest operators give through a forward pass."""

    def __init__(self) -> None:
        self._operators: Any = WeakIdKeyDictionary()

    def behind(self, tensor: Tensor) -> str:
        """The operator that a tensor was computed behind; ``""``: behind none."""
        return str(self._operators.get(tensor, ""))

    def follow(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Take note of one call of a torch function, in the code that handles such calls."""
        name = roi_operator(function)
        if not name and self._operators:
            names = map(self.behind, tensors_in((args, kwargs)))
            name = next(filter(None, names), "")
        if not name:
            return
        marked = tensors_in(output)
        if writes_in_place(getattr(function, "__name__", ""), kwargs) and args:
            for tensor in tensors_in(args[0]):
                marked += [tensor, *tensors_in(tensor._base)]
        for tensor in marked:
            if tensor.is_floating_point() or tensor.is_complex():
                self._operators[tensor] = name
