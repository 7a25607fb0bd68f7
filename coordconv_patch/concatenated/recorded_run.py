"""One run of a model: what is concatenated, by whom, and which convolutions see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from coordconv_patch.concatenated.joins import CATS, cat_arguments
from coordconv_patch.running.inputs import run_model, writable_inputs
from coordconv_patch.running.silence import warnings_ignored
from coordconv_patch.running.untouched import evaluation, state_restored
from coordconv_patch.running.version_counters import version_of

__all__ = ["CatCall", "ModuleCall", "Run", "record"]


@dataclass(frozen=True)
class CatCall:
    """A call of ``torch.cat`` over the channels of images.

    Attributes:
        owners: Qualified names of the running modules, outermost first.
        around: The numbers of those calls of them.
        parts: What is concatenated.
        output: The result.
    """

    owners: tuple[str, ...]
    around: tuple[int, ...]
    parts: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module with one tensor.

    Attributes:
        name: Its qualified name.
        owners: Names of the modules that were running around it, outermost first.
        around: The calls that it is a part of, of modules that may be rewritten.
        input: The tensor.
        output: What it returned.
        version: How often that tensor had been written to when it was returned.
    """

    name: str
    owners: tuple[str, ...]
    around: tuple[int, ...]
    input: Tensor
    output: Tensor
    version: int


@dataclass
class Run:
    """What one forward pass did.

    Attributes:
        cats: Concatenations, in order.
        convolutions: Calls of convolution modules, in order.
        modules: Calls of modules that may be rewritten, by their numbers.
        with_more: Convolution modules that were called with more than an input.
        uses: For the output of a concatenation or such a module, by identity, which functions
            took it and in which module's code.
    """

    cats: list[CatCall] = field(default_factory=list)
    convolutions: list[ModuleCall] = field(default_factory=list)
    modules: dict[int, ModuleCall] = field(default_factory=dict)
    with_more: set[str] = field(default_factory=set)
    uses: dict[int, set[tuple[str, str]]] = field(default_factory=dict)


def record(model: nn.Module, example_inputs: Any, rewritable: Callable[[nn.Module], bool]) -> Run:
    """Run a model once in evaluation mode; it is left as it was.

    Args:
        model: The model.
        example_inputs: See :func:`coordconv_patch.running.inputs.split_inputs`.
        rewritable: Which modules may be rewritten as a whole.

    Raises:
        PatchError: If the forward pass fails.
    """
    recorder = _Recorder(model, rewritable)
    quiet = warnings_ignored(UserWarning)
    with evaluation(model), state_restored(model, runs=True), quiet, recorder:
        run_model(model, writable_inputs(example_inputs))
    return recorder.run


_READS_NO_VALUES = frozenset(
    {
        *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__),  # type: ignore[attr-defined]
        *(Tensor.layout.__get__, Tensor.requires_grad.__get__, Tensor.is_cuda.__get__),  # type: ignore[attr-defined]
        Tensor._version.__get__,  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.stride),
    }
)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, rewritable: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.run = Run()
        self._model = model
        self._rewritable = rewritable
        self._thread = threading.get_ident()
        self._running: list[tuple[str, int]] = []
        self._numbers = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Recorder:
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            kept = bool(name) and self._rewritable(module)
            self._handles += [
                module.register_forward_pre_hook(self._before(name)),
                module.register_forward_hook(
                    self._after(name, kept), always_call=True, with_kwargs=True
                ),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() == self._thread:
                self._running.append((name, self._numbers))
                self._numbers += 1

        return note

    def _after(self, name: str, kept: bool) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            number = self._running.pop()[1]
            given = (*args, *kwargs.values())
            if isinstance(module, _ConvNd):
                if len(given) > 1:
                    self.run.with_more.add(name)
                given = given[:1]
            if len(given) != 1 or not all(isinstance(each, Tensor) for each in (*given, output)):
                return
            owners, around = self._stack()
            call = ModuleCall(name, owners, around, given[0], output, version_of(output))
            if isinstance(module, _ConvNd):
                self.run.convolutions.append(call)
            if kept:
                self.run.modules[number] = call
                self.run.uses.setdefault(id(output), set())

        return note

    def _stack(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Names of the running modules, and the numbers of their calls."""
        return tuple(name for name, _ in self._running), tuple(n for _, n in self._running)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _READS_NO_VALUES:
            self._note_uses(func, args, kwargs)
        output = func(*args, **kwargs)
        if func in CATS:
            parts, dim = cat_arguments(args, kwargs)
            if output.dim() > 2 and dim % output.dim() == 1:
                owners, around = self._stack()
                self.run.cats.append(CatCall(owners, around, parts, output))
                self.run.uses.setdefault(id(output), set())
        return output

    def _note_uses(self, func: Any, args: Any, kwargs: Any) -> None:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        name = str(getattr(func, "__name__", func))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) in self.run.uses and self._running:
                self.run.uses[id(leaf)].add((name, self._running[-1][0]))
