"""Random coordinate convolutions of every kind, and inputs for them, for property tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import reference
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from coordconv_patch import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
    Coordinates,
)

CLASSES: dict[tuple[int, bool], tuple[type[Any], type[Any]]] = {
    (1, False): (nn.Conv1d, CoordConv1d),
    (2, False): (nn.Conv2d, CoordConv2d),
    (3, False): (nn.Conv3d, CoordConv3d),
    (1, True): (nn.ConvTranspose1d, CoordConvTranspose1d),
    (2, True): (nn.ConvTranspose2d, CoordConvTranspose2d),
    (3, True): (nn.ConvTranspose3d, CoordConvTranspose3d),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One random convolution and one random input."""

    ndim: int
    transposed: bool
    arguments: dict[str, Any]
    coords: dict[str, Any]
    input_shape: tuple[int, ...]
    output_size: tuple[int, ...] | None = None

    def plain(self, **factory: Any) -> Any:
        torch.manual_seed(1)
        return CLASSES[self.ndim, self.transposed][0](**self.arguments, **factory)

    def coord(self, **factory: Any) -> Any:
        torch.manual_seed(1)
        coords = Coordinates(**self.coords)
        return CLASSES[self.ndim, self.transposed][1](**self.arguments, coords=coords, **factory)

    def call(self, layer: Any, x: Tensor) -> Tensor:
        return layer(x) if self.output_size is None else layer(x, list(self.output_size))

    def expected(self, layer: Any, x: Tensor, grid: Tensor | None = None) -> Tensor:
        """By concatenation, of a grid ``(K, *size)`` or the whole picture's."""
        arguments = self.arguments
        if grid is None:
            grid = reference.paper_grid(x.shape[-self.ndim :], **self.coords)
        output_padding = arguments.get("output_padding", ())
        if self.output_size is not None:
            output_padding = tuple(
                wanted - smallest
                for wanted, smallest in zip(self.output_size, self.smallest_output(), strict=True)
            )
        return reference.concatenating_conv(
            x,
            grid,
            layer.weight,
            layer.coord_weight,
            layer.bias,
            stride=arguments["stride"],
            padding=arguments["padding"],
            dilation=arguments["dilation"],
            groups=arguments["groups"],
            padding_mode=arguments.get("padding_mode", "zeros"),
            transposed=self.transposed,
            output_padding=output_padding,
        )

    def smallest_output(self) -> tuple[int, ...]:
        """Output size of a transposed convolution without output padding."""
        return tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                self.input_shape[-self.ndim :],
                *(self.arguments[name] for name in ("stride", "padding", "dilation")),
                self.arguments["kernel_size"],
                strict=True,
            )
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ndim = draw(st.sampled_from([1, 2, 2, 2, 3]))
    transposed = draw(st.sampled_from([False, False, True]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    largest = 3 if ndim == 3 else 4
    kernel, stride, dilation = each(1, largest), each(1, 3), each(1, 2)
    groups = draw(st.integers(1, 3))
    arguments: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    size = each(1, 5)
    padding: str | tuple[int, ...] = each(0, 2)
    mode = "zeros"
    output_size = None
    if not transposed:
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from([padding, padding, "same", "valid"]))
        if padding == "same":
            stride = (1,) * ndim
        elif padding == "valid":
            size = tuple(n + d * (k - 1) for n, d, k in zip(size, dilation, kernel, strict=True))
        else:
            reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            size = tuple(max(n, r - 2 * p) for n, r, p in zip(size, reach, padding, strict=True))
        if mode != "zeros" and padding != "valid":
            # torch reflects at most n - 1 pixels and wraps at most n.
            widest = (
                tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
                if padding == "same"
                else padding
            )
            size = tuple(max(n, w + 1) for n, w in zip(size, widest, strict=True))
        arguments["padding_mode"] = mode
    else:
        arguments["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    arguments |= {"stride": stride, "padding": padding}
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    radius = draw(st.booleans())
    coords = {
        "order": draw(st.sampled_from(["xy", "yx"])),
        "align_corners": draw(st.booleans()),
        "radius": radius,
        "fourier": draw(st.sampled_from([0, 0, 1])),
    }
    case = Case(ndim, transposed, arguments, coords, (*batch, arguments["in_channels"], *size))
    if transposed:
        assume(
            all(
                smallest + extra > 0
                for smallest, extra in zip(
                    case.smallest_output(), arguments["output_padding"], strict=True
                )
            )
        )
        if draw(st.booleans()):
            output_size = tuple(
                smallest + draw(st.integers(0, s - 1))
                for smallest, s in zip(case.smallest_output(), stride, strict=True)
            )
            assume(all(length > 0 for length in output_size))
            case = dataclasses.replace(case, output_size=output_size)
    return case
