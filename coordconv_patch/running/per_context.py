"""Values of one asyncio task, or of one thread outside of such, which compiled code can read.

A task that is created, and a call of ``asyncio.to_thread``, begin with the values of the code that
began them (:mod:`contextvars`). Other threads begin with none.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

__all__ = ["PerContext"]


class PerContext:
    """A list that each context has for itself, or nothing, which reads as a list of one ``None``.

    torch.compile cannot read a :class:`~contextvars.ContextVar` before torch 2.14. It does read a
    property whose getter is written in C, as the variable's own ``get`` is, and looks whether the
    value is still the same before it runs what it compiled. So each instance has a class of its
    own, with that property.

    Attributes:
        held: The list; the instance itself where none was set.
    """

    _variable: ContextVar[Any]
    held: Any

    def __new__(cls) -> PerContext:
        variable: ContextVar[Any] = ContextVar(cls.__name__)
        # A getter is called with the instance, which the variable's takes for its default.
        members = {"_variable": variable, "held": property(variable.get)}
        return object.__new__(type(cls.__name__, (cls,), members))

    def __reduce__(self) -> tuple[Any, ...]:
        return PerContext, ()  # copies, and what pickle makes, begin without lists

    def __getitem__(self, at: int) -> None:
        """``None``, as the first item of a list of one."""

    @property
    def is_set(self) -> bool:
        """Whether this context has a list."""
        return self.held is not self

    def set(self, value: list[Any] | None) -> Token[Any]:
        """Give this context another list; ``None``: take it away."""
        # The instance as a value is read like no value: compiled code has not to be made anew.
        return self._variable.set(self if value is None else value)

    def is_of_this_context(self, token: Token[Any]) -> bool:
        """Whether a :meth:`set` was of this context, and is undone now; may be asked once."""
        try:
            self._variable.reset(token)
        except ValueError:
            return False
        return True
