"""Patch a model: plan, carry the plan out, and compare the outputs.

A module site is rewritten by giving the convolution module its coordinate class
in place, in the module tree that every graph refers to; the model keeps its
class, methods, hooks, aliases, flags and state_dict names. So does a module that calls a
convolution function itself: see :mod:`coordconv_patch.owners.call_owners`. Only in a GraphModule,
which has no other code, is the graph rewritten: conv(x, W) becomes conv(x, W) + branch(x).
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, overload

from torch import fx, nn
from torch.export import ExportedProgram

from coordconv_patch.arguments import check_flag
from coordconv_patch.errors import PatchError, listing
from coordconv_patch.graphs.programs import from_exported
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.apply import apply_plan_
from coordconv_patch.patching.plan import Plan, plan
from coordconv_patch.patching.plan_warnings import (
    warn_of_obstacles,
    warn_of_regions_of_interest,
    warn_of_unreached,
    warn_of_unread,
)
from coordconv_patch.patching.same_outputs import Promise
from coordconv_patch.running.rollback import unchanged_on_failure
from coordconv_patch.running.untouched import LOOK, Model, copied
from coordconv_patch.sites.select import Where

__all__ = ["patch", "patch_"]

_LOG = logging.getLogger(__name__)


@overload
def patch(
    model: Model,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    check: bool = True,
) -> Model: ...


@overload
def patch(
    model: ExportedProgram,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    check: bool = True,
) -> fx.GraphModule: ...


def patch(
    model: nn.Module | ExportedProgram,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    check: bool = True,
) -> nn.Module:
    """A copy of the model whose chosen convolutions also see coordinates.

    The coordinate weights start at zero, so the copy's outputs equal the
    model's to the last bit, in training and in evaluation mode. The model itself
    is not changed.

    Args:
        model: Any module (the copy has its class), a GraphModule, or a torch.export
            ExportedProgram (gives a GraphModule, see :func:`coordconv_patch.from_exported`).
        where: Which convolutions: ``"first"``, ``"all"``, a name, a glob, ``"re:..."``,
            a type, a callable on a :class:`Site`, ``"stem"``, ``"neck"``, ``"head"``,
            chosen calls of a shared one (``"head.conv@0,3"``), or a list of these.
        coords: The convention of the coordinate channels, or the name of a preset;
            ``None``: the paper's.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). Needed for ``"first"`` on models that torch.fx cannot
            trace, or in whose trace another convolution may be missing that runs before, and for
            convolution functions whose weight the code computes.
        check: With example inputs, compare the outputs of the copy with the model's bit for
            bit, in evaluation and in training mode: two forward passes of each. A mode in which
            the model itself fails on them is left out.

    Returns:
        The patched copy.

    Warns:
        UserWarning: Of convolutions that a selector describes and that cannot be patched; of
            chosen ones that the example inputs do not reach, or in one mode only; and of those
            chosen otherwise than by name that see regions of interest, whose coordinates are
            those of a box and not of the picture. Without example inputs, of weights that a trace
            never reads beside those of chosen functional convolutions; with them, of outputs
            that cannot be compared.

    Raises:
        SelectionError: If a selector matches nothing that can be patched.
        PatchError: If the model cannot be copied, or a chosen site cannot be patched, or if
            the copy's outputs differ.
    """
    check_flag("check", check)
    module = from_exported(model) if isinstance(model, ExportedProgram) else model
    with LOOK:
        decided = plan(module, where, coords=coords, example_inputs=example_inputs)
        warn_of_obstacles(decided)
        warn_of_unread(decided)
        warn_of_regions_of_interest(decided, module)
        target = module if module is not model else copied(module)
        return _patch_and_check_(module, target, decided, example_inputs if check else None)


def patch_(
    model: Model,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    check: bool = True,
) -> Model:
    """Patch a model in place; see :func:`patch` for the arguments and errors.

    An optimizer that was built before does not know the coordinate weights; see
    :func:`coordconv_patch.add_to_optimizer_`.

    Returns:
        The model itself.

    Raises:
        PatchError: As :func:`patch`; also for an ExportedProgram, which needs :func:`patch`.
    """
    if isinstance(model, ExportedProgram):
        raise PatchError("an ExportedProgram cannot be patched in place: use patch(...)")
    check_flag("check", check)
    with LOOK:
        decided = plan(model, where, coords=coords, example_inputs=example_inputs)
        warn_of_obstacles(decided)
        warn_of_unread(decided)
        warn_of_regions_of_interest(decided, model)
        return _patch_and_check_(model, model, decided, example_inputs if check else None)


def _patch_and_check_(model: nn.Module, target: Model, decided: Plan, example_inputs: Any) -> Model:
    """Carry a plan out on a model or its copy; with example inputs, if outputs stay the same."""
    promise = None if example_inputs is None else Promise(model, target, example_inputs)
    # Nothing stays half-changed, whatever ends this: an interrupt in the comparison, a warning
    # that is an error.
    with unchanged_on_failure(target) as before:
        apply_plan_(target, decided)
        _LOG.debug("patched %s", listing(site.name for site in decided.chosen))
        broken = None if promise is None else promise.broken()
        if promise is not None and broken is not None:
            before.restore()
            doubt = promise.explain(broken)
            if doubt:
                warnings.warn(doubt, stacklevel=3)
            apply_plan_(target, decided)
        if promise is not None and (unseen := promise.uncompared()):
            warnings.warn(unseen, stacklevel=3)
        warn_of_unreached(decided, promise)
    return target
