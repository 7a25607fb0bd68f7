"""Published concatenating CoordConvs, written anew from what they compute: each in its own style.

Nothing here imports the package. What differs between them: who concatenates (a module, a
convolution's own subclass, the model's forward), how coordinates are computed (loops of ones and
matrix products, ranges, buffers), their order, their range, and r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# --- mkocabas/CoordConv-pytorch: AddCoords and a convolution; rows first; r from 0.5 ------------


class MkocabasAddCoords(nn.Module):
    def __init__(self, with_r: bool = False) -> None:
        super().__init__()
        self.with_r = with_r

    def forward(self, image: Tensor) -> Tensor:
        batch, _, x_dim, y_dim = image.size()
        xx = torch.arange(x_dim).repeat(1, y_dim, 1).transpose(1, 2).float() / (x_dim - 1)
        yy = torch.arange(y_dim).repeat(1, x_dim, 1).float() / (y_dim - 1)
        xx, yy = xx * 2 - 1, yy * 2 - 1
        xx = xx.repeat(batch, 1, 1, 1)
        yy = yy.repeat(batch, 1, 1, 1)
        joined = torch.cat([image, xx.type_as(image), yy.type_as(image)], dim=1)
        if self.with_r:
            rr = torch.sqrt((xx.type_as(image) - 0.5) ** 2 + (yy.type_as(image) - 0.5) ** 2)
            joined = torch.cat([joined, rr], dim=1)
        return joined


class MkocabasCoordConv(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, with_r: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        self.addcoords = MkocabasAddCoords(with_r=with_r)
        size = in_channels + 2 + int(with_r)
        self.conv = nn.Conv2d(size, out_channels, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.addcoords(x))


# --- walsvid/CoordConv: the layer derives from a convolution, and holds the one that it calls ---


class WalsvidAddCoords(nn.Module):
    def __init__(self, rank: int, with_r: bool = False) -> None:
        super().__init__()
        self.rank = rank
        self.with_r = with_r

    def forward(self, image: Tensor) -> Tensor:
        if self.rank == 1:
            batch, _, length = image.shape
            xx = torch.arange(length, dtype=torch.float32)[None, None] / (length - 1) * 2 - 1
            return torch.cat([image, xx.repeat(batch, 1, 1)], dim=1)
        batch, _, rows, columns = image.shape
        ones_row = torch.ones([1, 1, 1, columns], dtype=torch.int32)
        ones_column = torch.ones([1, 1, 1, rows], dtype=torch.int32)
        down = torch.arange(rows, dtype=torch.int32)[None, None, :, None]
        across = torch.arange(columns, dtype=torch.int32)[None, None, :, None]
        xx = torch.matmul(down, ones_row)
        yy = torch.matmul(across, ones_column).permute(0, 1, 3, 2)
        xx = (xx.float() / (rows - 1) * 2 - 1).repeat(batch, 1, 1, 1)
        yy = (yy.float() / (columns - 1) * 2 - 1).repeat(batch, 1, 1, 1)
        joined = torch.cat([image, xx, yy], dim=1)
        if self.with_r:
            rr = torch.sqrt(torch.pow(xx - 0.5, 2) + torch.pow(yy - 0.5, 2))
            joined = torch.cat([joined, rr], dim=1)
        return joined


class WalsvidCoordConv1d(nn.Conv1d):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self.addcoords = WalsvidAddCoords(1)
        self.conv = nn.Conv1d(in_channels + 1, out_channels, kernel_size, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.addcoords(x))


class WalsvidCoordConv2d(nn.Conv2d):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, with_r: bool = False, **kw: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kw)
        self.addcoords = WalsvidAddCoords(2, with_r)
        self.conv = nn.Conv2d(in_channels + 2 + int(with_r), out_channels, kernel_size, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.addcoords(x))


# --- pytorch-toolbelt: coordinates from a function, before the image's channels or behind -------


def toolbelt_append_coords(image: Tensor, with_r: bool, first: bool) -> Tensor:
    rows = torch.linspace(-1, +1, steps=image.size(2), dtype=image.dtype, device=image.device)
    columns = torch.linspace(-1, +1, steps=image.size(3), dtype=image.dtype, device=image.device)
    yy, xx = torch.meshgrid(rows, columns, indexing="ij")
    batch = image.size(0)
    xx = xx.unsqueeze(0).unsqueeze(0).expand(batch, -1, -1, -1)
    yy = yy.unsqueeze(0).unsqueeze(0).expand(batch, -1, -1, -1)
    parts = [xx, yy]
    if with_r:
        parts.append(torch.sqrt(xx * xx + yy * yy))
    return torch.cat([*parts, image] if first else [image, *parts], dim=1)


class ToolbeltAddCoords(nn.Module):
    def __init__(self, with_r: bool = False, first: bool = False) -> None:
        super().__init__()
        self.with_r = with_r
        self.first = first

    def forward(self, image: Tensor) -> Tensor:
        return toolbelt_append_coords(image, self.with_r, self.first)


class ToolbeltCoordConv(nn.Module):
    """Concatenates in its own forward, by a function, and stores no module for it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        with_r: bool = False,
        first: bool = False,
        **kw: Any,
    ) -> None:
        super().__init__()
        self.with_r, self.first = with_r, first
        self.conv = nn.Conv2d(in_channels + 2 + int(with_r), out_channels, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(toolbelt_append_coords(x, self.with_r, self.first))


# --- PaddleDetection's PP-YOLO, as ports to torch have it --------------------------------------


class PaddleCoordConv(nn.Module):
    """A convolution, batch norm and activation behind the coordinates, as in ConvBNLayer."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int) -> None:
        super().__init__()
        self.conv = PaddleConvBn(in_channels + 2, out_channels, kernel_size, padding)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        across = torch.arange(width, dtype=x.dtype) / (width - 1.0) * 2.0 - 1.0
        down = torch.arange(height, dtype=x.dtype) / (height - 1.0) * 2.0 - 1.0
        gx = across.view(1, 1, 1, width).expand(batch, 1, height, width)
        gy = down.view(1, 1, height, 1).expand(batch, 1, height, width)
        return self.conv(torch.cat([x, gx, gy], 1))


class PaddleConvBn(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.batch_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.batch_norm(self.conv(x)), 0.1)


# --- SOLO: coordinates made in the head's forward, for each level of a pyramid ------------------


class SoloHead(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.ins_convs = nn.ModuleList(
            [
                nn.Conv2d(channels + 2, channels, 3, padding=1),
                nn.Conv2d(channels, channels, 3, padding=1),
            ]
        )
        self.cate_convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1)])
        self.solo_ins = nn.Conv2d(channels, 4, 1)
        self.solo_cate = nn.Conv2d(channels, classes, 3, padding=1)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        both = [self.forward_single(each) for each in features]
        return [ins for ins, _ in both], [cate for _, cate in both]

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ins, cate = x, x
        across = torch.linspace(-1, 1, ins.shape[-1], device=ins.device)
        down = torch.linspace(-1, 1, ins.shape[-2], device=ins.device)
        y, x = torch.meshgrid(down, across, indexing="ij")
        y = y.expand([ins.shape[0], 1, -1, -1])
        x = x.expand([ins.shape[0], 1, -1, -1])
        coord = torch.cat([x, y], 1)
        ins = torch.cat([ins, coord], 1)
        for conv in self.ins_convs:
            ins = conv(ins).relu()
        for conv in self.cate_convs:
            cate = conv(cate).relu()
        return self.solo_ins(ins).sigmoid(), self.solo_cate(cate)


class Solo(nn.Module):
    """A small backbone with two levels, and the head that is shared by them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = SoloHead(8, 5)

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        fine = self.stem(image)
        return self.head([fine, self.down(fine)])


# --- AdaptiveWingLoss: sizes fixed at construction, x along H, a tuple as output ---------------


class WingAddCoords(nn.Module):
    def __init__(
        self, x_dim: int, y_dim: int, with_r: bool = False, with_boundary: bool = False
    ) -> None:
        super().__init__()
        self.x_dim, self.y_dim = x_dim, y_dim
        self.with_r, self.with_boundary = with_r, with_boundary

    def forward(self, image: Tensor, heatmap: Tensor | None = None) -> Tensor:
        batch = image.shape[0]
        xx_range = torch.arange(self.y_dim, dtype=torch.float32).view(1, -1, 1)
        xx = (torch.ones(1, self.x_dim, 1) @ xx_range.transpose(1, 2)).unsqueeze(1)
        yy_range = torch.arange(self.x_dim, dtype=torch.float32).view(1, 1, -1)
        yy = (yy_range.transpose(1, 2) @ torch.ones(1, 1, self.y_dim)).unsqueeze(1)
        xx = (xx / (self.y_dim - 1) * 2 - 1).repeat(batch, 1, 1, 1)
        yy = (yy / (self.x_dim - 1) * 2 - 1).repeat(batch, 1, 1, 1)
        joined = torch.cat([image, xx, yy], dim=1)
        if self.with_r:
            rr = torch.sqrt(xx**2 + yy**2)
            joined = torch.cat([joined, rr / torch.max(rr)], dim=1)
        if self.with_boundary:
            mask = torch.clamp(image[:, -1:] if heatmap is None else heatmap[:, -1:], 0.0, 1.0)
            nothing = torch.zeros_like(xx)
            edges = [torch.where(mask > 0.05, each, nothing) for each in (xx, yy)]
            joined = torch.cat([joined, *edges], dim=1)
        return joined


class WingCoordConv(nn.Module):
    """With ``returns_last``, as published: the last two channels are returned beside the output."""

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        in_channels: int,
        out_channels: int,
        with_r: bool = False,
        with_boundary: bool = False,
        returns_last: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.returns_last = returns_last
        self.addcoords = WingAddCoords(x_dim, y_dim, with_r, with_boundary)
        more = 2 + int(with_r) + 2 * int(with_boundary)
        self.conv = nn.Conv2d(in_channels + more, out_channels, **kwargs)

    def forward(self, image: Tensor) -> Any:
        joined = self.addcoords(image)
        last = joined[:, -2:] if self.returns_last else None
        output = self.conv(joined)
        return (output, last) if self.returns_last else output


# --- coordinates in buffers, in other ranges and centrings -------------------------------------


class BufferedCoordConv(nn.Module):
    """Coordinates stored for one size, of two styles: ``(i + 0.5) / n`` and ``i / n``."""

    def __init__(
        self, in_channels: int, out_channels: int, size: tuple[int, int], style: str, **kwargs: Any
    ) -> None:
        super().__init__()
        self.register_buffer("coords", self.grid(size, style))
        self.conv = nn.Conv2d(in_channels + 2, out_channels, **kwargs)

    @staticmethod
    def grid(size: tuple[int, int], style: str) -> Tensor:
        height, width = size
        shift = {"left": 0.0, "edges": 0.5}[style]
        y = ((torch.arange(height) + shift) / height).view(1, 1, -1, 1).expand(1, 1, height, width)
        x = ((torch.arange(width) + shift) / width).view(1, 1, 1, -1).expand(1, 1, height, width)
        return torch.cat((x, y), 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat((self.coords.expand(len(x), -1, -1, -1), x), 1))


class ComputedCoordConv(nn.Module):
    """Coordinates computed at each call: a style of :class:`BufferedCoordConv`, or y alone."""

    def __init__(self, in_channels: int, out_channels: int, style: str, **kwargs: Any) -> None:
        super().__init__()
        self.style = style
        self.conv = nn.Conv2d(in_channels + (1 if style == "y" else 2), out_channels, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        if self.style == "y":
            y = torch.linspace(-1, 1, size[0]).view(1, 1, -1, 1).expand(len(x), 1, *size)
            return self.conv(torch.cat((x, y), 1))
        if self.style == "reference":  # as uber-research's: divided by the other axis' length
            y = torch.arange(size[0]).view(1, 1, -1, 1).expand(1, 1, *size) / (size[1] - 1) * 2 - 1
            x_ = torch.arange(size[1]).view(1, 1, 1, -1).expand(1, 1, *size) / (size[0] - 1) * 2 - 1
            grid = torch.cat((x_, y), 1)
        elif self.style == "waves":
            y = torch.linspace(-1, 1, size[0]).view(1, 1, -1, 1).expand(1, 1, *size)
            x_ = torch.linspace(-1, 1, size[1]).view(1, 1, 1, -1).expand(1, 1, *size)
            grid = torch.cat((x_**3, y), 1)
        else:
            grid = BufferedCoordConv.grid(size, self.style)
        return self.conv(torch.cat((x, grid.expand(len(x), -1, -1, -1)), 1))


class HalfImage(nn.Module):
    """Runs a module in bfloat16 on images in float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16()).float()
