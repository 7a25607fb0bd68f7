"""The place that steps of an albumentations pipeline give, by what they do to a coordinate image.

albumentations moves key points by a rule of each class, some as centres of pixels and some as
measured from edges. So each geometric step is shown an image whose values are the coordinates,
as a mask with bilinear interpolation, and what it makes of it is fitted: the place is right because
it is what the picture shows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coordconv_patch.errors import CoordinatesError
from coordconv_patch.pictures.affine_maps import Array, affine_fit
from coordconv_patch.pictures.pipeline_steps import not_affine, steps_of

__all__ = ["KEY", "PictureMap", "with_steps_followed"]

KEY = "_coordconv_place"
"""Under which the map travels through the pipeline, beside the image."""

_LARGEST_RESIDUAL = 0.05
"""Pixels of the step's input. OpenCV rounds positions to 1/32 of a pixel, by up to 0.016."""

_SETTINGS = {
    "interpolation": 1,
    "mask_interpolation": 1,
    "border_mode": 0,
    "fill": 0,
    "fill_mask": 0,
}
"""For the coordinate image: ``cv2.INTER_LINEAR``, ``cv2.BORDER_CONSTANT``, zeros outside."""

_NOT_AFFINE = {
    *("ElasticTransform", "GridDistortion", "GridElasticDeform", "Mosaic", "OpticalDistortion"),
    *("Perspective", "PiecewiseAffine", "RandomGridShuffle", "ThinPlateSpline"),
}
"""Refused at once; others are when a call shows it."""

_SHAPES_ONLY = {"Morphological"}
"""Steps that change what masks show, and move nothing."""

_MOST_POINTS = 32
"""Rows and columns of pixels that are looked at."""


@dataclass(frozen=True)
class PictureMap:
    """Where the picture of now lies in the original one.

    Attributes:
        matrix: From positions in it to those in the original, in pixels, shape (3, 3).
        size: Its size now, (H, W).
    """

    matrix: Array
    size: tuple[int, int]


def with_steps_followed(pipeline: Any) -> Any:
    """A copy of a pipeline, or of one transform, whose geometric steps move a :class:`PictureMap`.

    Raises:
        CoordinatesError: If a step is not affine, or for volumes.
    """
    import albumentations  # an extra

    followed = copy.deepcopy(pipeline)
    for name, step in steps_of(followed):
        kind = type(step).__name__
        if isinstance(step, albumentations.Transform3D):
            raise CoordinatesError(f"{name}, {kind}, is for volumes: places follow pictures")
        if kind in _NOT_AFFINE:
            raise CoordinatesError(not_affine(f"{name}, {kind}"))
        if isinstance(step, albumentations.DualTransform):
            step._key2func[KEY] = _Follower(step)
        elif isinstance(step, albumentations.BaseCompose):
            step._available_keys.add(KEY)  # strict=True refuses others
    return followed


@dataclass(frozen=True)
class _Follower:
    """What a step does to a :class:`PictureMap`; it travels to workers with the step."""

    step: Any

    def __call__(self, place: PictureMap, **params: Any) -> PictureMap:
        name = type(self.step).__name__
        if name in _SHAPES_ONLY:
            return place
        image = _coordinate_image(place.size).copy()
        with _settings(self.step):
            shown = self.step.apply_to_mask(image, **_changed(params))
        if shown is image:
            return place
        return PictureMap(place.matrix @ _fit(shown, place.size, name), shown.shape[:2])


@functools.lru_cache(maxsize=8)
def _coordinate_image(size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Channels x / W and y / H at centres of pixels, and 1; shape (H, W, 3)."""
    height, width = size
    image = np.ones((height, width, 3), dtype=np.float32)
    image[:, :, 0] = (np.arange(width) + 0.5) / width
    image[:, :, 1] = ((np.arange(height) + 0.5) / height)[:, None]
    return image


@contextmanager
def _settings(step: Any) -> Iterator[None]:
    before = vars(step).copy()
    vars(step).update(_changed(before))
    try:
        yield
    finally:
        vars(step).update({name: before[name] for name in _changed(before) if name in before})


def _changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the coordinate image needs them; ``None`` says that masks are left alone."""
    return {
        name: _SETTINGS[name] if name in _SETTINGS and value is not None else value
        for name, value in settings.items()
    }


def _fit(shown: npt.NDArray[Any], size: tuple[int, int], name: str) -> Array:
    """The map from the result of a step to its input.

    Raises:
        CoordinatesError: If it is not affine, or too little of the picture is left to tell.
    """
    rows, columns = (
        np.unique(np.linspace(0, length - 1, _MOST_POINTS).round().astype(int))
        for length in shown.shape[:2]
    )
    values = shown[np.ix_(rows, columns)].astype(np.float64)
    pixels = np.stack(np.meshgrid(columns + 0.5, rows + 0.5), axis=-1)
    is_inside = np.abs(values[:, :, 2] - 1) < 1e-4
    coordinates = values[:, :, :2] * size[::-1]
    # Resizing repeats the outermost pixels of a crop, which then show the coordinates of others.
    is_within = is_inside.copy()
    if is_inside.any():
        lowest, highest = (of(coordinates[is_inside], axis=0) for of in (np.min, np.max))
        is_within &= ((coordinates > lowest + 1e-3) & (coordinates < highest - 1e-3)).all(axis=-1)
    for chosen in (is_within, is_inside):
        try:
            matrix, distance = affine_fit(pixels[chosen], coordinates[chosen])
            break
        except CoordinatesError:
            continue
    else:
        raise CoordinatesError(f"{name} left too little of the picture to tell its place")
    if distance > _LARGEST_RESIDUAL or abs(np.linalg.det(matrix)) < 1e-9:
        raise CoordinatesError(
            not_affine(name, f" (pixels are up to {distance:.2g} px off the best one)")
        )
    return matrix
