"""docs/channels.md does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "channels.md"


def test_the_code_of_the_page_runs() -> None:
    parts = PAGE.read_text(encoding="utf-8").split("```python\n")[1:]
    names: dict[str, Any] = {}
    for part in parts:
        exec(part.split("```")[0], names)
    assert names["face"].channel_names(2) == ("y", "x", "r")
