"""What older versions cannot do, for the tests that then expect something else."""

from __future__ import annotations

import onnxruntime
import torch

IS_2_6 = torch.__version__ < "2.7"
BEFORE_2_9 = torch.__version__ < "2.9"
BEFORE_2_11 = torch.__version__ < "2.11"

RUNTIME_1_23 = onnxruntime.__version__.startswith("1.23.")
"""The last ONNX Runtime for Python 3.10."""

STRICT = [False] if IS_2_6 else [False, True]
"""Values of ``strict=`` for torch.export, whose strict way in torch 2.6 fails on hooks."""
