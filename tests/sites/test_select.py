"""Every form of where=, and the message of each that fails."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import SelectionError
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.presets import PRESETS
from coordconv_patch.sites.select import select
from coordconv_patch.sites.site import Site


def _name(value: object) -> str:
    """A test's name for a value: without the address of a lambda, which differs by process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Block(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """Registered last to first; `shortcut` is another name of layer1's last conv."""

    def __init__(self) -> None:
        super().__init__()
        self.layer2 = nn.Sequential(Block(4), Block(4, stride=2))
        self.layer1 = nn.Sequential(Block(4))
        self.stem_conv = nn.Conv2d(3, 4, 3)
        self.shortcut = self.layer1[0].conv2

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem_conv(x)))


ORDER = [
    "stem_conv",
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer2.0.conv1",
    "layer2.0.conv2",
    "layer2.1.conv1",
    "layer2.1.conv2",
]


def chosen(model: nn.Module, where: Any, example_inputs: Any = None) -> list[str]:
    return [site.name for site in ccp.plan(model, where, example_inputs=example_inputs).chosen]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("first", ["stem_conv"]),
        ("all", ORDER),
        ("layer2.1.conv2", ["layer2.1.conv2"]),
        ("layer2.*.conv1", ["layer2.0.conv1", "layer2.1.conv1"]),
        ("*conv1", ["layer1.0.conv1", "layer2.0.conv1", "layer2.1.conv1"]),
        ("layer?.0.conv1", ["layer1.0.conv1", "layer2.0.conv1"]),
        ("layer2*", ORDER[3:]),
        ("layer[12].0.conv2", ["layer1.0.conv2", "layer2.0.conv2"]),
        (r"re:layer\d\.0\.conv[12]", ORDER[1:5]),
        ("re:.*conv1", ["layer1.0.conv1", "layer2.0.conv1", "layer2.1.conv1"]),
        (nn.Conv2d, ORDER),
        (nn.Module, ORDER),
        (lambda site: site.kernel_size == (1, 1), ORDER[1::2]),
        (lambda site: site.geometry.stride == (2, 2), ["layer2.1.conv1"]),
        (lambda site: site.order < 2, ORDER[:2]),
        (["first", "layer2.1.*"], ["stem_conv", "layer2.1.conv1", "layer2.1.conv2"]),
        (("stem_conv", lambda site: site.order == 6), ["stem_conv", "layer2.1.conv2"]),
        (["all", "first", "all"], ORDER),
        ("stem", ["stem_conv"]),
    ],
    ids=_name,
)
def test_selector_chooses_sites(where: Any, names: list[str]) -> None:
    assert chosen(Net(), where) == names


def test_default_is_the_first_executed_convolution() -> None:
    assert [site.name for site in ccp.plan(Net()).chosen] == ["stem_conv"]


@pytest.mark.parametrize("where", ["shortcut", "short*", "re:shortcut"])
def test_alias_names_the_site_that_it_stands_for(where: str) -> None:
    assert chosen(Net(), where) == ["layer1.0.conv2"]


def test_type_selects_subclasses_alone() -> None:
    class Special(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Special(3, 3, 1), nn.Conv1d(3, 3, 1))
    site_map = find_sites(model)
    by_type = {
        kind: [c.site.name for c in select(site_map, kind) if c.chosen]
        for kind in (Special, nn.Conv2d, nn.Conv1d)
    }
    assert by_type == {Special: ["1"], nn.Conv2d: ["0", "1"], nn.Conv1d: ["2"]}


def test_exact_name_comes_before_preset_and_glob() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first_conv = nn.Conv2d(3, 3, 1)
            self.neck = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.neck(self.first_conv(x))

    assert chosen(Named(), "neck") == ["neck"]


def test_every_choice_carries_its_reason() -> None:
    choices = select(find_sites(Net()), ["first", "layer1.*"])
    assert [(c.site.name, c.reason) for c in choices[:4]] == [
        ("stem_conv", "matches 'first'"),
        ("layer1.0.conv1", "matches 'layer1.*'"),
        ("layer1.0.conv2", "matches 'layer1.*'"),
        ("layer2.0.conv1", "not selected"),
    ]


def test_reason_names_the_type_or_the_callable() -> None:
    def small(site: Site) -> bool:
        return site.kernel_size == (1, 1)

    reasons = {c.reason for c in select(find_sites(Net()), [small, nn.Conv2d]) if c.chosen}
    assert reasons == {"matches small", "matches Conv2d"}


# --- presets on detectors ------------------------------------------------------------------------

RETINANET_HEADS = ["head.classification_head.conv.0.0", "head.regression_head.conv.0.0"]


@pytest.fixture(scope="module")
def retinanet() -> nn.Module:
    return torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    )


@pytest.fixture(scope="module")
def faster_rcnn() -> nn.Module:
    return torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )


def test_neck_is_every_1x1_of_the_feature_pyramid(
    retinanet: nn.Module, faster_rcnn: nn.Module
) -> None:
    inner = [f"backbone.fpn.inner_blocks.{level}.0" for level in range(3)]
    assert sorted(chosen(retinanet, "neck")) == inner
    assert sorted(chosen(faster_rcnn, "neck")) == inner[:2]


def test_head_is_the_first_convolution_of_each_head(
    retinanet: nn.Module, faster_rcnn: nn.Module
) -> None:
    assert sorted(chosen(retinanet, "head")) == RETINANET_HEADS
    assert chosen(faster_rcnn, "head") == ["rpn.head.conv.0.0"]


def test_head_goes_by_execution_where_it_is_known(retinanet: nn.Module) -> None:
    images = [torch.rand(3, 64, 96)]
    assert chosen(retinanet, "head", (images,)) == RETINANET_HEADS
    assert chosen(retinanet, "stem", (images,)) == ["backbone.body.conv1"]


def test_preset_that_fits_nothing_shows_the_sites() -> None:
    with pytest.raises(SelectionError, match=r"'neck' matches no .* sites are stem_conv, layer1"):
        ccp.plan(Net(), "neck")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("stem_cnv", "where='stem_cnv' matches no convolution of this model; close names: stem_co"),
        ("layer1.0.conv3", "close names: layer1.0.conv"),
        ("frist", "close names: first"),
        ("al", "close names: all"),
        ("layer9.*.conv1", "close names: layer"),
        ("*conv1*1", "close names: "),
        ("conv2", "close names: stem_conv, layer2.1.conv2, layer2.0.conv2, layer1.0.conv2"),
        ("zzz", "its sites are stem_conv, layer1.0.conv1, layer1.0.conv2, shortcut, layer2.0.con"),
        ("", "its sites are stem_conv"),
        ("re:conv1", "it must match the whole name; close names: stem_conv, layer2.1.conv1"),
        ("re:layer2", "'re:layer2' matches no convolution of this model; it must match the whole"),
        ("re:(", "'re:(' is not a regular expression: missing )"),
        (nn.Conv3d, "where=Conv3d matches no convolution of this model; its convolutions are of "),
        (lambda site: False, "it returned a false value for each of the 7 sites"),
        ([], "where=[] selects nothing; write 'first', 'all' or names of sites"),
        ((), "selects nothing"),
        (3, "where=3 is an int: write 'first', 'all', a name, a glob, 're:...', a module type"),
        (None, "where=None: write 'first'"),
        (["all", "stem_cnv"], "where='stem_cnv' matches no convolution"),
        ([["all"]], "where=['all'] is a list: write 'first'"),
    ],
    ids=_name,
)
def test_selector_that_matches_nothing_says_what_is_close(where: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)):
        ccp.plan(Net(), where)


def test_selection_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="matches no convolution"):
        ccp.plan(Net(), "nowhere")


def test_model_without_convolutions_is_an_error() -> None:
    with pytest.raises(SelectionError, match="the model has no convolution that coordinates"):
        ccp.plan(nn.Linear(2, 2), "all")


def test_failed_selection_changes_nothing() -> None:
    model = Net()
    with pytest.raises(SelectionError):
        ccp.patch_(model, ["all", "nowhere"])
    assert {type(m) for m in model.modules() if hasattr(m, "kernel_size")} == {nn.Conv2d}


def test_already_patched_site_is_refused_by_name() -> None:
    model = ccp.patch(Net(), ["stem_conv", "layer1.0.conv1"])
    for where in ("first", "stem_conv", "stem*", "re:stem_conv"):
        with pytest.raises(SelectionError, match="already patched: stem_conv"):
            ccp.plan(model, where)


# --- obstacles -----------------------------------------------------------------------------------


class Integer(Net):
    """Its second convolution has integer weights."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.layer1[0].conv1.weight
        self.layer1[0].conv1.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


OBSTACLE = "its weight has dtype torch.int8; coordinates need floats"


@pytest.mark.parametrize("where", ["all", "layer1.*", nn.Conv2d, "re:layer1.*"], ids=_name)
def test_selectors_of_many_warn_of_obstacles_and_patch_the_rest(where: Any) -> None:
    with pytest.warns(UserWarning, match=f"layer1.0.conv1: {OBSTACLE}") as caught:
        patched = ccp.patch(Integer(), where)
    assert caught[0].filename == __file__
    assert isinstance(patched.layer1[0].conv2, ccp.CoordConv2d)
    assert type(patched.layer1[0].conv1) is nn.Conv2d


def test_obstacle_of_a_site_named_exactly_is_an_error() -> None:
    message = f"where='layer1.0.conv1' cannot be patched:\n  layer1.0.conv1: {OBSTACLE}"
    with pytest.raises(SelectionError, match=re.escape(message)):
        ccp.patch(Integer(), "layer1.0.conv1")
    with pytest.raises(SelectionError, match=OBSTACLE):
        ccp.patch(Integer(), ["all", "layer1.0.conv1"])


def test_selector_of_many_that_meets_only_obstacles_is_an_error() -> None:
    with pytest.raises(SelectionError, match=OBSTACLE):
        ccp.plan(Integer(), "*1.0.conv1*")


def test_no_warning_without_obstacles() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ccp.patch(Net(), "all")


def _fails(site_map: Any) -> Any:
    raise KeyError("head")


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (_fails, "where='odd' failed: KeyError: 'head'"),
        (lambda: [], "where='odd' failed: TypeError"),
        (lambda sites: "layer1", "where='odd' gave 'layer1': .* a list of the sites"),
        (lambda sites: ("conv1",), r"where='odd' gave \['conv1'\]"),
        (lambda sites: torch.zeros(3), "where='odd' gave tensor"),
        (lambda sites: sites, "where='odd' gave SiteMap"),
    ],
)
def test_a_registered_selector_that_fails_is_told(
    choose: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "odd", choose)
    with pytest.raises(SelectionError, match=message):
        ccp.plan(Net(), "odd")
