"""Modules that may have inherited the weight of a coordinate layer; see :mod:`.heirs` for how."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.left_behind.heirs import Kernel, absorption, inheritance, values_like
from coordconv_patch.left_behind.last_weights import layout_of

__all__ = ["Heir", "inheritance_of", "tensors_of", "weights_being_exported"]


@dataclass(frozen=True)
class Heir:
    """A tensor that may have inherited a weight.

    Attributes:
        name: Qualified name of the module that it is in.
        module: That module.
        tensor: The tensor.
        before: If the module was there before, a sample of the weight that it had.
        coords_before: Also of its coordinate weight.
    """

    name: str
    module: nn.Module
    tensor: Tensor
    before: Tensor | None = None
    coords_before: Tensor | None = None

    def hides(self, layer: nn.Module) -> bool:
        """Whether the module holds a layer unregistered, and so may run it."""
        return any(value is layer for value in vars(self.module).values())

    def kernel_like(
        self, layer: nn.Module, weight: Tensor, coord_weight: Tensor | None
    ) -> Kernel | None:
        """The tensor as a convolution of the kind that a layer is; ``None`` if it is not."""
        transposed, groups = layout_of(layer)
        conv = self.module
        if isinstance(conv, _ConvNd) and (conv.transposed, conv.groups) != (transposed, groups):
            return None
        values = values_like(self.tensor, weight)
        if values is None:
            return None
        coords = self._coords_like(coord_weight)
        return Kernel.of(values, coords, transposed=transposed, groups=groups)

    def _coords_like(self, coord_weight: Tensor | None) -> Tensor | None:
        """The module's coordinate weight; another class's is known by its shape."""
        if isinstance(self.module, CoordConvNd):
            return self.module._parameters.get("coord_weight")
        return next(
            (
                tensor
                for inner in self.module.modules()
                for tensor in tensors_of(inner, {})
                if coord_weight is not None
                and tensor is not self.tensor
                and tensor.shape == coord_weight.shape
            ),
            None,
        )

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


def inheritance_of(
    heir: Heir, kernel: Kernel, name: str, gone: Mapping[str, Kernel]
) -> tuple[bool, bool]:
    """Whether an heir has the weight of a layer that is gone, and its coordinates alike."""
    if heir.before is not None:
        for with_identity in (False, True):
            whole, carried = absorption(
                kernel, heir.before, heir.coords_before, gone[name], with_identity=with_identity
            )
            if whole:
                return whole, carried
    whole, carried = inheritance(kernel, [gone[name]], with_identity=False)
    if whole:
        return whole, carried
    block = _common_block(heir.name, name)
    beside = [each for other, each in gone.items() if other != name and _is_inside(other, block)]
    return inheritance(kernel, [gone[name], *beside], with_identity=True)


def _common_block(name: str, other: str) -> str:
    """Qualified name of the innermost module that holds both."""
    pairs = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(name.split("."), other.split("."), strict=False)
    )
    return ".".join(part for part, _ in pairs)


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def tensors_of(
    module: nn.Module, exported: Mapping[tuple[nn.Module, str], Tensor]
) -> Iterator[Tensor]:
    """Tensors that a module holds itself; a quantized module of torch's tells them by a method."""
    for values in (module._parameters, module._buffers, vars(module)):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 1:
                yield exported.get((module, key), value)
    method = getattr(type(module), "weight", None)
    if type(module).__module__.startswith("torch.ao.nn.") and callable(method):
        yield method(module)


def weights_being_exported() -> Mapping[tuple[nn.Module, str], Tensor]:
    """The real tensors of a model that torch.export runs with fake ones, by module and key.

    It holds them in a variable of its own until it is done.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in ("_export", "_export_for_training"):
            model, state = map(frame.f_locals.get, ("mod", "original_state_dict"))
            if isinstance(model, nn.Module) and isinstance(state, dict):
                places = ((*name.rpartition("."), tensor) for name, tensor in state.items())
                return {
                    (model.get_submodule(owner), key): tensor for owner, _, key, tensor in places
                }
        frame = frame.f_back
    return {}
