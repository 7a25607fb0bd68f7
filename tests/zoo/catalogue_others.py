"""ultralytics, segmentation_models_pytorch, effdet, stable-baselines3 and diffusers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, image, names_in

__all__ = ["ENTRIES"]

_YOLO = names_in("""
    yolov3-tiny yolov3 yolov5n yolov6n yolov8n yolov8n-ghost yolov8n-seg yolov8n-pose
    yolov8n-obb yolov8n-cls yolov8n-world yolov8n-rtdetr yolov9t yolov10n yolo11n yolo11n-seg
    yolo11n-pose yolo11n-obb yolo11n-cls yolo12n yolo26n yolo26n-seg yolo26n-pose yolo26n-obb
    yolo26n-cls yolo26n-depth yolo26n-sem yoloe-v8n yoloe-11n-seg yoloe-26n-seg rtdetr-l
""")


def _yolo(name: str) -> nn.Module:
    import os

    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics.nn import tasks

    kinds = {
        "-seg": tasks.SegmentationModel,
        "-pose": tasks.PoseModel,
        "-obb": tasks.OBBModel,
        "-cls": tasks.ClassificationModel,
        "-world": tasks.WorldModel,
        "-worldv2": tasks.WorldModel,
        "-rtdetr": tasks.RTDETRDetectionModel,
        "-depth": getattr(tasks, "DepthModel", None),
        "-sem": getattr(tasks, "SemanticSegmentationModel", None),
    }
    kind = next((made for end, made in kinds.items() if name.endswith(end)), tasks.DetectionModel)
    if name.startswith("rtdetr"):
        kind = tasks.RTDETRDetectionModel
    if name.startswith("yoloe"):
        kind = tasks.YOLOESegModel if name.endswith("-seg") else tasks.YOLOEModel
    model = kind(f"{name}.yaml", verbose=False)
    if kind is tasks.RTDETRDetectionModel:
        model.model[-1].num_queries = 10  # the order of 300 untrained scores hangs on rounding
    return model


_SMP = {
    **dict.fromkeys(
        names_in("Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet"),
        "resnet18",
    ),
    "Segformer": "mit_b0",
    "DPT": "tu-test_vit",
}

_SMP_SIZES = {"DPT": (64, 64), "PAN": (128, 160)}
"""Pixels, height and width, where 64 x 96 will not do."""

_SMP_ENCODERS = names_in("""
    efficientnet-b0 mobilenet_v2 mobileone_s0 xception inceptionv4 se_resnet50 timm-gernet_s
    timm-mobilenetv3_small_075 tu-convnext_atto
""")


def _smp(architecture: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    options: dict[str, Any] = {}
    if architecture == "DPT":
        options = {"dynamic_img_size": True}
    return getattr(smp, architecture)(
        encoder_name=encoder, encoder_weights=None, classes=3, **options
    )


def _effdet(name: str) -> nn.Module:
    from effdet import create_model

    return create_model(
        name, pretrained=False, pretrained_backbone=False, num_classes=5, image_size=[128, 128]
    )


def _observations() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 80), generator=generator, dtype=torch.uint8)


def _deterministic() -> tuple[Tensor, bool]:
    """The policy takes its best action, and draws none."""
    return _observations(), True


def _policy(kind: str) -> nn.Module:
    import gymnasium
    import numpy as np
    from stable_baselines3.common.policies import ActorCriticCnnPolicy
    from stable_baselines3.dqn.policies import CnnPolicy as DQNPolicy
    from stable_baselines3.sac.policies import CnnPolicy as SACPolicy

    seen = gymnasium.spaces.Box(0, 255, (3, 64, 80), np.uint8)
    steps = gymnasium.spaces.Discrete(4)
    pushes = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    made = {
        "actor_critic": lambda: ActorCriticCnnPolicy(seen, steps, _rate),
        "actor_critic_continuous": lambda: ActorCriticCnnPolicy(
            seen, pushes, _rate, share_features_extractor=False
        ),
        "dqn": lambda: DQNPolicy(seen, steps, _rate).q_net,
        "sac": lambda: SACPolicy(seen, pushes, _rate).actor,
    }
    return made[kind]()


def _rate(progress: float) -> float:
    """A learning-rate schedule, which policies ask for."""
    return 1e-3


_BLOCK = {"block_out_channels": (32, 64), "norm_num_groups": 8}


def _diffusers(kind: str, **options: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, kind)(**options)


def _image_and_step(*shape: int) -> tuple[Tensor, Tensor]:
    return image(*shape)(), torch.tensor([10] * shape[0])


def _conditioned(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return *_image_and_step(*shape), image(shape[0], 5, 16, seed=1)()


def _span() -> nn.Module:
    from spandrel.architectures.SPAN.__arch.span import SPAN

    return SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)


_DIFFUSERS = [
    Entry(
        "diffusers/UNet2DModel",
        functools.partial(
            _diffusers,
            "UNet2DModel",
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **_BLOCK,
        ),
        functools.partial(_image_and_step, 2, 3, 32, 48),
    ),
    Entry(
        "diffusers/UNet2DConditionModel",
        functools.partial(
            _diffusers,
            "UNet2DConditionModel",
            sample_size=32,
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **_BLOCK,
        ),
        functools.partial(_conditioned, 2, 4, 32, 48),
    ),
    Entry(
        "diffusers/UNet3DConditionModel",
        functools.partial(
            _diffusers,
            "UNet3DConditionModel",
            sample_size=16,
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            **_BLOCK,
        ),
        functools.partial(_conditioned, 1, 4, 3, 16, 24),
    ),
    Entry(
        "diffusers/UNet1DModel",
        functools.partial(
            _diffusers,
            "UNet1DModel",
            sample_size=64,
            in_channels=2,
            out_channels=2,
            extra_in_channels=64,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
        ),
        functools.partial(_image_and_step, 2, 2, 64),
    ),
    Entry(
        "diffusers/AutoencoderKL",
        functools.partial(
            _diffusers,
            "AutoencoderKL",
            sample_size=32,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            **_BLOCK,
        ),
        image(2, 3, 32, 48),
    ),
    Entry(
        "diffusers/VQModel",
        functools.partial(
            _diffusers,
            "VQModel",
            sample_size=32,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            num_vq_embeddings=16,
            **_BLOCK,
        ),
        image(2, 3, 32, 48),
    ),
    Entry(
        "diffusers/AutoencoderTiny",
        functools.partial(
            _diffusers,
            "AutoencoderTiny",
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        image(2, 3, 32, 48),
    ),
    Entry(
        "diffusers/ControlNetModel",
        functools.partial(
            _diffusers,
            "ControlNetModel",
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            conditioning_embedding_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            **_BLOCK,
        ),
        lambda: (*_conditioned(2, 4, 32, 48), image(2, 3, 64, 96)()),
    ),
]

ENTRIES = [
    *(
        Entry(f"ultralytics/{name}", functools.partial(_yolo, name), image(2, 3, 64, 96))
        for name in _YOLO
    ),
    *(
        Entry(
            f"smp/{name}",
            functools.partial(_smp, name, encoder),
            image(2, 3, *_SMP_SIZES.get(name, (64, 96))),
        )
        for name, encoder in _SMP.items()
    ),
    *(
        Entry(f"smp/Unet-{encoder}", functools.partial(_smp, "Unet", encoder), image(2, 3, 64, 96))
        for encoder in _SMP_ENCODERS
    ),
    *(
        Entry(f"effdet/{name}", functools.partial(_effdet, name), image(2, 3, 128, 128))
        for name in ("efficientdet_d0", "tf_efficientdet_lite0", "mixdet_m", "resdet50")
    ),
    *(
        Entry(f"sb3/{kind}", functools.partial(_policy, kind), inputs)
        for kind, inputs in {
            "actor_critic": _deterministic,
            "actor_critic_continuous": _deterministic,
            "dqn": _observations,
            "sac": _deterministic,
        }.items()
    ),
    *_DIFFUSERS,
    Entry(
        "spandrel/SPAN",
        _span,
        image(2, 3, 32, 48),
        # Its training branches are merged by convolving kernels with kernels.
        refused="its input does not depend on the model's input",
        kills_exporter="torch.onnx.export of the plain model ends the process (SIGSEGV)",
    ),
]
