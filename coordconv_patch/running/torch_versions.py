"""Where torch's versions differ, and from which oldest version on each stand-in may go.

The oldest torch that the package runs on is :data:`OLDEST`. What a version cannot do is refused by
its name where it is asked for; what it calls otherwise, or lacks, is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import traceback

__all__ = ["OLDEST", "annotate_nodes", "annotations_are_kept", "is_exporting"]

OLDEST = "2.6"

# Decided here and not in the functions, since torch.compile traces those.
_TELLS_EXPORTS = hasattr(torch.compiler, "is_exporting")
_HAS_ANNOTATE = hasattr(traceback, "annotate")

if _TELLS_EXPORTS:
    is_exporting = torch.compiler.is_exporting
else:  # may go with torch 2.6

    def is_exporting() -> bool:
        """Whether torch.export may be tracing: torch 2.6 does not tell it from torch.compile."""
        return torch.compiler.is_compiling()


if _HAS_ANNOTATE:
    annotations_are_kept = is_exporting
else:  # may go with torch 2.8

    def annotations_are_kept() -> bool:
        """Whether torch.export is tracing, and in the way that keeps annotations of nodes.

        Before torch 2.9 its strict way, which is dynamo's, does not.
        """
        return is_exporting() and not torch.compiler.is_dynamo_compiling()


@contextmanager
def annotate_nodes(annotation: dict[str, Any]) -> Iterator[None]:
    """While entered, nodes that torch.export records hold these values in ``meta["custom"]``."""
    # Strict export lets dynamo see to it that annotations reach the graph; otherwise they
    # are taken over only where that is asked for.
    with traceback.preserve_node_meta(), _annotate(annotation):
        yield


if _HAS_ANNOTATE:
    _annotate = traceback.annotate
else:  # may go with torch 2.8

    @contextmanager
    def _annotate(annotation_dict: dict[str, Any]) -> Iterator[None]:
        meta = traceback.current_meta
        before = meta.get("custom")
        meta["custom"] = {**(before or {}), **annotation_dict}
        try:
            yield
        finally:
            if before is None:
                del meta["custom"]
            else:
                meta["custom"] = before
