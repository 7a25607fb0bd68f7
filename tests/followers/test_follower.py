"""What follows survives copies, compilers, checkpoints, threads and wrappers, and ends cleanly."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_detectors import Masked, mask_rcnn, patched, retinanet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


IMAGES = torch.rand(2, 3, 32, 48)
MASKS = torch.ones(2, 32, 48, dtype=torch.long)
MASKS[0, 20:], MASKS[1, :, 30:] = 0, 0
PICTURES = [torch.rand(3, 64, 96), torch.rand(3, 150, 64)]


def following() -> nn.Module:
    return ccp.follow_padding_(patched(Masked()))


def by_places(model: nn.Module, masks: Tensor = MASKS) -> Tensor:
    """Without hooks: each picture alone, cut out, and then what the padding around it changes."""
    model = ccp.follow_padding_(copy.deepcopy(model), False)
    outputs = []
    for image, mask in zip(IMAGES, masks, strict=True):
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        window = torch.tensor([[48 / width, 0, 48 / width - 1], [0, 32 / height, 32 / height - 1]])
        with torch.no_grad(), ccp.places(model, window):
            outputs.append(model(image[None])[:, :, : height // 2 - 2, : width // 2 - 2])
    return torch.cat([output.flatten() for output in outputs])


def inside(output: Tensor, masks: Tensor = MASKS) -> Tensor:
    """The same parts of a batch's outputs: those that see nothing of the padding."""
    parts = []
    for each, mask in zip(output, masks, strict=True):
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        parts.append(each[:, : height // 2 - 2, : width // 2 - 2].flatten())
    return torch.cat(parts)


def near(output: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


def test_copies_and_pickles_follow_by_themselves(tmp_path: Path) -> None:
    model = following()
    near(inside(model(IMAGES, MASKS)), by_places(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copied = copy.deepcopy(model)
    ccp.follow_padding_(model, False)
    whole = model(IMAGES)
    assert torch.equal(model(IMAGES, MASKS), whole)
    for each in (copied, loaded):
        near(inside(each(IMAGES, MASKS)), by_places(each))
        assert torch.equal(each(IMAGES), whole)
    ccp.save_coords(copied, tmp_path / "coords.safetensors")
    plain = ccp.unpatch(copied, discard=True)
    restored = ccp.load_coords(plain, tmp_path / "coords.safetensors")
    assert torch.equal(ccp.follow_padding_(restored)(IMAGES, MASKS), copied(IMAGES, MASKS))


def test_twice_is_once_and_unpatch_takes_every_hook_away() -> None:
    for model in (patched(mask_rcnn()), patched(Masked())):
        before = hooks(model)
        follow = [ccp.follow_padding_]
        if hasattr(model, "roi_heads"):
            follow.append(ccp.follow_regions_)
        for each in follow:
            each(model)
        once = hooks(model)
        for each in follow:
            each(model)
        assert hooks(model) == once > before
        plain = ccp.unpatch(model, discard=True)
        assert not any("Begin" in name or "After" in name for name in names(plain))
        for each in follow:
            each(model, False)
        assert hooks(model) == before


def hooks(model: nn.Module) -> int:
    return len(names(model))


def names(model: nn.Module) -> list[str]:
    return [
        type(hook).__name__
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registered.values()
    ]


def test_layers_patched_later_follow_too() -> None:
    model = ccp.follow_padding_(patched(Masked(), "first"))
    ccp.patch_(model, "second")
    nn.init.normal_(model.second.coord_weight)
    near(inside(model(IMAGES, MASKS)), by_places(model))
    with pytest.raises(ccp.CoordinatesError, match="has swap_sizes"):
        ccp.patch_(ccp.follow_padding_(patched(Masked(), "first")), "second", coords="reference")


def test_errors_end_it_and_a_call_within_a_call_is_its_own() -> None:
    model = following()
    whole, expected = model(IMAGES), model(IMAGES, MASKS)
    with pytest.raises(RuntimeError):
        model(IMAGES[:, :2], MASKS)
    assert torch.equal(model(IMAGES), whole)

    class Again(Masked):
        def forward(self, pixel_values: Tensor, pixel_mask: Any = None, again: bool = True) -> Any:
            before = super().forward(pixel_values, pixel_mask)
            inner = self(pixel_values, pixel_mask.flip(0), again=False) if again else None
            return before, inner, super().forward(pixel_values, pixel_mask)

    nested = ccp.follow_padding_(ccp.patch(Again().eval(), "all"))
    nested.load_state_dict(model.state_dict())
    before, inner, after = nested(IMAGES, MASKS)
    assert torch.equal(before, expected)
    assert torch.equal(after, expected)
    assert torch.equal(inner[0], model(IMAGES, MASKS.flip(0)))


def test_the_watch_raises_no_false_alarm() -> None:
    model = ccp.follow_regions_(ccp.follow_padding_(patched(mask_rcnn())))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(PICTURES)
        copy.deepcopy(model)(PICTURES)
        model.state_dict()
    again = ccp.patch(ccp.unpatch(model, discard=True), "all", example_inputs=(PICTURES,))
    ccp.follow_regions_(ccp.follow_padding_(again))


def test_threads_follow_each_their_own_batch() -> None:
    model = following()
    masks = [torch.ones_like(MASKS), MASKS, MASKS.flip(0)]
    expected = [model(IMAGES, each).detach() for each in masks]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for step in range(20):
                at = (index + step) % 3
                with torch.no_grad():
                    near(model(IMAGES, masks[at]), expected[at])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def compiled_cases() -> dict[str, tuple[Callable[[], nn.Module], list[tuple[Any, ...]]]]:
    wide = torch.rand(1, 3, 32, 64)
    return {
        "mask": (following, [(IMAGES, MASKS), (IMAGES, MASKS.flip(0)), (IMAGES,)]),
        "letterbox": (
            lambda: ccp.follow_letterbox_(patched(Masked())),
            [(IMAGES,), (wide,), (wide.mT.contiguous(),)],
        ),
    }


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["mask", "letterbox"])
def test_compiled_models_follow(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    build, batches = compiled_cases()[kind]
    model = build()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        for batch in batches:
            own = compiled(*batch)
            near(own, model(*batch), 1e-5)
    own.square().sum().backward()
    gradients = [weight.grad.clone() for weight in ccp.coord_parameters(model)]
    model.zero_grad()
    model(*batches[-1]).square().sum().backward()
    for weight, gradient in zip(ccp.coord_parameters(model), gradients, strict=True):
        near(gradient / gradient.abs().max(), weight.grad / gradient.abs().max(), 1e-5)


def test_other_masks_do_not_compile_again() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, model = CompileCounter(), following()
    compiled = torch.compile(model, backend=counter)
    for rows in range(2, 32):
        masks = torch.ones_like(MASKS)
        masks[0, rows:] = 0
        near(compiled(IMAGES, masks), model(IMAGES, masks), 1e-5)
    assert counter.frame_count <= 2


def test_a_compiled_backbone_follows_its_detector() -> None:
    torch._dynamo.reset()
    model = ccp.follow_padding_(patched(retinanet()))
    batches = (PICTURES, PICTURES[:1], PICTURES[::-1])
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        model.backbone.compile(backend="eager")
        for batch, each in zip(batches, expected, strict=True):
            for own, theirs in zip(model(batch), each, strict=True):
                near(own["scores"], theirs["scores"], 1e-5)


class Checkpointed(nn.Module):
    """Runs parts of the model again in the backward pass, and perhaps the model as a whole."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = MaskedByParts(reentrant)
        self.is_on, self.reentrant = True, reentrant

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        self.inner.is_on = self.is_on
        if not self.is_on:
            return self.inner(images, masks)
        images = images.clone().requires_grad_()
        return checkpoint(self.inner, images, masks, use_reentrant=self.reentrant)


class MaskedByParts(Masked):
    is_on = True

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.before, self.reentrant = nn.Conv2d(3, 3, 3, 1, 1), reentrant

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        x = self.before(pixel_values)
        if not self.is_on:
            return self.second(self.first(x).relu())
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.second(x.relu())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["whole", "inner"])
def test_checkpoints_inside_and_around_follow(part: str, reentrant: bool) -> None:
    """Also where places of other passes hold, or none, when they run again."""
    whole = ccp.follow_padding_(patched(Checkpointed(reentrant)))
    model = whole if part == "whole" else whole.inner
    window = ccp.Window((10, 20), (32, 48), (100, 200))

    def gradients() -> list[Tensor]:
        first = model(IMAGES, MASKS).square().sum()
        with ccp.places(model, window):
            second = model(IMAGES, MASKS.flip(0)).square().sum()
        third = model(IMAGES, torch.ones_like(MASKS)).square().sum()
        kept = []
        for loss in (third, first, second):
            whole.zero_grad()
            loss.backward()
            kept += [weight.grad.clone() for weight in ccp.coord_parameters(whole)]
        return kept

    own = gradients()
    whole.is_on = whole.inner.is_on = False
    for gradient, expected in zip(own, gradients(), strict=True):
        near(gradient / expected.abs().max(), expected / expected.abs().max())


def test_a_checkpoint_around_a_detector_with_regions() -> None:
    """Two kinds of places within one checkpoint: the run in the backward pass enters both."""
    model = ccp.follow_regions_(ccp.follow_padding_(patched(mask_rcnn()))).train()
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5, 40, 40]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *picture.shape[1:], dtype=torch.uint8),
        }
        for picture in PICTURES
    ]

    def loss(_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return sum(model(PICTURES, targets).values())

    kept = []
    for run in (loss, lambda x: checkpoint(loss, x, use_reentrant=False)):
        model.zero_grad()
        run(torch.zeros(1, requires_grad=True)).backward()
        kept.append([weight.grad.clone() for weight in ccp.coord_parameters(model)])
    for gradient, expected in zip(*kept, strict=True):
        near(gradient, expected, 1e-5)


def test_distributed_data_parallel_follows(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = patched(Masked())
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert ccp.follow_padding_(wrapped) is wrapped
        wrapped(IMAGES, MASKS).square().sum().backward()
        own = [weight.grad.clone() for weight in ccp.coord_parameters(model)]
        model.zero_grad()
        model(IMAGES, MASKS).square().sum().backward()
        for gradient, weight in zip(own, ccp.coord_parameters(model), strict=True):
            near(gradient, weight.grad, 1e-5)
        near(inside(wrapped(IMAGES, MASKS)), by_places(model))
    finally:
        torch.distributed.destroy_process_group()


# --- export ---------------------------------------------------------------------------------------


def test_a_file_holds_what_a_letterbox_and_masks_place(tmp_path: Path) -> None:
    for kind, (build, batches) in compiled_cases().items():
        model = build()
        report = ccp.export_onnx(model, tmp_path / f"{kind}.onnx", batches[0])
        assert set(report.lowerings.values()) == {"computed"}
        again = ccp.verify_onnx(model, tmp_path / f"{kind}.onnx", batches[0])
        assert again.difference < 1e-5
        assert coord_layers(model)


def test_a_detectors_file_holds_its_padding(tmp_path: Path) -> None:
    model = ccp.follow_padding_(patched(retinanet(), "backbone.*"))
    for layer in model.head.classification_head.modules():  # else scores are all alike
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    picture = [torch.rand(3, 64, 90)]
    options: dict[str, Any] = {"dynamic_batch": False, "exporter": "torchscript"}
    report = ccp.export_onnx(model, tmp_path / "detector.onnx", picture, **options)
    assert all(check.detections for check in report.checks)
    with pytest.raises(ccp.ArgumentError, match="dynamic_size=True for a model that f"):
        ccp.export_onnx(model, tmp_path / "any.onnx", picture, dynamic_size=True, **options)
    with pytest.raises(ccp.ArgumentError, match="'map' for a model that follows its padding"):
        ccp.export_onnx(model, tmp_path / "any.onnx", picture, lowering="map", **options)
    assert not (tmp_path / "any.onnx").exists()
