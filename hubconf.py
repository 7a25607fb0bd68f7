"""torch.hub: ``torch.hub.load("OWNER/coordconv-patch", "patched", "timm:resnet50")``."""

from __future__ import annotations

from typing import Any

from torch import nn

dependencies = ["torch", "numpy", "safetensors", "tqdm"]


def patched(
    source: str, where: Any = "first", *, coords: Any = None, pretrained: bool = True
) -> nn.Module:
    """A model of timm, torchvision or transformers whose chosen convolutions see coordinates.

    Args:
        source: As on the command line: ``timm:resnet50``, ``torchvision:resnet18?num_classes=12``,
            ``hf:microsoft/resnet-18``.
        where: See :func:`coordconv_patch.patch`.
        coords: See :func:`coordconv_patch.patch`.
        pretrained: Whether to load the zoo's weights.
    """
    from coordconv_patch.cli.sources import load_model
    from coordconv_patch.patching.patch import patch

    loaded = load_model(source, pretrained=pretrained)
    return patch(loaded.model, where, coords=coords, example_inputs=loaded.example_inputs)
