"""Layers behind pooled regions see where in the picture each bin lies."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from small_detectors import mask_rcnn, outputs_of, patched, retinanet
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, RoIAlign, roi_align

import coordconv_patch as ccp
from coordconv_patch.layers.coordinates import Coordinates

AREA = Coordinates(align_corners=False)
"""Edges are -1 and 1, so a position has one coordinate at every resolution."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SMALL, TALL = torch.rand(3, 64, 96), torch.rand(3, 150, 64)


def showing_(layer: nn.Module) -> None:
    """Let the first two output channels of a 3x3 convolution be its coordinates."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.coord_weight[0, 0, 1, 1] = layer.coord_weight[1, 1, 1, 1] = 1.0


def coordinate_picture(height: int, width: int, size: tuple[float, float]) -> Tensor:
    """x and y at the centres of a map's pixels, in a picture of a size in the map's pixels."""
    x = (2 * torch.arange(width, dtype=torch.float64) + 1) / size[1] - 1
    y = (2 * torch.arange(height, dtype=torch.float64) + 1) / size[0] - 1
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)))


BOXES = [
    torch.tensor([[8.0, 8, 40, 40], [20, 16, 44, 44.5], [30, 30, 31, 33.2]]),
    torch.tensor([[8.0, 10, 36, 31]]),
]
"""The third is smaller than a pixel of any map here. All stay away from the maps' borders, where
roi_align repeats the border's pixels."""


class Pooled(nn.Module):
    """Two maps of a stride of 4 and 8, and a head behind its pool."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool, self.head = pool, nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, *args: object) -> Tensor:
        return self.head(self.pool(*args))


def test_bins_of_each_level_lie_where_roi_align_reads() -> None:
    pool = MultiScaleRoIAlign(["a", "b"], 4, 2, canonical_scale=32, canonical_level=3)
    model = patched(Pooled(pool), coords=AREA)
    showing_(model.head)
    ccp.follow_regions_(model)
    maps, sizes = (
        {"a": torch.zeros(2, 2, 16, 24), "b": torch.zeros(2, 2, 8, 12)},
        [(64, 96), (50, 61)],
    )
    with torch.no_grad():
        seen = model(maps, BOXES, sizes).double()
    levels = model.pool.map_levels(BOXES).tolist()
    assert set(levels) == {0, 1}
    rows = [(index, box) for index, boxes in enumerate(BOXES) for box in boxes]
    for actual, level, (index, box) in zip(seen, levels, rows, strict=True):
        stride, (h, w) = 2 ** (level + 2), (size / 2 ** (level + 2) for size in sizes[index])
        picture = coordinate_picture(64 // stride, 96 // stride, (h, w))
        expected = roi_align(picture[None], [box[None].double()], 4, 1 / stride, 2)[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("as_rows", [False, True])
def test_a_single_pool_reads_where_it_says(aligned: bool, as_rows: bool) -> None:
    model = patched(Pooled(RoIAlign(4, 0.25, 2, aligned)), coords=AREA)
    showing_(model.head)
    ccp.follow_regions_(model)
    picture = coordinate_picture(16, 24, (16, 24))
    rois = BOXES
    if as_rows:
        numbers = [torch.full((len(boxes), 1), float(n)) for n, boxes in enumerate(BOXES)]
        rois = torch.cat([torch.cat(pair, 1) for pair in zip(numbers, BOXES, strict=True)])
    with torch.no_grad():
        seen = model(torch.zeros(2, 2, 16, 24), rois)
    double = [boxes.double() for boxes in BOXES]
    expected = roi_align(picture.expand(2, -1, -1, -1), double, 4, 0.25, 2, aligned)
    torch.testing.assert_close(seen.double(), expected, rtol=0, atol=1e-6)


def seen_by_mask_head(model: nn.Module, pictures: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What the mask head's first convolution gives, and the boxes that its pool was given."""
    kept: list[list[Tensor]] = []
    hook = model.roi_heads.mask_roi_pool.register_forward_pre_hook(
        lambda module, args: kept.append(args[1])
    )
    (seen,) = outputs_of(model.roi_heads.mask_head[0][0], lambda: model(pictures))
    hook.remove()
    return seen, kept[0]


def test_mask_rcnns_heads_see_the_picture() -> None:
    model = patched(mask_rcnn(), "roi_heads.mask_head.*", coords=AREA)
    showing_(model.roi_heads.mask_head[0][0])
    before, _ = seen_by_mask_head(model, [SMALL, TALL])
    assert torch.equal(before[0, :2], before[-1, :2])  # every region alike, so far
    ccp.follow_regions_(ccp.follow_padding_(model))
    seen, boxes = seen_by_mask_head(model, [SMALL, TALL])
    levels = model.roi_heads.mask_roi_pool.map_levels(boxes)
    pixel = torch.tensor([4.0, 8.0])[levels]
    joined, lengths = torch.cat(boxes), [len(each) for each in boxes]
    sizes = torch.tensor([[64.0, 96], [150, 64]]).repeat_interleave(torch.tensor(lengths), 0)
    scaled = [min(64 / 64, 160 / 96), min(64 / 64, 160 / 150)]
    assert scaled == [1, 1]
    assert len(levels) > 4
    for channel, axis in ((0, 0), (1, 1)):
        start, end = joined[:, axis], joined[:, axis + 2]
        length = torch.maximum(end - start, pixel)
        bins = (torch.arange(6) + 0.5) / 6
        position = start[:, None] + pixel[:, None] / 2 + length[:, None] * bins
        line = 2 * position / sizes[:, 1 - axis, None] - 1
        line = line[:, None, :] if axis == 0 else line[:, :, None]
        torch.testing.assert_close(seen[:, channel], line.expand(-1, 6, 6), rtol=0, atol=2e-6)


def test_regions_that_overlap_agree() -> None:
    """What two regions see is read off one picture of coordinates, up to the conversion at ends."""
    model = ccp.follow_regions_(patched(Pooled(RoIAlign(8, 0.25, 2, True)), coords=AREA))
    showing_(model.head)
    boxes = torch.tensor([[10.0, 10, 42, 42], [18, 14, 50, 46]])  # two bins right, one bin down
    with torch.no_grad():
        first, second = model(torch.zeros(1, 2, 16, 24), [boxes])
    torch.testing.assert_close(first[:, 1:, 2:], second[:, :-1, :-2], rtol=0, atol=1e-6)


def test_regions_do_not_depend_on_what_is_beside_their_picture() -> None:
    """The map is padded, and the picture's size is not: so is a window's."""
    model = patched(mask_rcnn(), "roi_heads.mask_head.*", coords=AREA)
    showing_(model.roi_heads.mask_head[0][0])
    ccp.follow_regions_(model)
    boxes = [torch.tensor([[8.0, 8, 40, 40], [20, 16, 60, 60]]), torch.tensor([[8.0, 8, 40, 100]])]
    model.roi_heads.mask_roi_pool.register_forward_pre_hook(
        lambda module, args: (args[0], boxes[: len(args[1])], args[2])
    )
    head = model.roi_heads.mask_head[0][0]

    def seen_in(pictures: list[Tensor]) -> Tensor:
        def run() -> None:
            with contextlib.suppress(IndexError):  # what is behind expects other boxes
                model(pictures)

        return outputs_of(head, run)[0][:2, :2]

    windows = [ccp.Window((10, 20), (64, 96), (200, 300)), ccp.Window((0, 0), (9, 9), (9, 9))]
    seen = []
    for pictures in ([SMALL], [SMALL, TALL]):
        seen.append(seen_in(pictures))
        with ccp.places(model, windows[: len(pictures)]):
            seen.append(seen_in(pictures))
    alone, alone_in_window, beside, beside_in_window = seen
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone_in_window, beside_in_window, rtol=0, atol=1e-6)
    expected = torch.stack(
        (((alone[:, 0] + 1) * 48 + 20) / 150 - 1, ((alone[:, 1] + 1) * 32 + 10) / 100 - 1), 1
    )
    torch.testing.assert_close(alone_in_window, expected, rtol=0, atol=2e-6)


def test_at_zero_weights_and_in_training_outputs_are_the_plain_ones() -> None:
    plain = mask_rcnn().eval()
    model = ccp.follow_regions_(ccp.follow_padding_(ccp.patch(plain, "all")))
    with torch.no_grad():
        for own, theirs in zip(model([SMALL, TALL]), plain([SMALL, TALL]), strict=True):
            assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5, 40, 40]]),
            "labels": torch.tensor([1]),
            "masks": F.pad(torch.ones(1, 20, 20, dtype=torch.uint8), (0, w - 20, 0, h - 20)),
        }
        for h, w in ((64, 96), (150, 64))
    ]
    losses = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(1)
        losses.append(each([SMALL, TALL], targets))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    sum(losses[0].values()).backward()
    assert all(weight.grad is not None for weight in ccp.coord_parameters(model))


def test_no_region_at_all_is_a_batch_of_none() -> None:
    model = patched(mask_rcnn())
    model.roi_heads.score_thresh = 2.0
    ccp.follow_regions_(ccp.follow_padding_(model))
    with torch.no_grad():
        assert [len(each["masks"]) for each in model([SMALL, TALL])] == [0, 0]


def test_padding_alone_leaves_regions_whole_and_both_end_one_by_one() -> None:
    model = patched(mask_rcnn(), "roi_heads.mask_head.*", coords=AREA)
    showing_(model.roi_heads.mask_head[0][0])
    whole = seen_by_mask_head(model, [SMALL, TALL])[0][0, :2]

    def is_whole() -> bool:
        seen = seen_by_mask_head(model, [SMALL, TALL])[0][:, :2]
        return bool(torch.isclose(seen, whole, rtol=0, atol=1e-6).all())

    ccp.follow_padding_(model)
    assert is_whole()
    ccp.follow_regions_(model)
    assert not is_whole()
    ccp.follow_padding_(model, False)
    assert not is_whole()
    ccp.follow_padding_(ccp.follow_regions_(model, False))
    assert is_whole()


def test_a_model_without_regions_is_refused() -> None:
    with pytest.raises(ccp.PatchError, match=r"RetinaNet does not pool .*RoIAlign.*places"):
        ccp.follow_regions_(patched(retinanet()))
