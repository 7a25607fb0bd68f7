"""Scripts outside of the package as modules: their folders are not packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

__all__ = ["load_script"]


def load_script(path: Path) -> Any:
    """A new module from a script's file; its code that is under ``__main__`` does not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
