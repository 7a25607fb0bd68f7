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
from torch.utils import _pytree as pytree

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import conv_arguments, function_input
from coordconv_patch.layers.geometry import Call
from coordconv_patch.owners.function_log import FunctionLog, FunctionSite
from coordconv_patch.running.inputs import run_model
from coordconv_patch.running.silence import warnings_ignored
from coordconv_patch.running.untouched import LOOK, evaluating, state_restored

__all__ = [
    "GraphFunctions",
    "Recording",
    "record_arguments",
    "record_calls",
    "record_run",
]


@dataclass(frozen=True)
class GraphFunctions:
    """The functional sites of one traced module.

    Attributes:
        module: The module.
        graph: Its graph.
        names: Site name of each of the graph's functional convolutions.
    """

    module: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]


@dataclass(frozen=True)
class Recording:
    """What one forward pass did.

    Attributes:
        calls: The calls of each site, in order of execution.
        callers: For each site the innermost module of whose single call all of them
            were part; ``None`` where there is none that hooks can be put on.
        functions: The functional sites of plain modules, in order of their first calls.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    callers: dict[str, str | None] = field(default_factory=dict)
    functions: tuple[FunctionSite, ...] = ()


def record_calls(
    model: nn.Module,
    example_inputs: Any,
    modules: Mapping[str, nn.Module],
    functions: Sequence[GraphFunctions],
) -> dict[str, list[Call]]:
    """Run the model once on the example inputs; the calls of each site, in order of execution.

    Args:
        model: The model; left as it was.
        example_inputs: See :func:`coordconv_patch.running.inputs.split_inputs`.
        modules: The convolution modules, by site name.
        functions: The functional sites.

    Raises:
        PatchError: If the forward pass fails.
    """
    return record_run(model, example_inputs, modules, functions).calls


def record_run(
    model: nn.Module,
    example_inputs: Any,
    modules: Mapping[str, nn.Module],
    functions: Sequence[GraphFunctions],
) -> Recording:
    """As :func:`record_calls`, with who called each site, and the functional sites it showed."""
    recorder = _CallRecorder(model, modules, functions, FunctionLog(model))
    # The model's warnings would seem to come from here, where its functions are watched.
    with evaluating(model), state_restored(model), warnings_ignored(UserWarning), recorder:
        run_model(model, example_inputs)
    return recorder.recording()


def record_arguments(
    model: nn.Module, example_inputs: Any, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run the model once on the example inputs; what each module was first called with.

    Args:
        model: The model; left as it was.
        example_inputs: See :func:`coordconv_patch.running.inputs.split_inputs`.
        modules: The modules to watch, by name.

    Returns:
        Positional and keyword arguments, by name; modules that are never called are absent.

    Raises:
        PatchError: If the forward pass fails.
    """
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(name, (args, kwargs))

    with LOOK:
        handles = [
            module.register_forward_pre_hook(
                _in_this_thread(functools.partial(note, name)), with_kwargs=True
            )
            for name, module in modules.items()
        ]
        try:
            with evaluating(model), state_restored(model):
                run_model(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that does nothing in other threads, which may be running the same model."""
    thread = threading.get_ident()

    def hook_here(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args, **kwargs)

    return hook_here


class _CallRecorder(TorchFunctionMode):
    """While entered, notes every execution of the sites.

    A region with functional sites is interpreted node by node on the inputs that it
    gets, which shows all of its sites in order; the real run that follows is not noted.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        functions: Sequence[GraphFunctions],
        log: FunctionLog,
    ) -> None:
        super().__init__()
        self._log = log
        self._model = model
        self._modules = modules
        self._functions = functions
        self._calls: dict[int | str, list[Call]] = {}
        self._around: dict[int | str, list[tuple[str, int]]] = {}
        self._interprets = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._regions_noted = 0
        self._running: list[tuple[str, int]] = []
        self._run_numbers = itertools.count()

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
        for traced in self._functions:
            pre_hook = _in_this_thread(functools.partial(self._before_region, traced))
            self._handles += [
                traced.module.register_forward_pre_hook(pre_hook, with_kwargs=True),
                traced.module.register_forward_hook(
                    _in_this_thread(self._after_region), always_call=True
                ),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def recording(self) -> Recording:
        """What was noted."""
        functions = tuple(self._log.sites())
        # Functional sites are known by their weights until all of their calls are.
        names: dict[int | str, str] = {id(site.weight): site.name for site in functions}
        calls = {names.get(key, str(key)): calls for key, calls in self._calls.items()}
        callers = {
            names.get(key, str(key)): self._caller(around) for key, around in self._around.items()
        }
        return Recording(calls, callers, functions)

    def _caller(self, around: Sequence[tuple[str, int]]) -> str | None:
        for name, _ in reversed(around):
            # A GraphModule loses its hooks when it is copied.
            if not isinstance(self._model.get_submodule(name), fx.GraphModule):
                return name
        return None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._interprets:
            in_graph = bool(self._regions_noted)
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
        if self._regions_noted:
            return
        call = _call(source, output, ndim)
        if padded:
            size = [
                length - sum(pair) for length, pair in zip(call.input_size, padded, strict=True)
            ]
            call = Call(tuple(size), call.output_size)
        self._calls.setdefault(name, []).append(call)
        around = self._around.setdefault(name, list(self._running))
        shared = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(around, self._running, strict=False)
        )
        self._around[name] = [one for one, _ in shared]

    def _after_module(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        source = args[0] if args else next(iter(kwargs.values()))
        self._note(name, source, output, len(cast(_ConvNd, module).kernel_size))

    def _before_region(
        self,
        traced: GraphFunctions,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        recorder, names = self, traced.names

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n in names:
                    weight = self.env[conv_arguments(n)["weight"]]
                    source = self.env[conv_arguments(n)["input"]]
                    recorder._note(names[n], source, result, weight.dim() - 2, _padding_amounts(n))
                return result

        if not self._regions_noted:
            is_graph = isinstance(module, fx.GraphModule)
            runnable = module if is_graph else fx.GraphModule(module, traced.graph)
            inputs = _placeholder_values(traced.graph, is_graph, args, kwargs)
            self._interprets = True
            try:
                Interpreter(runnable).run(*inputs, enable_io_processing=False)
            finally:
                self._interprets = False
        self._regions_noted += 1

    def _after_region(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._regions_noted -= 1


def _padding_amounts(node: fx.Node) -> Sequence[tuple[int, int]]:
    """Pixels by which the module that calls a functional convolution has padded its input."""
    try:
        return function_input(node).own.amounts
    except PatchError:
        return ()


def _call(source: Tensor, output: Tensor, ndim: int) -> Call:
    return Call(tuple(source.shape[-ndim:]), tuple(output.shape[-ndim:]))


def _placeholder_values(
    graph: fx.Graph, exported: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """A call's arguments in the order of a graph's placeholders."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if exported and isinstance(graph._codegen, fx.graph._PyTreeCodeGen):
        # Programs of torch.export take nested arguments apart.
        return pytree.arg_tree_leaves(*args, **kwargs)
    values = list(args)
    for node in placeholders[len(args) :]:
        values.append(kwargs.get(str(node.target), node.args[0] if node.args else None))
    return values
