"""Batch norms in evaluation: the affine map that each one is, and what its class does after it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coordconv_patch.errors import PatchError

__all__ = ["NormAffine", "is_batch_norm", "norm_affine"]


@dataclass(frozen=True)
class NormAffine:
    """A batch norm in evaluation: ``rest(x * scale + shift)``.

    Attributes:
        scale: Shape ``(C,)``, float64; ``weight / sqrt(running_var + eps)``.
        shift: Shape ``(C,)``, float64; ``bias - running_mean * scale``.
        rest: What the module computes after it: timm's drop and activation, else nothing.
    """

    scale: Tensor
    shift: Tensor
    rest: nn.Module


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, frozen ones and ones with an activation included."""
    frozen = "FrozenBatchNorm" in type(module).__name__
    return isinstance(module, _BatchNorm) or (frozen and hasattr(module, "running_var"))


@torch.no_grad()
def norm_affine(module: nn.Module) -> NormAffine:
    """What a batch norm computes in evaluation.

    A PatchError if it uses the batch's statistics, or computes something else.
    """
    if module.training and isinstance(module, _BatchNorm):
        raise PatchError("the batch norm is in training mode: call model.eval() first")
    mean, variance = module.running_mean, module.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise PatchError("the batch norm keeps no statistics, so it uses those of each batch")
    ones = torch.ones_like(variance, dtype=torch.float64)
    weight, bias = module.weight, module.bias
    gamma = weight.double() if isinstance(weight, Tensor) else ones
    beta = bias.double() if isinstance(bias, Tensor) else 0 * ones
    eps = getattr(module, "eps", 1e-5)  # transformers' frozen ones write 1e-5 into their forward
    scale = gamma / (variance.double() + eps).sqrt()
    steps = [getattr(module, name, None) for name in ("drop", "act")]
    kept = [s for s in steps if isinstance(s, nn.Module) and not isinstance(s, nn.Identity)]
    rest = nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)
    affine = NormAffine(scale, beta - mean.double() * scale, rest)
    _check(module, affine)
    return affine


def _check(module: nn.Module, affine: NormAffine) -> None:
    """Compare with the module itself, in float64: a subclass may compute anything."""
    norm, rest = copy.deepcopy(module).double(), copy.deepcopy(affine.rest).double()
    ndim = {"1d": 1, "3d": 3}.get(type(module).__name__[-2:], 2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, affine.scale.numel(), *[2] * ndim, generator=generator)
    sample = noise.to(affine.scale)
    shape = (-1, *[1] * ndim)
    expected = rest(sample * affine.scale.view(shape) + affine.shift.view(shape))
    if not torch.allclose(norm(sample), expected, rtol=1e-6, atol=1e-9):
        raise PatchError(
            f"{type(module).__name__} computes something else than a batch norm and what follows it"
        )
