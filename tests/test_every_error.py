"""Every error that a user can cause has a test of what it says.

Most are in two tables: ``WRONG`` in test_wrong_arguments.py (Python) and ``MISTAKES`` in
cli/test_cli.py (the command line, with exit codes); those of a subject are tested with it. Below
are the rest, and a check that no message of the package is without a test.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import coordconv_patch as ccp
from coordconv_patch import errors
from coordconv_patch.folding.batch_norms import fold_batch_norms_
from coordconv_patch.stable_baselines3 import CoordPolicy

ROOT = Path(ccp.__file__).parent
TESTS = Path(__file__).parent
KINDS = {name for name in errors.__all__ if name.endswith("Error")}

HARD_TO_CAUSE = {
    "its calls differ in padding, output size or convention": "a program that was edited by hand",
    "it goes into": "a program that was edited by hand",
    "times, a branch's end is used once": "a program that was edited by hand",
    "follow_regions_: the model pools regions of no picture": "torchvision refuses it before",
    "folding would merge convolutions with different coordinates": "no library folds like this",
    "its calls see different channels": "import_coordconv tells another reason before",
}
"""Messages for what no library and no user was seen to do."""


# --- the rest of the table ------------------------------------------------------------------------


class AnySize(nn.Module):
    """Takes pictures of one size alone, and batches of one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape) != (2, 3, 8, 8):
            raise ValueError("of this shape only")
        return self.conv(x)


X = torch.rand(2, 3, 8, 8)


def export(folder: Path, **options: Any) -> Any:
    model = ccp.patch(AnySize().eval(), "conv")
    return ccp.export_onnx(model, folder / "a.onnx", X, exporter="torchscript", **options)


def block_that_is_no_dataclass(_: Path) -> None:
    class Plain(ccp.ChannelBlock):
        kind = "plain"

    ccp.register_channel_block(Plain)


def block_whose_kind_is_a_field(_: Path) -> None:
    @dataclass(frozen=True)
    class Field(ccp.ChannelBlock):
        kind: str = "field"  # type: ignore[misc]

        def names(self, ndim: int) -> Any: ...

        def values(self, positions: Any) -> Any: ...

    ccp.register_channel_block(Field)


def block_that_refuses_its_fields(_: Path) -> None:
    @dataclass(frozen=True)
    class Refuses(ccp.ChannelBlock):
        kind: ClassVar[str] = "refuses_of_test"
        size: int = 1

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("size must be 1 or more")

        def names(self, ndim: int) -> Any: ...

        def values(self, positions: Any) -> Any: ...

    Refuses.from_dict({"kind": "refuses_of_test", "size": 0})


def file_of_an_early_version_without_a_weight(folder: Path) -> None:
    path = folder / "c.safetensors"
    ccp.save_coords(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3))), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()["coordconv_patch"].replace('version": 3', 'version": 1')
    save_file({"1.coord_weight": torch.zeros(1)}, path, {"coordconv_patch": header})
    try:
        ccp.load_coords(nn.Sequential(nn.Conv2d(3, 4, 3)), path)
    finally:
        path.unlink()


def pass_of_another_convention(_: Path) -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    graph = ccp.CoordConvPass("0", coords=ccp.Coordinates(radius=True))(graph).graph_module
    ccp.CoordConvPass("0")(graph)


def policy_in_the_wrong_order(_: Path) -> None:
    class Wrong(ActorCriticCnnPolicy, CoordPolicy):  # type: ignore[misc]
        pass


def followed_volumes(_: Path) -> None:
    ccp.follow_padding_(ccp.patch(nn.Sequential(nn.Conv3d(3, 4, 3))))


REST: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda folder: export(folder, dynamic_batch=True),
        "dynamic_batch=True, but the torch model itself does not run on",
    ),
    (
        lambda folder: export(folder, dynamic_batch=False, dynamic_size=True),
        "dynamic_size=True, but the torch model itself runs at no other size",
    ),
    (block_that_is_no_dataclass, "write @dataclass(frozen=True) above the class"),
    (block_whose_kind_is_a_field, ".kind is a field: write kind = 'field' without an annotation"),
    (block_that_refuses_its_fields, "is invalid: size must be 1 or more"),
    (followed_volumes, "0 has 3 dimensions, and padding is followed for pictures of two: "),
    (file_of_an_early_version_without_a_weight, "it holds no weight for the site '0'"),
    (pass_of_another_convention, "already, not (x, y): unpatch the model first"),
    (policy_in_the_wrong_order, "Wrong: write CoordPolicy and after it a policy class of"),
    (
        lambda _: ccp.Coordinates(order="yx", channels=(ccp.Axes(),)),
        "channels and order are given: write order as fields of the blocks of channels",
    ),
    (
        lambda folder: export(folder, places=True, lowering="map"),
        "lowering='map' with places=True: coordinates of places have one form",
    ),
]


@pytest.mark.parametrize(("cause", "message"), REST, ids=[text[:40] for _, text in REST])
def test_the_error_says_what_was_wrong(
    cause: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ccp.CoordConvPatchError, match=re.escape(message)):
        cause(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (weight_norm, "the convolution is parametrized"),
        (
            lambda conv: conv.register_forward_hook(lambda *_: None),
            "the convolution or the batch norm has hooks",
        ),
    ],
)
def test_a_batch_norm_that_is_not_folded_says_why(change: Any, obstacle: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    change(model[0])
    assert [folding.obstacle for folding in fold_batch_norms_(model)] == [obstacle]


# --- none without a test --------------------------------------------------------------------------


def messages() -> Iterator[tuple[str, list[str]]]:
    """Where each error of the package is raised, and the fixed texts of its message."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in KINDS and node.args:
                pieces = [text.strip() for text in fixed_texts(node.args[0])]
                pieces = [text for text in pieces if len(text.split()) >= 3]
                if pieces:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", pieces


def fixed_texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.BinOp):
        return fixed_texts(node.left) + fixed_texts(node.right)
    return []


def tested_text() -> str:
    """What the tests say, joined where a text is written in several pieces."""
    sources = [path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")]
    text = re.sub(r'"\s*\n\s*[rf]*"', "", "\n".join(sources))
    return " ".join(re.sub(r"\\(.)", r"\1", text).split())


def is_tested(pieces: list[str], text: str) -> bool:
    """Whether three words of a message, one after the other, stand in a test."""
    for piece in pieces:
        words = piece.split()
        triples = zip(words, words[1:], words[2:], strict=False)
        if any(" ".join(triple).strip(".,:;()") in text for triple in triples):
            return True
    return False


def test_every_message_is_looked_at_by_a_test() -> None:
    text = tested_text()
    told = dict(messages())
    assert len(told) > 300
    forgotten = {place: pieces for place, pieces in told.items() if not is_tested(pieces, text)}
    assert forgotten == {}


def test_a_message_that_no_test_looks_at_is_seen() -> None:
    assert not is_tested(["zqx" + " words that", "nobody" + " ever tests"], tested_text())


def test_what_is_hard_to_cause_is_still_said() -> None:
    told = " ".join(piece for _, pieces in messages() for piece in pieces)
    assert [excuse for excuse in HARD_TO_CAUSE if excuse not in told] == []
