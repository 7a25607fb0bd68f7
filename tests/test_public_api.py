"""The public surface: names, what an import costs, and the floors of the package."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import coordconv_patch
from coordconv_patch import errors
from coordconv_patch.onnx_names import ONNX_NAMES

ROOT = Path(coordconv_patch.__file__).parent
PREFIX = "coordconv_patch."

PUBLIC = {
    *("Coordinates", "Window"),
    *("Axes", "AxisPixels", "ChannelBlock", "Fourier", "Radius", "register_channel_block"),
    *("CoordConv1d", "CoordConv2d", "CoordConv3d"),
    *("CoordConvTranspose1d", "CoordConvTranspose2d", "CoordConvTranspose3d"),
    *("Plan", "plan", "patch", "patch_", "unpatch", "unpatch_", "set_window_", "CoordConvPass"),
    *(
        "places",
        "maps",
        "Given",
        "set_places_",
        "PlacedTransform",
        "places_in_turn",
        "tile_predictor",
    ),
    *("follow_letterbox_", "follow_padding_", "follow_regions_"),
    *("coord_parameters", "param_groups", "train_only_coords_", "add_to_optimizer_"),
    *("save_coords", "load_coords", "load_coords_"),
    *("scrambled", "influence", "Influence", "SiteInfluence", "plot_coords"),
    *("save_pretrained", "from_pretrained", "push_to_hub"),
    *("import_coordconv", "import_coordconv_", "ImportReport", "ImportedSite"),
    *("load_concatenated", "load_concatenated_", "to_concatenated"),
    *("RankedPart", "Ranking", "rank"),
    "from_exported",
    *("fold", "fold_with", "register_folding_method", "forget_left_behind_"),
    *("export_onnx", "ExportReport", "verify_onnx", "Check"),
    *("LayerStatus", "Site", "layer_status", "survey", "register_lowering", "register_selector"),
    *(name for name in errors.__all__ if name.endswith("Error")),
    *("Target", "register_target"),
    "__version__",
}

FLOORS = [
    "version",
    "errors",
    "packages",
    "arguments",
    "files",
    "display",
    "running",
    "channels",
    "layers",
    "graphs",
    "followers",
    "owners",
    "sites",
    "left_behind",
    "folding",
    "patching",
    "pictures",
    "training",
    "stable_baselines3",
    "status",
    "contributions",
    "weights",
    "concatenated",
    "lowering",
    "runtime",
    "verification",
    "export",
    "onnx_names",
    "bench",
    "ranking",
    "demo",
    "cli",
]
"""Folders and modules of the root, bottom up: each imports from those before it alone."""


@functools.cache
def modules() -> list[str]:
    """Names of the package's modules below the root."""
    infos = pkgutil.walk_packages([str(ROOT)], PREFIX)
    return [info.name.removeprefix(PREFIX) for info in infos]


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str) -> set[str]:
    """What a module imports from the package, names below the root; lazy imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            # "from package import part" means the part, where that is a module.
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {part for part in parts if part.removeprefix(PREFIX) in modules()}
            found |= inner if inner == parts else inner | {str(node.module)}
    return {name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)}


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[0])


def test_the_public_names_are_these() -> None:
    assert set(coordconv_patch.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_each_public_name_is_importable_and_documented(name: str) -> None:
    value = getattr(coordconv_patch, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("coordconv_patch.")


@pytest.mark.parametrize("module", ["", *modules()])
def test_every_module_lists_its_names_in_order_and_has_them(module: str) -> None:
    loaded = importlib.import_module("coordconv_patch" + (f".{module}" if module else ""))
    names = getattr(loaded, "__all__", [])
    assert len(set(names)) == len(names)
    assert list(names) == sorted(names, key=_constants_then_classes), "not sorted"
    for name in names:
        assert hasattr(loaded, name), name
    assert inspect.getdoc(loaded)


def _constants_then_classes(name: str) -> tuple[bool, bool, str]:
    """The order that ruff's RUF022 asks for."""
    return not name.isupper(), not name[0].isupper(), name


def test_the_root_defines_nothing_of_its_own() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (alternative,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(alternative.test) == "TYPE_CHECKING"
    assert ast.unparse(alternative.orelse) == "__getattr__ = onnx_name"
    kinds = {type(node) for node in (*tree.body[1:], *alternative.body) if node is not alternative}
    assert kinds == {ast.ImportFrom, ast.Assign}


def test_types_and_lookup_know_the_same_names_of_onnx() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (alternative,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in alternative.body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: node.module for node in imports for alias in node.names}
    assert names == ONNX_NAMES


def test_importing_the_package_imports_nothing_slow() -> None:
    """Neither extras nor rich; torch's compiler is as slow as torch itself."""
    slow = (
        *("timm", "torchvision", "matplotlib", "skimage", "stable_baselines3"),
        *("onnx", "onnx_ir", "onnxruntime", "onnxscript", "sympy", "torch._dynamo", "torch.onnx"),
    )
    code = (
        "import sys, coordconv_patch\n"
        "import coordconv_patch.stable_baselines3\n"
        f"print([name for name in {(*slow, 'rich', 'typer')} if name in sys.modules])\n"
        "import coordconv_patch.cli.commands\n"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stdout.split() == ["[]", "[]"]
    assert ran.stderr == ""


@pytest.mark.parametrize("module", [name for name in modules() if not name.startswith("demo")])
def test_no_module_but_the_demo_imports_an_extra_at_its_top(module: str) -> None:
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {
        name.split(".")[0]
        for node in top
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
        )
    }
    assert not roots & {"timm", "torchvision", "matplotlib", "skimage", "stable_baselines3"}
    assert not roots & {"timm", "torchvision", "albumentations", "matplotlib", "skimage"}


@pytest.mark.parametrize("module", modules())
def test_imports_run_down_the_floors(module: str) -> None:
    own = floor_of(module)
    above = [name for name in imports_of(module) if floor_of(name) > own]
    assert not above, f"{module} imports from above: {above}"


def test_no_two_modules_import_each_other() -> None:
    graph = {module: imports_of(module) for module in modules()}

    graphlib.TopologicalSorter(graph).prepare()  # names the modules of a circle in its error


def test_every_module_has_a_floor() -> None:
    assert {module.split(".")[0] for module in modules()} == set(FLOORS)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_every_error_is_one_of_the_packages_and_of_pythons(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.CoordConvPatchError)
    if kind is not errors.CoordConvPatchError:
        assert issubclass(kind, (ValueError, RuntimeError, ImportError))


def test_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()


def test_the_command_is_installed() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="coordconv-patch")
    from coordconv_patch.cli.main import main

    assert command.load() is main
