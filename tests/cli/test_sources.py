"""Models named on the command line, and weights from files."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.cli import model_sources
from coordconv_patch.cli.checkpoint import load_checkpoint_
from coordconv_patch.cli.loaded import LoadedModel
from coordconv_patch.cli.model_names import name_and_arguments
from coordconv_patch.cli.sources import load_model, parse_shape
from coordconv_patch.errors import ArgumentError, MissingPackageError, ModelSourceError

CODE = """
import torch
from torch import nn

import helper_beside_it


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, helper_beside_it.CHANNELS, 3)

    def forward(self, x):
        return self.conv(x)


def plain():
    return Net().train()


def with_inputs():
    return Net(), torch.ones(2, 3, 5, 7)


def with_keywords():
    return Net(), (torch.ones(2, 3, 5, 7), {"flag": True})


def wrong_inputs():
    return Net(), "x"


def asserts():
    assert 1 == 2


def ends():
    raise SystemExit(3)


def with_list():
    return Net(), ([torch.ones(3, 5, 7)],)


def number():
    return 3


def raises():
    raise KeyError("missing thing")


def needs_arguments(depth):
    return Net()


not_a_function = 3
"""


@pytest.fixture(autouse=True)
def _modules_restored() -> Iterator[None]:
    before = dict(sys.modules)
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - set(before):
        if "zoo" in name or name == "helper_beside_it":
            del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside_it.py").write_text("CHANNELS = 4\n")
    path = tmp_path / "my_zoo.py"
    path.write_text(CODE)
    return path


# --- zoos ---------------------------------------------------------------------------------------


def test_a_timm_model_comes_with_an_input_of_its_size() -> None:
    loaded = load_model("timm:mobilenetv3_small_050")
    assert type(loaded.model).__name__ == "MobileNetV3"
    assert loaded.example_inputs.shape == (1, 3, 224, 224)
    assert loaded.trained is False
    assert not any(module.training for module in loaded.model.modules())


def test_an_input_shape_replaces_the_suggested_one() -> None:
    loaded = load_model("timm:mobilenetv3_small_050", input_shape=(2, 3, 64, 48))
    assert loaded.example_inputs.shape == (2, 3, 64, 48)
    again = load_model("timm:mobilenetv3_small_050", input_shape=(2, 3, 64, 48))
    assert torch.equal(loaded.example_inputs, again.example_inputs)


def test_an_unknown_timm_model_names_close_ones() -> None:
    with pytest.raises(
        ModelSourceError, match=r"timm has no model 'resnet55'; close names: .*resnet5"
    ):
        load_model("timm:resnet55")
    with pytest.raises(ModelSourceError, match=r"timm has no model 'qqqqqq'; timm\.list_models"):
        load_model("timm:qqqqqq")


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_arguments_may_follow_a_name(zoo: str) -> None:
    loaded = load_model(f"{zoo}:resnet18?num_classes=12")
    assert loaded.model.fc.out_features == 12
    assert loaded.trained is False


def test_values_of_arguments_are_pythons_or_strings() -> None:
    assert name_and_arguments("a?b=12&c=0.5&d=True&e=None&f=avg&g=[1, 2]") == (
        "a",
        {"b": 12, "c": 0.5, "d": True, "e": None, "f": "avg", "g": [1, 2]},
    )
    assert name_and_arguments("a") == name_and_arguments("a?") == ("a", {})


@pytest.mark.parametrize("text", ["a?b", "a?=3", "a?b=1&b=2", "a?1b=2", "a?b=1&"])
def test_what_is_no_argument_says_how_they_are_written(text: str) -> None:
    with pytest.raises(
        ModelSourceError, match=r"write arguments behind the name as a\?num_classes"
    ):
        name_and_arguments(text)


def test_the_example_has_the_channels_that_the_model_takes() -> None:
    loaded = load_model("timm:resnet10t?in_chans=1&num_classes=0")
    assert loaded.model(loaded.example_inputs).shape == (1, 512)


def test_an_argument_that_a_model_does_not_take_is_told() -> None:
    with pytest.raises(ModelSourceError, match=r"resnet18 cannot be created: .*num_klasses"):
        load_model("timm:resnet18?num_klasses=3")


def test_a_pretrained_model_with_a_new_head_is_not_a_trained_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: make(name, **rest))
    assert load_model("timm:resnet10t", pretrained=True).trained is True
    assert load_model("timm:resnet10t?num_classes=3", pretrained=True).trained is False


def test_a_timm_model_of_a_folder_or_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("resnet10t", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = load_model(f"timm:local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
    asked: list[str] = []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: asked.append(name) or model)
    load_model("timm:hf-hub:timm/resnet10t.c3_in1k")
    assert asked == ["hf-hub:timm/resnet10t.c3_in1k"]
    with pytest.raises(ModelSourceError, match=r"of the Hugging Face Hub it is timm:hf-hub:timm/x"):
        load_model("timm:timm/x")


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    config = transformers.ResNetConfig(
        hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, num_labels=5, image_size=32
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_comes_from_a_folder(hub_folder: Path) -> None:
    loaded = load_model(f"hf:{hub_folder}", pretrained=True)
    again = load_model(f"hf:{hub_folder}", pretrained=True)
    assert type(loaded.model) is transformers.ResNetForImageClassification
    assert (loaded.trained, loaded.model.training) == (True, False)
    (given,) = loaded.example_inputs
    assert given["pixel_values"].shape == (1, 3, 32, 32)
    pairs = zip(loaded.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert load_model(f"hf:{hub_folder}").trained is False
    patched = ccp.patch(loaded.model, "first", example_inputs=loaded.example_inputs)
    assert len(ccp.coord_parameters(patched)) == 1


def test_a_model_of_transformers_takes_another_head(hub_folder: Path) -> None:
    loaded = load_model(f"hf:{hub_folder}?num_labels=9", pretrained=True)
    assert loaded.model(**loaded.example_inputs[0]).logits.shape == (1, 9)
    assert loaded.trained is False


def test_what_transformers_cannot_load_says_why(hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"nothing cannot be had .*Is there a network\?"):
        load_model(f"hf:{tmp_path}/nothing")
    config = json.loads((hub_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Own"]}))
    with pytest.raises(ModelSourceError, match=r"its configuration names \['Own'\]"):
        load_model(f"hf:{tmp_path}")
    text = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(text).save_pretrained(tmp_path)
    with pytest.raises(ModelSourceError, match="takes input_ids, not pictures"):
        load_model(f"hf:{tmp_path}")


def test_a_package_that_is_missing_for_hugging_face_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelSourceError, match="need the package transformers; install it with"):
        load_model("hf:microsoft/resnet-18")


def test_a_checkpoint_with_another_head_says_what_to_write(tmp_path: Path) -> None:
    torch.save(load_model("timm:resnet10t?num_classes=12").model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelSourceError, match=r"such as timm:resnet18\?num_classes=12$"):
        load_checkpoint_(load_model("timm:resnet10t").model, tmp_path / "w.pth")
    load_checkpoint_(load_model("timm:resnet10t?num_classes=12").model, tmp_path / "w.pth")
    with pytest.raises(ModelSourceError, match=r"does not fit") as caught:
        load_checkpoint_(load_model("timm:resnet18?num_classes=12").model, tmp_path / "w.pth")
    assert "has a head" not in str(caught.value)


def test_an_unknown_torchvision_model_names_close_ones() -> None:
    with pytest.raises(
        ModelSourceError, match=r"torchvision has no model .*close names: .*resnet18"
    ):
        load_model("torchvision:resnet81")


def test_a_torchvision_detector_takes_a_list_of_images() -> None:
    loaded = load_model("torchvision:ssdlite320_mobilenet_v3_large")
    ((image,),) = loaded.example_inputs
    assert image.shape == (3, 320, 320)
    shaped = load_model("torchvision:ssdlite320_mobilenet_v3_large", input_shape=(3, 64, 96))
    ((image,),) = shaped.example_inputs
    assert image.shape == (3, 64, 96)


def test_torchvision_classifiers_take_a_batch() -> None:
    loaded = load_model("torchvision:squeezenet1_1")
    assert loaded.example_inputs.shape == (1, 3, 224, 224)
    assert loaded.model(loaded.example_inputs).shape == (1, 1000)


@pytest.mark.parametrize("source", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_that_cannot_be_downloaded_name_the_remedy(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(ModelSourceError) as caught:
        load_model(source, pretrained=True)
    message = str(caught.value)
    assert "pretrained weights of resnet18 cannot be had (URLError" in message
    assert "Name or service not known" in message
    assert "Is there a network?" in message
    assert "--checkpoint FILE" in message


def test_pretrained_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, **options: Any) -> nn.Module:
        asked.update(options, name=name)
        return timm.models.create_model("resnet10t")

    monkeypatch.setattr(timm, "create_model", create)
    assert load_model("timm:resnet10t", pretrained=True).trained is True
    assert asked == {"name": "resnet10t", "pretrained": True}


def test_a_zoo_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r"needs timm, (.|\n)*pip install .*\[timm\]"):
        load_model("timm:resnet18")


@pytest.mark.parametrize("source", ["resnet50", "", "keras:resnet50", "file.py", "model.onnx"])
def test_another_form_names_the_forms_there_are(source: str) -> None:
    with pytest.raises(ModelSourceError, match=r"write timm:NAME, .*FUNCTION or model\.pt2"):
        load_model(source)


# --- Python files -------------------------------------------------------------------------------


def test_a_function_of_a_file_gives_the_model(file: Path) -> None:
    loaded = load_model(f"{file}:plain")
    assert loaded.model.conv.out_channels == 4  # from the file beside it
    assert loaded.example_inputs.shape == (1, 3, 224, 224)
    assert not loaded.model.training
    assert loaded.trained


def test_a_function_may_give_its_inputs_too(file: Path) -> None:
    assert load_model(f"{file}:with_inputs").example_inputs.shape == (2, 3, 5, 7)
    image, keywords = load_model(f"{file}:with_keywords").example_inputs
    assert image.shape == (2, 3, 5, 7)
    assert keywords == {"flag": True}
    shaped = load_model(f"{file}:with_inputs", input_shape=(1, 3, 9, 9))
    assert shaped.example_inputs.shape == (1, 3, 9, 9)
    ((image,),) = load_model(f"{file}:with_list", input_shape=(3, 9, 8)).example_inputs
    assert image.shape == (3, 9, 8)


def test_what_a_file_defines_can_be_copied_and_pickled(file: Path) -> None:
    model = ccp.patch(load_model(f"{file}:plain").model, "all")
    clone = pickle.loads(pickle.dumps(model))
    assert type(clone) is type(model)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("number", "returned a int; it must return a torch.nn.Module"),
        ("raises", "failed: KeyError: 'missing thing' (line "),
        ("asserts", "failed: AssertionError (line "),
        ("ends", "ends the process (sys.exit(3)) (line "),
        ("wrong_inputs", "returned a model, and 'x' as its example inputs: return a tensor"),
        ("needs_arguments", "it must take no arguments"),
        ("plane", "has no function 'plane'; close names: plain"),
        ("not_a_function", "has no function 'not_a_function'"),
        ("", "has no function ''"),
    ],
)
def test_a_function_that_gives_no_model_is_named_with_the_reason(
    function: str, reason: str, file: Path
) -> None:
    with pytest.raises(ModelSourceError) as caught:
        load_model(f"{file}:{function}")
    assert reason in str(caught.value)
    assert "my_zoo.py" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"there is no file .*nothing\.py"):
        load_model(f"{tmp_path / 'nothing.py'}:make")


@pytest.mark.parametrize("code", ["def broken(:\n", "import no_such_package_anywhere\n"])
def test_a_file_that_does_not_run_is_named_with_the_reason(code: str, tmp_path: Path) -> None:
    path = tmp_path / "broken_zoo.py"
    path.write_text(code)
    with pytest.raises(ModelSourceError, match=r"broken_zoo\.py failed: (SyntaxError|ModuleNot)"):
        load_model(f"{path}:make")


def test_a_file_that_ends_the_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\nsys.exit('bye')\n")
    with pytest.raises(
        ModelSourceError, match=r"script\.py ends the process .*'bye'.*line 2.*__main"
    ):
        load_model(f"{path}:make")


@pytest.mark.parametrize("size", [(1, 3, 10**5, 10**8), (1, 3, 10**23, 3), (1, 3, 2**62, 2**62)])
def test_an_input_too_large_to_make_is_refused(size: tuple[int, ...], file: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"shape \(1, 3, .*an input of that size cannot be"):
        load_model(f"{file}:plain", input_shape=size)


@pytest.mark.parametrize("name", ["n" * 300 + ".py:make", "n" * 300 + ".pt2", "n" * 5000 + ".pt2"])
def test_a_name_may_be_of_any_length(name: str) -> None:
    with pytest.raises(ModelSourceError, match="there is no file nnn") as caught:
        load_model(name, trusted=True)
    assert len(str(caught.value)) < 600


def test_a_damaged_program_is_told_in_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "z.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("models/model.json", "{}"), ("archive_format", "pt2")):
            archive.writestr(f"z/{name}", text)
        archive.writestr("z/archive_version", "0")
    with pytest.raises(ModelSourceError, match=r"z\.pt2 is not a torch\.export program"):
        load_model(str(path), trusted=True)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_checkpoint_of_other_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({1: torch.zeros(1)}, path)
    with pytest.raises(ModelSourceError, match="holds a dict with 1 among its names, not a state"):
        load_checkpoint_(nn.Conv2d(1, 1, 1), path)


def test_a_text_is_not_called_a_file_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("hello")
    with pytest.raises(ModelSourceError, match=r"a\.pth is not a file of torch\.save"):
        load_checkpoint_(nn.Conv2d(1, 1, 1), path)


def test_a_file_named_like_a_package_does_not_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text("from torch import nn\n\n\ndef make():\n    return nn.Conv2d(3, 4, 3)\n")
    original = sys.modules["json"]
    try:
        load_model(f"{path}:make")
        assert sys.modules["json"] is original
    finally:
        sys.modules["json"] = original


# --- exported programs --------------------------------------------------------------------------


def test_an_exported_program_comes_with_its_inputs(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 9)
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    loaded = load_model(str(path), trusted=True)
    assert isinstance(loaded.model, fx.GraphModule)
    (example,) = loaded.example_inputs
    assert torch.equal(example, x)
    assert torch.equal(loaded.model(example), model(x))


def test_keyword_inputs_of_a_program_come_last(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
            return x * gate

    path = tmp_path / "model.pt2"
    program = torch.export.export(Gated(), (torch.ones(2),), {"gate": torch.zeros(2)})
    torch.export.save(program, path)
    x, keywords = load_model(str(path), trusted=True).example_inputs
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(keywords["gate"], torch.zeros(2))


@pytest.mark.parametrize("trusted", [False, True])
def test_a_file_that_is_no_program_is_refused(trusted: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(ModelSourceError, match=r"there is no file .*model\.pt2"):
        load_model(str(path), trusted=trusted)
    path.write_bytes(b"nothing of the kind")
    reason = r"is not a torch\.export program .*torch\.export\.save" if trusted else "is not loaded"
    with pytest.raises(ModelSourceError, match=reason):
        load_model(str(path), trusted=trusted)


class Payload:
    """What a file's maker may put into it: unpickled, it writes another file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def program_with_payload(path: Path, payload: Payload) -> Path:
    """A program whose example inputs are the payload."""
    plain, pickled = io.BytesIO(), io.BytesIO()
    torch.export.save(torch.export.export(nn.Conv2d(1, 1, 1), (torch.ones(1, 1, 2, 2),)), plain)
    torch.save(payload, pickled)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            is_inputs = "sample_inputs" in name and name.endswith(".pt")
            target.writestr(name, pickled.getvalue() if is_inputs else source.read(name))
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_program_runs_no_code_unless_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "written"
    path = program_with_payload(tmp_path / "model.pt2", Payload(written))
    with pytest.raises(ModelSourceError, match=r"runs any code .* pass --trust .* trusted=True"):
        load_model(str(path))
    assert not written.exists()
    with pytest.raises(ModelSourceError, match=r"is not a torch\.export program"):
        load_model(str(path), trusted=True)
    assert written.exists(), "torch runs no code any more: then --trust can go"


# --- checkpoints --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def assert_loads(path: Path) -> None:
    """The checkpoint fills a plain model, and a patched one, whose coordinates become zero."""
    model, patched = make(1), ccp.patch(make(1), "all")
    with torch.no_grad():
        patched.conv.coord_weight.fill_(1)
    for target in (model, patched):
        load_checkpoint_(target, path)
        for name, tensor in make(0).state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor)
    assert not patched.conv.coord_weight.any()


def test_a_safetensors_checkpoint_loads(tmp_path: Path) -> None:
    save_file(make(0).state_dict(), tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors")


@pytest.mark.parametrize("nesting", [(), ("state_dict",), ("model",), ("state_dict", "model")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_torch_checkpoint_loads_from_its_usual_wrappings(
    prefix: str, nesting: tuple[str, ...], tmp_path: Path
) -> None:
    state: dict[str, Any] = {prefix + k: v for k, v in make(0).state_dict().items()}
    for key in reversed(nesting):
        state = {key: state, "epoch": 3}
    torch.save(state, tmp_path / "w.pth")
    assert_loads(tmp_path / "w.pth")


def test_a_patched_models_checkpoint_brings_its_coordinates(tmp_path: Path) -> None:
    source = ccp.patch(make(0), "all")
    with torch.no_grad():
        source.conv.coord_weight.fill_(2)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = ccp.patch(make(1), "all")
    load_checkpoint_(target, tmp_path / "w.pt")
    assert torch.equal(target.conv.coord_weight, source.conv.coord_weight)
    with pytest.raises(ModelSourceError, match=r"(?s)does not fit the model: .*conv\.coord_weight"):
        load_checkpoint_(make(1), tmp_path / "w.pt")


class Bomb:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "run")


def test_a_checkpoint_with_objects_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": make(0).state_dict(), "extra": Bomb(mark)}, tmp_path / "w.pth")
    with pytest.raises(ModelSourceError, match=r"holds more than tensors, .*safety"):
        load_checkpoint_(make(1), tmp_path / "w.pth")
    assert not mark.exists()


def test_a_whole_pickled_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(make(0), tmp_path / "w.pth")
    with pytest.raises(ModelSourceError, match=r"save model\.state_dict\(\) instead"):
        load_checkpoint_(make(1), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04 cut off"])
def test_garbage_is_refused_by_name(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelSourceError, match=name.replace(".", r"\.")):
        load_checkpoint_(make(1), path)


def test_a_truncated_torch_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(make(0).state_dict(), path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ModelSourceError, match=r"w\.pth cannot be read"):
        load_checkpoint_(make(1), path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"there is no file .*w\.pth"):
        load_checkpoint_(make(1), tmp_path / "w.pth")


def test_a_checkpoint_that_does_not_fit_names_what_does_not(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = make(0).state_dict()
    torch.save({**state, "conv.weight": torch.zeros(4, 3, 5, 5)}, path)
    with pytest.raises(ModelSourceError, match=r"(?s)does not fit the model: .*conv\.weight"):
        load_checkpoint_(make(1), path)
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(
        ModelSourceError, match=r"(?s)does not fit the model: .*conv\.weight.*other"
    ):
        load_checkpoint_(make(1), path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_a_checkpoint_of_something_else_says_what_it_holds(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelSourceError, match=r"holds a (list|Tensor), not a state_dict"):
        load_checkpoint_(make(1), tmp_path / "w.pth")


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1,3,224,224", (1, 3, 224, 224)),
        ("1x3x64x96", (1, 3, 64, 96)),
        ("2X3X8X8", (2, 3, 8, 8)),
        (" 1, 3, 5 ", (1, 3, 5)),
        ("7", (7,)),
    ],
)
def test_shapes_are_read(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "a,b", "1,,3", "1,3,0,8", "1,-3", "1.5,2", "224*224"])
def test_what_is_no_shape_says_what_to_write(text: str) -> None:
    with pytest.raises(ModelSourceError, match=r"write numbers like 1,3,224,224"):
        parse_shape(text)


def test_a_source_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_sources.MODEL_SOURCES, "mine", None)  # taken away at the end
    del model_sources.MODEL_SOURCES["mine"]

    def load(name: str, pretrained: bool) -> LoadedModel:
        return LoadedModel(nn.Conv2d(3, int(name), 1), torch.ones(1, 3, 4, 4), pretrained)

    model_sources.register_model_source("mine", load)
    loaded = load_model("mine:7", pretrained=True)
    assert loaded.model.out_channels == 7
    assert loaded.trained
    with pytest.raises(ArgumentError, match="there is a source of models with this prefix"):
        model_sources.register_model_source("mine", load)
    with pytest.raises(ArgumentError, match="write a word"):
        model_sources.register_model_source("a:b", load)
    with pytest.raises(ArgumentError, match="prefix=None"):
        model_sources.register_model_source(None, load)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="load='x'"):
        model_sources.register_model_source("other", "x")  # type: ignore[arg-type]
    with pytest.raises(
        ModelSourceError, match=r"write timm:NAME, torchvision:NAME, hf:NAME, mine:NAME, "
    ):
        load_model("other:7")


def test_an_installed_package_adds_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_zoo.py").write_text(
        "import torch\n"
        "from coordconv_patch.cli.loaded import LoadedModel\n"
        "def load(name, pretrained):\n"
        "    return LoadedModel(torch.nn.Conv2d(3, int(name), 1), torch.ones(1, 3, 4, 4), False)\n"
    )
    info = tmp_path / "a_zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{model_sources.ENTRY_POINTS}]\nzoo = a_zoo:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("zoo:5").model.out_channels == 5
