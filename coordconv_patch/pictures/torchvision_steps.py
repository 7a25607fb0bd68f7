"""The steps of a torchvision pipeline that no place can follow, told before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coordconv_patch.errors import CoordinatesError, MissingPackageError, excerpt
from coordconv_patch.pictures.pipeline_steps import not_affine, steps_of
from coordconv_patch.pictures.torchvision_points import NOT_AFFINE

__all__ = ["check_steps"]

_IMAGE_ALONE = ("AugMix", "AutoAugment", "CutMix", "MixUp", "RandAugment", "TrivialAugmentWide")

_FIRST_VERSION = ("torchvision.transforms.transforms", "torchvision.transforms.autoaugment")
"""Modules of the transforms that v2 replaces, class by class of the same name."""


def check_steps(pipeline: Any) -> None:
    """Refuse what cannot be followed before anything runs.

    Raises:
        CoordinatesError: That names the step.
        MissingPackageError: If torchvision is older than its key points.
    """
    import torchvision
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    if not hasattr(tv_tensors, "KeyPoints"):
        raise MissingPackageError(
            f"torchvision {torchvision.__version__} moves no points with its pictures, so nobody "
            "can tell the place: install torchvision 0.23 or newer, with its torch (2.8), or "
            "write the pipeline with albumentations"
        )
    for name, step in steps_of(pipeline):
        kind = type(step).__name__
        if isinstance(step, _classes(v2, NOT_AFFINE.values())):
            raise CoordinatesError(not_affine(f"{name}, {kind}"))
        if isinstance(step, _classes(v2, _IMAGE_ALONE)):
            raise CoordinatesError(
                f"{name}, {kind}, moves or mixes images without anything beside them, so nobody "
                "can tell the place: use its geometric and its colour transforms by themselves"
            )
        if isinstance(step, v2.Lambda) and object in step.types:
            raise CoordinatesError(
                f"{name}, v2.Lambda, changes whatever it is given, places too: write "
                "v2.Lambda(function, tv_tensors.Image), or the class of your images"
            )
        if type(step).__module__.startswith(_FIRST_VERSION):
            raise CoordinatesError(
                f"{name}, {kind}, takes images alone: write torchvision.transforms.v2.{kind}, "
                "which takes what belongs to them too"
            )
        if not isinstance(step, v2.Transform):
            raise CoordinatesError(
                f"{name}, {excerpt(step)}, is not one of torchvision.transforms.v2 or of "
                "albumentations: write v2.Lambda(function, tv_tensors.Image) for a function that "
                "changes the image alone, and v2.Compose for nn.Sequential"
            )


def _classes(module: Any, names: Iterable[str]) -> tuple[type, ...]:
    return tuple(getattr(module, name) for name in names if hasattr(module, name))
