"""Symbolic tracing with every convolution and batch norm module as a leaf."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from coordconv_patch.graphs.norms import is_batch_norm
from coordconv_patch.graphs.stand_ins import (
    TensorProxy,
    autograd_functions_recorded,
    isinstance_answered,
)
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import state_restored

__all__ = [
    "ConvTracer",
    "trace",
    "trace_call",
]


class ConvTracer(fx.Tracer):
    """Traces with every convolution and batch norm module as a leaf, subclasses included.

    GraphModules are leaves too: they have a graph of their own.

    Where timm is in use, the modules and functions that it declares untraceable
    are leaves too.
    """

    def __init__(self) -> None:
        # Only if the program has imported timm: nobody else has its modules. Older versions keep
        # these lists elsewhere; their models are then traced by regions.
        timm_layers = sys.modules.get("timm.layers")
        known = hasattr(timm_layers, "get_notrace_functions")
        functions = timm_layers.get_notrace_functions() if timm_layers and known else []
        self._leaf_classes = (
            tuple(timm_layers.get_notrace_modules()) if timm_layers and known else ()
        )
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that is known to stand for a tensor, where it certainly does."""
        return TensorProxy(node, self) if self._gives_tensor(node) else super().proxy(node)

    def _gives_tensor(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            kind = type(self.root.get_submodule(str(node.target)))
            return kind.__module__.startswith("torch.nn") and not issubclass(kind, _GIVES_TUPLES)
        if node.op in ("call_function", "call_method"):
            return str(getattr(node.target, "__name__", node.target)) in _GIVES_A_TENSOR
        return node.op in ("placeholder", "get_attr")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (_ConvNd, CoordBranch, fx.GraphModule, *self._leaf_classes)):
            return True
        if is_batch_norm(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """As torch.fx traces, but one thread at a time, and unnoticed by the others."""
        with tracing_alone():
            return super().trace(root, concrete_args)


_GIVES_TUPLES = (
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
"""Layers of torch.nn whose result is not a tensor, or need not be."""

_GIVES_A_TENSOR = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "group_norm"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "pad", "interpolate"),
        *("relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "sigmoid", "tanh"),
        *("softmax", "dropout", "avg_pool2d", "adaptive_avg_pool2d", "flatten", "cat", "stack"),
        *("add", "sub", "mul", "truediv", "neg", "clamp", "float", "half", "contiguous"),
        *("permute", "reshape", "view", "transpose", "unsqueeze", "squeeze", "mean"),
    }
)
"""Names of functions and methods whose result is one tensor if their argument is."""


def trace(module: nn.Module) -> fx.Graph:
    """The graph of a module; optional arguments are fixed at their defaults.

    The module is left as it was, also where tracing fails halfway.

    Raises:
        Exception: Whatever the module's code raises when it meets a proxy.
    """
    if isinstance(module, fx.GraphModule):
        return module.graph
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    with state_restored(module), isinstance_answered(module):
        return ConvTracer().trace(module, concrete_args=defaults or None)


def trace_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
    """The graph of what a module did in one call; for modules that :func:`trace` cannot trace.

    Where the module's code looks at a value (the size of an image, the length of a list),
    it sees that of this call. So the graph tells which convolutions run, in which order and
    what follows them, on inputs like these; it is for reading, and cannot be run. Its
    placeholders are the tensors in the arguments, in pytree order.

    The module is left as it was, and so are the arguments.

    Args:
        module: The module, in the mode in which it is to be traced.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        Exception: Whatever the module's code raises when it meets a proxy all the same.
    """
    with state_restored(module), torch.no_grad(), autograd_functions_recorded(_KnownProxy):
        return _CallTracer(args, kwargs).trace(module)


class _CallTracer(ConvTracer):
    """Traces with proxies that know the values of one call."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        # Copies: the traced code may write into its inputs.
        self._leaves, self._spec = pytree.tree_flatten(
            pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
        )
        self._running_leaf = False

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        placeholders = {
            index: self._placeholder(f"input_{index}", leaf)
            for index, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor)
        }

        def run(*proxies: Any) -> tuple[Any, ...]:
            given = dict(zip(placeholders, proxies, strict=True))
            leaves = [given.get(index, leaf) for index, leaf in enumerate(self._leaves)]
            args, kwargs = pytree.tree_unflatten(leaves, self._spec)
            return tuple(_proxies_in(root_fn(self.root, *args, **kwargs)))

        return run, list(placeholders.values())

    def _placeholder(self, name: str, value: Tensor) -> _KnownProxy:
        return _KnownProxy(self.create_node("placeholder", name, (), {}), self, value)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *further: Any,
        **options: Any,
    ) -> Any:
        """A proxy for the result; the result itself where it holds no tensor."""
        value = self._result(kind, target, args, kwargs)
        # The wrappers of torch.fx.wrap insist on a proxy.
        wrapped = isinstance(target, FunctionType) and not target.__module__.startswith("torch.")
        if not (wrapped or _holds_tensor(value)):
            return value
        node = super().create_proxy(kind, target, args, kwargs, *further, **options).node
        return _KnownProxy(node, self, value)

    def _result(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(_KnownProxy, _value_of, (args, kwargs))
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        assert kind == "call_module"
        self._running_leaf, before = True, self._running_leaf
        try:
            return self.root.get_submodule(target)(*args, **kwargs)
        finally:
            self._running_leaf = before

    def create_arg(self, a: Any) -> Any:
        # Asked by its real type: by isinstance() a proxy is a tensor, which would be a constant.
        if issubclass(type(a), fx.Proxy):
            return a.node
        try:
            return super().create_arg(a)
        except NotImplementedError:  # an object that no generated code could spell
            return f"<{type(a).__name__}>"

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._running_leaf:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # parameters become nodes where a recorded operation uses them

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(_value_of(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = _value_of(obj)
        if isinstance(value, Mapping):
            return iter(value)
        return iter([cast(Any, obj)[index] for index in range(len(value))])


class _KnownProxy(fx.Proxy):
    """A proxy that knows its value; what holds no tensor is given as it is."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.__dict__["known_value"] = value

    @property  # type: ignore[misc]  # isinstance() only reads it
    def __class__(self) -> type:
        """What isinstance() sees: code that asks for a tensor gets one.

        Only Python code: C++ asks in the same way, and would read a proxy's memory as that of a
        tensor, where nothing looks for ``__torch_function__`` first.
        """
        if "isinstance" in sys._getframe(1).f_code.co_names:
            return type(self.__dict__["known_value"])
        return type(self)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.__dict__["known_value"], name)
        if callable(attribute):
            return _KnownMethod(self, name)
        if not _holds_tensor(attribute):
            return attribute
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.iter(self)

    def __len__(self) -> int:
        return len(_value_of(self))

    def __int__(self) -> int:
        return int(_value_of(self))

    def __float__(self) -> float:
        return float(_value_of(self))

    def __index__(self) -> int:
        return operator.index(_value_of(self))

    def __contains__(self, item: Any) -> bool:
        return item in _value_of(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _KnownMethod:
    """A method of a proxy's value, recorded when it is called."""

    def __init__(self, owner: _KnownProxy, name: str) -> None:
        self._owner = owner
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = (self._owner, *args)
        return self._owner.tracer.create_proxy("call_method", self._name, arguments, kwargs)


def _value_of(proxy: fx.Proxy) -> Any:
    return proxy.__dict__["known_value"]


def _holds_tensor(value: Any) -> bool:
    """Whether a result holds tensors, in containers or in the attributes of output classes."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensor(item) for item in value)
    return hasattr(value, "__dict__") and any(isinstance(v, Tensor) for v in vars(value).values())


def _proxies_in(value: Any) -> Iterator[fx.Proxy]:
    """The proxies in nested containers and in the attributes of output classes."""
    if issubclass(type(value), fx.Proxy):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _proxies_in(item)
    elif isinstance(value, Mapping):
        yield from _proxies_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)):
        yield from _proxies_in(list(vars(value).values()))
