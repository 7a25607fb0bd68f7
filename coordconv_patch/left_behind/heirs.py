"""Whether another tensor has inherited a convolution's weight.

A convolution that disappears from a model may live on in another one: replaced by one of
another class, with the same weight; with a batch norm folded in, each output channel scaled;
summed with the branches beside it, smaller kernels padded, an identity included. In all of
these each output channel of the heir is a linear combination of the same channel of the
convolutions that are gone,

    heir[c] = sum over b of factor[b, c] * pad(weight_b[c])  (+ factor * identity[c])

with as many unknowns as branches, and as many equations as the channel has weights. So it is
not a matter of opinion: other weights leave a residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordconv_patch.layers.geometry import flat_amounts
from coordconv_patch.layers.weight_marks import rows_of, sample_of

__all__ = [
    "Kernel",
    "absorption",
    "holds_part_of",
    "inheritance",
    "is_published_form",
    "values_like",
]

_MAX_ROWS = 16
"""Output channels that are compared."""
_ROUNDING = 3e-2
"""Residual that rounding may leave, relative to the weights: half precision, or 8 bits."""
_COARSE_ROUNDING = 0.2
"""The same for 4 bits, where a single weight is looked for, and a channel has many numbers."""
_MOST = 0.9
"""Share of the compared channels that must agree."""


@dataclass(frozen=True)
class Kernel:
    """Weights of a convolution, by output channel.

    Attributes:
        rows: Shape ``(C_out, C_in / groups, *kernel_size)``.
        coords: The coordinate weight likewise, ``(C_out, K, *kernel_size)``; ``None`` if it
            has none.
        groups: Its groups.
    """

    rows: Tensor
    coords: Tensor | None
    groups: int

    @classmethod
    def of(
        cls, weight: Tensor, coord_weight: Tensor | None, *, transposed: bool, groups: int
    ) -> Kernel:
        """From weights in torch's layout."""
        coords = None
        if coord_weight is not None:
            coords = rows_of(coord_weight, transposed=transposed, groups=1)
        return cls(rows_of(weight, transposed=transposed, groups=groups), coords, groups)


def values_like(candidate: Tensor, weight: Tensor) -> Tensor | None:
    """A tensor's values in the layout of a convolution's weight, if it can hold such a weight.

    Args:
        candidate: Any tensor: a weight, a matrix of as many numbers, a quantized weight.
        weight: A convolution's weight.

    Returns:
        Its values, with a kernel size that may be larger or another number of channels;
        ``None`` if it cannot be compared.
    """
    if candidate.is_quantized or type(candidate) not in _PLAIN_TENSORS:
        dequantize = getattr(candidate, "dequantize", None)
        if dequantize is None or isinstance(candidate, torch._subclasses.FakeTensor):
            return None
        candidate = dequantize()
    if not candidate.is_floating_point() or candidate.is_meta or candidate.numel() < 2:
        return None
    if candidate.dim() != weight.dim():
        if candidate.numel() != weight.numel() or candidate.shape[:1] != weight.shape[:1]:
            return None
        candidate = candidate.reshape(weight.shape)
    return candidate.detach()


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def inheritance(heir: Kernel, gone: Sequence[Kernel], *, with_identity: bool) -> tuple[bool, bool]:
    """Whether one convolution's weight is made of that of others.

    Args:
        heir: What may be the heir.
        gone: The convolutions that are gone: first the one that is asked about, then those
            that may be summed with it.
        with_identity: Whether an identity may be summed with it too.

    Returns:
        Whether the first one's weight is part of the heir's; and whether its coordinate
        weight is inherited in the same way, and so nothing is lost.
    """
    fitting = [kernel for kernel in gone if _fits(kernel, heir)]
    if not fitting or fitting[0] is not gone[0]:
        return False, False
    target = _some(heir.rows)
    parts = [_padded(_some(kernel.rows), target).flatten(1) for kernel in fitting]
    step = -(-len(heir.rows) // _MAX_ROWS)
    identity = [each.flatten(1) for each in _identity(heir, step)] if with_identity else []
    wanted = target.flatten(1)
    if not _is_made_of([*parts, *identity], wanted):
        return False, False
    if heir.coords is None:
        return True, False
    coords = _some(heir.coords)
    added = [
        torch.zeros_like(coords) if each.coords is None else _padded(_some(each.coords), coords)
        for each in fitting
    ]
    if any(each.shape != coords.shape for each in added):
        return True, False
    added += [torch.zeros_like(coords) for _ in identity]
    carried = _are_made_alike(
        [*parts, *identity], wanted, [each.flatten(1) for each in added], coords.flatten(1)
    )
    return True, carried


def absorption(
    heir: Kernel,
    before: Tensor,
    coords_before: Tensor | None,
    gone: Kernel,
    *,
    with_identity: bool,
) -> tuple[bool, bool]:
    """Whether a convolution that stayed has taken up the weight of one that is gone.

    Args:
        heir: The convolution that stayed, as it is now.
        before: A sample of its weight as it was, see :func:`sample_of`.
        coords_before: A sample of its coordinate weight as it was, if it has one.
        gone: The convolution that is gone.
        with_identity: Whether an identity may be summed with them too.

    Returns:
        As :func:`inheritance`.
    """
    if not _fits(gone, heir):
        return False, False
    wanted = _in_double(sample_of(heir.rows))
    columns = [_in_double(sample_of(_padded(gone.rows, heir.rows))), _in_double(before)]
    columns += [_in_double(sample_of(each)) for each in _identity(heir, 1)] if with_identity else []
    if wanted.shape != before.shape or not _is_made_of(columns, wanted):
        return False, False
    if heir.coords is None or coords_before is None or gone.coords is None:
        return True, False
    coords = _in_double(sample_of(heir.coords))
    added = [_in_double(sample_of(_padded(gone.coords, heir.coords))), _in_double(coords_before)]
    added += [torch.zeros_like(coords) for _ in columns[2:]]
    if any(each.shape != coords.shape for each in added):
        return True, False
    return True, _are_made_alike(columns, wanted, added, coords)


def is_published_form(candidate: Tensor, gone: Kernel) -> bool:
    """Whether a weight is that of a concatenating CoordConv, scaled by output channel perhaps.

    Args:
        candidate: By output channel, shape ``(C_out, C_in + K, *kernel_size)``.
        gone: A coordinate convolution: its rows and its coordinates one after the other.
    """
    if gone.coords is None or gone.coords.shape[2:] != gone.rows.shape[2:]:
        return False
    wanted = _some(candidate)
    joined = [_some(torch.cat(pair, 1)) for pair in _both_orders(gone.rows, gone.coords)]
    return any(
        each.shape == wanted.shape and _is_made_of([each.flatten(1)], wanted.flatten(1))
        for each in joined
    )


def _both_orders(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    b = b.to(a)
    return [(a, b), (b, a)]


def holds_part_of(candidate: Tensor, rows: Tensor) -> bool:
    """Whether a tensor holds many channels of a weight, each scaled, in whatever order.

    The output channels, that is. Of the input channels it may hold the first ones, all in
    reverse order (BGR for RGB), or one that is the sum of all (a stem for grey images).

    Args:
        candidate: By output channel, shape ``(C_out', C_in', *kernel_size)``.
        rows: Shape ``(C_out, C_in, *kernel_size)``.
    """
    if candidate.shape[2:] != rows.shape[2:]:
        return False
    inputs = min(candidate.shape[1], rows.shape[1])
    forms = [rows[:, :inputs]]
    if candidate.shape[1] == rows.shape[1]:
        forms.append(rows.flip(1))
    elif candidate.shape[1] == 1:
        forms.append(rows.sum(1, keepdim=True))
    return any(_hold_alike(candidate[:, :inputs], form) for form in forms)


def _hold_alike(candidate: Tensor, rows: Tensor) -> bool:
    """Whether many channels are multiples of channels of a weight with as many inputs."""
    ours, theirs = _some(candidate, 64).flatten(1), _in_double(rows).flatten(1)
    if ours.shape[1] < 4 or min(len(ours), len(theirs)) < 2:
        return False
    cosines = F.normalize(ours) @ F.normalize(theirs).T
    alive = ours.count_nonzero(dim=1) > 0
    alike = (cosines.abs().amax(1) > 1 - 1e-6) & alive
    share = min(len(theirs), len(candidate)) / len(candidate)
    return bool(alike.sum() >= max(2.0, 0.5 * share * len(ours)))


def _some(rows: Tensor, most: int = _MAX_ROWS) -> Tensor:
    return _in_double(rows[:: -(-rows.shape[0] // most)])


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _fits(kernel: Kernel, heir: Kernel) -> bool:
    """Whether a kernel can be part of another: as many channels, and not larger."""
    if kernel.rows.shape[:2] != heir.rows.shape[:2]:
        return False
    lengths = zip(kernel.rows.shape[2:], heir.rows.shape[2:], strict=True)
    return all(small <= large and (large - small) % 2 == 0 for small, large in lengths)


def _padded(rows: Tensor, target: Tensor) -> Tensor:
    """Zeros around a kernel, so that it has the size of another."""
    margins = [
        ((large - small) // 2,) * 2
        for small, large in zip(rows.shape[2:], target.shape[2:], strict=True)
    ]
    return F.pad(rows, flat_amounts(margins))


def _identity(heir: Kernel, step: int) -> list[Tensor]:
    """Each ``step``-th row of the kernel that passes each channel through.

    Empty unless there are as many inputs as outputs.
    """
    outputs, inputs = heir.rows.shape[:2]
    if outputs != inputs * heir.groups:
        return []
    channels = torch.arange(0, outputs, step)
    kernel = torch.zeros(len(channels), *heir.rows.shape[1:], dtype=torch.float64)
    centre = [torch.tensor(length // 2) for length in heir.rows.shape[2:]]
    kernel[(torch.arange(len(channels)), channels % inputs, *centre)] = 1
    return [kernel]


def _is_made_of(columns: Sequence[Tensor], wanted: Tensor) -> bool:
    """Whether most rows are linear combinations of columns, in which the first one matters.

    Args:
        columns: Each of shape ``(rows, n)``.
        wanted: Shape ``(rows, n)``.
    """
    if len(columns) == 1 and torch.equal(columns[0], wanted):
        return bool(wanted.min() < wanted.max())  # a constant is nobody's
    if wanted.shape[1] < len(columns) + 2:
        return False  # as many unknowns as equations explain anything
    is_coarse = len(columns) == 1 and wanted.shape[1] >= 16
    residual, factors = _combination(columns, wanted)
    alive = wanted.count_nonzero(dim=1) > 0
    allowed = _COARSE_ROUNDING if is_coarse else _ROUNDING
    if not alive.any() or (residual[alive] <= allowed).double().mean() < _MOST:
        return False
    share = factors[:, 0].abs() * columns[0].norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-300)
    least = max(1e-3, 3 * float(residual[alive].median()))
    return bool((share[alive] > least).double().mean() > 0.5)


def _are_made_alike(
    columns: Sequence[Tensor],
    wanted: Tensor,
    coord_columns: Sequence[Tensor],
    wanted_coords: Tensor,
) -> bool:
    """Whether the same factors that make weights make coordinate weights.

    All are solved for together: columns may be multiples of each other (a depthwise 1x1 kernel
    and an identity), and their factors ambiguous without the coordinates.

    Args:
        columns: See :func:`_is_made_of`.
        wanted: The same.
        coord_columns: Coordinate weights of the columns, each of shape ``(rows, m)``.
        wanted_coords: Shape ``(rows, m)``.
    """
    sizes = [float(each.norm()) for each in (columns[0], coord_columns[0])]
    scale = sizes[0] / sizes[1] if all(sizes) else 1.0
    joint = [torch.cat((w, scale * c), 1) for w, c in zip(columns, coord_columns, strict=True)]
    residual, _ = _combination(joint, torch.cat((wanted, scale * wanted_coords), 1))
    return float((residual <= _ROUNDING).double().mean()) >= _MOST


def _combination(columns: Sequence[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The best linear combination in each row.

    Args:
        columns: Each of shape ``(rows, n)``.
        wanted: Shape ``(rows, n)``.

    Returns:
        What it leaves, relative, of shape ``(rows,)``; factors of shape ``(rows, columns)``.
    """
    matrix = torch.stack(list(columns), 2)
    sizes = matrix.norm(dim=1, keepdim=True).clamp_min(1e-300)
    solution = torch.linalg.lstsq(matrix / sizes, wanted.unsqueeze(2), driver="gelsd").solution
    rest = ((matrix / sizes) @ solution).squeeze(2) - wanted
    residual = rest.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-300)
    return residual, (solution / sizes.transpose(1, 2)).squeeze(2)
