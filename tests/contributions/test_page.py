"""docs/controls.md does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "controls.md"


def test_the_code_of_the_page_runs(capsys: Any) -> None:
    names: dict[str, Any] = {}
    for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(part.split("```")[0], names)
    assert "share of variance" in capsys.readouterr().out
    assert names["picture"].stat().st_size > 5_000
