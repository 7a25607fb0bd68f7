"""Give a trained convolutional model's convolutions coordinates, without changing its outputs.

>>> import coordconv_patch as ccp
>>> model = ccp.patch(model, where="first")          # doctest: +SKIP
>>> ccp.export_onnx(model, "model.onnx", example)    # doctest: +SKIP
"""

from coordconv_patch.coords import Coordinates, Window
from coordconv_patch.export import Check, ExportReport, export_onnx, verify_onnx
from coordconv_patch.folding import fold_with, register_folding_method
from coordconv_patch.layers import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
)
from coordconv_patch.left_behind import forget_left_behind_
from coordconv_patch.passes import CoordConvPass, fold
from coordconv_patch.patching import patch, patch_, set_window_, unpatch, unpatch_
from coordconv_patch.plan import Plan, plan
from coordconv_patch.programs import from_exported
from coordconv_patch.training import (
    add_to_optimizer_,
    coord_parameters,
    param_groups,
    train_only_coords_,
)
from coordconv_patch.version import __version__
from coordconv_patch.weights import load_coords, load_coords_, save_coords

__all__ = [
    "Check",
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvPass",
    "CoordConvTranspose1d",
    "CoordConvTranspose2d",
    "CoordConvTranspose3d",
    "Coordinates",
    "ExportReport",
    "Plan",
    "Window",
    "__version__",
    "add_to_optimizer_",
    "coord_parameters",
    "export_onnx",
    "fold",
    "fold_with",
    "forget_left_behind_",
    "from_exported",
    "load_coords",
    "load_coords_",
    "param_groups",
    "patch",
    "patch_",
    "plan",
    "register_folding_method",
    "save_coords",
    "set_window_",
    "train_only_coords_",
    "unpatch",
    "unpatch_",
    "verify_onnx",
]
