"""Where the command line finds models by name, and how others add to it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeAlias, cast

from coordconv_patch.arguments import check_callable, check_word
from coordconv_patch.cli.hugging_face import hugging_face_model
from coordconv_patch.cli.loaded import LoadedModel
from coordconv_patch.cli.zoo_models import timm_model, torchvision_model
from coordconv_patch.errors import ArgumentError

__all__ = ["ENTRY_POINTS", "MODEL_SOURCES", "model_source", "register_model_source"]

ENTRY_POINTS = "coordconv_patch.model_sources"
"""Installed packages add sources by entry points of this group, named as their prefixes."""

ModelSource: TypeAlias = Callable[[str, bool], LoadedModel]
"""Loads the model of a name, with its pretrained weights or without."""

MODEL_SOURCES: dict[str, ModelSource] = {
    "timm": timm_model,
    "torchvision": torchvision_model,
    "hf": hugging_face_model,
}
"""Sources of models, by the prefix that is written before their names."""


def register_model_source(prefix: str, load: ModelSource) -> None:
    """Let the command line load ``PREFIX:NAME``.

    An installed package can do so without being imported first, by an entry point of the
    group :data:`ENTRY_POINTS` that is named as the prefix and refers to ``load``.

    Args:
        prefix: What is written before the colon, such as ``"timm"``.
        load: Takes the name, with the arguments that may stand behind it (see
            :func:`coordconv_patch.cli.model_names.name_and_arguments`), and whether pretrained
            weights are wanted. It should raise
            :class:`coordconv_patch.ModelSourceError` for a model that cannot be loaded.

    Raises:
        ArgumentError: If the prefix is taken, or is not a plain word, or ``load`` not a function.
    """
    check_word("prefix", prefix)
    if prefix in MODEL_SOURCES:
        raise ArgumentError(f"prefix={prefix!r}: there is a source of models with this prefix")
    check_callable("load", load)
    MODEL_SOURCES[prefix] = load


def model_source(prefix: str) -> ModelSource | None:
    """The source with a prefix; ``None`` if there is none."""
    if prefix in MODEL_SOURCES:
        return MODEL_SOURCES[prefix]
    for point in entry_points(group=ENTRY_POINTS, name=prefix):
        return cast("ModelSource", point.load())
    return None
