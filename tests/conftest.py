"""Settings for every test."""

import os

import torch

# Workers of pytest-xdist share the cores; more threads than cores only slow them down.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
