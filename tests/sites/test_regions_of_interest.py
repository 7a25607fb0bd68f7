"""Convolutions behind RoIAlign and its like: found by the data flow, noted, warned of."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision import ops
from torchvision.models import detection
from torchvision.ops import roi_align as imported

import coordconv_patch as ccp
from coordconv_patch.graphs.conv_tracer import ConvTracer
from coordconv_patch.sites.find import find_sites

PICTURE = torch.rand(1, 3, 16, 16)
BOXES = torch.tensor([[0.0, 0, 0, 8, 8], [0.0, 4, 4, 15, 12]])


def behind(model: Any, example_inputs: Any = None) -> dict[str, str]:
    """The convolutions that see regions of interest, and the operator that gave them."""
    sites = find_sites(model, example_inputs).sites
    return {site.name: site.roi_operator for site in sites if site.roi_operator}


class Detector(nn.Module):
    """Features of the picture, a head on regions of them, and one on the picture."""

    def __init__(self, pool: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = pool or (lambda x, boxes: ops.roi_align(x, boxes, 4))
        self.mask_head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.weight = nn.Parameter(torch.rand(4, 4, 1, 1))
        self.mask_out = nn.Conv2d(4, 1, 1)
        self.picture_head = nn.Sequential(nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x).relu()
        regions = self.up(self.mask_head(self.pool(features, boxes)) * 2)
        flat = regions.flatten(1).sigmoid()
        masks = flat.reshape(regions.shape)
        masks = F.conv2d(masks, self.weight)
        return self.mask_out(masks), self.picture_head(features)


BEHIND = ["mask_head.0", "up", "weight", "mask_out"]
"""In order of execution."""


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("mask", detection.maskrcnn_resnet50_fpn),
        ("keypoint", detection.keypointrcnn_resnet50_fpn),
    ],
)
def test_all_of_torchvisions_mask_and_keypoint_heads_see_regions(name: str, build: Any) -> None:
    options = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    model = build(**options, box_score_thresh=0.0, box_detections_per_img=2)
    heads = [
        part
        for part, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and part.startswith("roi_heads.")
    ]
    assert {part.split(".")[1] for part in heads} == {f"{name}_head", f"{name}_predictor"}
    assert behind(model, [torch.rand(3, 64, 64)]) == dict.fromkeys(heads, "roi_align")


@pytest.mark.parametrize("example", [None, (PICTURE, BOXES)], ids=["traced", "run"])
@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("roi_align", lambda x, boxes: imported(x, [boxes[:, 1:]], 4)),
        ("roi_align", lambda x, boxes: ops.roi_align(x, boxes, 4)),
        ("roi_pool", lambda x, boxes: ops.roi_pool(x, boxes, 4)),
        ("roi_align", ops.RoIAlign(4, 1.0, 2)),
        ("ps_roi_align", lambda x, boxes: ops.ps_roi_align(x.repeat(1, 4, 1, 1), boxes, 2)),
        ("ps_roi_pool", ops.PSRoIPool(1, 1.0)),
    ],
)
def test_every_operator_marks_the_convolutions_behind_it(
    name: str, pool: Any, example: Any
) -> None:
    assert behind(Detector(pool), example) == dict.fromkeys(BEHIND, name)


@pytest.mark.parametrize("example", [None, (PICTURE, BOXES)], ids=["as told", "run"])
def test_exported_programs_tell_it_too(example: Any) -> None:
    program = ccp.from_exported(torch.export.export(Detector(), (PICTURE, BOXES)))
    assert set(behind(program, example)) == set(BEHIND)


class Pieces(nn.Module):
    """Regions written into another tensor piece by piece, as torchvision's pool of levels does."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.write, self.conv = write, nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        whole = x.new_zeros(2, 3, 4, 4)
        self.write(whole, ops.roi_align(x, boxes, 4))
        return self.conv(whole)


def _set(whole: Tensor, regions: Tensor) -> None:
    whole[[1, 0]] = regions


@pytest.mark.parametrize(
    "write",
    [
        _set,
        lambda whole, regions: whole.add_(regions),
        lambda whole, regions: whole[0].copy_(regions[0]),
        lambda whole, regions: torch.mul(regions, 2, out=whole),
    ],
    ids=["[]=", "add_", "a view", "out="],
)
def test_what_is_written_into_a_tensor_is_followed(write: Any) -> None:
    assert behind(Pieces(write), (PICTURE, BOXES)) == {"conv": "roi_align"}


def test_what_is_written_into_a_tensor_is_followed_in_graphs() -> None:
    model = Pieces(lambda whole, regions: whole.add_(regions))
    assert behind(model) == {"conv": "roi_align"}
    graph = ConvTracer().trace(model)
    (add,) = graph.find_nodes(op="call_method", target="add_")
    with graph.inserting_before(add):
        graph.call_function(operator.setitem, (add.args[0], slice(None), add.args[1]))
    graph.erase_node(add)
    assert behind(fx.GraphModule(model, graph)) == {"conv": "roi_align"}


class Reordered(nn.Module):
    """The picture's channels in an order that regions tell: still the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        regions = ops.roi_align(x, boxes, 4)
        return self.conv(x[:, regions.mean((0, 2, 3)).argsort()])


class Shaped(Reordered):
    """A tensor of the regions' size, of nothing of theirs."""

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        regions = ops.roi_align(x, boxes, 4)
        return self.conv(torch.ones(regions.shape)) + self.conv(torch.ones(regions.size()))


def test_indices_and_sizes_carry_no_regions_on() -> None:
    assert behind(Reordered(), (PICTURE, BOXES)) == {}
    assert behind(Shaped(), (PICTURE, BOXES)) == {}
    assert behind(Shaped()) == {}


class Inner(nn.Module):
    """A head that is a graph of its own, on regions."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.graph, self.conv = fx.symbolic_trace(head), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        return self.conv(self.graph(ops.roi_align(x, boxes, 4)))


@pytest.mark.parametrize("example", [None, (PICTURE, BOXES)], ids=["traced", "run"])
def test_graphs_within_graphs_are_followed(example: Any) -> None:
    assert behind(Inner(), example) == {"graph.0": "roi_align", "conv": "roi_align"}


def roi_align(x: Tensor, boxes: Tensor) -> Tensor:
    """A function of that name, of somebody else."""
    return x + boxes.mean()


def test_other_functions_of_the_name_mean_nothing() -> None:
    assert behind(Detector(roi_align), (PICTURE, BOXES)) == {}
    assert behind(Detector(roi_align)) == {}


def test_plans_and_surveys_note_it_in_the_row() -> None:
    note = "its coordinates are those of a region of interest (roi_align), not of the picture"
    for shown in (ccp.plan(Detector(), "all"), ccp.survey(Detector())):
        assert [row.site.name for row in shown.rows if note in row.note] == BEHIND
        assert shown.notes == ()
        assert note in str(shown)


@pytest.mark.parametrize("where", ["head", "all", nn.Conv2d, ["backbone", "head"]])
def test_choices_that_do_not_name_it_are_warned_of(where: Any) -> None:
    for patch in (ccp.patch, ccp.patch_):
        with pytest.warns(
            UserWarning, match=r"of a box, not of the picture: .*mask_head\.0"
        ) as log:
            model = patch(Detector(), where)
        assert {warning.filename for warning in log} == {__file__}
        assert "mask_head.0" in [status.name for status in ccp.layer_status(model)]


@pytest.mark.parametrize(
    "where",
    [
        *("mask_head.0", "mask_*", "re:mask.*", ["head", "mask_head.0"]),
        *("first", "picture_head.0", lambda site: not site.roi_operator),
    ],
)
def test_names_and_choices_of_the_picture_are_not_warned_of(where: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ccp.patch(Detector(), where)


class Untraceable(Detector):
    """It asks for values, which a trace does not have."""

    def __init__(self) -> None:
        super().__init__(ops.RoIAlign(4, 1.0, 2))

    def forward(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, boxes if boxes.max() > 1 else boxes * 16)


def test_what_no_trace_shows_is_said_until_example_inputs_show_it() -> None:
    unseen = r"^pool: convolutions behind pools of regions of interest"
    decided = ccp.plan(Untraceable(), "head")
    (note,) = decided.notes
    assert note in " ".join(str(decided).split())
    assert decided.to_dict()["notes"] == [note]
    with pytest.warns(UserWarning, match=unseen):
        ccp.patch(Untraceable(), "head")
    seen = ccp.plan(Untraceable(), "head", example_inputs=(PICTURE, BOXES))
    assert seen.notes == ()
    assert [site.name for site in seen.chosen] == [site.name for site in decided.chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ccp.patch(Untraceable(), "mask_head.0")
