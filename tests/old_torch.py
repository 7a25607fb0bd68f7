"""What older versions of torch cannot do, for the tests that then expect something else."""

from __future__ import annotations

import torch

IS_2_6 = torch.__version__ < "2.7"
BEFORE_2_9 = torch.__version__ < "2.9"
BEFORE_2_11 = torch.__version__ < "2.11"

STRICT = [False] if IS_2_6 else [False, True]
"""Values of ``strict=`` for torch.export, whose strict way in torch 2.6 fails on hooks."""
