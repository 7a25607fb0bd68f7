"""The pages: every public name is documented with an example, and links lead somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import coordconv_patch as ccp
from documentation.code_blocks import PAGES, ROOT

API = [path for name, path in PAGES.items() if name.startswith("docs/api/")]
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def test_every_public_name_stands_once_in_the_reference() -> None:
    names = re.findall(
        r"^::: coordconv_patch\.(\w+)$",
        "\n".join(path.read_text(encoding="utf-8") for path in API),
        re.MULTILINE,
    )
    assert Counter(names) == Counter(ccp.__all__)


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_each_name_of_a_page_is_in_its_example(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for name in re.findall(r"^::: coordconv_patch\.(\w+)$", text, re.MULTILINE):
        used = re.search(rf"\bccp\.{name}\b", code) or f"`ccp.{name}(" in text
        assert used, f"{path.name}: no example of {name}"


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files(name: str) -> None:
    path = ROOT / name
    for target, _ in _LINK.findall(path.read_text(encoding="utf-8")):
        assert not target or (path.parent / target).exists(), f"{name}: {target}"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    kinds = ("docs/**/*.md", "docs/**/*.ipynb")
    pages = {str(path.relative_to(ROOT / "docs")) for kind in kinds for path in ROOT.glob(kind)}
    assert set(re.findall(r"[\w/]+\.(?:md|ipynb)", menu)) == pages
