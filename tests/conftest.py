"""Settings for every test."""

import os
from collections.abc import Iterator

import pytest
import torch

# Workers of pytest-xdist share the cores; more threads than cores only slow them down.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many tiny convolutions: on a busy machine a second thread makes them 30 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
