"""Drop the guard of lengths against -1.

torch's TorchScript exporter writes ``x.expand(n, -1, -1, -1)`` with a guard, because -1 means
"as it is" to torch::

    Where(Equal(t, -1), 1, t)   with   t = Concat(Gather(Shape(x), 0), C, H, W)

Lengths are not negative, so that is t.
"""

from __future__ import annotations

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import stored_tensor

__all__ = ["UnguardLengths"]


class UnguardLengths(ir.passes.InPlacePass):
    """Replaces guarded lengths that cannot be negative by the lengths."""

    def call(self, model: ir.Model) -> RewriteResult:
        tally = Tally("unguard_lengths")
        for node in tuple(model.graph):
            lengths = _unguarded(node) if node.op_type == "Where" else None
            if lengths is not None:
                node.outputs[0].replace_all_uses_with(lengths)
                tally.count += 1
        return tally.result(model)


def _unguarded(where: ir.Node) -> ir.Value | None:
    """The lengths that a Where guards against -1, if they cannot be negative."""
    equal = where.inputs[0].producer() if where.inputs[0] is not None else None
    lengths = where.inputs[2]
    if equal is None or equal.op_type != "Equal" or lengths is None:
        return None
    if lengths not in equal.inputs or not _are_lengths(lengths):
        return None
    other = equal.inputs[1] if equal.inputs[0] is lengths else equal.inputs[0]
    return _before_flattening(lengths) if _is_negative(other) else None


def _before_flattening(lengths: ir.Value) -> ir.Value:
    """Lengths as they were joined: what is joined is flat, and inference sees through that."""
    node = lengths.producer()
    if node is not None and node.op_type == "Reshape":
        joined, shape = node.inputs[0], stored_tensor(node.inputs[1])
        before = joined.producer() if joined is not None else None
        flattens = shape is not None and shape.numpy().tolist() == [-1]
        if flattens and before is not None and before.op_type == "Concat":
            return before.outputs[0]
    return lengths


def _are_lengths(value: ir.Value | None) -> bool:
    """Whether a value is made of lengths that shapes have, and of stored ones."""
    stored = stored_tensor(value)
    if stored is not None:
        return stored.dtype is ir.DataType.INT64 and bool((stored.numpy() >= 0).all())
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if node.op_type == "Concat":
        return all(_are_lengths(part) for part in node.inputs)
    if node.op_type in ("Reshape", "Unsqueeze", "Gather"):
        return _are_lengths(node.inputs[0])
    return node.op_type == "Shape"


def _is_negative(value: ir.Value | None) -> bool:
    """Whether a value is stored numbers below zero, or a fill of one times such numbers."""
    stored = stored_tensor(value)
    if stored is not None:
        return bool((stored.numpy() < 0).all())
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul":
        return False
    return any(
        _is_filled_with_one(one) and _is_negative(other)
        for one, other in (node.inputs, node.inputs[::-1])
    )


def _is_filled_with_one(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "ConstantOfShape" or "value" not in node.attributes:
        return False
    return bool((node.attributes["value"].as_tensor().numpy() == 1).all())
