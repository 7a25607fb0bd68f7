"""The sites of a model: every place where a convolution is applied.

Convolution modules are found in the module tree, functional convolutions in
graphs. The graphs come from tracing by *regions*: the model is traced whole;
where that fails its children are traced, and so on, so that a region is a
maximal traceable submodule. The graph tells the order of execution; a recorded
forward pass on example inputs, where given, tells order and sizes for any model.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from coordconv_patch.errors import PatchError
from coordconv_patch.geometry import DECLARED, ConvGeometry, Padding
from coordconv_patch.layers import CoordBranch, CoordConvNd, check_convertible

__all__ = ["Call", "Region", "Site", "SiteMap", "find_sites"]


@dataclass(frozen=True)
class Call:
    """One execution of a site, as seen on the example inputs.

    Sizes are spatial: ``(H, W)`` for images, in pixels.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A maximal submodule that torch.fx can trace.

    Attributes:
        name: Qualified name of the submodule, ``""`` for the whole model.
        module: The submodule itself.
        graph: Its graph, with convolution modules as leaves.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    graph: fx.Graph = field(repr=False, compare=False)


@dataclass(frozen=True)
class Site:
    """One place where a convolution is applied.

    Attributes:
        name: Qualified module name. A functional convolution is named after the module
            that holds its weight, or after its graph node.
        kind: ``"module"`` or ``"function"``.
        class_name: Class of the module, or name of the function.
        geometry: Channels, kernel, stride and so on; ``None`` where a functional
            convolution does not tell them.
        padding: How it pads its input.
        order: Position of its first execution, from 0; ``None`` if it is never
            executed, or if the order cannot be known.
        calls: Its executions on the example inputs; ``None`` without example inputs.
        obstacle: Why it cannot be patched; empty if it can.
        patched: Whether it already carries coordinates.
        module: The convolution module; ``None`` for a functional site.
        aliases: Further names under which the same module is registered.
        region: The region it was traced in; ``None`` if in none.
        owner: For a functional site, the qualified name of the smallest submodule
            that calls it: the one that becomes a GraphModule.
        nodes: For a functional site, its nodes in the region's graph.
    """

    name: str
    kind: Literal["module", "function"]
    class_name: str
    geometry: ConvGeometry | None
    padding: Padding = DECLARED
    order: int | None = None
    calls: tuple[Call, ...] | None = None
    obstacle: str = ""
    patched: bool = False
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    region: Region | None = field(default=None, repr=False, compare=False)
    owner: str = ""
    nodes: tuple[fx.Node, ...] = field(default=(), repr=False, compare=False)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size, ``(kH, kW)`` for images; ``()`` if unknown."""
        return self.geometry.kernel_size if self.geometry else ()


@dataclass(frozen=True)
class SiteMap:
    """All sites of a model.

    Attributes:
        sites: In order of execution where it is known (those never executed last),
            else in order of registration.
        regions: The traced regions.
        order_known: Whether the order of execution is known.
        untraced: Why the whole model could not be traced; empty if it could.
    """

    sites: tuple[Site, ...]
    regions: tuple[Region, ...]
    order_known: bool
    untraced: str


def find_sites(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    probe_padding: bool = True,
) -> SiteMap:
    """Find every convolution of a model. The model is not changed.

    Args:
        model: Any module, GraphModules included.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). With it, a forward pass is recorded, in evaluation
            mode and without gradients; training flags and random state are restored.
        probe_padding: Find out how each module pads; ``False`` if only names are wanted.

    Raises:
        PatchError: If the forward pass fails on the example inputs.
    """
    finder = _Finder(model, probe_padding)
    finder.trace("", model)
    sites = [*finder.module_sites(), *finder.function_sites()]
    order: list[str] | None = finder.execution_order("")
    if example_inputs is not None:
        recorded = record_calls(model, sites, example_inputs)
        order = list(recorded)
        sites = [replace(site, calls=tuple(recorded.get(site.name, ()))) for site in sites]
    if order is not None:
        position = {name: index for index, name in reversed(list(enumerate(order)))}
        sites = [replace(site, order=position.get(site.name)) for site in sites]
        sites.sort(key=lambda site: len(position) if site.order is None else site.order)
    return SiteMap(tuple(sites), tuple(finder.regions), order is not None, finder.untraced)


# --- tracing ------------------------------------------------------------------------------------


class ConvTracer(fx.Tracer):
    """Traces with every convolution module as a leaf, subclasses included.

    Where timm is in use, the modules and functions that it declares untraceable
    are leaves too.
    """

    def __init__(self) -> None:
        timm_layers = sys.modules.get("timm.layers")
        functions = timm_layers.get_notrace_functions() if timm_layers else []
        self._leaf_classes = tuple(timm_layers.get_notrace_modules()) if timm_layers else ()
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (_ConvNd, CoordBranch, *self._leaf_classes)):
            return True
        return super().is_leaf_module(m, module_qualified_name)


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
    with _state_restored(module):
        return ConvTracer().trace(module, concrete_args=defaults or None)


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass leaves behind: attributes, buffers and random state.

    A traced one would leave proxies, and counts one more batch in every batch norm
    whose own code does the counting.
    """
    before = [_state_of(module) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(_cuda_devices(model)):
            yield
    finally:
        for state in before:
            for holder, contents in state:
                _restore(holder, contents)
        with torch.no_grad():
            for buffer, value in buffers:
                if not buffer.is_meta and not _identical(buffer, value):
                    buffer.copy_(value)


def _state_of(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dicts that hold a module's attributes, each with a copy of its contents."""
    holders = (vars(module), module._buffers, module._parameters, module._modules)
    return [(holder, dict(holder)) for holder in cast("tuple[dict[str, Any], ...]", holders)]


def _restore(holder: dict[str, Any], contents: dict[str, Any]) -> None:
    for name in [name for name in holder if name not in contents]:
        del holder[name]
    for name, value in contents.items():
        if name not in holder or holder[name] is not value:
            holder[name] = value


def _identical(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values, NaN included."""
    return torch.equal(left, right) or torch.equal(left.nan_to_num(), right.nan_to_num())


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


class _Finder:
    """Traces a model by regions, and lists the sites in them."""

    def __init__(self, model: nn.Module, probe_padding: bool) -> None:
        self.model = model
        self.probe_padding = probe_padding
        self.regions: list[Region] = []
        self.region_of: dict[str, Region] = {}
        self.untraced = ""
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self._progress = tqdm(desc="tracing", unit=" modules", delay=1.0, disable=None, leave=False)

    def trace(self, name: str, module: nn.Module) -> None:
        """Trace a submodule; where that fails, its children; leaves that hold convs likewise."""
        if isinstance(module, _ConvNd):
            return
        self._progress.update()
        try:
            graph = trace(module)
        except Exception as error:
            if not name:
                self.untraced = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            self._trace_children(name, module)
            return
        region = Region(name, module, graph)
        self.regions.append(region)
        self.region_of[name] = region
        for node in graph.nodes:
            if node.op == "call_module":
                target = _join(name, node.target)
                leaf = self.model.get_submodule(target)
                if target not in self.region_of and _may_hold_sites(leaf):
                    self.trace(target, leaf)

    def _trace_children(self, name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            full_name = self.names[child][0]
            if full_name == _join(name, child_name) and _may_hold_sites(child):
                self.trace(full_name, child)

    def execution_order(self, name: str) -> list[str] | None:
        """Names of the sites in the order in which a submodule runs them; None if unknown."""
        if isinstance(self.model.get_submodule(name), _ConvNd):
            return [name]
        region = self.region_of.get(name)
        if region is None:
            return None
        order: list[str] = []
        for node in region.graph.nodes:
            if node.op == "call_module":
                target = _join(name, node.target)
                leaf = self.model.get_submodule(target)
                if isinstance(leaf, _ConvNd):
                    order.append(self.names[leaf][0])
                elif _may_hold_sites(leaf):
                    inner = self.execution_order(target)
                    if inner is None:
                        return None
                    order += inner
            elif _is_function_site(node):
                order.append(_function_site_name(region.name, region.module, node))
        return order

    def module_sites(self) -> Iterator[Site]:
        """The convolution modules, in order of registration."""
        for module, names in self.names.items():
            if not isinstance(module, _ConvNd):
                continue
            obstacle, padding = "", DECLARED
            patched = isinstance(module, CoordConvNd)
            lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
            if patched:
                padding = cast(CoordConvNd, module).coord_padding
            elif self.probe_padding:
                try:
                    padding = check_convertible(module)
                except PatchError as error:
                    obstacle = str(error)
            yield Site(
                name=names[0],
                kind="module",
                class_name=type(module).__name__,
                geometry=None if lazy else ConvGeometry.of(module),
                padding=padding,
                obstacle=obstacle,
                patched=patched,
                module=module,
                aliases=tuple(names[1:]),
                region=self._region_around(names[0]),
            )
        self._progress.close()

    def _region_around(self, name: str) -> Region | None:
        while name:
            name = name.rpartition(".")[0]
            if name in self.region_of:
                return self.region_of[name]
        return None

    def function_sites(self) -> Iterator[Site]:
        """The functional convolutions in the traced graphs; calls of one weight are one site."""
        for region in self.regions:
            for name, nodes in function_nodes(region.name, region.module, region.graph).items():
                yield _function_site(region, name, nodes)


def _may_hold_sites(module: nn.Module) -> bool:
    """Whether tracing into a module can bring sites: torch.nn's own layers hold none."""
    if isinstance(module, (_ConvNd, CoordBranch)):
        return False
    return any(
        isinstance(inner, _ConvNd)
        or not type(inner).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))
        for inner in module.modules()
    )


def _join(prefix: str, name: Any) -> str:
    return f"{prefix}.{name}" if prefix and name else f"{prefix}{name}"


# --- functional convolutions --------------------------------------------------------------------

_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = (
    *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
)
_CONVOLUTION_ARGUMENTS = (
    *("input", "weight", "bias", "stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups"),
)
_aten = torch.ops.aten

CONV_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.conv1d: _CONV_ARGUMENTS,
    F.conv2d: _CONV_ARGUMENTS,
    F.conv3d: _CONV_ARGUMENTS,
    F.conv_transpose1d: _TRANSPOSED_ARGUMENTS,
    F.conv_transpose2d: _TRANSPOSED_ARGUMENTS,
    F.conv_transpose3d: _TRANSPOSED_ARGUMENTS,
    _aten.conv1d.default: _CONV_ARGUMENTS,
    _aten.conv1d.padding: _CONV_ARGUMENTS,
    _aten.conv2d.default: _CONV_ARGUMENTS,
    _aten.conv2d.padding: _CONV_ARGUMENTS,
    _aten.conv3d.default: _CONV_ARGUMENTS,
    _aten.conv3d.padding: _CONV_ARGUMENTS,
    _aten.conv_transpose1d.default: _TRANSPOSED_ARGUMENTS,
    _aten.conv_transpose2d.input: _TRANSPOSED_ARGUMENTS,
    _aten.conv_transpose3d.input: _TRANSPOSED_ARGUMENTS,
    _aten.convolution.default: _CONVOLUTION_ARGUMENTS,
}
"""Functions that are convolutions, with the names of their positional arguments."""


def conv_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional convolution's node, by name."""
    names = CONV_SIGNATURES[node.target]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def function_nodes(prefix: str, module: nn.Module, graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The functional convolutions of a graph by site name.

    Args:
        prefix: Qualified name of the module that the graph belongs to.
        module: That module.
        graph: Its graph.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_function_site(node):
            nodes.setdefault(_function_site_name(prefix, module, node), []).append(node)
    return nodes


def _is_function_site(node: fx.Node) -> bool:
    """Whether a node is a convolution, and not one of a coordinate branch that was exported."""
    if node.op != "call_function" or node.target not in CONV_SIGNATURES:
        return False
    weight = conv_arguments(node).get("weight")
    return not (
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and str(weight.target).rpartition(".")[2] == "coord_weight"
    )


def _function_site_name(prefix: str, module: nn.Module, node: fx.Node) -> str:
    weight = conv_arguments(node).get("weight")
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return _join(prefix, node.name)
    # "conv1.weight" names the site conv1, as if conv1 were a module site; where it is one,
    # the functional use of its weight is another site.
    full_name = _join(prefix, weight.target)
    holder, _, attribute = full_name.rpartition(".")
    own_holder = str(weight.target).rpartition(".")[0]
    if not holder or attribute != "weight" or isinstance(module.get_submodule(own_holder), _ConvNd):
        return full_name
    return holder


def _function_site(region: Region, name: str, nodes: list[fx.Node]) -> Site:
    geometry: ConvGeometry | None = None
    obstacle = ""
    try:
        geometries = {_function_geometry(region.module, node) for node in nodes}
        geometry = geometries.pop()
        if geometries:
            obstacle = "one weight is used with several strides or paddings"
    except PatchError as error:
        obstacle = str(error)
    patched = [
        branch_of(region.module, node) is not None or _has_exported_branch(region.module, node)
        for node in nodes
    ]
    if hasattr(region.module, "train_graph"):
        obstacle = obstacle or "its graph module has two graphs, for training and evaluation"
    target = nodes[0].target
    stack = nodes[0].meta.get("nn_module_stack") or {}
    traced_here = not isinstance(region.module, fx.GraphModule)
    owner = str(list(stack)[-1]) if stack and traced_here else ""
    return Site(
        name=name,
        kind="function",
        class_name=getattr(target, "__name__", str(target)),
        geometry=geometry,
        obstacle=obstacle,
        patched=any(patched),
        calls=_calls_from_meta(nodes),
        region=region,
        owner=_join(region.name, owner),
        nodes=tuple(nodes),
    )


def _function_geometry(root: nn.Module, node: fx.Node) -> ConvGeometry:
    arguments = conv_arguments(node)
    weight = arguments.get("weight")
    shape, dtype = _shape_and_dtype(root, weight)
    if shape is None:
        raise PatchError(
            "its weight is computed at run time (per sample, perhaps), so its shape is unknown"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise PatchError(f"its weight has dtype {dtype}; coordinates need floats")
    ndim = len(shape) - 2
    name = getattr(node.target, "__name__", str(node.target))
    transposed = bool(arguments.get("transposed", "transpose" in name))
    numbers: dict[str, Any] = {}
    for key, default in (
        ("stride", 1),
        ("padding", 0),
        ("dilation", 1),
        ("output_padding", 0),
        ("groups", 1),
    ):
        value = arguments.get(key, default)
        parts = value if isinstance(value, (tuple, list)) else [value]
        if any(isinstance(part, fx.Node) for part in parts):
            raise PatchError(f"its {key} is computed at run time")
        if key == "groups" or isinstance(value, str):
            numbers[key] = value
        else:
            spread = [int(part) for part in parts] or [default]
            numbers[key] = tuple(spread * ndim if len(spread) == 1 else spread)
    groups = numbers["groups"]
    return ConvGeometry(
        transposed=transposed,
        in_channels=shape[0] if transposed else shape[1] * groups,
        out_channels=shape[1] * groups if transposed else shape[0],
        kernel_size=tuple(shape[2:]),
        stride=numbers["stride"],
        padding=numbers["padding"],
        dilation=numbers["dilation"],
        groups=groups,
        output_padding=numbers["output_padding"] if transposed else (),
    )


def _shape_and_dtype(
    root: nn.Module, value: Any
) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    if not isinstance(value, fx.Node):
        return None, None
    if value.op == "get_attr":
        tensor = operator.attrgetter(str(value.target))(root)
        return tuple(tensor.shape), tensor.dtype
    recorded = value.meta.get("val", value.meta.get("tensor_meta"))
    if recorded is None:
        return None, None
    return tuple(int(length) for length in recorded.shape), recorded.dtype


def branch_of(root: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a graph already adds to a functional convolution: the sum's node and the branch's."""
    for user in node.users:
        if user.op != "call_function" or user.target is not operator.add:
            continue
        for other in user.all_input_nodes:
            if other.op == "call_module" and isinstance(
                root.get_submodule(str(other.target)), CoordBranch
            ):
                return user, other
    return None


def _has_exported_branch(root: nn.Module, node: fx.Node) -> bool:
    """Whether the model was patched before torch.export made a program of it."""
    weight = conv_arguments(node).get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    holder = root.get_submodule(str(weight.target).rpartition(".")[0])
    return isinstance(getattr(holder, "coord_weight", None), Tensor)


def _calls_from_meta(nodes: Sequence[fx.Node]) -> tuple[Call, ...] | None:
    """Sizes that the graph itself knows (torch.export records them)."""
    calls = []
    for node in nodes:
        source = conv_arguments(node)["input"]
        values = [source.meta.get("val"), node.meta.get("val")]
        if not all(isinstance(value, Tensor) for value in values):
            return None
        sizes = [tuple(value.shape[2:]) for value in values]
        if not all(type(length) is int for size in sizes for length in size):
            return None
        calls.append(Call(*sizes))
    return tuple(calls)


# --- recording a forward pass -------------------------------------------------------------------


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments.

    A tensor is one argument; a tuple is the positional arguments, where a dict at
    its end is keyword arguments; anything else (a list of images) is one argument.
    """
    if not isinstance(example_inputs, tuple):
        return (example_inputs,), {}
    if example_inputs and isinstance(example_inputs[-1], dict):
        return example_inputs[:-1], dict(example_inputs[-1])
    return example_inputs, {}


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output on example inputs, see :func:`split_inputs`.

    Raises:
        PatchError: If the model fails on them.
    """
    args, kwargs = split_inputs(example_inputs)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise PatchError(
            f"the model failed on the example inputs ({describe_inputs(example_inputs)}): "
            f"{type(error).__name__}: {error}"
        ) from error


def in_signature_order(model: nn.Module, example_inputs: Any) -> Any:
    """Example inputs with their keyword arguments in the order of the forward's signature.

    Graph inputs come in that order.
    """
    args, kwargs = split_inputs(example_inputs)
    if not kwargs:
        return example_inputs
    names = list(inspect.signature(model.forward).parameters)
    position = {name: index for index, name in enumerate(names)}
    ordered = sorted(kwargs, key=lambda name: position.get(name, len(position)))
    return (*args, {name: kwargs[name] for name in ordered})


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every submodule in training or evaluation mode; each one's own flag is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state are put back."""
    devices = _cuda_devices(model)
    with in_mode(model, training=False), torch.no_grad(), torch.random.fork_rng(devices):
        yield


def record_calls(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any
) -> dict[str, list[Call]]:
    """Run the model once on the example inputs; the calls of each site, in order of execution.

    Raises:
        PatchError: If the forward pass fails.
    """
    recorder = _CallRecorder(sites)
    with evaluating(model), _state_restored(model), recorder:
        run_model(model, example_inputs)
    return recorder.calls


class _CallRecorder:
    """While entered, notes every execution of the sites.

    A region with functional sites is interpreted node by node on the inputs that it
    gets, which shows all of its sites in order; the real run that follows is not noted.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.calls: dict[str, list[Call]] = {}
        self._sites = sites
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._regions_noted = 0

    def __enter__(self) -> _CallRecorder:
        names_by_region: dict[Region, dict[fx.Node, str]] = {}
        for site in self._sites:
            if site.module is not None:
                hook = functools.partial(self._after_module, site.name)
                self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
            elif site.region is not None:
                names = names_by_region.setdefault(site.region, {})
                names.update(dict.fromkeys(site.nodes, site.name))
        for region, names in names_by_region.items():
            pre_hook = functools.partial(self._before_region, region, names)
            self._handles += [
                region.module.register_forward_pre_hook(pre_hook, with_kwargs=True),
                region.module.register_forward_hook(self._after_region, always_call=True),
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, source: Tensor, output: Tensor, ndim: int) -> None:
        if not self._regions_noted:
            call = Call(tuple(source.shape[-ndim:]), tuple(output.shape[-ndim:]))
            self.calls.setdefault(name, []).append(call)

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
        region: Region,
        names: Mapping[fx.Node, str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        recorder = self

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n in names:
                    arguments = conv_arguments(n)
                    weight = self.env[arguments["weight"]]
                    source = self.env[arguments["input"]]
                    recorder._note(names[n], source, result, weight.dim() - 2)
                return result

        if not self._regions_noted:
            traced = isinstance(module, fx.GraphModule)
            runnable = module if traced else fx.GraphModule(module, region.graph)
            inputs = _placeholder_values(region.graph, traced, args, kwargs)
            Interpreter(runnable).run(*inputs, enable_io_processing=False)
        self._regions_noted += 1

    def _after_region(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._regions_noted -= 1


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


def describe_inputs(example_inputs: Any) -> str:
    if isinstance(example_inputs, Tensor):
        return f"a tensor of shape {tuple(example_inputs.shape)}, {example_inputs.dtype}"
    if isinstance(example_inputs, (tuple, list)):
        return ", ".join(describe_inputs(part) for part in example_inputs)
    return type(example_inputs).__name__
