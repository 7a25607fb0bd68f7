"""The parts of a model that torch.fx can trace.

The model is traced whole; where that fails its children are traced, and so on, so that a
region is a maximal traceable submodule. A leaf of a trace that may hold convolutions, such as a
GraphModule, is a region of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.display.progress import Progress
from coordconv_patch.errors import first_line
from coordconv_patch.graphs.conv_tracer import trace
from coordconv_patch.graphs.functional import join_names
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.running.tracing_gate import TracingBusyError

__all__ = ["Region", "Regions", "may_hold_sites", "trace_regions"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """A maximal submodule that torch.fx can trace.

    ``name`` is ``""`` for the whole model; convolution modules are leaves of the graph.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    graph: fx.Graph = field(repr=False, compare=False)


@dataclass(frozen=True)
class Regions:
    """The traced regions of a model, and the names of its modules, which are looked up often.

    Attributes:
        by_name: The regions by the names of their submodules, outer ones first.
        untraced: Why the whole model could not be traced; empty if it could.
        modules: The model's modules by all of their names; the model itself is ``""``.
        names: All names that each module is registered under, in order of registration.
    """

    by_name: Mapping[str, Region]
    untraced: str
    modules: Mapping[str, nn.Module] = field(repr=False, compare=False)
    names: Mapping[nn.Module, Sequence[str]] = field(repr=False, compare=False)

    def around(self, name: str) -> Region | None:
        """The innermost region that a module lies in, itself not counted; ``None`` if in none."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.by_name:
                return self.by_name[name]
        return None


def trace_regions(model: nn.Module) -> Regions:
    """Trace a model by regions. The model is not changed."""
    regions: dict[str, Region] = {}
    failures: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    if isinstance(model, torch.jit.ScriptModule):
        return Regions(regions, "it is a TorchScript module", modules, names)
    waiting = [("", model)]
    with Progress("tracing", unit="modules") as progress:
        while waiting:
            name, module = waiting.pop(0)
            if name in regions or name in failures or isinstance(module, _ConvNd):
                continue
            progress.step()
            try:
                regions[name] = Region(name, module, trace(module))
            except TracingBusyError:
                raise
            except Exception as error:
                failures[name] = first_line(error)
                _LOG.debug("%s cannot be traced: %s", name or "the model", failures[name])
                inner = _children(name, module, names)
            else:
                inner = _leaves(modules, regions[name])
            waiting[:0] = [(part, module) for part, module in inner if may_hold_sites(module)]
    return Regions(regions, failures.get("", ""), modules, names)


def _children(
    name: str, module: nn.Module, names: Mapping[nn.Module, Sequence[str]]
) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module, where they are registered first."""
    for child_name, child in module.named_children():
        full_name = join_names(name, child_name)
        if names[child][0] == full_name:
            yield full_name, child


def _leaves(modules: Mapping[str, nn.Module], region: Region) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a region's graph calls."""
    for node in region.graph.find_nodes(op="call_module"):
        name = join_names(region.name, node.target)
        yield name, modules[name]


def may_hold_sites(module: nn.Module) -> bool:
    """Whether tracing into a module can bring sites: torch.nn's own layers hold none."""
    if isinstance(module, (_ConvNd, CoordBranch, torch.jit.ScriptModule)):
        return False
    return any(
        isinstance(inner, _ConvNd)
        or not type(inner).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))
        for inner in module.modules()
    )
