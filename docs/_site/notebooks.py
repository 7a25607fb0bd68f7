"""Run the notebooks and keep what they show: ``python docs/_site/notebooks.py``.

Needs the extras ``docs`` and ``demo``. What a notebook writes goes into a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from tqdm.auto import tqdm

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))


def run(path: Path, folder: Path) -> Any:
    """The notebook with the outputs of a run in a folder of its own.

    Raises:
        CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    # Without times of execution, which would change with every run.
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # stderr has progress, which looks otherwise in each frontend
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run all, and write each with its new outputs."""
    for path in tqdm(NOTEBOOKS, unit="notebook"):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run(path, Path(folder)), path)


if __name__ == "__main__":
    main()
