"""The dry run: its table, its numbers, its values for programs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
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
    assert "sizes are unknown, so the bars compare weights" in str(plan)
    assert "MAdds" not in str(plan)
    assert "multiply-adds" not in plan.summary()


def test_sites_that_are_not_chosen_cost_nothing(x: Tensor) -> None:
    plan = ccp.plan(Net(), "shared", example_inputs=x)
    assert [row.site.name for row in plan.rows if row.chosen] == ["shared"]
    assert [site.name for site in plan.chosen] == ["shared"]
    assert {row.parameters for row in plan.rows if not row.chosen} == {0}
    assert plan.multiply_adds == 17280


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells by the name before them; cells are two spaces or more apart."""
    lines = [re.split(r" {2,}", line[2:]) for line in text.splitlines() if "  " in line[2:]]
    return {cells[0]: cells[1:] for cells in lines}


def test_sites_are_shown_with_class_geometry_sizes_calls_and_costs(x: Tensor) -> None:
    plan = ccp.plan(Net(), ["stem", "shared"], example_inputs=x)
    lines = str(plan.by_site()).splitlines()
    rows = rows_of("\n".join(lines))
    stem = ["Conv2d", "3\u21928 7\u00d77 s2 p3", "16\u00d724", "8\u00d712", "1", "784", "75.3 k"]
    assert rows["stem"] == [*stem, "\u2588" * 12]
    sizes = "8\u00d712, 4\u00d76"
    assert rows["shared"][1:5] == ["8\u21928 3\u00d73 p1 depthwise", sizes, sizes, "2"]
    assert rows["up"][:2] == ["ConvTranspose2d", "8\u21924 3\u00d73 s2 transposed"]
    marks = {line[2:].split()[0]: line[0] for line in lines if line[2:].split()}
    assert (marks["stem"], marks["shared"], marks["up"]) == ("+", "+", " ")
    assert lines[0] == "coordinates (x, y)"
    assert (
        "2 of 5 sites chosen, 928 coordinate weights, 92.5 k multiply-adds a forward pass "
        "(traced whole)"
    ) in lines


def test_a_bar_is_as_long_as_a_site_is_costly(x: Tensor) -> None:
    text = str(ccp.plan(Net(), ["stem", "shared"], example_inputs=x).by_site())
    bars = {name: cells[-1] for name, cells in rows_of(text).items() if "\u2588" in cells[-1]}
    eighths = round(17280 / 75264 * 12 * 8)
    assert bars["stem"] == "\u2588" * 12
    assert bars["shared"] == "\u2588" * (eighths // 8) + chr(0x2590 - eighths % 8)


def test_a_plan_has_a_row_for_each_stage() -> None:
    plan = ccp.plan(timm.create_model("resnet50"), ["first", "layer4.*.conv2"])
    rows = rows_of(str(plan))
    assert list(rows)[:6] == ["stage", "conv1", "layer1.*", "layer2.*", "layer3.*", "layer4.*"]
    assert rows["layer3.*"] == ["19"]
    assert rows["layer4.*"][:3] == ["10", "3", "27,648"]
    assert "+ matches 'layer4.*.conv2': layer4.0.conv2, layer4.1.conv2, layer4.2.conv2" in str(plan)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_plan_fits_the_terminal_with_whole_names(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = torchvision.models.get_model(
        "retinanet_resnet50_fpn", weights=None, weights_backbone=None
    ).eval()
    plan = ccp.plan(model, "all")
    for shown in (plan, plan.by_site()):
        assert max(map(len, str(shown).splitlines())) <= width
        console = Console(width=width, file=io.StringIO(), force_terminal=False)
        console.print(shown)
        assert console.file.getvalue().rstrip() == str(shown)  # type: ignore[attr-defined]
    text = str(plan.by_site())
    assert [row.site.name for row in plan.rows if f"+ {row.site.name}" not in text] == []
    if width >= 80:
        assert "\u2588" * 12 in text


def test_no_column_says_the_same_in_every_row(x: Tensor) -> None:
    text = str(ccp.plan(timm.create_model("resnet18"), "all").by_site())
    assert text.count("Conv2d") == 1
    assert "every row: class Conv2d" in text


def test_its_repr_is_short() -> None:
    plan = ccp.plan(timm.create_model("resnet50"), "all")
    assert repr(plan) == (
        "<Plan: 53 of 53 sites chosen, 119,680 coordinate weights (traced whole)>"
    )


def test_a_notebook_gets_the_stages_and_a_page_every_site(tmp_path: Path) -> None:
    plan = ccp.plan(timm.create_model("resnet50"), "first", example_inputs=torch.rand(1, 3, 64, 64))
    cell = plan._repr_html_()
    assert "layer4.*" in cell
    assert "layer4.2.conv3" not in cell
    assert len(cell) < 6000
    plan.to_html(tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    places = [page.index(f">{row.site.name}</td>") for row in plan.rows if "." in row.site.name]
    assert places == sorted(places)
    assert 'title="conv1, 32\u00d732"' in page
    assert '<tr class="strong"><td>conv1</td>' in page
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="|url\(', page) == []


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ccp.ArgumentError, match=r"cannot write .*nowhere"):
        ccp.plan(Net()).to_html(tmp_path / "nowhere" / "plan.html")


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
    text = str(plan.by_site())
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
