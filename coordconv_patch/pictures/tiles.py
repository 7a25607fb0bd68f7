"""Tiles that somebody else's code cuts and tells the place of: MONAI's sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from coordconv_patch.errors import CoordinatesError, excerpt
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.window import Window
from coordconv_patch.patching.places import places

__all__ = ["tile_predictor"]

_HINT = (
    "tile_predictor: call sliding_window_inference(images, roi_size, sw_batch_size, predictor, "
    "with_coord=True), which says where each window is"
)


def tile_predictor(model: nn.Module, image_size: Sequence[int]) -> Callable[..., Any]:
    """A predictor for MONAI's sliding windows that sees coordinates of the whole image.

    Args:
        model: A patched model.
        image_size: Spatial size of the images that are cut, ``images.shape[2:]``, before MONAI pads
            those that are smaller than a window.

    Returns:
        A function ``(windows, slices, *args, **kwargs)``, as ``sliding_window_inference`` and
        ``SlidingWindowInferer`` call it with ``with_coord=True``; further arguments go to the
        model. ``slices`` has one entry a window: those of batch, channels and spatial dimensions.

    Raises:
        PatchError: If the model is not patched.
        CoordinatesError: If the size is not one of an image; at the call, if there are no slices,
            or they do not fit.

    Example:
        >>> images = torch.rand(1, 3, 512, 512)
        >>> predictor = coordconv_patch.tile_predictor(model, images.shape[2:])
        >>> sliding_window_inference(images, (128, 128), 4, predictor, with_coord=True)  # doctest: +SKIP
    """  # noqa: E501
    require_coord_layers(model)
    if not isinstance(image_size, Sequence) or isinstance(image_size, (str, bytes)):
        raise CoordinatesError(
            f"tile_predictor: image_size={excerpt(image_size)}: give images.shape[2:]"
        )
    # A window of the whole image, for its checks of the numbers.
    size = Window((0,) * len(image_size), tuple(image_size), tuple(image_size)).image_size

    def predict(windows: Tensor, slices: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(slices, Sequence) or len(slices) != len(windows):
            raise CoordinatesError(f"slices={excerpt(slices)}: {_HINT}")
        with places(model, [_window(each, size) for each in slices]):
            return model(windows, *args, **kwargs)

    return predict


def _window(slices: Sequence[slice], image_size: tuple[float, ...]) -> Window:
    """A window by its slices of batch, channels, and each spatial dimension.

    Raises:
        CoordinatesError: If these are not slices with two ends, or if it reaches beyond the image
            where MONAI pads none.
    """
    spatial = tuple(slices)[2:] if isinstance(slices, Sequence) else ()
    ends = [getattr(each, end, None) for each in spatial for end in ("start", "stop")]
    if not ends or not all(isinstance(end, Integral) for end in ends):
        raise CoordinatesError(f"slices={excerpt(slices)}: {_HINT}")
    if len(spatial) != len(image_size):
        raise CoordinatesError(
            f"tile_predictor: windows of {len(spatial)} dimensions in images of size {image_size}: "
            "give images.shape[2:]"
        )
    offsets, sizes = [], []
    for each, length in zip(spatial, image_size, strict=True):
        extent = each.stop - each.start
        # An image that is smaller than the window was padded, with the shorter half before it.
        before = max(0, extent - length) // 2
        if each.stop > max(extent, length):
            raise CoordinatesError(
                f"tile_predictor: a window ends at {each.stop} of {length} pixels: give the size "
                "of the images that are cut, images.shape[2:]"
            )
        offsets.append(each.start - before)
        sizes.append(extent)
    return Window(tuple(offsets), tuple(sizes), image_size)
