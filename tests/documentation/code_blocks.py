"""The code blocks of a page, and how each kind of them is run."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
_COMMAND = re.compile(r'^coordconv-patch = "([\w.]+):(\w+)"', re.MULTILINE)
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("examples/*/README.md")),
    ]
}
FENCE = re.compile(r"^\s*```+(.*)$", re.MULTILINE)
SKIP = re.compile(r"<!-- skip: next \"(.+)\" -->\n\s*```")
_NUMBER = re.compile(r"[\d.,]*\d(e[-+]?\d+)?")


def without_numbers(text: str) -> str:
    """What is printed, but for numbers and spaces."""
    return " ".join(_NUMBER.sub("#", text).split())


class PageRun:
    """Runs the blocks of one page in order: Python in one namespace, commands in one folder."""

    def __init__(
        self, path: Path, patch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str]
    ) -> None:
        self.patch, self.output = patch, output
        self.printed = ""
        parsers = (
            PythonCodeBlockParser(),
            CodeBlockParser("bash", self.run_commands),
            CodeBlockParser("text", self.compare_output),
            SkipParser(),
        )
        self.document = Document.parse(str(path), *parsers)
        # A module of its own, so that what a page defines can be pickled.
        module = types.ModuleType("page_" + path.stem)
        patch.setitem(sys.modules, module.__name__, module)
        self.document.namespace = module.__dict__

    def run(self) -> int:
        """Run all; returns how many blocks ran."""
        ran = 0
        for example in self.document.examples():
            try:
                example.evaluate()
            except SkipTest:
                continue
            ran += isinstance(example.parsed, str)
            self.printed = self.output.readouterr().out or self.printed
        return ran

    def run_commands(self, example: Example) -> None:
        """Commands of a console; the package's own in this process, which has torch loaded."""
        module, function = _COMMAND.findall((ROOT / "pyproject.toml").read_text("utf-8"))[0]
        main = getattr(importlib.import_module(module), function)
        for line in str(example.parsed).replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] == ["coordconv-patch"]:
                self.patch.setattr(sys, "argv", command)
                with pytest.raises(SystemExit) as ended:
                    main()
                assert not ended.value.code, f"{line}: exit code {ended.value.code}"
            elif command:
                subprocess.run(["bash", "-euc", line], check=True)

    def compare_output(self, example: Example) -> None:
        """A ``text`` block is what the block before it prints, but for numbers and spaces."""
        assert without_numbers(str(example.parsed)) == without_numbers(self.printed)
