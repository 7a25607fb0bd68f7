"""What a channel block is: some coordinate channels that belong together."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.errors import CoordConvPatchError, CoordinatesError, excerpt

__all__ = ["ChannelBlock"]

_LONGEST_TEXT = 1000
_MOST_ITEMS = 1000
_DEEPEST = 4


@dataclass(frozen=True)
class ChannelBlock(ABC):
    """Some coordinate channels of a convention, see ``Coordinates(channels=...)``.

    A block is a value: a frozen dataclass whose fields are numbers, texts, truth values,
    ``None``, or tuples of these. By its :attr:`kind` and its fields it is saved with the weights,
    and compared when they are loaded.

    Attributes:
        kind: The name that a block of this class is saved under.
        is_affine: Whether every channel's values are affine in the indices of the pixels
            (a factor times each index, and a constant) in a picture of given size.
    """

    kind: ClassVar[str]
    is_affine: ClassVar[bool] = False

    @abstractmethod
    def names(self, ndim: int) -> tuple[str, ...]:
        """Names of the channels for ``ndim`` spatial dimensions, in their order.

        Raises:
            CoordinatesError: If the block does not exist for so many dimensions.
        """

    @abstractmethod
    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        """The channels, one tensor each.

        Args:
            positions: The pixels along each spatial dimension, in the order of the dimensions.

        Returns:
            Tensors elementwise in the positions: each of the shape that those of the axes that
            it depends on broadcast to. Computed by plain torch operations, without looking at
            values or sizes, so that ``torch.compile`` and ``torch.export`` can capture them.
        """

    def dims(self, ndim: int) -> list[int | None]:
        """For each channel the one spatial dimension that it depends on; ``None``: on several.

        Channels that depend on one alone have cheaper forms in exported and compiled graphs.
        """
        return [None] * len(self.names(ndim))

    def to_dict(self) -> dict[str, Any]:
        """The kind, and the fields that differ from the default, JSON-ready; see :meth:`from_dict`.

        Raises:
            CoordinatesError: If a field is something that a file cannot hold.
        """
        fields: dict[str, Any] = {"kind": self.kind}
        for field, value in _changed_fields(self).items():
            _check_plain(value, f"{type(self).__name__}: {field}={excerpt(value)}")
            fields[field] = value
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ChannelBlock:
        """Inverse of :meth:`to_dict`, from parsed JSON, whose fields may hold anything.

        Raises:
            CoordinatesError: If a field is unknown (a newer version wrote it) or invalid.
        """
        what = f"channel block {cls.kind!r}"
        values = {name: value for name, value in fields.items() if name != "kind"}
        unknown = set(values) - {field.name for field in dataclasses.fields(cls) if field.init}
        if unknown:
            raise CoordinatesError(
                f"{what}: unknown fields {excerpt(sorted(unknown, key=str))}: a newer version of "
                "what defines it may have written them"
            )
        for field, value in values.items():
            _check_plain(value, f"{what}: {field}={excerpt(value)}")
        try:
            return cls(**{name: _with_tuples(value) for name, value in values.items()})
        except CoordConvPatchError:
            raise
        except (TypeError, ValueError) as error:
            raise CoordinatesError(f"{what}: {excerpt(values)} is invalid: {error}") from error

    def __str__(self) -> str:
        fields = [f"{name}={value!r}" for name, value in _changed_fields(self).items()]
        return f"{type(self).__name__}({', '.join(fields)})"


def _changed_fields(block: ChannelBlock) -> dict[str, Any]:
    values = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
    defaults = {field.name: field.default for field in dataclasses.fields(block)}
    return {
        name: value
        for name, value in values.items()
        if type(value) is not type(defaults[name]) or value != defaults[name]
    }


def _check_plain(value: object, what: str, depth: int = 0) -> None:
    """Check that a file can hold a value, and that it comes back as what it was."""
    if isinstance(value, (tuple, list)) and len(value) <= _MOST_ITEMS and depth < _DEEPEST:
        for item in value:
            _check_plain(item, what, depth + 1)
        return
    if value is None or type(value) is bool:
        return
    if type(value) is str and len(value) <= _LONGEST_TEXT and _is_unicode(value):
        return
    if (type(value) is int and value.bit_length() <= 63) or (
        type(value) is float and math.isfinite(value)
    ):
        return
    raise CoordinatesError(
        f"{what}: files hold finite numbers, short texts, True, False, None, and tuples of these"
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_tuples(value: Any) -> Any:
    """A parsed value as a field has it: JSON has lists only, and a list has no hash."""
    if isinstance(value, (list, tuple)):
        return tuple(_with_tuples(item) for item in value)
    return value
