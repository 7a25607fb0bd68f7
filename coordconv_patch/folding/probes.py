"""Where coordinates go in a folding, learned from runs on copies with chosen weights.

Coordinates are further input channels of the convolution, and folding does the
same to the weights of every input channel. So the code is run on copies of the plain model in
which each convolution's coordinate weights stand where the weights of its first input channel
were:

    coord_weight_folded[:, k] = fold(W[:, 0] = coord_weight[:, k])[:, 0] - fold(W[:, 0] = 0)[:, 0]

The difference removes what does not come from the weights, such as the identity branch of a
RepVGG block. This holds for every folding that is affine in the weights and treats input
channels alike; others (a batch norm *before* the convolution, say) are refused.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import PatchError
from coordconv_patch.folding.float64 import NewTensorsInFloat64, default_float64
from coordconv_patch.layers.conversion import check_convertible
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import Padding
from coordconv_patch.running.silence import output_silenced

__all__ = ["Carrier", "Probes"]


@dataclass(frozen=True)
class Carrier:
    """A convolution of the folded model that has to carry coordinates."""

    coords: Coordinates
    padding: Padding
    coord_weight: Tensor


class Probes:
    """Runs of a folding function on plain copies with chosen weights.

    ``plain`` is a copy of the model without its coordinate layers, which becomes one in float64 on
    the CPU.
    """

    def __init__(
        self, layers: Mapping[str, CoordLayer], plain: nn.Module, function: Callable[[Any], Any]
    ) -> None:
        self.function = function
        self.coords = {name: layer.coords for name, layer in layers.items()}
        self.coord_weights = {
            name: layer.coord_weight.detach().cpu().double() for name, layer in layers.items()
        }
        self.plain = plain.cpu().double()

    def run(self, channels: dict[str, Tensor], *, last: bool = False) -> tuple[nn.Module, bool]:
        """The folded model if one input channel of the convolutions had these weights.

        Args:
            channels: By site, of shape ``(C_out, *kernel_size)``; zero where not named, as
                are the weights of all other input channels.
            last: Take the last input channel of each group, not the first.

        Returns:
            The folded model, and whether it is another object than the one that was folded.
        """
        with NewTensorsInFloat64():
            folded, is_pure = self._run(channels, last)
        if any(tensor.dtype is not torch.float64 for _, tensor in _tensors(folded)):
            # Made by torch.Tensor(...), perhaps, which no mode sees.
            with default_float64():
                folded, is_pure = self._run(channels, last)
        return folded, is_pure

    @torch.no_grad()
    def _run(self, channels: dict[str, Tensor], last: bool) -> tuple[nn.Module, bool]:
        probe = copy.deepcopy(self.plain)
        for name in self.coords:
            conv = probe.get_submodule(name)
            assert isinstance(conv, _ConvNd)
            conv.weight.zero_()
            if name in channels:
                place = _input_channel(conv, conv.weight, last=last)
                place.copy_(channels[name].reshape(place.shape))
        with output_silenced(logging.CRITICAL):  # it is to say it once, when it folds the model
            returned = self.function(probe)
        folded = returned if isinstance(returned, nn.Module) else probe
        return folded, folded is not probe

    def carriers(self) -> tuple[dict[str, Carrier], bool]:
        """The convolutions of the folded model that carry coordinates, by name.

        Also whether the function returns a new module.
        """
        zero, is_pure = self.run({})
        carriers: dict[str, Carrier] = {}
        for coords in dict.fromkeys(self.coords.values()):
            for name, padding in self._reached(coords, zero).items():
                if name in carriers:
                    raise PatchError(
                        f"folding would merge convolutions with different coordinates ({coords} "
                        f"and {carriers[name].coords}) into {name or 'one'}: patch them alike"
                    )
                carriers[name] = Carrier(coords, padding, torch.empty(0))
            for name, weight in self._coord_weights(coords, zero).items():
                if name in carriers and carriers[name].coords == coords:
                    carriers[name] = replace(carriers[name], coord_weight=weight)
        return carriers, is_pure

    def _reached(self, coords: Coordinates, zero: nn.Module) -> dict[str, Padding]:
        """Where the coordinates of a convention go; checks that folding is affine."""
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: torch.randn(_input_channel(conv, conv.weight).shape, generator=generator)
            for name, conv in self._convs(coords).items()
        }
        once, _ = self.run(noise)
        # Twice the weights, in another input channel: both must make no difference.
        twice, _ = self.run({name: values * 2 for name, values in noise.items()}, last=True)
        reached: dict[str, Padding] = {}
        before, after, doubled = (dict(_tensors(folded)) for folded in (zero, once, twice))
        for name, tensor in before.items():
            change = after[name] - tensor
            if change.any():
                owner, _, own_name = name.rpartition(".")
                conv = zero.get_submodule(owner)
                if not isinstance(conv, _ConvNd) or own_name != "weight":
                    raise PatchError(
                        f"folding makes {name} depend on a convolution's weight, which "
                        f"coordinates cannot follow{_INSTEAD}"
                    )
                _check_followed(name, conv, change, doubled[name] - tensor)
                _check_not_for_quantization(zero, owner)
                reached[owner] = check_convertible(conv)
        return reached

    def _coord_weights(self, coords: Coordinates, zero: nn.Module) -> dict[str, Tensor]:
        """The folded coordinate weight of every convolution of the folded model."""
        channels: dict[str, list[Tensor]] = {}
        transposed: dict[str, bool] = {}
        convs = self._convs(coords)
        for k in range(max(coords.num_channels(len(conv.kernel_size)) for conv in convs.values())):
            values = {}
            for name, conv in convs.items():
                if k < coords.num_channels(len(conv.kernel_size)):  # a Conv1d has fewer
                    dim = 0 if conv.transposed else 1
                    values[name] = self.coord_weights[name].select(dim, k)
            folded, _ = self.run(values)
            for name, conv in folded.named_modules():
                if isinstance(conv, _ConvNd) and k < coords.num_channels(len(conv.kernel_size)):
                    before = zero.get_parameter(f"{name}.weight".lstrip("."))
                    change = _input_channel(conv, conv.weight.detach() - before.detach())
                    channel = change.reshape(conv.out_channels, *conv.kernel_size)
                    channels.setdefault(name, []).append(channel)
                    transposed[name] = conv.transposed
        return {
            name: torch.stack(parts, 0 if transposed[name] else 1)
            for name, parts in channels.items()
        }

    def _convs(self, coords: Coordinates) -> dict[str, _ConvNd]:
        """The plain model's convolutions whose coordinates have a convention."""
        convs: dict[str, _ConvNd] = {}
        for name, of in self.coords.items():
            conv = self.plain.get_submodule(name)
            assert isinstance(conv, _ConvNd)
            if of == coords:
                convs[name] = conv
        return convs


_INSTEAD = ": export with export_onnx(...), which needs no folding"


def _check_followed(name: str, conv: _ConvNd, change: Tensor, doubled_in_last: Tensor) -> None:
    """Check that a folded weight follows the unfolded ones as coordinates can.

    ``change`` is how it changes with noise in the first input channels, ``doubled_in_last`` with
    twice that noise in the last ones.
    """
    in_first = _input_channel(conv, change)
    in_last = _input_channel(conv, doubled_in_last, last=True)
    if not torch.allclose(in_last, 2 * in_first, rtol=1e-9, atol=1e-12):
        raise PatchError(
            f"folding is not linear in the weights that end up in {name}, or does not treat all "
            "input channels alike (a batch norm before the convolution, perhaps), so coordinates "
            f"cannot follow it{_INSTEAD}"
        )
    if change.count_nonzero() != in_first.count_nonzero():
        raise PatchError(
            f"folding mixes the input channels of {name}, so coordinates cannot follow it{_INSTEAD}"
        )


def _check_not_for_quantization(folded: nn.Module, name: str) -> None:
    """Check that a convolution is not inside a module that torch.ao will replace as a whole."""
    parent = type(folded.get_submodule(name.rpartition(".")[0]))
    if name and parent.__module__.startswith("torch.ao."):
        raise PatchError(
            f"folding makes a {parent.__name__} of {name}, whose quantization knows nothing of "
            "coordinates: fold(model), then quantize its torch.export program (PyTorch 2 export)"
        )


def _input_channel(conv: _ConvNd, weight: Tensor, *, last: bool = False) -> Tensor:
    """A view of the weights with which each output channel sees one input channel of its group.

    That is the first one, or the last. Shape ``(C_out, *kernel_size)``, for transposed convolutions
    ``(groups, C_out / groups, *kernel_size)``.
    """
    per_group = conv.in_channels // conv.groups
    index = per_group - 1 if last else 0
    return weight[index::per_group] if conv.transposed else weight[:, index]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor.detach()
