"""Stages: how the sites of a model fall into a few groups."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from coordconv_patch.sites.stages import stages_of


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        ("", {}),
        ("conv", {"conv": "conv"}),
        ("stem l1.a l1.b l2.a l2.b", {"stem": "stem", "l1.*": "l1.a l1.b", "l2.*": "l2.a l2.b"}),
        # More than half lie in one group: it is taken apart, as often as need be.
        (
            "b.body.stem b.body.l1.a b.body.l1.b b.body.l2.a b.body.l2.b head.a",
            {
                "b.body.stem": "b.body.stem",
                "b.body.l1.*": "b.body.l1.a b.body.l1.b",
                "b.body.l2.*": "b.body.l2.a b.body.l2.b",
                "head.a": "head.a",
            },
        ),
        ("f.0 f.3 f.6", {"f.0": "f.0", "f.3": "f.3", "f.6": "f.6"}),
        # In the order of the first of each, though a later one comes between.
        ("x.a y.a x.b z", {"x.*": "x.a x.b", "y.a": "y.a", "z": "z"}),
        ("a a.b", {"a": "a", "a.b": "a.b"}),
    ],
)
def test_members_are_grouped_by_the_beginnings_of_their_names(
    names: str, stages: dict[str, str]
) -> None:
    groups = stages_of(names.split(), lambda name: name)
    assert {group.name: " ".join(group.members) for group in groups} == stages
    assert list(stages) == [group.name for group in groups]


@pytest.mark.parametrize(
    ("network", "stages"),
    [
        ("resnet26", ["conv1", *(f"layer{index}.*" for index in range(1, 5))]),
        (
            "tf_efficientnet_lite0",
            [
                *("conv_stem", "blocks.0.0.*", *(f"blocks.{index}.*" for index in range(1, 6))),
                *("blocks.6.0.*", "conv_head"),
            ],
        ),
    ],
)
def test_stages_are_those_that_people_name(network: str, stages: list[str]) -> None:
    modules = timm.create_model(network).named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    groups = stages_of(names, str, most=16)
    assert [group.name for group in groups] == stages
    assert [name for group in groups for name in group.members] == names


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["stem", *(f"body.{index}" for index in range(17))], ["stem", "body.*"]),
        ([str(index) for index in range(17)], ["*"]),
        ([str(index) for index in range(16)], [str(index) for index in range(16)]),
    ],
)
def test_there_are_no_more_than_so_many(names: list[str], stages: list[str]) -> None:
    assert [group.name for group in stages_of(names, str, most=16)] == stages
