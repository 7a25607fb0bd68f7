"""Stages by names, at the networks that people name them of."""

from __future__ import annotations

import timm
from torch import nn

from coordconv_patch.ranking.stages import MOST_STAGES, stages_of


def convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def test_a_resnets_stages_are_its_layers() -> None:
    stages = stages_of(convolutions(timm.create_model("resnet26")))
    assert list(stages) == ["conv1", "layer1", "layer2", "layer3", "layer4"]


def test_blocks_that_hold_most_of_a_network_are_split() -> None:
    stages = stages_of(convolutions(timm.create_model("tf_efficientnet_lite0")))
    blocks = [f"blocks.{index}" for index in range(7)]
    assert list(stages) == ["conv_stem", *blocks, "conv_head"]
    assert stages["blocks.0"] == ("blocks.0.0.conv_dw", "blocks.0.0.conv_pw")


def test_every_site_is_in_one_stage_in_its_order() -> None:
    names = [f"net.{stage}.{index}" for stage in range(3) for index in range(40)]
    stages = stages_of(names)
    assert list(stages) == ["net.0", "net.1", "net.2"]
    assert [site for sites in stages.values() for site in sites] == names


def test_no_more_stages_than_can_be_ranked() -> None:
    names = ["stem", *(f"body.{index}" for index in range(MOST_STAGES + 5))]
    assert list(stages_of(names)) == ["stem", "body"]


def test_one_site_is_one_stage() -> None:
    assert stages_of(["features.0"]) == {"": ("features.0",)}
