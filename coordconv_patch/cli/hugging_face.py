"""Models of transformers, of the Hugging Face Hub or in a local folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from coordconv_patch.cli.loaded import LoadedModel, random_image
from coordconv_patch.cli.model_names import name_and_arguments
from coordconv_patch.errors import ModelSourceError, first_line

__all__ = ["hugging_face_model"]

_SIDE = 224


def hugging_face_model(name: str, pretrained: bool) -> LoadedModel:
    """A model of transformers, by its repository's name or its folder.

    Its class is the one that its configuration names; arguments change the configuration.

    Args:
        name: A repository or a folder, with arguments or without: ``microsoft/resnet-18``,
            ``./folder?num_labels=12``.
        pretrained: Load its weights too, and not its configuration alone.

    Raises:
        ModelSourceError: If there is no such model, or it takes no pictures.
    """
    transformers = _transformers()
    name, arguments = name_and_arguments(name)
    config = _had(lambda: transformers.AutoConfig.from_pretrained(name, **arguments), name)
    kind = _class_of(transformers, config, name)
    if pretrained:
        # A head of another size is drawn anew, as transformers does it.
        model = _had(
            lambda: kind.from_pretrained(name, config=config, ignore_mismatched_sizes=True), name
        )
    else:
        model = _had(lambda: kind(config), name)
    return LoadedModel(model.eval(), _example(model, config, name), pretrained and not arguments)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelSourceError(
            "hf: models need the package transformers; install it with: pip install transformers"
        ) from error


def _class_of(transformers: Any, config: Any, name: str) -> Any:
    for title in config.architectures or ():
        kind = getattr(transformers, title, None)
        if kind is not None:
            return kind
    raise ModelSourceError(
        f"hf:{name}: its configuration names {config.architectures or 'no class'}, which "
        "transformers does not have: build it in a Python file, and write path/to/file.py:FUNCTION"
    )


def _example(model: nn.Module, config: Any, name: str) -> Any:
    taken = getattr(model, "main_input_name", "something else")
    if taken != "pixel_values":
        raise ModelSourceError(
            f"hf:{name} takes {taken}, not pictures: build it in a Python file, and write "
            "path/to/file.py:FUNCTION that returns inputs too"
        )
    size = getattr(config, "image_size", None) or _SIDE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or 3
    return ({"pixel_values": random_image((1, channels, height, width))},)


def _had(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except Exception as error:
        raise ModelSourceError(
            f"hf:{name} cannot be had ({first_line(error)}). Write the name of a repository of the "
            "Hugging Face Hub, such as hf:microsoft/resnet-18, or of a folder that "
            "save_pretrained has written. Is there a network?"
        ) from error
