"""Every model of the catalogue, in torch and through ONNX Runtime: ``pytest -m zoo``.

Rows are kept; with ``ZOO_RESUME=1`` those there are taken as they are. Then
``python tests/zoo/report.py`` writes docs/zoo.md.
"""

from __future__ import annotations

import os

import pytest

from zoo.catalogue import CATALOGUE
from zoo.results import STAGES, Stage, expected_failures, judge, load
from zoo.sweep import row_of

EXPECTED = expected_failures()


@pytest.mark.zoo
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CATALOGUE)
def test_model(name: str, stage: Stage) -> None:
    row = load(name, stage) if os.environ.get("ZOO_RESUME") else None
    verdict, problems = judge(stage, row if row is not None else row_of(name, stage))
    reason = EXPECTED.get((name, stage))
    if reason is None:
        assert verdict == "passes", f"{verdict}: {'; '.join(problems)}"
        return
    assert verdict != "passes", f"passes now: take it out of expected_failures.json ({reason})"
    # Only what goes wrong without coordinates, too, may be expected to.
    assert verdict == "plain fails", "; ".join(problems)
    pytest.xfail(f"{reason} ({'; '.join(problems)})")
