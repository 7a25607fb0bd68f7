"""Check the promise: a model that was just patched gives the outputs that it gave before.

A patched model is compared with the plain one on the example inputs, bit for bit, in evaluation
and in training mode. That takes two forward passes of each, and leaves both as they were.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import CONV_SIGNATURES
from coordconv_patch.layers.coordconv import coord_layers
from coordconv_patch.running.inputs import run_model
from coordconv_patch.running.untouched import in_mode, state_restored

__all__ = ["Difference", "Promise"]

Mode = Literal["evaluation", "training"]


@dataclass(frozen=True)
class _Run:
    """One forward pass of a model on example inputs.

    Attributes:
        outputs: Its tensors and plain values, by their place in the output; ``None`` if the
            model fails in this mode.
        reached: The coordinate layers that ran, by site name.
        error: Why it failed.
    """

    outputs: dict[str, Any] | None
    reached: frozenset[str] = frozenset()
    error: str = ""


@dataclass(frozen=True)
class Difference:
    """Where the outputs of two runs differ first.

    Attributes:
        mode: In which mode.
        place: Which output, such as ``"[0]['boxes']"``; ``""`` for a single tensor.
        what: In which way, in words.
    """

    mode: Mode
    place: str
    what: str


class Promise:
    """What a model gave on its example inputs before it was patched.

    Args:
        model: The model. It is run in evaluation mode alone, as others may be running it. The
            run that recorded its sites does not count: while torch functions are watched,
            nn.MultiheadAttention takes another way, whose last bits differ.
        target: What is to be patched: the model, or a copy. It is run in training mode.
        example_inputs: See :func:`coordconv_patch.running.inputs.split_inputs`.
    """

    def __init__(self, model: nn.Module, target: nn.Module, example_inputs: Any) -> None:
        self._model, self._target = model, target
        self._example_inputs = example_inputs
        self._before = self._plain_runs()
        self._inputs: list[tuple[str, int]] = []
        self.reached: dict[Mode, frozenset[str]] = {}
        """The coordinate layers that the patched model ran, in the modes that were compared."""

    def _plain_runs(self) -> dict[Mode, _Run]:
        return {
            "evaluation": _run(self._model, self._example_inputs, training=False),
            "training": _run(self._target, self._example_inputs, training=True),
        }

    def broken(self) -> Difference | None:
        """Where the target's outputs, now patched, are not the model's; ``None`` if nowhere.

        Modes in which the plain model itself fails on the example inputs are left out.
        """
        after = {
            mode: _run(self._target, self._example_inputs, training=mode == "training")
            for mode in self._before
        }
        self.reached = {
            mode: run.reached
            for mode, run in after.items()
            if self._before[mode].outputs is not None
        }
        broken = _first_difference(self._before, after)
        if broken is not None:
            self._inputs = self._inputs_of_convolutions(broken.mode)
        return broken

    def explain(self, broken: Difference) -> None:
        """Say of a broken promise what is different, and where that begins.

        The target is plain again by now.

        Raises:
            PatchError: Unless the model gives other outputs each time by itself, so that
                nothing can be said.
        """
        if _first_difference(self._before, self._plain_runs()) is not None:
            return
        site = _first_with_other_input(self._inputs_of_convolutions(broken.mode), self._inputs)
        where = f"the first convolution whose input differs is {site}"
        if not site:
            where = "the input of every convolution is the same, so it arises at the last or later"
        place = f"output{broken.place}" if broken.place else "the output"
        raise PatchError(
            f"patching would change what the model computes: in {broken.mode} mode {place} is not "
            f"the same bit for bit ({broken.what}); {where}. Nothing was changed. Leave out the "
            "convolutions before it (where=...), or pass check=False to patch all the same; and "
            "please report this model"
        )

    def _inputs_of_convolutions(self, mode: Mode) -> list[tuple[str, int]]:
        """The convolutions that run in one mode, in order, each with a checksum of its input."""
        noting = _NotingInputs(self._target)
        with (
            _seeded(self._target, mode == "training"),
            torch.no_grad(),
            noting,
            # What runs before it fails is what there is to see.
            contextlib.suppress(PatchError),
        ):
            run_model(self._target, _copied(self._example_inputs))
        return noting.seen


def _run(model: nn.Module, example_inputs: Any, *, training: bool) -> _Run:
    reached: set[str] = set()
    try:
        with (
            _seeded(model, training),
            torch.set_grad_enabled(training),
            _noting_reached(model, reached),
        ):
            return _Run(
                dict(_values(run_model(model, _copied(example_inputs)))), frozenset(reached)
            )
    except PatchError as error:
        return _Run(None, frozenset(reached), str(error))


@contextlib.contextmanager
def _seeded(model: nn.Module, training: bool) -> Iterator[None]:
    """Every run draws the same random numbers, and leaves no trace."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with state_restored(model), in_mode(model, training=training):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _noting_reached(model: nn.Module, reached: set[str]) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        return lambda *_: reached.add(name)

    handles = [
        layer.register_forward_pre_hook(hook_for(name))
        for name, layer in coord_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    """Example inputs that a model may write into, the tensors in containers copied."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    return value


def _values(output: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of an output: of containers, and of objects' attributes."""
    if isinstance(output, Tensor):
        yield place, output.detach().clone()
    elif output is None or isinstance(output, (bool, int, float, str)):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _values(value, f"{place}[{key!r}]", depth + 1)
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from _values(value, f"{place}[{index}]", depth + 1)
    elif hasattr(output, "__dict__") and not isinstance(output, nn.Module) and depth < _MAX_DEPTH:
        for name, value in vars(output).items():
            yield from _values(value, f"{place}.{name}", depth + 1)


_MAX_DEPTH = 8
"""Of attributes of objects, which may refer to each other in a circle."""


def _first_difference(
    plain: Mapping[Mode, _Run], patched: Mapping[Mode, _Run]
) -> Difference | None:
    for mode, before in plain.items():
        after = patched[mode]
        if before.outputs is None:
            continue
        if after.outputs is None:
            return Difference(mode, "", f"it fails: {after.error}")
        for place in dict.fromkeys((*before.outputs, *after.outputs)):
            what = _differs(before.outputs.get(place, _MISSING), after.outputs.get(place, _MISSING))
            if what:
                return Difference(mode, place, what)
    return None


_MISSING = object()


def _differs(before: Any, after: Any) -> str:
    """In which way a value differs; empty if it does not."""
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        same = type(before) is type(after) and (before == after or before != before)
        return "" if same else f"{_shown(before)} before, {_shown(after)} after"
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"{_shown(before)} before, {_shown(after)} after"
    if before.is_meta or torch.equal(before, after):
        return ""
    if not before.is_floating_point():
        return f"{int((before != after).sum())} of {before.numel()} values differ"
    if torch.equal(before.nan_to_num(), after.nan_to_num()):
        return ""
    largest = (before.double() - after.double()).abs().nan_to_num().max()
    return f"it differs by up to {float(largest):.3g}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return "nothing" if value is _MISSING else repr(value)[:60]


def _first_with_other_input(
    plain: Sequence[tuple[str, int]], patched: Sequence[tuple[str, int]]
) -> str:
    """The first convolution whose input is another one; empty if there is none."""
    for before, after in zip(plain, patched, strict=False):
        if before != after:
            return after[0]
    longer = plain if len(plain) > len(patched) else patched
    return longer[min(len(plain), len(patched))][0] if len(plain) != len(patched) else ""


class _NotingInputs(TorchFunctionMode):
    """While entered, notes the inputs of all convolution functions but the coordinates' own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in model.named_parameters()}
        self.seen: list[tuple[str, int]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONV_SIGNATURES:
            given = dict(zip(CONV_SIGNATURES[func], args, strict=False)) | dict(kwargs)
            name = self.names.get(id(given["weight"]))
            if name is None and not isinstance(given["weight"], nn.Parameter):
                name = func.__name__  # a weight that the code computes
            if name is not None and not name.endswith("coord_weight"):
                self.seen.append((name.removesuffix(".weight"), _checksum(given["input"])))
        return func(*args, **kwargs)


def _checksum(tensor: Tensor) -> int:
    values = tensor.detach().contiguous().cpu().view(-1)
    return zlib.crc32(values.view(torch.uint8).numpy().tobytes()) if values.numel() else 0
