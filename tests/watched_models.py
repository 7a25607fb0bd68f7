"""Small patched models, with coordinates as after a training, and what a use of them tells."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))


class ConvBN(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv: Any = nn.Conv2d(
            inputs, outputs, kernel, padding=padding, groups=groups, bias=False
        )
        self.bn: Any = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def folded_weight(self) -> tuple[Tensor, Tensor]:
        bn = self.bn
        return fuse_conv_bn_weights(
            self.conv.weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )


class Net(nn.Module):
    """Its sites: stem.conv, body.0.conv (depthwise if asked for), body.2.conv and head."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem: Any = ConvBN(3, 8, 3)
        self.body: Any = nn.Sequential(ConvBN(8, 8, 3, groups), nn.ReLU(), ConvBN(8, 8, 1))
        self.head: Any = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def trained(model: nn.Module, where: Any = "all") -> Any:
    """A patched model in evaluation mode, with values as after training, which has run once."""
    generator = torch.Generator().manual_seed(2)
    patched = ccp.patch(model.eval(), where)
    with torch.no_grad():
        for module in patched.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
        for weight in ccp.coord_parameters(patched):
            weight.normal_(generator=generator)
    return patched


def fold_in_place(model: nn.Module) -> None:
    """The same, through .data of the convolutions that are there."""
    for block in model.modules():
        if isinstance(block, ConvBN):
            weight, bias = block.folded_weight()
            block.conv.weight.data.copy_(weight)
            block.conv.bias = nn.Parameter(bias)
            block.bn = nn.Identity()


def told(run: Callable[[], object]) -> tuple[str, list[str]]:
    """The package's error, and the warnings, that running something gives."""
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except PatchError as raised:
            error = str(raised)
    return error, [str(w.message) for w in caught if "oordinate" in str(w.message)]
