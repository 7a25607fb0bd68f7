"""What the benchmarks share: models, ports, engines, the floor, records and pictures."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).parents[2])
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)  # this checkout is measured, whatever is installed, or nothing is
