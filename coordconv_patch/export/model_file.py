"""The file of a graph, and beside it the file with its weights where they are too large for one.

A protobuf message ends at 2 GiB, so weights of larger models lie in a part beside the graph. A
part's name that stays the same from export to export is a danger: whoever is killed between the
two renames leaves the old graph with the new weights, which run without an error. A name that
tells the content rules that out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir

from coordconv_patch.files.atomic import part_name

__all__ = ["MAX_BYTES_IN_GRAPH", "write_model"]

MAX_BYTES_IN_GRAPH = 2_000_000_000
"""Weights of more bytes go into a file beside the graph: a protobuf message ends at 2 GiB."""


def write_model(model: onnx_ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a graph and its weights; returns the graph's file, and the weights' if there is one."""
    if sum(tensor.nbytes for _, tensor in _weights(model)) <= MAX_BYTES_IN_GRAPH:
        onnx_ir.save(model, path, format="protobuf")
        return (path,)
    part = path.with_name(part_name(path.name, _digest(model)))
    onnx_ir.save(model, path, format="protobuf", external_data=part.name)
    return path, part


def _weights(model: onnx_ir.Model) -> Iterator[tuple[str, onnx_ir.TensorProtocol]]:
    """What the initializers of a graph and of the graphs in its nodes hold, by name."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def _digest(model: onnx_ir.Model) -> str:
    """A digest of all that decides about the bytes of the weights' file."""
    digest = hashlib.sha256(onnx_ir.__version__.encode())  # which lays the weights out
    for name, tensor in _weights(model):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
