"""The dry run: its table, its numbers, its values for programs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import coordconv_patch as ccp
from coordconv_patch.patching.plan import survey


class Net(nn.Module):
    """A stem, a conv called at two sizes, a squeeze-excite on one pixel, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x))
        x = self.shared(F.max_pool2d(x, 2))
        x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.up(x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 16, 24)


def test_parameters_and_multiply_adds_are_the_ones_worked_out_by_hand(x: Tensor) -> None:
    plan = ccp.plan(Net(), "all", example_inputs=x)
    numbers = {row.site.name: (row.parameters, row.multiply_adds) for row in plan.rows}
    assert numbers == {
        # 8 outputs, 2 coordinates, 7 x 7; used at each of 8 x 12 output pixels.
        "stem": (8 * 2 * 49, 8 * 2 * 49 * 8 * 12),
        # Whatever the groups; at 8 x 12 and at 4 x 6.
        "shared": (8 * 2 * 9, 8 * 2 * 9 * (8 * 12 + 4 * 6)),
        "squeeze": (8 * 2, 8 * 2),
        # Transposed: at each of 4 x 6 input pixels.
        "up": (2 * 4 * 9, 2 * 4 * 9 * 4 * 6),
        "unused": (4 * 2, 0),
    }
    assert plan.parameters == 784 + 144 + 16 + 72 + 8
    assert plan.multiply_adds == 75264 + 17280 + 16 + 1728


def test_radius_adds_a_third_channel(x: Tensor) -> None:
    plan = ccp.plan(Net(), "stem", coords=ccp.Coordinates(radius=True), example_inputs=x)
    assert plan.parameters == 8 * 3 * 49


def test_numbers_are_independent_of_the_batch_size(x: Tensor) -> None:
    one, eight = (
        ccp.plan(Net(), "all", example_inputs=torch.rand(n, 3, 16, 24)).multiply_adds
        for n in (1, 8)
    )
    assert one == eight


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_multiply_adds_agree_with_torchs_flop_counter(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.rand(1, 3, 64, 96)
    plan = ccp.plan(model, "all", example_inputs=x)
    patched = ccp.patch(model, "all")
    counts = []
    for each in (model, patched):
        with FlopCounterMode(display=False) as counter:
            each(x)
        counts.append(counter.get_total_flops())
    assert plan.multiply_adds == (counts[1] - counts[0]) / 2 > 1e6
    assert plan.parameters == sum(w.numel() for w in ccp.coord_parameters(patched))


def test_sizes_and_costs_are_unknown_without_example_inputs() -> None:
    plan = ccp.plan(Net(), "all")
    assert plan.multiply_adds is None
    assert plan.parameters == 1024
    assert "?" in str(plan)
    assert "multiply-adds" not in plan.summary()


def test_sites_that_are_not_chosen_cost_nothing(x: Tensor) -> None:
    plan = ccp.plan(Net(), "shared", example_inputs=x)
    assert [row.site.name for row in plan.rows if row.chosen] == ["shared"]
    assert [site.name for site in plan.chosen] == ["shared"]
    assert {row.parameters for row in plan.rows if not row.chosen} == {0}
    assert plan.multiply_adds == 17280


def test_table_shows_name_class_geometry_sizes_calls_costs_and_reason(x: Tensor) -> None:
    lines = str(ccp.plan(Net(), ["stem", "shared"], example_inputs=x)).splitlines()
    row = {
        cells[1]: cells
        for cells in ([c.strip() for c in ln.split("\u2502")[1:-1]] for ln in lines)
        if len(cells) > 1
    }
    assert row["stem"] == [
        "+",
        "stem",
        "Conv2d",
        "3\u21928 7\u00d77 s2 p3",
        "16\u00d724",
        "8\u00d712",
        "1",
        "784",
        "75.3 k",
        "matches 'stem'",
    ]
    assert row["shared"][3:7] == [
        "8\u21928 3\u00d73 p1 depthwise",
        "8\u00d712, 4\u00d76",
        "8\u00d712, 4\u00d76",
        "2",
    ]
    assert row["up"][0] == ""
    assert row["up"][2:4] == ["ConvTranspose2d", "8\u21924 3\u00d73 s2 transposed"]
    assert row["up"][-1] == "not selected"
    assert lines[0] == "coordinates (x, y)"
    assert lines[-1] == (
        "2 of 5 sites chosen, 928 coordinate weights, 92.5 k multiply-adds a forward pass "
        "(traced whole)"
    )


def test_notes_tell_of_one_pixel_inputs_and_convolutions_never_called(x: Tensor) -> None:
    notes = {row.site.name: row.note for row in ccp.plan(Net(), example_inputs=x).rows}
    assert notes == {
        "stem": "",
        "shared": "",
        "squeeze": "its input is one pixel, whose coordinates are 0",
        "up": "",
        "unused": "never called on the example inputs",
    }


def test_every_site_name_stands_whole_in_the_table() -> None:
    model = timm.create_model("efficientnet_b0")
    nested = nn.Sequential()
    nested.add_module("backbone_of_the_feature_pyramid_network", model)
    plan = ccp.plan(nested, "all", example_inputs=torch.rand(1, 3, 32, 32))
    text = str(plan)
    assert [row.site.name for row in plan.rows if row.site.name not in text] == []


def test_functional_convolutions_of_plain_modules_need_no_note(x: Tensor) -> None:
    model = nn.Sequential(Functional(), nn.Conv2d(4, 4, 1))
    rows = {row.site.name: row for row in ccp.plan(model, "all", example_inputs=x).rows}
    assert [row.note for row in rows.values()] == ["", ""]
    assert [row.chosen for row in rows.values()] == [True, True]


def test_traced_regions_are_counted_in_the_summary(x: Tensor) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    plan = ccp.plan(Untraceable(), "all", example_inputs=x)
    assert plan.summary().endswith("(2 traced regions)")


def test_values_for_programs_are_json(x: Tensor) -> None:
    plan = ccp.plan(Net(), "stem", coords="mkocabas", example_inputs=x)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["coords"] == {"order": "yx"}
    assert values["order_known"] is True
    assert (values["parameters"], values["multiply_adds"]) == (784, 75264)
    assert [site["name"] for site in values["sites"]] == [row.site.name for row in plan.rows]
    stem, shared = values["sites"][:2]
    assert stem["geometry"]["kernel_size"] == [7, 7]
    assert (stem["chosen"], stem["reason"]) == (True, "matches 'stem'")
    assert shared["calls"] == [[[8, 12], [8, 12]], [[4, 6], [4, 6]]]
    assert (shared["chosen"], shared["multiply_adds"]) == (False, None)


@pytest.mark.parametrize("where", ["all", "kernel"])
def test_values_for_programs_are_json_for_unknown_geometry(where: str) -> None:
    class Computed(Functional):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.LazyConv2d(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(super().forward(x), self.kernel * x.mean()) + self.conv(x)

    values: Any = json.loads(json.dumps(ccp.plan(Computed(), where).to_dict()))
    assert {site["name"]: site["geometry"] is None for site in values["sites"]} == {
        "kernel": False,
        "conv2d": True,
        "conv": True,
    }


def test_plan_of_an_exported_program_names_its_functions(x: Tensor) -> None:
    exported = torch.export.export(Net(), (x,))
    plan = ccp.plan(exported, "all")
    assert [row.site.class_name for row in plan.rows][:2] == ["conv2d.default", "conv2d.default"]
    assert plan.multiply_adds == ccp.plan(Net(), "all", example_inputs=x).multiply_adds


def test_plan_takes_the_coordinates_by_name() -> None:
    assert ccp.plan(Net(), coords="mkocabas").coords == ccp.Coordinates.preset("mkocabas")
    assert ccp.plan(Net()).coords == ccp.Coordinates()
    with pytest.raises(ValueError, match="no coordinate preset"):
        ccp.plan(Net(), coords="mkocabs")


# --- windows --------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.part = nn.Conv2d(3, 3, 3), Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.conv(self.conv(x)))


def test_a_window_is_named_in_the_plan() -> None:
    window = ccp.Window((0, 8), (8, 8), (16, 16))
    plan = ccp.plan(Net(), "first", coords=ccp.Coordinates(window=window))
    assert "'offset': (0, 8)" in str(plan)
    assert plan.to_dict()["coords"]["window"]["image_size"] == (16, 16)


def test_the_windows_of_patched_sites_are_named_in_plans_and_surveys() -> None:
    where = ["conv@1", "part.kernel"]
    model = ccp.patch(Twice(), where, example_inputs=torch.zeros(1, 3, 12, 12))
    window = ccp.Window((0, 8), (8, 8), (16, 16))
    for wanted in (None, window):
        ccp.set_window_(model, wanted)
        shown = survey(model)
        notes = {row.site.name: row.note for row in shown.rows}
        assert set(notes) == {"conv", "part.kernel"}
        for note in notes.values():
            assert (f"its coordinates are those of {window}" in note) is (wanted is not None)
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), "first")
    ccp.set_window_(model, window)
    assert str(window) in str(ccp.plan(model, "1"))
