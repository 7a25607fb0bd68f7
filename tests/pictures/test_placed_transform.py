"""Data pipelines that give places: what a place says is what the transformed picture shows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from coordinate_pictures import check_place, coordinate_picture
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import coordconv_patch as ccp

WHOLE = (47, 64)
BILINEAR = v2.InterpolationMode.BILINEAR


def as_tensor(transform: Any) -> tuple[Tensor, Tensor]:
    return transform(coordinate_picture(*WHOLE))


def as_pil(transform: Any) -> tuple[Tensor, Tensor]:
    """Channel by channel, in PIL's mode of floats."""
    state = torch.get_rng_state()
    results = []
    for channel in coordinate_picture(*WHOLE):
        torch.set_rng_state(state)
        results.append(transform(PIL.Image.fromarray(channel.numpy(), mode="F")))
    images, thetas = zip(*results, strict=True)
    assert all(torch.equal(theta, thetas[0]) for theta in thetas)
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]), thetas[0]


# --- torchvision ----------------------------------------------------------------------------------

TORCHVISION: dict[str, Any] = {
    "identity": v2.Identity(),
    "horizontal flip": v2.RandomHorizontalFlip(1),
    "vertical flip": v2.RandomVerticalFlip(1),
    "resize": v2.Resize((31, 97)),
    "resize the shorter side": v2.Resize(60),
    "resize, at most": v2.Resize(30, max_size=37),
    "random resize": v2.RandomResize(30, 70),
    "shortest size": v2.RandomShortestSize([30, 60]),
    "scale jitter": v2.ScaleJitter((60, 60), scale_range=(0.6, 2.0)),
    "resized crop": v2.RandomResizedCrop((33, 41), scale=(0.2, 1), interpolation=BILINEAR),
    "crop, padded": v2.RandomCrop(40, padding=9),
    "crop, padded if needed": v2.RandomCrop((70, 90), pad_if_needed=True),
    "center crop": v2.CenterCrop((20, 31)),
    "center crop, padded by odd": v2.CenterCrop((70, 71)),
    "center crop of one axis": v2.CenterCrop((20, 81)),
    "pad": v2.Pad([1, 2, 3, 4]),
    "zoom out": v2.RandomZoomOut(p=1),
    "rotation": v2.RandomRotation(40, interpolation=BILINEAR),
    "rotation, expanded": v2.RandomRotation((12, 80), interpolation=BILINEAR, expand=True),
    "rotation about a point": v2.RandomRotation(40, interpolation=BILINEAR, center=(10, 7)),
    "rotation about a point, expanded": v2.RandomRotation(
        (33, 33), interpolation=BILINEAR, expand=True, center=(11, 7)
    ),
    "quarter turn": v2.RandomRotation((90, 90), expand=True),
    "affine": v2.RandomAffine(30, (0.1, 0.2), (0.7, 1.4), (-10, 10, -8, 8), interpolation=BILINEAR),
    "affine about a point": v2.RandomAffine(
        30, (0.1, 0.2), (0.7, 1.4), (-10, 10, -8, 8), interpolation=BILINEAR, center=(12, 9)
    ),
    "composition": v2.Compose(
        [
            v2.RandomResizedCrop((50, 60), scale=(0.4, 1), interpolation=BILINEAR),
            v2.RandomApply([v2.RandomHorizontalFlip(1)]),
            v2.RandomChoice([v2.RandomVerticalFlip(1), v2.Pad([3, 5])]),
            v2.RandomOrder([v2.RandomRotation(20, BILINEAR), v2.RandomHorizontalFlip(1)]),
            v2.CenterCrop(48),
        ]
    ),
}


@pytest.mark.parametrize("picture", [as_tensor, as_pil])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_places_are_what_the_picture_shows(
    name: str, picture: Callable[[Any], tuple[Tensor, Tensor]]
) -> None:
    torch.manual_seed(0)
    transform = ccp.PlacedTransform(TORCHVISION[name])
    for _ in range(4):
        check_place(*picture(transform), WHOLE)


def test_pixels_that_are_only_moved_have_exact_places() -> None:
    for name in ("horizontal flip", "vertical flip", "crop, padded", "center crop of one axis"):
        check_place(*as_tensor(ccp.PlacedTransform(TORCHVISION[name])), WHOLE, limit=1e-4)


@pytest.mark.parametrize("mode", ["reflect", "edge", "symmetric"])
def test_what_a_border_is_filled_with_does_not_matter(mode: str) -> None:
    picture = coordinate_picture(*WHOLE)
    _, theta = ccp.PlacedTransform(v2.Pad([1, 2, 3, 4], padding_mode=mode))(picture)
    assert torch.equal(theta, ccp.PlacedTransform(TORCHVISION["pad"])(picture)[1])


def test_steps_that_change_colours_and_types_are_passed() -> None:
    def unchanged(image: Tensor) -> Tensor:
        return image * 1.0

    pipeline = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(1),
            v2.ColorJitter(brightness=(1, 1)),
            v2.RandomPhotometricDistort(p=0),
            v2.Lambda(unchanged, tv_tensors.Image),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomErasing(p=1, scale=(0.02, 0.05)),
            v2.Normalize([0.0], [1.0]),
            v2.ToPureTensor(),
            v2.RandomVerticalFlip(1),
            v2.Resize((40, 40)),
        ]
    )
    image, theta = ccp.PlacedTransform(pipeline)(
        coordinate_picture(*WHOLE).permute(1, 2, 0).numpy()
    )
    assert type(image) is Tensor
    check_place(image, theta, WHOLE)
    assert torch.equal(theta, torch.tensor([[-1.0, 0, 0], [0, -1, 0]]))


def test_the_image_is_the_one_that_the_pipeline_gives_alone() -> None:
    image = coordinate_picture(*WHOLE)
    torch.manual_seed(1)
    expected = TORCHVISION["composition"](image)
    torch.manual_seed(1)
    assert torch.equal(ccp.PlacedTransform(TORCHVISION["composition"])(image)[0], expected)


def test_what_belongs_to_an_image_goes_along() -> None:
    boxes = tv_tensors.BoundingBoxes([[4, 5, 20, 30]], format="XYXY", canvas_size=WHOLE)
    image, target, theta = ccp.PlacedTransform(v2.RandomHorizontalFlip(1))(
        coordinate_picture(*WHOLE), {"boxes": boxes, "name": "a"}
    )
    assert target["name"] == "a"
    assert target["boxes"].tolist() == [[44, 5, 60, 30]]
    check_place(image, theta, WHOLE)


class Clamp(v2.Transform):
    """Key points are clamped; so would be ours."""

    def transform(self, inpt: Any, params: Any) -> Any:
        return v2.functional.clamp_keypoints(inpt) if hasattr(inpt, "canvas_size") else inpt


class ImageAlone(v2.Transform):
    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: Any) -> Any:
        return tv_tensors.Image(inpt[..., ::2, ::2])


class Elastic(v2.Transform):
    """Found at the call, for its class is not known."""

    def transform(self, inpt: Any, params: Any) -> Any:
        return self._call_kernel(v2.functional.elastic, inpt, torch.zeros(1, 20, 20, 2))


class Dropped(v2.Transform):
    def transform(self, inpt: Any, params: Any) -> Any:
        return tv_tensors.wrap(inpt[:4], like=inpt) if hasattr(inpt, "canvas_size") else inpt


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (v2.ElasticTransform(), "step 1 of the pipeline, ElasticTransform: .* is not one affine"),
        (
            v2.RandomApply([v2.RandomPerspective()]),
            "step 0 of step 1 of the pipeline, RandomPerspective: .* leave it out",
        ),
        (v2.TenCrop(9), "TenCrop: what it does to the picture"),
        (v2.RandAugment(), "step 1 of the pipeline, RandAugment, moves or mixes images without"),
        (v2.Lambda(lambda x: x / 2), r"v2.Lambda, changes whatever .*tv_tensors.Image\)"),
        (
            torchvision.transforms.RandomCrop(9),
            "RandomCrop, takes images alone: .*.v2.RandomC",
        ),
        (lambda x: x / 2, "step 1 of the pipeline, <function .*is not one of torchvision"),
        (v2.Lambda(lambda x: x / 2, Tensor), "changed the points of the picture to Tensor; "),
        (Elastic(), "ElasticTransform: what it does to the picture is not one affine map"),
        (Clamp(), "moved the points in a way that is not affine; "),
        (Dropped(), "a transform removed points of the picture"),
        (ImageAlone(), "image of 10 x 10 pixels, but moved points as if it were one of 20 x 20"),
    ],
)
def test_torchvision_steps_without_a_place_are_refused(step: Any, message: str) -> None:
    with pytest.raises(ccp.CoordinatesError, match=message):
        ccp.PlacedTransform(v2.Compose([v2.CenterCrop(20), step]))(
            tv_tensors.Image(coordinate_picture(*WHOLE))
        )


# --- albumentations -------------------------------------------------------------------------------

ALBUMENTATIONS: dict[str, Any] = {
    "no-op": A.NoOp(),
    "horizontal flip": A.HorizontalFlip(p=1),
    "vertical flip": A.VerticalFlip(p=1),
    "transpose": A.Transpose(p=1),
    "D4": A.D4(p=1),
    "square symmetry": A.SquareSymmetry(p=1),
    "quarter turns": A.RandomRotate90(p=1),
    "resize": A.Resize(31, 97),
    "resize by area": A.Resize(23, 32, interpolation=cv2.INTER_AREA),
    "longest": A.LongestMaxSize(50),
    "smallest": A.SmallestMaxSize(60),
    "random scale": A.RandomScale((-0.4, 0.4), p=1),
    "crop": A.Crop(3, 5, 40, 41),
    "random crop": A.RandomCrop(24, 30),
    "random crop, padded": A.RandomCrop(60, 60, pad_if_needed=True),
    "center crop": A.CenterCrop(21, 33),
    "center crop, padded": A.CenterCrop(60, 71, pad_if_needed=True),
    "crop from borders": A.RandomCropFromBorders(p=1),
    "crop and pad": A.CropAndPad(percent=(-0.2, 0.2), p=1),
    "crop and pad, other size": A.CropAndPad(px=(-5, 7), keep_size=False, p=1),
    "resized crop": A.RandomResizedCrop((33, 35)),
    "sized crop": A.RandomSizedCrop((20, 40), (33, 35)),
    "pad": A.Pad([1, 2, 3, 4]),
    "pad with a value": A.PadIfNeeded(80, 90, fill=1, fill_mask=1),
    "pad by reflection": A.PadIfNeeded(71, 80, border_mode=cv2.BORDER_REFLECT_101),
    "rotate": A.Rotate(40, p=1),
    "rotate, cropped": A.Rotate((30, 30), crop_border=True, p=1),
    "safe rotate": A.SafeRotate(40, p=1),
    "shift, scale, rotate": A.ShiftScaleRotate(p=1),
    "affine": A.Affine(
        rotate=(-30, 30), scale=(0.7, 1.4), translate_px=(-5, 5), shear=(-10, 10), p=1
    ),
    "affine, fit": A.Affine(rotate=(20, 40), fit_output=True, p=1),
    "affine, reflected": A.Affine(rotate=(20, 40), border_mode=cv2.BORDER_REFLECT_101, p=1),
    "holes": A.CoarseDropout(fill=0, fill_mask=1, p=1),
    "composition": A.Compose(
        [
            A.RandomResizedCrop((50, 60)),
            A.HorizontalFlip(p=0.5),
            A.OneOf([A.Rotate(30), A.Affine(shear=(-10, 10))], p=1),
            A.SomeOf([A.VerticalFlip(p=1), A.Transpose(p=1)], n=1),
            A.Sequential([A.PadIfNeeded(64, 64)]),
        ],
        strict=True,
        seed=3,
    ),
}


@pytest.mark.parametrize("name", ALBUMENTATIONS)
def test_albumentations_places_are_what_the_picture_shows(name: str) -> None:
    transform = ccp.PlacedTransform(ALBUMENTATIONS[name])
    picture = coordinate_picture(*WHOLE).permute(1, 2, 0).contiguous().numpy()
    # A reflection shows the picture where there is none; what is behind the border is left out.
    transform.pipeline.set_random_seed(0)
    plain = copy.deepcopy(ALBUMENTATIONS[name])
    for _ in range(4):
        image, theta = transform(picture)
        if "reflect" in name:
            plain.border_mode, plain.params = cv2.BORDER_CONSTANT, transform.pipeline.params
            image = plain.apply(picture, **{**plain.params, "fill": 0})
        check_place(torch.from_numpy(image.copy()).permute(2, 0, 1), theta, WHOLE)


def test_albumentations_targets_are_those_of_the_pipeline_alone() -> None:
    pipeline = A.Compose(
        [
            A.RandomResizedCrop((32, 40)),
            A.RandomBrightnessContrast(p=1),
            A.GaussNoise(p=1),
            A.Rotate(30, p=1),
            A.Morphological(p=1),
            A.ToTensorV2(),
        ],
        bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]),
        seed=7,
    )
    image = (coordinate_picture(*WHOLE).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    inputs: dict[str, Any] = {
        "image": image,
        "mask": (np.arange(np.prod(WHOLE)).reshape(WHOLE) % 200).astype(np.uint8),
        "bboxes": np.array([[4.0, 5.0, 50.0, 40.0]]),
        "labels": [1],
    }
    transform = ccp.PlacedTransform(pipeline)
    expected = pipeline(**inputs)
    result = transform(**inputs)
    theta = result.pop("theta")
    assert set(result) == set(expected)
    assert torch.equal(result["image"], expected["image"])
    assert torch.equal(result["mask"], expected["mask"])
    assert np.array_equal(result["bboxes"], expected["bboxes"])
    assert theta.shape == (2, 3)


def test_crops_by_masks_and_boxes_are_followed() -> None:
    pipeline = A.Compose(
        [
            A.CropNonEmptyMaskIfExists(30, 40),
            A.MaskDropout(p=1),
            A.BBoxSafeRandomCrop(p=1),
            A.RandomSizedBBoxSafeCrop(33, 35, p=1),
        ],
        bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]),
    )
    mask = np.zeros(WHOLE, dtype=np.uint8)
    mask[22, 30] = 1
    result = ccp.PlacedTransform(pipeline)(
        image=coordinate_picture(*WHOLE).permute(1, 2, 0).contiguous().numpy(),
        mask=mask,
        bboxes=np.array([[28.0, 18.0, 36.0, 26.0]]),
        labels=[1],
    )
    check_place(torch.from_numpy(result["image"]).permute(2, 0, 1), result["theta"], WHOLE)


class Bent(A.DualTransform):
    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        rows, columns = np.indices(img.shape[:2], dtype=np.float32)
        return cv2.remap(img, columns + np.sin(rows), rows, cv2.INTER_LINEAR)


class Halved(A.ImageOnlyTransform):
    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return img[::2, ::2]


class Gone(A.DualTransform):
    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return np.zeros_like(img)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (A.ElasticTransform(p=1), "step 1 of the pipeline, ElasticTransform: .*not one affine map"),
        (A.OneOf([A.Perspective(), A.NoOp()]), "step 0 of step 1 of the pipeline, Perspective: "),
        (A.PiecewiseAffine(), "PiecewiseAffine: what it does to the picture"),
        (A.RandomGridShuffle(), "RandomGridShuffle: what it does to the picture"),
        (A.CubicSymmetry(), "step 1 of the pipeline, CubicSymmetry, is for volumes"),
        (Bent(p=1), r"Bent: what it does .* affine map \(pixels are up to 1(\.\d+)? px off"),
        (Halved(p=1), "an image of 10 x 15 pixels, where a mask would have 20 x 30"),
        (Gone(p=1), "Gone left too little of the picture to tell its place"),
    ],
)
def test_albumentations_steps_without_a_place_are_refused(step: Any, message: str) -> None:
    picture = coordinate_picture(*WHOLE).permute(1, 2, 0).contiguous().numpy()
    with pytest.raises(ccp.CoordinatesError, match=message):
        ccp.PlacedTransform(A.Compose([A.CenterCrop(20, 30), step]))(image=picture)


# --- both -----------------------------------------------------------------------------------------


class Pictures(Dataset[Any]):
    def __init__(self, transform: Any, turn: bool) -> None:
        self.transform, self.turn = transform, turn

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = coordinate_picture(40 + index, 50 + 3 * index)
        return self.transform(picture.permute(1, 2, 0).numpy() if self.turn else picture), index


@pytest.mark.parametrize(
    "pipeline",
    [
        v2.Compose([v2.RandomResizedCrop(32, (0.4, 1)), v2.RandomHorizontalFlip()]),
        A.Compose([A.RandomResizedCrop((32, 32)), A.HorizontalFlip(), A.ToTensorV2()]),
    ],
)
def test_batches_of_workers_see_the_coordinates_of_the_pictures(pipeline: Any) -> None:
    """A patched convolution reads out what the pictures show."""
    model = ccp.patch(
        nn.Sequential(nn.Conv2d(3, 2, 1, bias=False)),
        coords=ccp.Coordinates(value_range=(0, 1), align_corners=False),
    )
    for parameter, value in zip(model.parameters(), (torch.zeros(1), torch.eye(2)), strict=True):
        parameter.data.copy_(value.view(-1, *value.shape[1:], 1, 1))
    transform = pickle.loads(pickle.dumps(ccp.PlacedTransform(pipeline)))
    dataset = Pictures(transform, isinstance(pipeline, A.Compose))
    for (images, thetas), numbers in DataLoader(dataset, batch_size=4, num_workers=2):
        assert thetas.shape == (4, 2, 3)
        with torch.no_grad(), ccp.places(model, thetas):
            outputs = model(images)
        for image, output, theta, number in zip(images, outputs, thetas, numbers, strict=True):
            whole = (40 + int(number), 50 + 3 * int(number))
            check_place(image, theta, whole)
            inner = (slice(None), slice(3, -3), slice(3, -3))
            scale = torch.tensor([*whole[::-1]])[:, None, None]
            assert float(((output - image[:2]) * scale)[inner].abs().max()) < 0.2


@pytest.mark.parametrize(
    ("pipeline", "inputs", "named", "message"),
    [
        (v2.Identity(), (), {}, "give the image first, unnamed"),
        (v2.Identity(), ("picture.png",), {}, "an image of str, 'picture.png': write a tensor"),
        (A.NoOp(), (), {"mask": np.zeros((3, 3))}, "give the image alone, or name everything"),
        (A.NoOp(), (np.zeros(3),), {}, "an image of ndarray"),
    ],
)
def test_other_inputs_are_refused(pipeline: Any, inputs: Any, named: Any, message: str) -> None:
    with pytest.raises(ccp.CoordinatesError, match=message):
        ccp.PlacedTransform(pipeline)(*inputs, **named)


def test_a_pipeline_of_neither_library_is_refused() -> None:
    with pytest.raises(ccp.CoordinatesError, match=r"the pipeline, <function .*v2.Compose"):
        ccp.PlacedTransform(as_tensor)
