"""What an exported file is meant for: a runtime, or any.

Runtimes differ in what they fold and fuse, and some refuse, or compute wrongly, graphs that others
run (docs/runtimes.md has the matrix). A :class:`Target` says how a file is written so that its
runtime takes it. :func:`register_target` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from onnx_ir.passes import InPlacePass

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.export.graph_passes.carry_coordinates import CarryCoordinates
from coordconv_patch.export.graph_passes.expand_coordinates import ExpandCoordinates
from coordconv_patch.export.graph_passes.fold_scales import FoldScales
from coordconv_patch.export.graph_passes.fuse_clips import FuseClips
from coordconv_patch.export.graph_passes.order_additions import OrderAdditions
from coordconv_patch.export.graph_passes.repeat_maps import RepeatMaps
from coordconv_patch.lowering.map import Map
from coordconv_patch.runtime.providers import CPU

__all__ = ["BY_PROVIDER", "ONNX_RUNTIME", "TARGETS", "Target", "register_target", "target_named"]

BY_PROVIDER = "auto"
"""As a target's lowering: what suits ONNX Runtime's execution provider."""


@dataclass(frozen=True)
class Target:
    """How a file is written for one runtime.

    Attributes:
        name: What ``target=`` calls it: a Python identifier.
        title: What it is, as reports say it.
        lowering: The form of the coordinate branch where sizes are fixed: a name of
            :data:`coordconv_patch.lowering.registry.LOWERINGS`, or ``"auto"``: that which suits
            an execution provider of ONNX Runtime.
        provider: That provider; ``None``: the one that the file is checked on.
        whole_constants: Whether coordinate constants are stored as they are read, and not as the
            vectors that they are made of. The file grows by whole maps; no node of it computes
            from constants alone.
        rewrites: The graph passes for the sums with coordinates, in order; ``None``: those of the
            provider, see :data:`coordconv_patch.export.rewrites.REWRITES`.
        computes_coordinates: Whether the runtime takes coordinates that the graph computes:
            those of ``dynamic_size=True`` and of places. Otherwise such an export is refused.
        opset: The operator set to write where none is asked for; ``None``: the exporter's choice.
        batch_advice: Why the batch had better be fixed there; ``""``: it need not be.
        fixes_batch: Whether a file with a dynamic batch fails there; such an export is refused.
        notes: What else whoever runs the file there should know.
    """

    name: str
    title: str
    lowering: str = Map.name
    provider: str | None = None
    whole_constants: bool = True
    rewrites: tuple[Callable[[], InPlacePass], ...] | None = (FoldScales, ExpandCoordinates)
    computes_coordinates: bool = False
    opset: int | None = None
    batch_advice: str = ""
    fixes_batch: bool = False
    notes: tuple[str, ...] = ()

    def check(self, lowering: str, dynamic_batch: bool, computes: str) -> None:
        """Check that an export can be written for this target.

        Args:
            lowering: As ``export_onnx`` was given it.
            dynamic_batch: So too.
            computes: The argument for which the graph would compute coordinates, or ``""``.

        Raises:
            ArgumentError: If it cannot.
        """
        is_for_onnx_runtime = self.lowering == BY_PROVIDER and self.rewrites is None
        if lowering != "auto" and not is_for_onnx_runtime:
            raise ArgumentError(
                f"lowering={lowering!r} with target={self.name!r}, which has a form of its own: "
                f"leave lowering out, or write target={ONNX_RUNTIME.name!r}"
            )
        if dynamic_batch and self.fixes_batch:
            raise ArgumentError(
                f"dynamic_batch=True with target={self.name!r}: {self.title} takes files of a "
                "fixed batch; pass dynamic_batch=False, and example_inputs of the batch that it "
                "shall have"
            )
        if computes and not self.computes_coordinates:
            able = [repr(name) for name, each in TARGETS.items() if each.computes_coordinates]
            raise ArgumentError(
                f"{computes} with target={self.name!r}: such a file computes coordinates, and "
                f"{self.title} takes stored ones; export one file for each size or place, or "
                f"write target={' or '.join(able)}"
            )

    def notes_on(self, dynamic_batch: bool) -> tuple[str, ...]:
        """What the report of an export says."""
        advice = self.batch_advice if dynamic_batch else ""
        return (*([f"pass dynamic_batch=False: {advice}"] if advice else []), *self.notes)


ONNX_RUNTIME = Target(
    "onnxruntime",
    "ONNX Runtime",
    lowering=BY_PROVIDER,
    whole_constants=False,
    rewrites=None,
    computes_coordinates=True,
)
"""The default: written for the execution provider that is there."""

_PORTABLE = Target("portable", "any runtime")

_OPENVINO = Target(
    "openvino",
    "OpenVINO",
    lowering=BY_PROVIDER,
    provider=CPU,
    whole_constants=False,
    rewrites=(
        # Coordinates that activations carry need no addition there either.
        partial(CarryCoordinates, in_blocks=False),
        FoldScales,
        ExpandCoordinates,
        OrderAdditions,
        FuseClips,
    ),
    computes_coordinates=True,
    batch_advice=(
        "OpenVINO computes coordinates once where it knows the batch (after model.reshape, too), "
        "and at every run where it does not"
    ),
)

_OTHERS = (
    Target("opencv", "OpenCV's dnn module", computes_coordinates=True),
    Target(
        "tensorrt",
        "TensorRT",
        whole_constants=False,
        computes_coordinates=True,
        rewrites=(FoldScales, ExpandCoordinates, OrderAdditions),
        notes=("no TensorRT was at hand when this target was written: nothing was run there",),
    ),
    Target("ncnn", "ncnn, by pnnx", batch_advice="pnnx writes for one size of its inputs"),
    Target("mnn", "MNN", computes_coordinates=True),
    Target(
        "litert",
        "LiteRT, by onnx2tf",
        fixes_batch=True,
        rewrites=(FoldScales, ExpandCoordinates, RepeatMaps),
    ),
    Target(
        "coreml",
        "Core ML, by ONNX Runtime's provider",
        batch_advice="Core ML's neural engine takes fixed sizes",
        notes=("no Core ML was at hand when this target was written: nothing was run there",),
    ),
    # WebAssembly has no kernels for blocks of channels, so a map is added as quickly as anything.
    Target("web", "ONNX Runtime in a browser", whole_constants=False, computes_coordinates=True),
)

TARGETS: dict[str, Target] = {
    each.name: each for each in (ONNX_RUNTIME, _OPENVINO, *_OTHERS, _PORTABLE)
}
"""All targets by name: what ``target=`` and the command line read."""

_OWN = frozenset(TARGETS)


def target_named(name: Any) -> Target:
    """The target of a name, or an ArgumentError that lists the names."""
    if not isinstance(name, str) or name not in TARGETS:
        raise ArgumentError(f"target={name!r}: write {', '.join(map(repr, TARGETS))}")
    return TARGETS[name]


def register_target(target: Target) -> None:
    """Let ``target=`` take one more target, under its own name.

    A second one of a name takes the place of the first.

    Args:
        target: Best made of an existing one by :func:`dataclasses.replace`.

    Raises:
        ArgumentError: If it is not a Target, or its name is not an identifier, or is that of a
            target of the package.

    Example::

        register_target(Target("tract", "tract", whole_constants=True))
        export_onnx(model, "model.onnx", images, target="tract")
    """
    if not isinstance(target, Target):
        raise ArgumentError(f"target={excerpt(target)}: write a Target")
    if not isinstance(target.name, str) or not target.name.isidentifier() or target.name in _OWN:
        raise ArgumentError(
            f"the target's name={excerpt(target.name)}: write an identifier other than "
            f"{', '.join(map(repr, sorted(_OWN)))}"
        )
    TARGETS[target.name] = target
