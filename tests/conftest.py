"""Settings for every test."""

import functools
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from old_torch import BEFORE_2_9

# Workers of pytest-xdist share the cores; more threads than cores only slow them down.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if BEFORE_2_9:
    # Their torch.export is strict unless told otherwise, as later versions are not.
    torch.export.export = functools.partial(torch.export.export, strict=False)


@pytest.fixture(autouse=True)
def _no_terminal() -> Iterator[None]:
    """Results are printed as wide as need be: workers of pytest-xdist are told of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:  # the tests' own must be undone before others
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(autouse=True)
def _gradients_stay_on() -> Iterator[None]:
    """A test that leaves them off, by contexts left out of order, breaks those that follow."""
    yield
    is_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert is_on, "gradients are off after this test"


@pytest.fixture(autouse=BEFORE_2_9)
def _compiled_anew() -> Iterator[None]:
    """Old versions count the compilations of all tests together, and give up at the ninth.

    And a failed export leaves a hook behind on which later compilations stumble.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    torch.nn.modules.module._global_buffer_registration_hooks.clear()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many tiny convolutions: on a busy machine a second thread makes them 30 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
