"""A data pipeline that says which part of the original picture its result is."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from coordconv_patch.errors import CoordinatesError, excerpt
from coordconv_patch.pictures.affine_maps import theta_of_pixels
from coordconv_patch.pictures.albumentations_steps import KEY, PictureMap, with_steps_followed
from coordconv_patch.pictures.torchvision_points import map_of, points_of
from coordconv_patch.pictures.torchvision_steps import check_steps

__all__ = ["PlacedTransform"]


class PlacedTransform:
    """A pipeline of torchvision's transforms v2 or of albumentations that gives the place too.

    Whatever crops, flips, resizes, pads, rotates, translates, scales or shears pictures is
    followed, in any composition, with steps in between that change colours; so coordinates are
    those of the original picture. Beyond its border they go on as inside it. Positions are exact
    but for rounding (torchvision), or right to some hundredths of a pixel (albumentations, where a
    step's effect is measured on an image of coordinates). Works in DataLoaders with workers;
    default collation makes a batch of the places, shape (N, 2, 3), for
    :func:`coordconv_patch.places`.

    Args:
        pipeline: A transform of ``torchvision.transforms.v2`` (0.23 or later), or an
            ``albumentations.Compose`` or transform. Of the latter a copy is used.

    Raises:
        CoordinatesError: If the pipeline has a step that is not affine, such as an elastic one or
            a perspective, or one that changes the image alone; at the call, where only the call
            shows it.
        MissingPackageError: If the installed torchvision is older than 0.23.

    Example:
        >>> from torchvision.transforms import v2
        >>> transform = PlacedTransform(v2.Compose([v2.CenterCrop(32), v2.RandomHorizontalFlip(1)]))
        >>> image, theta = transform(torch.rand(3, 64, 64))
        >>> theta.tolist()
        [[-0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]
    """

    def __init__(self, pipeline: Any) -> None:
        self._is_albumentations = any(
            kind.__module__.partition(".")[0] == "albumentations" for kind in type(pipeline).__mro__
        )
        if self._is_albumentations:
            self.pipeline = with_steps_followed(pipeline)
        else:
            check_steps(pipeline)
            self.pipeline = pipeline

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Transform an image, and what belongs to it.

        Args:
            *inputs: The image, a tensor (..., H, W), a PIL image or an array (H, W, C); for
                torchvision whatever else the pipeline takes, such as a dict of boxes.
            **named: For albumentations, ``image=...`` and its other targets.

        Returns:
            What the pipeline returns and theta, shape (2, 3), float32, as the last of a tuple.
            For albumentations with named inputs its dict, with theta under ``"theta"``.

        Raises:
            CoordinatesError: As the class.
        """
        if not self._is_albumentations:
            if named or not inputs:
                raise CoordinatesError("torchvision's transforms: give the image first, unnamed")
            return self._by_torchvision(*inputs)
        if not named and len(inputs) == 1:
            result = self._by_albumentations(image=inputs[0])
            return result["image"], result["theta"]
        if inputs or "image" not in named or "theta" in named:
            raise CoordinatesError(
                "albumentations: give the image alone, or name everything, as in "
                "transform(image=image, mask=mask); theta is the name of the result's place"
            )
        return self._by_albumentations(**named)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pipeline!r})"

    def _by_torchvision(self, image: Any, *others: Any) -> tuple[Any, ...]:
        whole = _size(image)
        result, *rest, moved = self.pipeline(image, *others, points_of(whole))
        size = _size(result)
        theta = theta_of_pixels(map_of(moved, size, whole), size, whole)
        return (result, *rest, theta)

    def _by_albumentations(self, **named: Any) -> dict[str, Any]:
        whole = _size(named["image"])
        result = self.pipeline(**named, **{KEY: PictureMap(np.eye(3), whole)})
        place = result.pop(KEY)
        size = _size(result["image"])
        if size != place.size:
            raise CoordinatesError(
                f"the pipeline gave an image of {size[0]} x {size[1]} pixels, where a mask would "
                "have {} x {}: a step changes the image alone".format(*place.size)
            )
        result["theta"] = theta_of_pixels(place.matrix, size, whole)
        return result


def _size(image: Any) -> tuple[int, int]:
    """Height and width.

    Raises:
        CoordinatesError: If it is not an image.
    """
    if isinstance(image, Tensor) and image.dim() >= 2:
        return int(image.shape[-2]), int(image.shape[-1])
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        return int(image.shape[0]), int(image.shape[1])
    if hasattr(image, "getbands"):  # a PIL image
        return int(image.height), int(image.width)
    raise CoordinatesError(
        f"an image of {type(image).__name__}, {excerpt(image)}: write a tensor (C, H, W), an array "
        "(H, W, C) or a PIL image"
    )
