"""Classes that are made at run time and take the place of a module's own, which they inherit from.

A module whose own code is to run in another way keeps that code. Its class is replaced in place
by a subclass that a *mixin* is written before. Copies and pickles are made as those of the
module's own class, and get the class anew; one such class may lie upon another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from coordconv_patch.errors import PatchError
from coordconv_patch.running.class_change import set_class

__all__ = ["InPlaceMixin", "class_in_place", "class_without"]


class InPlaceMixin(nn.Module):
    """The base of the mixins.

    Attributes:
        class_below_name: The attribute of the made classes that tells which class it was before.
    """

    class_below_name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not passed on: a library that registers its subclasses would take this for one."""

    @classmethod
    def _methods_in_place(cls, below: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        """The methods that the made class has instead of those of the class below."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so it is put back on what the class below gives.
        reduced = super().__reduce_ex__(protocol)
        mixins, below = _layers(type(self))
        if not mixins or isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        arguments = tuple(below if each is type(self) else each for each in arguments)
        return _rebuilt, (mixins, below, make, arguments), *rest


_MADE: dict[tuple[type[InPlaceMixin], type[nn.Module]], type[InPlaceMixin]] = {}
_MADE_FROM: dict[type[nn.Module], tuple[type[InPlaceMixin], type[nn.Module]]] = {}


def class_in_place(mixin: type[InPlaceMixin], below: type[nn.Module]) -> type[InPlaceMixin]:
    """The class with a mixin before another one; the same one every time.

    It has the name of the class below: code looks at the names of classes.

    Raises:
        PatchError: If the class below cannot have a subclass.
    """
    key = (mixin, below)
    if key not in _MADE:
        own: dict[str, Any] = {
            mixin.class_below_name: below,
            "__module__": below.__module__,
            "__qualname__": below.__qualname__,
            "__doc__": below.__doc__,
        }
        metaclass: Any = type(below)
        own |= mixin._methods_in_place(below)
        try:
            combined = metaclass(below.__name__, (mixin, below), own)
        except Exception as error:
            raise PatchError(
                f"{below.__qualname__} is given coordinates by a subclass of it, and has a "
                f"metaclass that refuses one: {error}"
            ) from error
        _MADE_FROM[combined] = key
        _MADE.setdefault(key, combined)  # another thread may have been faster
    return _MADE[key]


def class_without(mixin: type[InPlaceMixin], kind: type[nn.Module]) -> type[nn.Module]:
    """A made class without one of the mixins that lie upon the class below them all."""
    mixins, below = _layers(kind)
    for each in mixins:
        if each is not mixin:
            below = class_in_place(each, below)
    return below


def _layers(kind: type[nn.Module]) -> tuple[tuple[type[InPlaceMixin], ...], type[nn.Module]]:
    """The mixins of a made class, the innermost first, and the class below them all."""
    mixins: list[type[InPlaceMixin]] = []
    while kind in _MADE_FROM:
        mixin, kind = _MADE_FROM[kind]
        mixins.insert(0, mixin)
    return tuple(mixins), kind


def _rebuilt(
    mixins: tuple[type[InPlaceMixin], ...],
    below: type[nn.Module],
    make: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    """What pickle and copy make: an object of the class below, whose class is then replaced."""
    module = make(*arguments)
    if type(module) is below:
        for mixin in mixins:
            set_class(module, class_in_place(mixin, type(module)))
    return module
