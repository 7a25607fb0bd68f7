"""The values in an output, and whether two are the same."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import enum
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coordconv_patch.patching.output_values import Uncompared, difference_of, values_in


@dataclasses.dataclass(slots=True)
class Slots:
    inside: Any
    __private: int = 3


class Plain:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


Pair = collections.namedtuple("Pair", "left right")


def differences(before: Any, after: Any) -> list[str]:
    first, second = dict(values_in(before)), dict(values_in(after))
    assert list(first) == list(second)
    assert not any(isinstance(value, Uncompared) for value in first.values())
    return [place for place in first if difference_of(first[place], second[place])]


def sparse(value: float) -> Tensor:
    return torch.tensor([[0.0, value], [2.0, 0.0]])


OF_A_NUMBER: dict[str, Callable[[float], Any]] = {
    "tensor": lambda v: torch.tensor([1.0, v]),
    "complex tensor": lambda v: torch.tensor([complex(1, v)]),
    "float8": lambda v: torch.tensor([v, 1.0]).to(torch.float8_e4m3fn),
    "bfloat16": lambda v: torch.tensor(v).bfloat16(),
    "integers": lambda v: torch.tensor([int(v), 1]),
    "sparse": lambda v: sparse(v).to_sparse(),
    "csr": lambda v: sparse(v).to_sparse_csr(),
    "csc": lambda v: sparse(v).to_sparse_csc(),
    "mkldnn": lambda v: sparse(v).to_mkldnn(),
    "nested": lambda v: torch.nested.nested_tensor([torch.ones(2), torch.tensor([float(v)])]),
    "jagged": lambda v: torch.nested.nested_tensor(
        [torch.ones(2), torch.tensor([float(v)])], layout=torch.jagged
    ),
    "array": lambda v: np.array([1.0, v]),
    "array of integers": lambda v: np.array([1, int(v)]),
    "array of objects": lambda v: np.array([None, {"a": v}], dtype=object),
    "array of text": lambda v: np.array(["a", str(v)]),
    "records": lambda v: np.array([(1, v)], dtype=[("a", "i4"), ("b", "f8")]),
    "scalar": np.float32,
    "complex scalar": lambda v: np.complex64(complex(0, v)),
    "float": float,
    "complex": lambda v: complex(0, v),
    "bytes": lambda v: bytes([int(v)]),
    "bytearray": lambda v: bytearray([int(v)]),
    "array.array": lambda v: array.array("d", [v]),
    "deque": lambda v: collections.deque([torch.tensor(v)]),
    "set": lambda v: {"a", "b", v},
    "frozenset": lambda v: frozenset((1, v)),
    "slots": lambda v: Slots([v]),
    "object": lambda v: Plain({"a": v}),
    "named tuple": lambda v: Pair(1, v),
    "mapping": lambda v: collections.OrderedDict(a=v),
    "date": lambda v: datetime.date(2000, 1, int(v)),
    "enumeration": lambda v: Colour(int(v)),
    "range": lambda v: range(int(v)),
}
OF_INTEGERS = {
    *("integers", "array of integers", "bytes", "bytearray", "date", "enumeration", "range"),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype):UserWarning")
@pytest.mark.parametrize("kind", OF_A_NUMBER)
def test_a_difference_is_seen_in_values_of_every_kind(kind: str) -> None:
    make = OF_A_NUMBER[kind]
    assert differences(make(1), make(1)) == []
    assert differences(make(1), make(2)) != []


@pytest.mark.filterwarnings("ignore:.*(beta|prototype):UserWarning")
@pytest.mark.parametrize("kind", sorted(OF_A_NUMBER.keys() - OF_INTEGERS))
@pytest.mark.parametrize("other", [0.0, float("inf"), 448.0])
def test_what_is_not_a_number_is_the_same_as_itself_alone(kind: str, other: float) -> None:
    make = OF_A_NUMBER[kind]
    broken, whole = make(float("nan")), make(other)
    assert differences(broken, make(float("nan"))) == []
    if not (kind == "float8" and other == float("inf")):  # which has no infinity
        assert differences(broken, whole) != []
        assert differences(whole, broken) != []


def test_both_parts_of_complex_numbers_count_where_one_is_not_a_number() -> None:
    nan = float("nan")
    for make in (lambda *p: complex(*p), lambda *p: torch.tensor([complex(*p)])):
        assert differences(make(nan, 1.0), make(nan, 1.0)) == []
        assert differences(make(nan, 1.0), make(nan, 2.0)) != []


def test_the_two_zeros_are_the_same() -> None:
    for make in (torch.tensor, np.array, float):
        assert differences(make(0.0), make(-0.0)) == []


def test_another_layout_type_or_shape_differs() -> None:
    dense = sparse(1.0)
    for other in (dense.to_sparse(), dense.double(), dense[:1], dense.numpy(), None):
        before, after = dict(values_in(dense)), dict(values_in(other))
        assert difference_of(before.get(""), after.get("", "missing"))


def test_values_are_kept_as_they_were() -> None:
    kept = np.zeros(2), torch.zeros(2), bytearray(2), sparse(0.0).to_sparse()
    before = dict(values_in(kept))
    kept[0][0], kept[1][0], kept[2][0] = 1, 1, 1
    kept[3]._values()[0] = 1
    after = dict(values_in(kept))
    assert len([place for place in before if difference_of(before[place], after[place])]) == 4


def test_objects_that_refer_to_each_other_in_a_circle_end() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    one, other = Plain(1), Plain(circle)
    one.back, other.back = other, one  # type: ignore[attr-defined]
    assert [place for place, _ in values_in([one, circle])] == [
        "[0].inside",
        "[0].back.inside[0]",
    ]


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("value", [generator(), iter([1]), map(abs, [1]), {object()}])
def test_what_cannot_be_looked_into_is_said(value: Any) -> None:
    ((place, seen),) = values_in([value])
    assert place == "[0]"
    assert isinstance(seen, Uncompared)
    assert seen.kind == type(value).__name__


@pytest.mark.parametrize("value", [object(), len, torch.nn.ReLU(), Plain, (), {}, threading])
def test_code_and_empty_containers_hold_no_values(value: Any) -> None:
    assert not any(isinstance(each, Uncompared) for _, each in values_in([value]))
