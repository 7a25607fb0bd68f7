"""Give a trained convolutional model's convolutions coordinates, without changing its outputs.

>>> import coordconv_patch as ccp
>>> model = ccp.patch(model, where="first")          # doctest: +SKIP
>>> ccp.export_onnx(model, "model.onnx", example)    # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from coordconv_patch.channels.axes import Axes
from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.fourier import Fourier
from coordconv_patch.channels.given import Given
from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.channels.radius import Radius
from coordconv_patch.channels.registry import register_channel_block
from coordconv_patch.concatenated.checkpoint import load_concatenated, load_concatenated_
from coordconv_patch.concatenated.import_coordconv import import_coordconv, import_coordconv_
from coordconv_patch.concatenated.report import ImportedSite, ImportReport
from coordconv_patch.concatenated.to_concatenated import to_concatenated
from coordconv_patch.contributions.influence import influence
from coordconv_patch.contributions.map_picture import plot_coords
from coordconv_patch.contributions.report import Influence, SiteInfluence
from coordconv_patch.errors import (
    ArgumentError,
    CoordConvPatchError,
    CoordinatesError,
    ExampleInputsError,
    ExportError,
    MissingPackageError,
    ModelSourceError,
    PatchError,
    SelectionError,
    WeightsError,
)
from coordconv_patch.folding.batch_norms import fold
from coordconv_patch.folding.method_names import register_folding_method
from coordconv_patch.folding.other_libraries import fold_with
from coordconv_patch.followers.follow import follow_letterbox_, follow_padding_, follow_regions_
from coordconv_patch.graphs.programs import from_exported
from coordconv_patch.layers.coordconv import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
)
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.scrambled import scrambled
from coordconv_patch.layers.window import Window
from coordconv_patch.left_behind.watch import forget_left_behind_
from coordconv_patch.lowering.registry import register_lowering
from coordconv_patch.onnx_names import onnx_name
from coordconv_patch.patching.fx_pass import CoordConvPass
from coordconv_patch.patching.maps import maps
from coordconv_patch.patching.patch import patch, patch_
from coordconv_patch.patching.places import places, set_places_
from coordconv_patch.patching.plan import Plan, plan, survey
from coordconv_patch.patching.unpatch import unpatch, unpatch_
from coordconv_patch.patching.window import set_window_
from coordconv_patch.pictures.placed_transform import PlacedTransform
from coordconv_patch.pictures.tiles import tile_predictor
from coordconv_patch.pictures.turns import places_in_turn
from coordconv_patch.ranking.rank import rank
from coordconv_patch.ranking.ranking import RankedPart, Ranking
from coordconv_patch.sites.presets import register_selector
from coordconv_patch.sites.site import Site
from coordconv_patch.status import LayerStatus, layer_status
from coordconv_patch.training import (
    add_to_optimizer_,
    coord_parameters,
    param_groups,
    train_only_coords_,
)
from coordconv_patch.verification.check import Check
from coordconv_patch.version import __version__
from coordconv_patch.weights.hub import from_pretrained, push_to_hub, save_pretrained
from coordconv_patch.weights.save_load import load_coords, load_coords_, save_coords

if TYPE_CHECKING:
    from coordconv_patch.export.onnx import export_onnx
    from coordconv_patch.export.report import ExportReport
    from coordconv_patch.export.targets import Target, register_target
    from coordconv_patch.verification.verify import verify_onnx
else:
    __getattr__ = onnx_name

__all__ = [
    "ArgumentError",
    "Axes",
    "AxisPixels",
    "ChannelBlock",
    "Check",
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvPass",
    "CoordConvPatchError",
    "CoordConvTranspose1d",
    "CoordConvTranspose2d",
    "CoordConvTranspose3d",
    "Coordinates",
    "CoordinatesError",
    "ExampleInputsError",
    "ExportError",
    "ExportReport",
    "Fourier",
    "Given",
    "ImportReport",
    "ImportedSite",
    "Influence",
    "LayerStatus",
    "MissingPackageError",
    "ModelSourceError",
    "PatchError",
    "PlacedTransform",
    "Plan",
    "Radius",
    "RankedPart",
    "Ranking",
    "SelectionError",
    "Site",
    "SiteInfluence",
    "Target",
    "WeightsError",
    "Window",
    "__version__",
    "add_to_optimizer_",
    "coord_parameters",
    "export_onnx",
    "fold",
    "fold_with",
    "follow_letterbox_",
    "follow_padding_",
    "follow_regions_",
    "forget_left_behind_",
    "from_exported",
    "from_pretrained",
    "import_coordconv",
    "import_coordconv_",
    "influence",
    "layer_status",
    "load_concatenated",
    "load_concatenated_",
    "load_coords",
    "load_coords_",
    "maps",
    "param_groups",
    "patch",
    "patch_",
    "places",
    "places_in_turn",
    "plan",
    "plot_coords",
    "push_to_hub",
    "rank",
    "register_channel_block",
    "register_folding_method",
    "register_lowering",
    "register_selector",
    "register_target",
    "save_coords",
    "save_pretrained",
    "scrambled",
    "set_places_",
    "set_window_",
    "survey",
    "tile_predictor",
    "to_concatenated",
    "train_only_coords_",
    "unpatch",
    "unpatch_",
    "verify_onnx",
]
