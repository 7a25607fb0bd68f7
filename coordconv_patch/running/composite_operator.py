"""Functions that are one operator to torch.compile's frontend, and traced by what comes after it.

The code that dynamo makes of a model checks at every call each object, attribute and function that
it read while it traced. An operator it only writes down. As the operator has no kernels but the
function itself (it is *composite* in torch's words), everything behind dynamo decomposes it,
so that compilers fuse what is in it as ever; and it needs no formula for fake tensors or gradients.

``torch.compiler.allow_in_graph`` does nearly the same, but imports the compiler, for seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["composite_operator"]

_NAMESPACE = "coordconv_patch"


def composite_operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function; a decorator.

    Not to be called while torch.export is tracing: it keeps the operator, and the program could be
    loaded only where this package is installed.

    Args:
        schema: Name, arguments and result, in the words of :meth:`torch.library.Library.define`.
    """
    name = schema.partition("(")[0]

    def operator_of(function: Callable[..., Any]) -> Any:
        namespace = getattr(torch.ops, _NAMESPACE)
        if not hasattr(namespace, name):  # it is, where the package is imported a second time
            library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
            library.define(schema)
            library.impl(name, function, "CompositeImplicitAutograd")
            # The operator goes with its library, and may be needed as long as the process lives.
            function.__dict__["library"] = library
        return getattr(namespace, name).default

    return operator_of
