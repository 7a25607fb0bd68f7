"""Models of timm and torchvision, by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from coordconv_patch.cli.loaded import LoadedModel, random_image
from coordconv_patch.cli.model_names import name_and_arguments
from coordconv_patch.errors import ModelSourceError, first_line
from coordconv_patch.packages import require_packages

__all__ = ["close_names", "timm_model", "torchvision_model"]


def timm_model(name: str, pretrained: bool) -> LoadedModel:
    """A model of timm; raises :class:`ModelSourceError` if there is none of this name.

    Arguments may follow (``resnet18?num_classes=12``); ``hf-hub:OWNER/NAME`` and
    ``local-dir:FOLDER`` are names too.
    """
    timm = _imported("timm")
    name, arguments = name_and_arguments(name)
    if ":" not in name and not timm.is_model(name):
        hint = close_names(name, timm.list_models()) or "timm.list_models() has them all"
        if "/" in name:
            hint = f"of the Hugging Face Hub it is timm:hf-hub:{name}"
        raise ModelSourceError(f"timm has no model {name!r}; {hint}")
    model = _created(
        lambda: timm.create_model(name, pretrained=pretrained, **arguments), name, pretrained
    )
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    channels = arguments.get("in_chans", size[0])
    example = random_image((1, channels, *size[1:]))
    return LoadedModel(model.eval(), example, pretrained and not arguments)


def torchvision_model(name: str, pretrained: bool) -> LoadedModel:
    """A model of torchvision; raises :class:`ModelSourceError` if there is none of this name.

    Arguments may follow: ``resnet18?num_classes=12``.
    """
    models = _imported("torchvision").models
    name, arguments = name_and_arguments(name)
    if name not in models.list_models():
        hint = close_names(name, models.list_models()) or "see torchvision.models"
        raise ModelSourceError(f"torchvision has no model {name!r}; {hint}")
    if pretrained:
        model = _created(lambda: models.get_model(name, weights="DEFAULT", **arguments), name, True)
    else:
        builder = models.get_model_builder(name)
        options: dict[str, Any] = {"weights": None} | arguments
        if "weights_backbone" in builder.__annotations__:
            options["weights_backbone"] = None
        model = _created(lambda: builder(**options), name, False)
    return LoadedModel(model.eval(), _torchvision_example(name, type(model).__module__), pretrained)


def _torchvision_example(name: str, place: str) -> Any:
    """Inputs for the model of a name, by the module of torchvision that its class lies in."""
    if ".detection." in place:
        return ([random_image((3, 320, 320))],)
    if ".video." in place:
        return random_image((1, 3, 16, 112, 112))
    if ".optical_flow." in place:
        return (random_image((1, 3, 128, 128)), random_image((1, 3, 128, 128)))
    side = 299 if name == "inception_v3" else 224
    return random_image((1, 3, side, side))


def close_names(name: str, known: Sequence[str]) -> str:
    """A hint at names like a wrong one; empty if there are none."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"close names: {', '.join(close)}" if close else ""


def _imported(package: str) -> Any:
    require_packages(f"a model of {package}", package)
    return importlib.import_module(package)


def _created(create: Callable[[], nn.Module], name: str, pretrained: bool) -> nn.Module:
    try:
        return create()
    except Exception as error:
        if not pretrained:
            raise ModelSourceError(f"{name} cannot be created: {error}") from error
        raise ModelSourceError(
            f"the pretrained weights of {name} cannot be had ({first_line(error)}). "
            "Is there a network? If you have the weights in a file, leave --pretrained out and "
            "pass --checkpoint FILE"
        ) from error
