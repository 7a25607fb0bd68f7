"""Mutated coordinate files and killed writers: a few in every run, all with ``pytest -m fuzz``."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coords_file_fuzz
import killed_writers
import pytest
import torch
from coords_file_fuzz import Fuzzer, Record
from killed_writers import KINDS, kill_writers

import coordconv_patch as ccp
from coordconv_patch.errors import WeightsError
from coordconv_patch.files import atomic, workplace
from coordconv_patch.weights import coords_file
from coordconv_patch.weights import save_load as weights

RECORD = Path(__file__).parents[2] / "docs" / "robustness.md"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads do not survive a fork, and small tensors do not need them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fuzzed(folder: Path, cases: range) -> Record:
    record = Fuzzer(folder).run(cases)
    assert record.cases == len(cases)
    return record


# --- mutated files ------------------------------------------------------------------------------


def test_mutated_files_are_refused_or_loaded_as_they_are(tmp_path: Path) -> None:
    record = fuzzed(tmp_path, range(400))
    assert record.faults == []
    assert record.longest > 100  # messages were read


@pytest.mark.fuzz
def test_12000_mutated_files_are_refused_or_loaded_as_they_are(tmp_path: Path) -> None:
    record = fuzzed(tmp_path, range(12_000))
    assert record.faults == []
    assert record.slowest < 2


def test_the_fuzzer_notices_a_checksum_that_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = coords_file.read_tensor_file
    monkeypatch.setattr(
        coords_file,
        "read_tensor_file",
        lambda *args: dataclasses.replace(real(*args), is_intact=True),
    )
    faults = fuzzed(tmp_path, range(400)).faults
    assert any("damage was taken for what was saved" in fault for fault in faults)


def test_the_fuzzer_notices_types_that_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer = Fuzzer(tmp_path)
    monkeypatch.setattr(ccp.Coordinates, "__post_init__", lambda self: None)
    faults = fuzzer.run(range(400)).faults
    assert any(re.search(r"was taken for|Error: ", fault) for fault in faults)


def test_the_fuzzer_notices_half_changed_models_and_other_exceptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer = Fuzzer(tmp_path)

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(weights, "_fill", fail)
    assert not any("the model has changed" in fault for fault in fuzzer.run(range(200)).faults)
    monkeypatch.setattr(weights, "unchanged_on_failure", contextlib.nullcontext)
    faults = fuzzer.run(range(200, 400)).faults
    assert any("ZeroDivisionError: in the middle" in fault for fault in faults)
    assert any("refused, but the model has changed" in fault for fault in faults)


def test_the_fuzzer_notices_loads_that_take_long_and_long_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer = Fuzzer(tmp_path)
    monkeypatch.setattr(coords_file_fuzz, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(coords_file_fuzz, "LONGEST_MESSAGE", 10)
    monkeypatch.setattr(coords_file_fuzz, "alarm", contextlib.nullcontext)
    faults = fuzzer.run(range(5)).faults
    assert len(faults) == 5
    assert any("a message of" in fault for fault in faults)
    assert all("; it took" in fault or ": it took" in fault for fault in faults)


# --- killed writers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_killed_writers_leave_a_whole_file_and_nothing_after_the_next_write(
    kind: str, tmp_path: Path
) -> None:
    record = kill_writers(KINDS[kind](), tmp_path, kills=8)
    assert record.problems == []
    assert (record.kills, record.damaged, record.still_left) == (8, 0, 0)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_200_killed_writers_leave_a_whole_file_and_nothing_after_the_next_write(
    kind: str, tmp_path: Path
) -> None:
    record = kill_writers(KINDS[kind](), tmp_path, kills=200)
    assert record.problems == []
    assert (record.kills, record.damaged, record.still_left) == (200, 0, 0)
    assert record.left_over > 20  # writers were killed while they wrote
    assert record.changed > 5  # and after they had


def test_the_kills_notice_leftovers_that_are_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workplace, "_sweep", lambda target: None)
    record = kill_writers(KINDS["graph and weights"](), tmp_path, kills=8)
    assert record.left_over > 0
    assert record.still_left > 0


def test_the_kills_notice_a_graph_with_another_ones_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one name for all weights, as before, a kill between the renames mixes two files."""
    kind = KINDS["graph and weights"]()
    monkeypatch.setattr(killed_writers, "part_name", lambda name, digest: f"{name}.data")
    monkeypatch.setattr(atomic, "_is_part", lambda name, target: name == f"{target.name}.data")
    path = tmp_path / "f"
    kind.write(path, "one")
    real = atomic.os.replace

    def killed_in_between(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError("killed")
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", killed_in_between)
    with pytest.raises(Exception, match="killed"):
        kind.write(path, "two")
    assert kind.read(path) == ""


# --- the record ---------------------------------------------------------------------------------


def test_the_record_says_what_came_of_it() -> None:
    text = RECORD.read_text(encoding="utf-8")
    assert "python tests/coords_file_fuzz.py --cases 12000" in text
    assert "python tests/killed_writers.py --kills 200" in text
    assert re.search(r"^12,000 cases: 0 faults\.", text, re.MULTILINE)
    for kind in KINDS:
        assert re.search(rf"^\| {kind} \| 200 \| 0 \| 0 \|", text, re.MULTILINE)


def test_the_error_of_a_file_is_bounded() -> None:
    message = str(WeightsError("begin " + "x" * 10_000 + " end"))
    assert len(message) <= 1000
    assert message.startswith("begin ")
    assert message.endswith(" end")
