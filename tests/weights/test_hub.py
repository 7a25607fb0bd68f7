"""Coordinate weights as a folder of the Hugging Face Hub, there and back."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import ArgumentError, WeightsError


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()


def trained() -> nn.Module:
    model = ccp.patch(base(), "all", coords=ccp.Coordinates(radius=True))
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


X = torch.rand(2, 3, 9, 12)


class Hub:
    """The Hub, as a folder: what huggingface_hub does to it, without a network."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, Any]] = []

    def HfApi(self, token: str | None = None) -> Hub:
        self.asked.append(("token", token))
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        self.asked.append(("private", private))
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

    def file_exists(self, name: str, file: str) -> bool:
        return (self.root / name / file).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, ignore_patterns: Any
    ) -> SimpleNamespace:
        for path in Path(folder_path).iterdir():
            if path.name not in (ignore_patterns or ()):
                shutil.copy(path, self.root / repo_id / path.name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def hf_hub_download(self, name: str, file: str, **options: Any) -> str:
        self.asked.append(("download", options))
        return str(self.root / name / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for name in ("HfApi", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


def same(left: nn.Module, right: nn.Module) -> bool:
    outputs: list[Tensor] = [model(X) for model in (left, right)]
    return torch.equal(*outputs) and not torch.equal(outputs[0], base()(X))


def test_a_folder_goes_there_and_back(tmp_path: Path) -> None:
    model = trained()
    assert ccp.save_pretrained(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    plain = base()
    loaded = ccp.from_pretrained(plain, tmp_path / "a" / "b")
    assert same(loaded, model)
    assert ccp.layer_status(plain) == ()
    assert same(ccp.from_pretrained(plain, str(tmp_path / "a" / "b")), model)


def test_the_configuration_says_what_programs_ask(tmp_path: Path) -> None:
    ccp.save_pretrained(trained(), tmp_path, base_model="timm/resnet50.a1_in1k")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model"] == "timm/resnet50.a1_in1k"
    assert config["sites"]["0"] == {"coords": {"radius": True}, "shape": [8, 3, 3, 3]}
    assert list(config["sites"]) == ["0", "2"]
    header = json.loads(
        next(iter(_metadata(tmp_path / "model.safetensors")["coordconv_patch"].splitlines()))
    )
    assert config["fingerprint"] == header["fingerprint"]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_the_card_has_the_hubs_fields_and_a_row_for_each_convolution(tmp_path: Path) -> None:
    model = trained()
    report = ccp.plan(base(), "all", example_inputs=X)
    ccp.save_pretrained(model, tmp_path, base_model='timm/"odd": name', report=report)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "coordconv-patch"
    assert card.data.base_model == 'timm/"odd": name'
    assert card.data.tags == ["coordconv", "coordconv-patch"]
    norm = ccp.layer_status(model)[0].norm
    assert f"| `0` | x, y, r | 8\u00d73\u00d73\u00d73 | {norm:.3g} |" in card.text
    assert "2 convolutions of" in card.text
    assert "228 weights" in card.text  # 8 * 3 * 9 + 4 * 3
    assert str(report) in card.text
    (code,) = [part for part in card.text.split("```") if part.startswith("python")]
    compile(code.removeprefix("python"), "card", "exec")


def test_a_card_that_somebody_has_written_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    ccp.save_pretrained(trained(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_one_convolution_is_one(tmp_path: Path) -> None:
    ccp.save_pretrained(ccp.patch(base()), tmp_path)
    assert "1 convolution of a model also sees coordinates (x, y)" in " ".join(
        (tmp_path / "README.md").read_text().split()
    )


def test_a_repository_goes_there_and_back(hub: Hub) -> None:
    model = trained()
    url = ccp.push_to_hub(model, "me/coords", base_model="a/b", private=True, token="t")
    assert url == "https://hub/me/coords/commit/1"
    assert hub.asked == [("token", "t"), ("private", True)]
    assert (
        'ccp.from_pretrained(model, "me/coords")'
        in (hub.root / "me" / "coords" / "README.md").read_text()
    )
    loaded = ccp.from_pretrained(base(), "me/coords", revision="v1")
    assert same(loaded, model)
    assert hub.asked[-1] == ("download", {"revision": "v1"})


def test_a_repositorys_own_card_stays(hub: Hub) -> None:
    (hub.root / "me" / "coords").mkdir(parents=True)
    (hub.root / "me" / "coords" / "README.md").write_text("mine")
    ccp.push_to_hub(trained(), "me/coords")
    assert (hub.root / "me" / "coords" / "README.md").read_text() == "mine"
    assert (hub.root / "me" / "coords" / "model.safetensors").exists()


def test_another_model_is_refused_unless_the_check_is_left_out(tmp_path: Path) -> None:
    ccp.save_pretrained(trained(), tmp_path)
    other = base()
    with torch.no_grad():
        other[0].weight.mul_(2)
    with pytest.raises(WeightsError, match="belongs to a model with other weights"):
        ccp.from_pretrained(other, tmp_path)
    assert len(ccp.coord_parameters(ccp.from_pretrained(other, tmp_path, check_base=False))) == 2


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(WeightsError, match=r"there is no folder .*none"):
            ccp.from_pretrained(base(), missing)
    with pytest.raises(WeightsError, match=r"'me/none' is neither .*no route.*Is there a netw"):
        ccp.from_pretrained(base(), "me/none")
    with pytest.raises(WeightsError, match=r"there is no file .*model\.safetensors"):
        ccp.from_pretrained(base(), tmp_path)


def test_an_upload_that_is_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise ValueError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", refuses)
    with pytest.raises(WeightsError, match=r"'me/x' cannot be written \(ValueError: 401.*hf auth"):
        ccp.push_to_hub(trained(), "me/x")


def test_a_plain_model_and_a_wrong_report_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is nothing to save"):
        ccp.save_pretrained(base(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match=r"report=\{\} is a dict: pass what export"):
        ccp.save_pretrained(trained(), tmp_path / "b", report={})  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"cannot write .*file"):
        ccp.save_pretrained(trained(), tmp_path / "file")


HALF_A_CHARACTER = "\ud800"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("base_model", Path("timm/resnet18")),
        ("base_model", None),
        ("base_model", HALF_A_CHARACTER),
        ("repository", 5),
        ("repository", HALF_A_CHARACTER),
        ("include_batch_norm", "no"),
    ],
)
def test_wrong_arguments_leave_the_folder_as_it_was(
    tmp_path: Path, argument: str, value: Any
) -> None:
    folder = tmp_path / "weights"
    with pytest.raises(ArgumentError, match=f"{argument}="):
        ccp.save_pretrained(trained(), folder, **{argument: value})
    assert not folder.exists()
    ccp.save_pretrained(ccp.patch(base()), folder)
    (folder / "README.md").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ArgumentError, match=f"{argument}="):
        ccp.save_pretrained(trained(), folder, **{argument: value})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_that_cannot_be_saved_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "weights"
    model = trained()
    with torch.no_grad():
        ccp.coord_parameters(model)[0].fill_(float("nan"))
    with pytest.raises(WeightsError, match="not finite"):
        ccp.save_pretrained(model, folder)
    assert list(tmp_path.iterdir()) == []
    ccp.save_pretrained(ccp.patch(base()), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match="not finite"):
        ccp.save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(WeightsError, match=r"cannot write .*ENOSPC"):
        ccp.save_pretrained(trained(), tmp_path / "deep" / "weights")
    assert list(tmp_path.iterdir()) == []


def test_names_may_be_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(name: str, *_: Any, **__: Any) -> None:
        raise ValueError(f"{name} is too long")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuses)
    with pytest.raises(WeightsError, match="is neither a folder nor a repository") as caught:
        ccp.from_pretrained(base(), "n" * 300)
    assert len(str(caught.value)) < 700


def test_an_upload_checks_its_arguments_first(hub: Hub) -> None:
    for wrong in ({"repository": None}, {"message": 5}, {"private": "no"}, {"base_model": 5}):
        with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}="):
            ccp.push_to_hub(trained(), **{"repository": "me/x", **wrong})  # type: ignore[arg-type]
    assert not hub.root.exists()


def test_without_the_hubs_package_folders_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = trained()
    ccp.save_pretrained(model, tmp_path)
    assert same(ccp.from_pretrained(base(), tmp_path), model)
    with pytest.raises(ArgumentError, match="push_to_hub needs the package huggingface_hub"):
        ccp.push_to_hub(model, "me/x")
    with pytest.raises(ArgumentError, match="from_pretrained needs the package huggingface_hub"):
        ccp.from_pretrained(base(), "me/x")


def test_torch_hub_gives_a_patched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: make(name, **rest))
    root = Path(__file__).parents[2]
    model = torch.hub.load(str(root), "patched", "timm:resnet10t?num_classes=5", source="local")
    assert [status.name for status in ccp.layer_status(model)] == ["conv1.0"]
    assert model.num_classes == 5
