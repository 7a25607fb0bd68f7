"""Points that torchvision's transforms v2 move as exactly as they move the picture's pixels.

torchvision's own ``KeyPoints`` do not: flips take x to ``w - 1 - x``, as if points were centres of
pixels, and resizing takes it to ``x * new_w / w``, as if they were measured from edges. Rotations
with ``expand`` move them by up to half a pixel against the picture, and so does a centre crop that
pads. :func:`points_of` gives a subclass with kernels of its own, which are those of the image.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coordconv_patch.errors import CoordinatesError
from coordconv_patch.pictures.affine_maps import Array, affine_fit
from coordconv_patch.pictures.pipeline_steps import not_affine

__all__ = ["NOT_AFFINE", "map_of", "points_of"]

NOT_AFFINE = {
    "elastic": "ElasticTransform",
    "five_crop": "FiveCrop",
    "perspective": "RandomPerspective",
    "ten_crop": "TenCrop",
}
"""Names of the transforms that no affine map describes, by the functional that they call."""

_FRACTIONS = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
"""Five values an axis, so that clamping some of them to a smaller picture is not affine."""


def points_of(size: tuple[int, int]) -> Any:
    """A grid of points over a picture, to be sent through transforms beside it.

    Args:
        size: The picture's, (H, W).

    Returns:
        A ``torchvision.tv_tensors.KeyPoints`` of shape (25, 2).
    """
    return _points_class()(_grid(size), canvas_size=size)


def map_of(moved: Any, size: tuple[int, int], whole: tuple[int, int]) -> Array:
    """The map from the transformed picture to the original one, by what became of its points.

    Args:
        moved: What the transforms made of :func:`points_of`.
        size: Of the transformed picture, (H, W).
        whole: Of the original picture, (H, W).

    Returns:
        Shape (3, 3), in pixels, see :mod:`coordconv_patch.pictures.affine_maps`.

    Raises:
        CoordinatesError: If there is no such affine map.
    """
    hint = (
        "; a step that changes the image alone has to leave key points as they are: write "
        "v2.Lambda(function, tv_tensors.Image) for a function, and leave out steps that clamp or "
        "remove key points"
    )
    if not isinstance(moved, _points_class()):
        raise CoordinatesError(
            f"a transform changed the points of the picture to {type(moved).__name__}{hint}"
        )
    if tuple(moved.canvas_size) != size:
        raise CoordinatesError(
            f"the transforms gave an image of {size[0]} x {size[1]} pixels, but moved points as "
            "if it were one of {} x {}".format(*moved.canvas_size)
            + hint
        )
    points, images = _plain(moved).double().numpy(), _grid(whole).numpy()
    if len(points) != len(images):
        raise CoordinatesError(f"a transform removed points of the picture{hint}")
    forward, distance = affine_fit(images, points)
    if distance > 1e-3 or not np.linalg.det(forward):
        raise CoordinatesError(f"a transform moved the points in a way that is not affine{hint}")
    return np.asarray(np.linalg.inv(forward), dtype=np.float64)


def _grid(size: tuple[int, int]) -> Tensor:
    height, width = size
    return torch.cartesian_prod(_FRACTIONS * width, _FRACTIONS * height)


def _plain(points: Tensor) -> Tensor:
    return torch.Tensor.as_subclass(points, torch.Tensor)


@functools.cache
def _points_class() -> Any:
    """The subclass. Not at the top, for it needs torchvision, which is an extra."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    class PicturePoints(tv_tensors.KeyPoints):
        def as_subclass(self, cls: type) -> Any:
            # ToPureTensor may stand in the middle of a pipeline; what follows moves points too.
            return self

    # RandomErasing and others warn once a call of what they leave alone, which is right here.
    warnings.filterwarnings("ignore", r".*passing through inputs of type tv_tensors.PicturePoints")
    for name, kernel in _KERNELS.items():
        functional.register_kernel(name, PicturePoints)(functools.partial(_moved, kernel))
    not_geometry = {"clamp", "get_size", "sanitize"}
    geometric = {
        name.removesuffix("_keypoints") for name in dir(functional) if "_keypoints" in name
    }
    for name in (geometric | set(NOT_AFFINE)) - set(_KERNELS) - not_geometry:
        functional.register_kernel(name, PicturePoints)(_refusal(name))
    return PicturePoints


def _moved(kernel: Callable[..., tuple[Tensor, Any]], points: Any, *args: Any, **kw: Any) -> Any:
    result, size = kernel(_plain(points), tuple(points.canvas_size), *args, **kw)
    return type(points)(result, canvas_size=tuple(size))


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(points: Any, *args: Any, **kwargs: Any) -> Any:
        raise CoordinatesError(not_affine(NOT_AFFINE.get(name, name)))

    return refuse


# --- kernels: points and the picture's size before -> after ---------------------------------------
# With the names and the order of arguments that the functionals have.

_Size = tuple[int, int]


def _horizontal_flip(points: Tensor, canvas: _Size) -> tuple[Tensor, _Size]:
    return torch.stack([canvas[1] - points[:, 0], points[:, 1]], dim=1), canvas


def _vertical_flip(points: Tensor, canvas: _Size) -> tuple[Tensor, _Size]:
    return torch.stack([points[:, 0], canvas[0] - points[:, 1]], dim=1), canvas


def _resize(
    points: Tensor,
    canvas: _Size,
    size: Any,
    interpolation: Any = None,
    max_size: int | None = None,
    antialias: Any = None,
) -> tuple[Tensor, _Size]:
    from torchvision.transforms.v2 import functional

    _, (height, width) = functional.resize_keypoints(points, size, canvas, max_size)
    ratios = torch.tensor([width / canvas[1], height / canvas[0]], dtype=torch.float64)
    return points * ratios, (height, width)


def _crop(
    points: Tensor, canvas: _Size, top: int, left: int, height: int, width: int
) -> tuple[Tensor, _Size]:
    return points - torch.tensor([left, top]), (height, width)


def _resized_crop(
    points: Tensor,
    canvas: _Size,
    top: int,
    left: int,
    height: int,
    width: int,
    size: Any,
    interpolation: Any = None,
    antialias: Any = None,
) -> tuple[Tensor, _Size]:
    return _resize(*_crop(points, canvas, top, left, height, width), size)


def _center_crop(points: Tensor, canvas: _Size, output_size: Any) -> tuple[Tensor, _Size]:
    wanted = list(output_size) if isinstance(output_size, Sequence) else [output_size]
    height, width = (int(length) for length in (wanted * 2)[:2])
    # An axis that is too short is padded, with the shorter half before it; a longer one is cut.
    top, left = (
        -((new - old) // 2) if new > old else round((old - new) / 2)
        for new, old in zip((height, width), canvas, strict=True)
    )
    return _crop(points, canvas, top, left, height, width)


def _pad(
    points: Tensor, canvas: _Size, padding: Any, fill: Any = None, padding_mode: str = "constant"
) -> tuple[Tensor, _Size]:
    """Whatever the border is filled with: beyond the picture, coordinates go on as inside."""
    from torchvision.transforms.v2 import functional

    padded, size = functional.pad_keypoints(points, canvas, padding)
    return padded, size


def _affine(
    points: Tensor,
    canvas: _Size,
    angle: float,
    translate: Any,
    scale: float,
    shear: Any,
    interpolation: Any = None,
    fill: Any = None,
    center: Any = None,
) -> tuple[Tensor, _Size]:
    from torchvision.transforms.v2 import functional

    moved, _ = functional.affine_keypoints(points, canvas, angle, translate, scale, shear, center)
    return moved, canvas


def _rotate(
    points: Tensor,
    canvas: _Size,
    angle: float,
    interpolation: Any = None,
    expand: bool = False,
    center: Any = None,
    fill: Any = None,
) -> tuple[Tensor, _Size]:
    from torchvision.transforms.v2 import functional

    moved, _ = functional.rotate_keypoints(points, canvas, angle, False, center)
    if not expand:
        return moved, canvas
    # Key points' own idea of the new size is a pixel off the image's for some angles.
    empty = torch.empty(0, *canvas)
    height, width = functional.rotate_image(empty, angle, expand=True, center=center).shape[1:]
    # The larger picture has the same middle.
    return moved + torch.tensor([width - canvas[1], height - canvas[0]]) / 2, (height, width)


_KERNELS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "affine": _affine,
    "center_crop": _center_crop,
    "crop": _crop,
    "horizontal_flip": _horizontal_flip,
    "pad": _pad,
    "resize": _resize,
    "resized_crop": _resized_crop,
    "rotate": _rotate,
    "vertical_flip": _vertical_flip,
}
"""By the name of a functional in ``torchvision.transforms.v2.functional``."""
