"""Writers killed at random moments, and what they leave.

    python tests/killed_writers.py --kills 200      # prints its record as a table

A process writes the same file over and over, by turns with the one and the other content, until it
is killed. What lies there then must be one of the two, whole; and after the next write nothing
else may be left in the folder. "Coordinate weights" are written by save_coords; "graph and weights"
are a file that names a part, as export_onnx writes a large graph: the one with the other's part
would be a silent fault.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.errors import ExportError
from coordconv_patch.files.atomic import part_name, replacement

MOST_SECONDS_BEFORE_THE_KILL = 0.1
"""Some writes' time: one takes a few milliseconds, or tens of them on a busy machine."""
CONTENTS = ("one", "two")


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a content is written, and which content lies there, '' if damaged."""

    name: str
    write: Callable[[Path, str], None]
    read: Callable[[Path], str]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 7), nn.Conv2d(64, 64, 7)).eval()


def patched(content: str) -> nn.Module:
    """A model whose coordinate weights are the content."""
    model = ccp.patch(network(), "all")
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.fill_(CONTENTS.index(content) + 1)
    return model


def coordinate_weights() -> Kind:
    models = {content: patched(content) for content in CONTENTS}

    def write(path: Path, content: str) -> None:
        ccp.save_coords(models[content], path)

    def read(path: Path) -> str:
        weights = ccp.coord_parameters(ccp.load_coords(network(), path))
        found = {float(value) for weight in weights for value in weight.detach().unique()}
        return CONTENTS[int(found.pop()) - 1] if len(found) == 1 else ""

    return Kind("coordinate weights", write, read)


def graph_and_weights() -> Kind:
    def write(path: Path, content: str) -> None:
        weights = content * 100_000
        with replacement(path, ExportError) as temporary:
            part = part_name(temporary.name, sha256(weights.encode()).hexdigest())
            temporary.with_name(part).write_text(weights)
            temporary.write_text(f"{content} {part}")

    def read(path: Path) -> str:
        content, part = path.read_text().split()
        beside = path.with_name(part)
        whole = beside.exists() and beside.read_text() == content * 100_000
        return content if whole else ""

    return Kind("graph and weights", write, read)


@dataclass
class Record:
    """What the kills of one kind of writer left.

    Attributes:
        kills: How many.
        damaged: After how many of them the file was not one of the two, whole.
        left_over: After how many of them something lay in the folder besides it.
        still_left: After how many of them something did after the next write.
        changed: After how many of them the file was the other one than before.
    """

    kills: int = 0
    damaged: int = 0
    left_over: int = 0
    still_left: int = 0
    changed: int = 0
    problems: list[str] = field(default_factory=list)

    def row(self, name: str) -> str:
        numbers = (self.kills, self.damaged, self.still_left, self.left_over, self.changed)
        return f"| {name} | {' | '.join(map(str, numbers))} |"


HEADING = (
    "| writer of | kills | damaged | leftovers after the next write | "
    "leftovers before it | file replaced |\n|---|---|---|---|---|---|"
)


def kill_writers(kind: Kind, folder: Path, kills: int, seed: int = 0) -> Record:
    """Kill writers of one kind at random moments, each a process of its own."""
    random_, record, path = random.Random(seed), Record(), folder / "file.safetensors"
    kind.write(path, CONTENTS[0])
    expected = set(os.listdir(folder))
    before = CONTENTS[0]
    for index in range(kills):
        kill_one(kind, path, random_.uniform(0, MOST_SECONDS_BEFORE_THE_KILL))
        record.kills += 1
        try:
            found = kind.read(path)
        except Exception as error:
            found = ""
            record.problems.append(f"kill {index}: {type(error).__name__}: {str(error)[:200]}")
        record.damaged += found not in CONTENTS
        record.changed += found != before
        record.left_over += len(os.listdir(folder)) > len(expected)
        before = CONTENTS[index % 2]
        kind.write(path, before)
        record.still_left += len(os.listdir(folder)) > len(expected)
    return record


def kill_one(kind: Kind, path: Path, seconds: float) -> None:
    """Let a process write without end, and kill it after a time."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, b"x")
            while True:
                for content in CONTENTS:
                    kind.write(path, content)
        finally:
            os._exit(1)
    os.close(writable)
    os.read(readable, 1)
    os.close(readable)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer failed by itself"


KINDS: dict[str, Callable[[], Kind]] = {
    "coordinate weights": coordinate_weights,
    "graph and weights": graph_and_weights,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    print(HEADING)
    problems = []
    for name, make in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            record = kill_writers(make(), Path(folder), options.kills, options.seed)
        print(record.row(name))
        problems += record.problems
    print("\n".join(problems))


if __name__ == "__main__":
    main()
