"""What a detector found in a picture, and which of a model's outputs say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Array", "Detections", "Fields", "find_fields"]

Array = np.ndarray[Any, Any]

Fields = dict[str, tuple[int, tuple[Any, ...]]]
"""Where the fields of one picture's detections stand: the output's number, and the part of it."""

_PACKED = 6
"""Columns of detections in one tensor: x1, y1, x2, y2, score, class."""


@dataclass(frozen=True)
class Detections:
    """What a picture shows: M boxes, scores, labels, and further fields such as masks by name.

    Boxes (M, 4) are in pixels or whatever the model gives, labels (M,) zeros where it gives none.
    """

    boxes: Array
    scores: Array
    labels: Array
    extras: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def take(cls, fields: Fields, outputs: Sequence[Array]) -> Detections | None:
        """The detections among a run's outputs; ``None`` if their shapes do not fit together."""
        try:
            taken = {name: outputs[index][part] for name, (index, part) in fields.items()}
        except IndexError:
            return None
        boxes, scores = (taken.pop(name).astype(np.float64) for name in ("boxes", "scores"))
        if scores.ndim != 1 or boxes.shape != (len(scores), 4):
            return None
        labels = taken.pop("labels", np.zeros(len(scores)))
        fits = all(field.shape[:1] == scores.shape for field in (labels, *taken.values()))
        return cls(boxes, scores, labels, taken) if fits and labels.ndim == 1 else None

    def describe(self, row: int) -> str:
        """One detection in words."""
        box = ", ".join(f"{edge:.4g}" for edge in self.boxes[row])
        return f"box ({box}), label {self.labels[row]:g}, score {self.scores[row]:.6g}"


def find_fields(outputs: Any) -> tuple[Fields, ...]:
    """Which of a model's output tensors, in pytree order, are detections; one entry a picture.

    They are mappings (or named tuples) with ``boxes`` (M, 4) and ``scores`` (M,), as
    torchvision's detectors and transformers' post-processing give them, and tensors
    (N, M, 6) of x1, y1, x2, y2, score, class sorted by score, as end-to-end YOLOs do.
    """
    leaves = [leaf for leaf in _leaves_with_paths(outputs) if isinstance(leaf[1], Tensor)]
    groups: dict[Any, dict[str, tuple[int, Tensor]]] = {}
    packed: list[Fields] = []
    for index, (path, tensor) in enumerate(leaves):
        last = path[-1] if path else None
        name = getattr(last, "key", getattr(last, "name", None))
        if isinstance(name, str):
            groups.setdefault(path[:-1], {})[name] = (index, tensor)
        if _is_packed(tensor):
            columns = {"boxes": slice(0, 4), "scores": 4, "labels": 5}
            packed += [
                {field: (index, (picture, slice(None), part)) for field, part in columns.items()}
                for picture in range(len(tensor))
            ]
    named = [
        {
            name: (index, ())
            for name, (index, tensor) in group.items()
            if tensor.dim() and len(tensor) == len(group["scores"][1])
        }
        for group in groups.values()
        if _is_group({name: tensor for name, (_, tensor) in group.items()})
    ]
    return (*named, *packed)


def _leaves_with_paths(outputs: Any) -> list[tuple[Any, Any]]:
    try:
        return pytree.tree_flatten_with_path(outputs)[0]
    except ValueError:  # a class that is registered without its fields' names, as diffusers' are
        return [((), leaf) for leaf in pytree.tree_leaves(outputs)]


def _is_group(tensors: Mapping[str, Tensor]) -> bool:
    if "boxes" not in tensors or "scores" not in tensors:
        return False
    boxes, scores = tensors["boxes"], tensors["scores"]
    return scores.dim() == 1 and boxes.shape == (len(scores), 4)


def _is_packed(tensor: Tensor) -> bool:
    if tensor.dim() != 3 or tensor.shape[2] != _PACKED or not tensor.is_floating_point():
        return False
    scores, classes = tensor[..., 4], tensor[..., 5]
    return bool(
        ((scores >= 0) & (scores <= 1)).all()
        and (scores[:, 1:] <= scores[:, :-1]).all()
        and torch.equal(classes, classes.round().clamp(min=0))
    )
