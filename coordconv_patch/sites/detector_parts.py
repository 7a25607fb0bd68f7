"""The parts of a detector: its neck, its heads, and the branches of these.

Known by the types of modules and by how these lie in one another, never by a model's name:

- the neck is a pyramid of torchvision (``FeaturePyramidNetwork``); or, in a ``Sequential`` that
  ends in a head, as ultralytics builds its models, what lies between the first ``Upsample`` and the
  head, and the layer of a single 1x1 convolution before it, whose output is upsampled;
- heads are the types listed here, the innermost ones. Parallel branches, such as one for each level
  of the pyramid, are the items of a ``ModuleList``; a head without one is a branch itself.

Modules of other types count by the words that they are named with: ``fpn``, ``neck``,
``mask_head``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.layers.geometry import ConvGeometry

__all__ = ["Part", "branches", "mask_features", "necks"]

_CLASSES = {
    "torchvision.models.detection.retinanet": ("RetinaNetClassificationHead",),
    "torchvision.models.detection.fcos": ("FCOSClassificationHead",),
    "torchvision.models.detection.ssd": ("SSDClassificationHead",),
    "torchvision.models.detection.ssdlite": ("SSDLiteClassificationHead",),
}
"""Heads that say what a thing is, by the module that defines them."""
_PLACES = {
    "torchvision.models.detection.retinanet": ("RetinaNetRegressionHead",),
    "torchvision.models.detection.fcos": ("FCOSRegressionHead",),
    "torchvision.models.detection.ssd": ("SSDRegressionHead",),
    "torchvision.models.detection.ssdlite": ("SSDLiteRegressionHead",),
}
"""Heads that say where it is."""
_BOTH = {
    "torchvision.models.detection.rpn": ("RPNHead",),
    "torchvision.models.detection.faster_rcnn": ("FastRCNNConvFCHead",),
    "torchvision.models.detection.mask_rcnn": ("MaskRCNNHeads",),
    "torchvision.models.detection.keypoint_rcnn": ("KeypointRCNNHeads",),
    "ultralytics.nn.modules.head": ("Detect", "RTDETRDecoder"),
}
"""Heads that say both, in branches of their own or in one that is shared."""
_PYRAMIDS = {"torchvision.ops.feature_pyramid_network": ("FeaturePyramidNetwork",)}
_PROTOTYPES = {"ultralytics.nn.modules.block": ("Proto",)}

_CLASS_LISTS = re.compile(r"(one2one_)?cv3")
_LISTS = re.compile(r"(one2one_)?cv\d+|module_list|input_proj")
"""Lists of parallel branches. Further ones of ultralytics' heads run behind these."""
_NECK_WORDS = re.compile(r"(fpn|neck|pan|bifpn|\w+_(fpn|neck)|(fpn|neck)_\w+)", re.IGNORECASE)
_HEAD_WORDS = re.compile(r"(heads?|decode_head|detect|\w+_head|head_\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A part of a detector.

    Attributes:
        name: Qualified name of the module that it is.
        what: What it is, for messages.
        says_where: Whether it predicts where things are: not the classes alone.
    """

    name: str
    what: str
    says_where: bool = True

    def holds(self, site: str) -> bool:
        """Whether a site, by its name, is the part or lies in it."""
        return site == self.name or site.startswith(f"{self.name}.")


def necks(model: nn.Module | None, sites: list[str]) -> list[Part]:
    """The necks of a model.

    Args:
        model: The model; ``None``: only the names of its sites are known.
        sites: The names of its sites.
    """
    parts = []
    for name, module in _named_modules(model):
        if isinstance(module, _types(_PYRAMIDS)):
            parts.append(Part(name, f"the neck {name}, a {type(module).__name__}"))
        elif isinstance(module, nn.Sequential):
            parts += _between_upsample_and_head(name, module)
    by_name = {_module_named(site, _NECK_WORDS) for site in sites} - {""}
    known = [name for name in sorted(by_name) if not any(part.holds(name) for part in parts)]
    return parts + [Part(name, f"the neck {name}, by its name") for name in known]


def branches(model: nn.Module | None, sites: list[str]) -> list[Part]:
    """The branches of a model's heads; arguments as those of :func:`necks`."""
    classes = _types(_CLASSES)
    every = (*classes, *_types(_PLACES), *_types(_BOTH))
    heads = {name: module for name, module in _named_modules(model) if isinstance(module, every)}
    parts = []
    for name, module in heads.items():
        if any(other.startswith(f"{name}.") for other in heads):
            continue  # the innermost heads are the branches of this one
        what = f"{type(module).__name__} {name}"
        says_where = not isinstance(module, classes)
        lists = [each for each in module.named_children() if _is_list_of_branches(*each)]
        for list_name, branch_list in lists:
            says = says_where and not _CLASS_LISTS.fullmatch(list_name)
            names = [f"{name}.{list_name}.{key}" for key, _ in branch_list.named_children()]
            parts += [Part(each, f"a branch of {what}", says) for each in names]
        if not lists:
            parts.append(Part(name, f"the head {what}", says_where))
    by_name = dict.fromkeys(filter(None, (_module_named(site, _HEAD_WORDS) for site in sites)))
    # A word may name what only holds the heads, or what lies in one.
    known = [
        name
        for name in by_name
        if not any(name == head or _are_nested(name, head) for head in heads)
    ]
    return parts + [Part(name, f"the head {name}, by its name") for name in known]


def mask_features(model: nn.Module | None) -> list[Part]:
    """The modules that make the features of which masks are combined."""
    return [
        Part(name, f"the mask features {name}, a {type(module).__name__}")
        for name, module in _named_modules(model)
        if isinstance(module, _types(_PROTOTYPES))
    ]


def _named_modules(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    return iter(()) if model is None else model.named_modules()


def _types(table: Mapping[str, tuple[str, ...]]) -> tuple[type, ...]:
    """The types of a table; none of a library that nobody has imported, and so nobody uses."""
    modules = {name: sys.modules.get(name) for name in table}
    return tuple(
        getattr(module, kind)
        for name, module in modules.items()
        for kind in table[name]
        if hasattr(module, kind)
    )


def _is_list_of_branches(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and _LISTS.fullmatch(name) is not None


def _between_upsample_and_head(name: str, layers: nn.Sequential) -> list[Part]:
    """The neck of a sequence of layers that ends in a head; empty if it is not such a one."""
    children = list(layers.named_children())
    ends = [at for at, (_, layer) in enumerate(children) if isinstance(layer, _types(_BOTH))]
    begins = [at for at, (_, layer) in enumerate(children) if isinstance(layer, nn.Upsample)]
    if not ends or not begins or begins[0] > ends[-1]:
        return []
    first = begins[0]
    if first and _is_one_pointwise_convolution(children[first - 1][1]):
        first -= 1
    prefix = f"{name}." if name else ""
    what = "the neck, the layers between the first Upsample and the head"
    return [Part(f"{prefix}{key}", what) for key, _ in children[first : ends[-1]]]


def _is_one_pointwise_convolution(module: nn.Module) -> bool:
    convolutions = [each for each in module.modules() if isinstance(each, _ConvNd)]
    return len(convolutions) == 1 and set(ConvGeometry.of(convolutions[0]).kernel_size) == {1}


def _are_nested(first: str, second: str) -> bool:
    return first.startswith(f"{second}.") or second.startswith(f"{first}.")


def _module_named(site: str, words: re.Pattern[str]) -> str:
    """A site's name up to its innermost module that is named so, ``""`` if none is."""
    parts = site.split(".")[:-1]
    for end in range(len(parts), 0, -1):
        if words.fullmatch(parts[end - 1]):
            return ".".join(parts[:end])
    return ""
