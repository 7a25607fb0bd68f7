"""What must hold for a patched model in torch, checked on one entry.

Every finding is ``"ok"``, or says what is wrong, or starts with ``"plain: "`` where the
plain model itself cannot do it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

import coordconv_patch as ccp
from coordconv_patch.owners.call_owners import CallOwner
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.site import SiteMap
from zoo.concatenating import concatenate_coordinates_
from zoo.entry import Entry
from zoo.running import (
    build,
    fill_coords_,
    first_difference,
    in_double,
    relative_difference,
    run,
    seed_everything,
    split,
    tensors,
)

__all__ = ["FINDINGS", "check_in_torch"]

FINDINGS = (
    *("refusals", "left_alone", "eval_bits", "train_bits", "train_gradients", "buffers"),
    *("class_kept", "state_dict", "coord_gradients", "coords_matter", "reference"),
    *("deepcopy", "pickle", "unpatch"),
)
"""What is checked, in order."""

_EXACT = 1e-9
"""Allowed difference from the concatenating reference in float64, relative to the largest output.

Where normalisations of nearly constant channels amplify rounding: as much as the output moves
when the input does by 1e-12 of itself, but not more than 1e-5.
"""

Patch = Callable[..., nn.Module]
Result = TypeVar("Result")


def check_in_torch(entry: Entry, patch: Patch = ccp.patch) -> dict[str, Any]:
    """Check one entry; ``patch`` is replaced where the checks themselves are tested."""
    started = time.perf_counter()
    row: dict[str, Any] = {}
    try:
        model = build(entry)
        before = run(model, entry.example(training=False))
        state = copy.deepcopy(model.state_dict())
    except Exception as error:
        return {"plain": _reason(error)}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    try:
        sites = find_sites(model, entry.example(training=False))
        row |= _regions(sites)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patched = patch(model, "all", example_inputs=entry.example(training=False))
    except Exception as error:
        return row | {"patch": _reason(error)}
    check = _Check(entry, model, patched, before, state, row["refused"])
    for name in FINDINGS:
        try:
            row[name] = getattr(check, name)() or "ok"
        except _PlainModelError as failure:
            row[name] = f"plain: {failure}"
        except Exception as error:
            row[name] = _reason(error)
    return row | check.figures | {"seconds": round(time.perf_counter() - started, 1)}


class _PlainModelError(Exception):
    """The plain model cannot do what is checked."""


@contextmanager
def _plain() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _PlainModelError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text}"


def _regions(sites: SiteMap) -> dict[str, Any]:
    """How many convolutions there are, and how many lie in traced regions."""
    return {
        "sites": len(sites.sites),
        "functional_sites": sum(site.kind == "function" for site in sites.sites),
        "sites_in_regions": sum(site.region is not None for site in sites.sites),
        "never_called": sum(site.calls == () for site in sites.sites),
        "called_repeatedly": sum(len(site.calls or ()) > 1 for site in sites.sites),
        "regions": len(sites.regions),
        "untraced": sites.untraced,
        "refused": {site.name: site.obstacle[:200] for site in sites.sites if site.obstacle},
    }


class _Check:
    """The checks; each method is one, in the order of :data:`FINDINGS`.

    The plain and the patched model always run alike, so that their buffers stay alike.
    """

    def __init__(
        self,
        entry: Entry,
        model: nn.Module,
        patched: nn.Module,
        before: list[Tensor],
        state: dict[str, Any],
        refused: dict[str, str],
    ) -> None:
        self.entry = entry
        self.refused = refused
        self.before = before
        self.state = state
        self.model = model
        self.patched = patched
        self.figures: dict[str, Any] = {"coord_weights": len(ccp.coord_parameters(patched))}

    def inputs(self, training: bool = False) -> Any:
        return self.entry.example(training=training)

    def refusals(self) -> str:
        """Only the convolutions that the catalogue names are refused, for its reason."""
        expected = self.entry.refused
        other = {
            n: why
            for n, why in self.refused.items()
            if not expected or not re.search(expected, why)
        }
        if other:
            return f"{len(other)} convolutions, such as {next(iter(other.items()))}"
        return "no convolution is refused any more" if expected and not self.refused else ""

    def left_alone(self) -> str:
        """Planning and patching a copy leave the model itself as it was."""
        now = self.model.state_dict()
        changed = [
            name
            for name, value in self.state.items()
            if isinstance(value, Tensor) and first_difference([value], [now[name]])
        ]
        if changed or list(self.state) != list(now):
            return f"the model's own {changed[:3] or 'names'} changed"
        again = run(self.model, self.inputs())
        difference = first_difference(self.before, again)
        if difference and first_difference(again, run(self.model, self.inputs())):
            raise _PlainModelError(f"differs from run to run: {difference}")
        return difference

    def eval_bits(self) -> str:
        for grad in (False, False, True):  # makes the maps, uses them, goes without them
            expected = run(self.model, self.inputs(), grad=grad)
            if not expected:
                raise _PlainModelError("its output holds no tensor")
            difference = first_difference(expected, run(self.patched, self.inputs(), grad=grad))
            if difference:
                again = first_difference(expected, run(self.model, self.inputs(), grad=grad))
                if again:
                    raise _PlainModelError(f"differs from run to run: {again}")
                return difference
        return ""

    def train_bits(self) -> str:
        expected, found = self._both(
            lambda model: run(model, self.inputs(training=True), training=True, grad=True)
        )
        return first_difference(expected, found)

    def train_gradients(self) -> str:
        """The gradients of the plain parameters are the plain model's, to the last bit."""
        expected, found = self._both(self._gradients)
        names = {
            name: parameter
            for name, parameter in self.patched.named_parameters()
            if not _is_coord_weight(name)
        }
        missing = [name for name in names if (name in expected) != (name in found)]
        if missing:
            return f"gradients of {missing[:3]} are there in one model only"
        apart = [name for name in expected if first_difference([expected[name]], [found[name]])]
        if apart:
            worst = max(relative_difference([expected[n]], [found[n]]) for n in apart)
            return f"{len(apart)} of {len(expected)} gradients differ, by {worst:.2g} at most"
        return ""

    def buffers(self) -> str:
        expected, found = self.model.state_dict(), self.patched.state_dict()
        apart = [
            name
            for name, value in expected.items()
            if isinstance(value, Tensor) and first_difference([value], [found[name]])
        ]
        return f"{apart[:3]} differ after the same runs" if apart else ""

    def class_kept(self) -> str:
        before = dict(self.model.named_modules())
        after = dict(self.patched.named_modules())
        # A module that calls convolution functions itself gets a subclass of its class.
        self.figures["call_owners"] = [
            name for name, module in after.items() if isinstance(module, CallOwner)
        ]
        wrong = [
            name
            for name, module in before.items()
            if not isinstance(after.get(name), _written(module))
            or (
                type(after[name]) is not type(module)
                and not isinstance(after[name], (_ConvNd, CallOwner))
            )
        ]
        return f"other classes at {wrong[:3]}" if wrong else ""

    def state_dict(self) -> str:
        expected, found = list(self.model.state_dict()), list(self.patched.state_dict())
        kept = [name for name in found if not _is_coord_weight(name)]
        if sorted(kept) != sorted(expected):
            return f"names differ: {sorted(set(kept) ^ set(expected))[:3]}"
        result = self.patched.load_state_dict(self.model.state_dict(), strict=True)
        return "" if not result.missing_keys else f"missing: {result.missing_keys[:3]}"

    def coord_gradients(self) -> str:
        """Each coordinate weight that a pass reaches has a gradient, non-zero where it can be.

        Where all inputs of a convolution are one pixel, coordinates are 0. Where the
        convolution's own weight gets no gradient, the model cuts it off. A loss may also
        look at one pixel in the middle only, as a detector's does at its anchors' places.
        """
        fill_coords_(self.patched)
        # Some policies keep the last distribution, which cannot be copied with its graph.
        run(self.patched, self.inputs())
        model = copy.deepcopy(self.patched)  # these runs are the patched model's alone
        seen = _GradientsSeen(model)
        modes = []
        for training in (True, False):
            try:
                seen.run(lambda training=training: self._gradients(model, training))
                modes.append(training)
            except Exception:
                continue
        if not modes:
            raise _PlainModelError("no pass gives an output that has a gradient")
        seen.look_closer(lambda: run(model, self.inputs(), grad=True))
        self.figures |= seen.figures()
        return seen.fault()

    def coords_matter(self) -> str:
        expected = run(self.model, self.inputs())
        found = run(self.patched, self.inputs())
        return "" if first_difference(expected, found) else "the output is the plain one"

    def reference(self) -> str:
        """Agrees in float64 with the concatenating form of the same weights."""
        layers = {
            name.removesuffix(".coord_weight"): parameter
            for name, parameter in self.patched.named_parameters(remove_duplicate=True)
            if name.endswith(".coord_weight") or name == "coord_weight"
        }
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if not all(isinstance(modules.get(name), _ConvNd) for name in layers):
            functional = [n for n in layers if not isinstance(modules.get(n), _ConvNd)]
            self.figures["without_reference"] = functional
            raise _PlainModelError("functional convolutions have no concatenating form here")
        try:
            return self._compare_with_reference(layers, torch.float64, _EXACT)
        except _PlainModelError:
            return self._compare_with_reference(layers, torch.float32, 1e-3)

    def _compare_with_reference(
        self, layers: dict[str, nn.Parameter], dtype: torch.dtype, allowed: float
    ) -> str:
        plain, patched = copy.deepcopy(self.model).to(dtype), copy.deepcopy(self.patched).to(dtype)
        inputs = in_double(self.inputs()) if dtype is torch.float64 else self.inputs()
        with _plain():
            before = run(plain, inputs)
            if relative_difference(before, run(plain, inputs)):
                raise _PlainModelError("differs from run to run")
        concatenate_coordinates_(plain, {n: w.to(dtype) for n, w in layers.items()})
        expected = run(plain, inputs)
        found = relative_difference(expected, run(patched, inputs))
        self.figures["reference_dtype"] = str(dtype).removeprefix("torch.")
        self.figures["reference_difference"] = found
        if allowed < found < 1e-5:
            nudged = tree_map_only(Tensor, _nudged, inputs)
            allowed = max(allowed, relative_difference(expected, run(plain, nudged)))
        return "" if found <= allowed else f"differs by {found:.3g}, allowed are {allowed:.3g}"

    def deepcopy(self) -> str:
        copied = copy.deepcopy(self.patched)
        return first_difference(run(self.patched, self.inputs()), run(copied, self.inputs()))

    def pickle(self) -> str:
        with _plain():
            _reloaded(self.model)
        reloaded = _reloaded(self.patched)
        return first_difference(run(self.patched, self.inputs()), run(reloaded, self.inputs()))

    def unpatch(self) -> str:
        plain = ccp.unpatch(self.patched, discard=True)
        if list(plain.state_dict()) != list(self.model.state_dict()):
            return "the state_dict has other names than the plain model's"
        after = dict(plain.named_modules())
        changed = [
            name
            for name, module in self.model.named_modules()
            if _written(after[name]) is not _written(module)
        ]
        if changed:
            return f"other classes at {changed[:3]}"
        return first_difference(run(self.model, self.inputs()), run(plain, self.inputs()))

    def _both(self, compute: Callable[[nn.Module], Result]) -> tuple[Result, Result]:
        """The same of both models, also where the plain one fails halfway: buffers have moved."""
        try:
            with _plain():
                expected = compute(self.model)
        except _PlainModelError:
            with contextlib.suppress(Exception):
                compute(self.patched)
            raise
        return expected, compute(self.patched)

    def _gradients(self, model: nn.Module, training: bool = True) -> dict[str, Tensor]:
        """Gradients of every parameter, of a fixed random sum of all outputs."""
        model.zero_grad(set_to_none=True)
        model.train(training)
        seed_everything(2)
        args, kwargs = split(self.inputs(training))
        outputs = [t for t in tensors(model(*args, **kwargs)) if t.requires_grad]
        model.eval()
        if not outputs:
            raise RuntimeError("no output has a gradient")
        generator = torch.Generator().manual_seed(3)
        total = sum(
            (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum()
            for output in outputs
            if output.isfinite().all()
        )
        total.backward()
        return {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not _is_coord_weight(name)
        }


def _written(module: nn.Module) -> type:
    """A module's class; torch makes one anew for each parametrized module."""
    made = parametrize.is_parametrized(module)
    return type(module).__bases__[0] if made else type(module)


def _nudged(tensor: Tensor) -> Tensor:
    return tensor * (1 + 1e-12) if tensor.is_floating_point() else tensor


def _is_coord_weight(name: str) -> bool:
    return name.rpartition(".")[2] == "coord_weight"


def _reloaded(model: nn.Module) -> nn.Module:
    """What ``torch.save`` and ``torch.load`` of the whole model give."""
    file = io.BytesIO()
    torch.save(model, file, pickle_module=pickle)
    file.seek(0)
    return torch.load(file, weights_only=False)


class _GradientsSeen:
    """Which coordinate layers ran, and which of them got a gradient, over several passes."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "coord_weight", None), nn.Parameter)
        }
        self.called: dict[str, bool] = {}
        """Layers that ran, with whether an input had more than one pixel."""
        self.state: dict[str, str] = {}

    def run(self, backward: Callable[[], object]) -> None:
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.layers.items()
        ]
        try:
            backward()
        finally:
            for handle in handles:
                handle.remove()
        for name in self.called:
            state = _gradient_state(self.layers[name], self.called[name])
            if self.state.get(name) != "ok" and not (
                name in self.state and self.state[name] == "zero" and state == "cut off"
            ):
                self.state[name] = state

    def look_closer(self, forward: Callable[[], object]) -> None:
        """Whether a gradient of zero is the loss's doing: the layer's own output has one."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            if output.dim() > 1 and output.numel() > outputs.get(name, output[:0]).numel():
                outputs[name] = output.clone()  # the model may write into it

        zero = [name for name, state in self.state.items() if state == "zero"]
        if not zero:
            return
        handles = [
            self.layers[name].register_forward_hook(functools.partial(keep, name)) for name in zero
        ]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        for name, output in outputs.items():
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
            total = (output * weights.to(output.dtype)).sum()
            gradient = torch.autograd.grad(total, self.layers[name].coord_weight)[0]
            if gradient.any():
                self.state[name] = "loss is blind"

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            source = args[0] if args else next(iter(kwargs.values()))
            ndim = module.coord_weight.dim() - 2
            wide = any(length > 1 for length in source.shape[-ndim:])
            self.called[name] = self.called.get(name, False) or wide

        return hook

    def figures(self) -> dict[str, Any]:
        counts = {"gradients_" + state.replace(" ", "_"): 0 for state in ("ok", "cut off")}
        for state in self.state.values():
            key = "gradients_" + state.replace(" ", "_")
            counts[key] = counts.get(key, 0) + 1
        return counts

    def fault(self) -> str:
        bad = {n: s for n, s in self.state.items() if s in ("missing", "not finite", "zero")}
        return f"{len(bad)} of {len(self.state)}, such as {list(bad.items())[:3]}" if bad else ""


def _gradient_state(layer: nn.Module, wide: bool) -> str:
    own = getattr(layer, "weight", None)
    reached = not isinstance(own, Tensor) or (own.grad is not None and bool(own.grad.any()))
    gradient = layer.coord_weight.grad
    if gradient is None:
        return "missing" if reached else "cut off"
    if not gradient.isfinite().all():
        return "cut off" if own is not None and not own.grad.isfinite().all() else "not finite"
    if gradient.any():
        return "ok"
    if not wide:
        return "one pixel"
    return "zero" if reached else "cut off"
