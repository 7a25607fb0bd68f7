"""The sites of a model: every place where a convolution is applied.

Convolution modules are found in the module tree, functional convolutions in
graphs. The graphs come from tracing by *regions*: the model is traced whole;
where that fails its children are traced, and so on, so that a region is a
maximal traceable submodule. The graph tells the order of execution; a recorded
forward pass on example inputs, where given, tells order and sizes for any model.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm

from coordconv_patch.arguments import check_example_inputs
from coordconv_patch.errors import PatchError, first_line
from coordconv_patch.graphs.functional import (
    branch_of,
    conv_arguments,
    function_geometry,
    function_input,
    function_nodes,
    has_exported_branch,
    is_function_site,
    join_names,
    weight_site_name,
)
from coordconv_patch.graphs.own_padding import NOT_PADDED
from coordconv_patch.graphs.tracing import trace, trace_call
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.call_hooks import chosen_calls_of
from coordconv_patch.layers.conversion import check_convertible
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import CONV_FUNCTIONS, DECLARED, Call, ConvGeometry, Padding
from coordconv_patch.owners.call_owners import geometry_of_calls, owner_obstacle
from coordconv_patch.owners.function_log import common_caller
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.running.tracing_gate import TracingBusyError
from coordconv_patch.running.untouched import evaluating
from coordconv_patch.sites.obstacles import (
    adapter_obstacle,
    foreign_convolutions,
    quantization_obstacle,
)
from coordconv_patch.sites.recording import (
    GraphFunctions,
    Recording,
    record_arguments,
    record_run,
)

__all__ = [
    "Region",
    "Site",
    "SiteMap",
    "find_sites",
]


@dataclass(frozen=True)
class Region:
    """A maximal submodule that torch.fx can trace.

    Attributes:
        name: Qualified name of the submodule, ``""`` for the whole model.
        module: The submodule itself.
        graph: Its graph, with convolution modules as leaves.
        of_one_call: Whether the graph is what one call on the example inputs did, because
            symbolic tracing fails: for reading only.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    graph: fx.Graph = field(repr=False, compare=False)
    of_one_call: bool = False


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
        caller: The innermost module during whose single call all of them happened, ``""``
            for the model; ``None`` if that is unknown or no hook can be put on it.
        obstacle: Why it cannot be patched; empty if it can.
        patched: Whether it already carries coordinates.
        module: The convolution module; ``None`` for a functional site.
        aliases: Further names under which the same module is registered.
        region: The region it was traced in; ``None`` if in none.
        nodes: For a functional site of a GraphModule, its nodes in the graph.
        owned: For a functional site of a plain module, which calls of which module it is.
        weight: The weight of such a site, or one like it where it is computed.
    """

    name: str
    kind: Literal["module", "function"]
    class_name: str
    geometry: ConvGeometry | None
    padding: Padding = DECLARED
    order: int | None = None
    calls: tuple[Call, ...] | None = None
    caller: str | None = None
    obstacle: str = ""
    patched: bool = False
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    region: Region | None = field(default=None, repr=False, compare=False)
    nodes: tuple[fx.Node, ...] = field(default=(), repr=False, compare=False)
    owned: OwnedCalls | None = None
    weight: Tensor | None = field(default=None, repr=False, compare=False)

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
        ArgumentError: If the model is not a module, or example inputs cannot be such.
        PatchError: If the forward pass fails on the example inputs.
    """
    check_is_module(model)
    check_example_inputs(example_inputs)
    if isinstance(model, torch.jit.ScriptModule):
        return SiteMap(tuple(_foreign_sites(model)), (), False, "it is a TorchScript module")
    finder = _Finder(model, probe_padding)
    finder.trace("", model)
    if example_inputs is not None:
        finder.trace_calls(example_inputs)
    sites = [*finder.module_sites(), *_foreign_sites(model), *finder.function_sites()]
    order: list[str] | None = finder.execution_order("")
    if example_inputs is not None:
        recorded = _recorded(model, sites, example_inputs)
        # What ran is the truth: a trace may take another way through the code.
        ran = {site.name: site for site in finder.recorded_functions(recorded)}
        sites = [site for site in sites if site.name not in ran] + list(ran.values())
        order = list(recorded.calls)
        sites = [
            replace(
                site,
                calls=_calls_of(site, recorded),
                caller=recorded.callers.get(site.name),
            )
            for site in sites
        ]
    if order is not None:
        position = {name: index for index, name in reversed(list(enumerate(order)))}
        sites = [replace(site, order=position.get(site.name)) for site in sites]
        sites.sort(key=lambda site: len(position) if site.order is None else site.order)
    return SiteMap(tuple(sites), tuple(finder.regions), order is not None, finder.untraced)


def _recorded(model: nn.Module, sites: Sequence[Site], example_inputs: Any) -> Recording:
    modules = {site.name: site.module for site in sites if site.module is not None}
    by_region: dict[Region, GraphFunctions] = {}
    for site in sites:
        if site.nodes and site.region is not None:
            region = site.region
            functions = GraphFunctions(region.module, region.graph, {})
            by_region.setdefault(region, functions).names.update(
                dict.fromkeys(site.nodes, site.name)
            )
    return record_run(model, example_inputs, modules, list(by_region.values()))


def _calls_of(site: Site, recorded: Recording) -> tuple[Call, ...] | None:
    """A site's calls; unknown for convolutions that cannot be watched."""
    if site.kind == "module" and site.module is None:
        return site.calls
    return tuple(recorded.calls.get(site.name, ()))


class _Finder:
    """Traces a model by regions, and lists the sites in them."""

    def __init__(self, model: nn.Module, probe_padding: bool) -> None:
        self.model = model
        self.probe_padding = probe_padding
        self.regions: list[Region] = []
        self.region_of: dict[str, Region] = {}
        self.region_of_call: dict[str, Region] = {}
        self.failed: list[str] = []
        self.name_of_function: dict[fx.Node, str] = {}
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
        except TracingBusyError:
            raise
        except Exception as error:
            if not name:
                self.untraced = first_line(error)
            self.failed.append(name)
            self._trace_children(name, module)
            return
        region = Region(name, module, graph)
        self.regions.append(region)
        self.region_of[name] = region
        for node in graph.nodes:
            if node.op == "call_module":
                target = join_names(name, node.target)
                leaf = self.model.get_submodule(target)
                if target not in self.region_of and _may_hold_sites(leaf):
                    self.trace(target, leaf)

    def _trace_children(self, name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            full_name = self.names[child][0]
            if full_name == join_names(name, child_name) and _may_hold_sites(child):
                self.trace(full_name, child)

    def trace_calls(self, example_inputs: Any) -> None:
        """Regions of one call, around the convolutions that no symbolic graph holds."""
        left = {
            names[0]
            for module, names in self.names.items()
            if isinstance(module, _ConvNd) and self._region_around(names[0]) is None
        }
        around = [name for name in self.failed if any(_is_in(conv, name) for conv in left)]
        modules = {name: self.model.get_submodule(name) for name in around}
        arguments = record_arguments(self.model, example_inputs, modules) if modules else {}
        for name in around:  # outer modules first
            if name not in arguments or not any(_is_in(conv, name) for conv in left):
                continue
            try:
                with evaluating(self.model):
                    graph = trace_call(modules[name], *arguments[name])
            except TracingBusyError:
                raise
            except Exception:
                continue
            region = Region(name, modules[name], graph, of_one_call=True)
            self.regions.append(region)
            self.region_of_call[name] = region
            left = {conv for conv in left if not _is_in(conv, name)}

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
                target = join_names(name, node.target)
                leaf = self.model.get_submodule(target)
                if isinstance(leaf, _ConvNd):
                    order.append(self.names[leaf][0])
                elif _may_hold_sites(leaf):
                    inner = self.execution_order(target)
                    if inner is None:
                        return None
                    order += inner
            elif is_function_site(node):
                order.append(self.name_of_function[node])
        return order

    def module_sites(self) -> Iterator[Site]:
        """The convolution modules, in order of registration."""
        for module, names in self.names.items():
            if not isinstance(module, _ConvNd):
                continue
            obstacle = quantization_obstacle(module) or adapter_obstacle(self.model, names[0])
            padding = DECLARED
            patched = isinstance(module, CoordConvNd) or chosen_calls_of(module) is not None
            lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
            if patched:
                padding = getattr(module, "coord_padding", DECLARED)
            elif obstacle:
                pass
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
        for regions in (self.region_of, self.region_of_call):
            outer = name
            while outer:
                outer = outer.rpartition(".")[0]
                if outer in regions:
                    return regions[outer]
        return None

    def function_sites(self) -> Iterator[Site]:
        """The functional convolutions in the traced graphs; calls by one weight are one site."""
        for region in self.region_of.values():
            if isinstance(region.module, fx.GraphModule):
                nodes_of = function_nodes(region.name, region.module, region.graph)
                found = [(_graph_site(region, *named), named[1]) for named in nodes_of.items()]
            else:
                found = list(self._traced_sites(region))
            for site, nodes in found:
                self.name_of_function.update(dict.fromkeys(nodes, site.name))
                yield site

    def _traced_sites(self, region: Region) -> Iterator[tuple[Site, list[fx.Node]]]:
        """The functional sites of plain modules, as a trace shows them, and their nodes."""
        by_weight: dict[Any, list[fx.Node]] = {}
        for node in filter(is_function_site, region.graph.nodes):
            weight = conv_arguments(node).get("weight")
            key = weight
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                key = str(weight.target)
            by_weight.setdefault(key, []).append(node)
        taken: Counter[str] = Counter()
        for weight, nodes in by_weight.items():
            if isinstance(weight, str):
                yield self._site_by_stored_weight(region, weight, nodes), nodes
            else:
                site = self._site_by_computed_weight(region, nodes)
                taken[site.name] += 1
                count = taken[site.name] - 1
                name = f"{site.name}_{count}" if count else site.name
                yield replace(site, name=name), nodes

    def _site_by_stored_weight(self, region: Region, weight: str, nodes: list[fx.Node]) -> Site:
        stored = join_names(region.name, weight)
        holder = stored.rpartition(".")[0]
        owner = common_caller([_callers(region, node) for node in nodes], holder)
        module = self.model.get_submodule(owner)
        name = weight_site_name(stored, self.model.get_submodule(holder))
        site = _graph_site(region, name, nodes)
        padding = NOT_PADDED if site.obstacle else function_input(nodes[0]).own
        indices, total = _positions(region, nodes, weight)
        relative = stored[len(owner) :].lstrip(".")
        owned = OwnedCalls(owner, site.class_name, relative, padding, indices, total)
        return replace(
            site,
            nodes=(),
            obstacle=site.obstacle or owner_obstacle(module),
            patched=geometry_of_calls(module, owned) is not None,
            owned=owned,
            weight=operator.attrgetter(stored)(self.model),
        )

    def _site_by_computed_weight(self, region: Region, nodes: list[fx.Node]) -> Site:
        owner = common_caller([_callers(region, node) for node in nodes])
        site = _graph_site(region, "", nodes)
        name = join_names(owner, site.class_name)
        owned = OwnedCalls(owner, site.class_name, None)
        geometry = geometry_of_calls(self.model.get_submodule(owner), owned)
        obstacle = (
            "its weight is computed when the model runs, so a trace does not tell its shape: pass "
            "example_inputs=..., on which it is seen"
        )
        return replace(
            site,
            name=name,
            nodes=(),
            geometry=geometry,
            obstacle="" if geometry is not None else obstacle,
            patched=geometry is not None,
            owned=owned,
        )

    def recorded_functions(self, recorded: Recording) -> Iterator[Site]:
        """The functional sites of plain modules that were seen running."""
        for found in recorded.functions:
            owner = self.model.get_submodule(found.owned.owner)
            yield Site(
                name=found.name,
                kind="function",
                class_name=found.owned.function,
                geometry=found.geometry,
                padding=found.owned.padding.rule,
                obstacle=found.obstacle or owner_obstacle(owner),
                patched=geometry_of_calls(owner, found.owned) is not None,
                region=self._region_around(join_names(found.owned.owner, "?")),
                owned=found.owned,
                weight=found.weight,
            )


def _is_in(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _may_hold_sites(module: nn.Module) -> bool:
    """Whether tracing into a module can bring sites: torch.nn's own layers hold none."""
    if isinstance(module, (_ConvNd, CoordBranch, torch.jit.ScriptModule)):
        return False
    return any(
        isinstance(inner, _ConvNd)
        or not type(inner).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))
        for inner in module.modules()
    )


def _foreign_sites(model: nn.Module) -> Iterator[Site]:
    """Convolutions that are no torch.nn modules: TorchScript's and quantized ones."""
    for name, class_name, obstacle in foreign_convolutions(model):
        yield Site(
            name=name, kind="module", class_name=class_name, geometry=None, obstacle=obstacle
        )


def _callers(region: Region, node: fx.Node) -> list[str]:
    """Qualified names of the modules that ran when a node was traced, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [region.name, *(join_names(region.name, path) for path, _ in stack.values())]


def _positions(
    region: Region, nodes: Sequence[fx.Node], weight: str
) -> tuple[tuple[int, ...] | None, int]:
    """Positions of a site's calls among those by its weight, where the weight has other users.

    A convolution module whose weight the code also uses by itself is one.

    Returns:
        The positions and the number of calls; ``None`` and 0 where no other code gives the
        weight to the same function.
    """
    holder = region.module.get_submodule(weight.rpartition(".")[0])
    if not isinstance(holder, _ConvNd):
        return None, 0
    if CONV_FUNCTIONS[len(holder.kernel_size), holder.transposed] is not nodes[0].target:
        return None, 0
    alike = [
        node
        for node in region.graph.nodes
        if node in nodes
        or (node.op == "call_module" and region.module.get_submodule(node.target) is holder)
    ]
    if len(alike) == len(nodes):
        return None, 0
    return tuple(i for i, node in enumerate(alike) if node in nodes), len(alike)


def _graph_site(region: Region, name: str, nodes: list[fx.Node]) -> Site:
    """A functional site as a graph shows it."""
    geometry: ConvGeometry | None = None
    obstacle, padding = "", DECLARED
    try:
        geometries = {function_geometry(region.module, node) for node in nodes}
        geometry = geometries.pop()
        if geometries:
            obstacle = "one weight is used with several strides or paddings"
        paddings = {function_input(node).own.rule for node in nodes}
        padding = paddings.pop()
        if paddings:
            obstacle = "one weight is used with several strides or paddings"
    except PatchError as error:
        obstacle = str(error)
    patched = [
        branch_of(region.module, node) is not None or has_exported_branch(region.module, node)
        for node in nodes
    ]
    if hasattr(region.module, "train_graph"):
        obstacle = obstacle or "its graph module has two graphs, for training and evaluation"
    target = nodes[0].target
    return Site(
        name=name,
        kind="function",
        class_name=getattr(target, "__name__", str(target)),
        geometry=geometry,
        padding=padding,
        obstacle=obstacle,
        patched=any(patched),
        calls=_calls_from_meta(nodes),
        region=region,
        nodes=tuple(nodes),
    )


def _calls_from_meta(nodes: Sequence[fx.Node]) -> tuple[Call, ...] | None:
    """Sizes that the graph itself knows (torch.export records them)."""
    calls = []
    for node in nodes:
        try:
            source = function_input(node).node
        except PatchError:
            return None
        values = [source.meta.get("val"), node.meta.get("val")]
        sizes = [tuple(value.shape[2:]) for value in values if isinstance(value, Tensor)]
        if len(sizes) < 2:
            return None
        if not all(type(length) is int for size in sizes for length in size):
            return None
        calls.append(Call(*sizes))
    return tuple(calls)
