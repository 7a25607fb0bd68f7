"""Record a forward pass: which convolutions run, in which order, at what sizes, called by whom."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from coordconv_patch.layers.geometry import Call, ndim_of
from coordconv_patch.layers.given_maps import blank_maps
from coordconv_patch.owners.function_log import FunctionLog, FunctionSite
from coordconv_patch.running.inputs import run_model, writable_inputs
from coordconv_patch.running.silence import warnings_ignored
from coordconv_patch.running.untouched import evaluation, state_restored
from coordconv_patch.sites.node_by_node import NodeByNode
from coordconv_patch.sites.regions import Region
from coordconv_patch.sites.roi_flow import RoiFlow
from coordconv_patch.sites.site import GraphFunctionSite

__all__ = ["RunRecord", "record_run"]


@dataclass(frozen=True)
class RunRecord:
    """What one forward pass did.

    Attributes:
        calls: The calls of each site, in order of execution.
        callers: For each site the innermost module of whose single call all of them
            were part; ``None`` where there is none that hooks can be put on.
        functions: The functional sites of plain modules, in order of their first calls.
        roi_operators: For each site that sees regions of interest the operator that gave them.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    callers: dict[str, str | None] = field(default_factory=dict)
    functions: tuple[FunctionSite, ...] = ()
    roi_operators: dict[str, str] = field(default_factory=dict)


def record_run(
    model: nn.Module,
    example_inputs: Any,
    modules: Mapping[str, nn.Module],
    functions: Sequence[GraphFunctionSite] = (),
) -> RunRecord:
    """Run a model once on the example inputs, and leave it as it was.

    ``modules`` are the convolution modules by site name, ``functions`` the functional sites of
    GraphModules; those of plain modules are seen. A PatchError if the forward pass fails.
    """
    recorder = _CallRecorder(model, modules, functions, FunctionLog(model))
    # The model's warnings would seem to come from here, where its functions are watched.
    quiet = warnings_ignored(UserWarning)
    with evaluation(model), state_restored(model, runs=True), blank_maps(model), quiet, recorder:
        run_model(model, writable_inputs(example_inputs))
    return recorder.record()


def _shared(
    around: Sequence[tuple[str, int]], other: Sequence[tuple[str, int]]
) -> list[tuple[str, int]]:
    """The runs of modules that two calls are both part of, outermost first."""
    pairs = zip(around, other, strict=False)
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that does nothing in other threads, which may be running the same model."""
    thread = threading.get_ident()

    def hook_here(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args, **kwargs)

    return hook_here


class _CallRecorder(TorchFunctionMode):
    """While entered, notes every execution of the sites.

    A GraphModule with functional sites runs node by node, which shows which node each call is.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        functions: Sequence[GraphFunctionSite],
        log: FunctionLog,
    ) -> None:
        super().__init__()
        self._log = log
        self._model = model
        self._modules = modules
        self._names_in: dict[Region, dict[fx.Node, str]] = {}
        for site in functions:
            names = self._names_in.setdefault(site.region, {})
            names.update(dict.fromkeys(site.nodes, site.name))
        self._calls: dict[int | str, list[Call]] = {}
        self._around: dict[int | str, list[tuple[str, int]]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._graphs_running = 0
        self._running: list[tuple[str, int]] = []
        self._run_numbers = itertools.count()
        self._roi_flow = RoiFlow()
        self._roi_operators: dict[int | str, str] = {}

    def __enter__(self) -> _CallRecorder:
        for name, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._handles += [
                    module.register_forward_pre_hook(
                        _in_this_thread(functools.partial(self._before, name))
                    ),
                    module.register_forward_hook(_in_this_thread(self._after), always_call=True),
                ]
        for name, module in self._modules.items():
            hook = _in_this_thread(functools.partial(self._after_module, name))
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        # Of two names of one GraphModule the first counts.
        for region, names in reversed(self._names_in.items()):
            # Taken off again as everything that a forward pass leaves behind in a model.
            vars(region.module)["forward"] = self._node_by_node(region, names)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def record(self) -> RunRecord:
        """What was noted."""
        functions = tuple(self._log.sites())
        # Functional sites are known by their weights until all of their calls are.
        names: dict[int | str, str] = {
            id(weight): site.name for site in functions for weight in site.weights
        }
        calls: dict[str, list[Call]] = {}
        around: dict[str, list[tuple[str, int]]] = {}
        behind: dict[str, str] = {}
        for key, made in self._calls.items():
            name = names.get(key, str(key))
            calls.setdefault(name, []).extend(made)
            around[name] = _shared(around.get(name, self._around[key]), self._around[key])
            if key in self._roi_operators:
                behind.setdefault(name, self._roi_operators[key])
        callers = {name: self._caller(shared) for name, shared in around.items()}
        return RunRecord(calls, callers, functions, behind)

    def _caller(self, around: Sequence[tuple[str, int]]) -> str | None:
        for name, _ in reversed(around):
            # A GraphModule loses its hooks when it is copied.
            if not isinstance(self._model.get_submodule(name), fx.GraphModule):
                return name
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._roi_flow.follow(func, args, kwargs or {}, output)
        in_graph = bool(self._graphs_running)
        own = self._log.note(func, args, kwargs or {}, output, self._running, in_graph=in_graph)
        if own is not None:
            weight, source = own
            self._note(id(weight), source, output, weight.dim() - 2)
        return output

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._running.append((name, next(self._run_numbers)))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.pop()

    def _note(
        self,
        name: int | str,
        source: Tensor,
        output: Tensor,
        ndim: int,
        padded: Sequence[tuple[int, int]] = (),
    ) -> None:
        size = tuple(source.shape[-ndim:])
        if padded:
            size = tuple(length - sum(pair) for length, pair in zip(size, padded, strict=True))
        self._calls.setdefault(name, []).append(Call(size, tuple(output.shape[-ndim:])))
        if behind := self._roi_flow.behind(source):
            self._roi_operators.setdefault(name, behind)
        around = self._around.setdefault(name, list(self._running))
        self._around[name] = _shared(around, self._running)

    def _after_module(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        source = args[0] if args else next(iter(kwargs.values()))
        self._note(name, source, output, ndim_of(cast(_ConvNd, module)))

    def _node_by_node(self, region: Region, names: Mapping[fx.Node, str]) -> Callable[..., Any]:
        """The forward of a GraphModule that notes its functional sites."""
        plain, thread = region.module.forward, threading.get_ident()

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # which may be running the same model
                return plain(*args, **kwargs)
            self._graphs_running += 1
            try:
                return NodeByNode(region, names, self._note).run_call(args, kwargs)
            finally:
                self._graphs_running -= 1

        return forward
