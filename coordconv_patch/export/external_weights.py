"""The weights of a graph that is too large for one file: one part beside it, named by its content.

A protobuf message ends at 2 GiB, so exporters put the weights of larger models into files beside
the graph: torch.export's into one, TorchScript's into one per tensor, named after it. A name that
stays the same from export to export is a danger: whoever is killed between the two renames leaves
the old graph with the new weights, which run without an error. A name that tells the content
rules that out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir

from coordconv_patch.files.atomic import part_name

__all__ = ["gather_weights"]


def gather_weights(path: Path) -> Path | None:
    """Put the weights beside an exported graph into one file named by its content.

    Args:
        path: The graph, in a folder that holds nothing but it and its weights.

    Returns:
        The file with the weights; ``None`` if they are in the graph's own file.

    Raises:
        OSError: If the files cannot be read or written.
    """
    exported = sorted(file for file in path.parent.iterdir() if file != path)
    if not exported:
        return None
    digest = hashlib.sha256()
    for file in (path, *exported):  # the graph too: it says in which order the weights are stored
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as opened:
            while chunk := opened.read(2**24):
                digest.update(chunk)
    part = path.with_name(part_name(path.name, digest.hexdigest()))
    onnx_ir.save(onnx_ir.load(path), path, external_data=part.name)
    for file in exported:
        file.unlink()
    return part
