"""The coordinate maps of a model: what each site's coordinates add to its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from coordconv_patch.contributions.taps import Taps
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.running.inputs import run_model
from coordconv_patch.running.untouched import copied, evaluation
from coordconv_patch.running.wrappers import unwrapped

__all__ = ["coordinate_maps"]


def coordinate_maps(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """What the coordinates add to the output of each site that the model calls.

    The model is not changed; a copy is run, in evaluation mode.

    Args:
        model: A patched model.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is keyword
            arguments).

    Returns:
        Maps of shape ``(C_out, *output_size)`` on the CPU, in float32, by site name, in order of
        execution. Of a site that is called several times the largest one, and where samples have
        places of their own (:func:`coordconv_patch.places`) the first sample's.

    Raises:
        PatchError: If the model is not patched, cannot be copied, or fails on the inputs.
    """
    model = unwrapped(model)
    layers = require_coord_layers(model)
    twin = copied(model, advice="a copy of the model is looked at")
    maps: dict[str, Tensor] = {}

    def keep(site: str, output: Tensor, branch: Tensor) -> None:
        batched = branch.dim() == layers[site].coord_geometry.ndim + 2
        own = branch[0] if batched else branch
        if site not in maps or own.numel() > maps[site].numel():
            maps[site] = own.detach().float().cpu().clone()

    taps = Taps(twin)
    with evaluation(twin), taps.open(seen=keep):
        run_model(twin, example_inputs)
    return maps
