"""Settings for every test."""

import functools
import os
from collections.abc import Iterator

import pytest
import torch
from old_torch import IS_2_6

# Workers of pytest-xdist share the cores; more threads than cores only slow them down.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if IS_2_6:
    # Its torch.export is strict unless told otherwise, as later versions are not.
    torch.export.export = functools.partial(torch.export.export, strict=False)


@pytest.fixture(autouse=True)
def _no_terminal() -> Iterator[None]:
    """Results are printed as wide as need be: workers of pytest-xdist are told of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:  # the tests' own must be undone before others
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many tiny convolutions: on a busy machine a second thread makes them 30 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
