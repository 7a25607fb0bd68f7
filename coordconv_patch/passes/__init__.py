"""torch.fx passes, one a file."""

from coordconv_patch.passes.fold import fold
from coordconv_patch.passes.rewrite import CoordConvPass

__all__ = ["CoordConvPass", "fold"]
