"""transformers: vision and audio models with convolutions, from small configurations."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, image

__all__ = ["ENTRIES"]

_TWO_STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 8,
}
_RESNET_BACKBONE = ("ResNetConfig", {**_TWO_STAGES, "layer_type": "basic"})
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

_MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ResNetForImageClassification": ("ResNetConfig", _TWO_STAGES, (2, 3, 64, 96)),
    "RegNetForImageClassification": (
        "RegNetConfig",
        {**_TWO_STAGES, "groups_width": 8},
        (2, 3, 64, 96),
    ),
    "BitForImageClassification": (
        "BitConfig",
        {**_TWO_STAGES, "num_groups": 8},
        (2, 3, 64, 96),
    ),
    "BitForImageClassification-same": (
        "BitConfig",
        {**_TWO_STAGES, "num_groups": 8, "global_padding": "same"},
        (2, 3, 64, 96),
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        (2, 3, 64, 96),
    ),
    "ConvNextV2ForImageClassification": (
        "ConvNextV2Config",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        (2, 3, 64, 96),
    ),
    "MobileNetV1ForImageClassification": (
        "MobileNetV1Config",
        {"depth_multiplier": 0.25},
        (2, 3, 64, 96),
    ),
    "MobileNetV2ForImageClassification": (
        "MobileNetV2Config",
        {"depth_multiplier": 0.35},
        (2, 3, 64, 96),
    ),
    "MobileNetV2ForSemanticSegmentation": (
        "MobileNetV2Config",
        {"depth_multiplier": 0.35, "output_stride": 16},
        (2, 3, 64, 96),
    ),
    "EfficientNetForImageClassification": (
        "EfficientNetConfig",
        {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
        (2, 3, 64, 96),
    ),
    "MobileViTForImageClassification": (
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 32],
            "num_attention_heads": 2,
        },
        (2, 3, 64, 64),
    ),
    "MobileViTForSemanticSegmentation": (
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 32],
            "num_attention_heads": 2,
        },
        (2, 3, 64, 64),
    ),
    "MobileViTV2ForImageClassification": (
        "MobileViTV2Config",
        {"width_multiplier": 0.5},
        (2, 3, 64, 64),
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        (2, 3, 64, 96),
    ),
    "PvtForImageClassification": (
        "PvtConfig",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
        (2, 3, 64, 64),
    ),
    "PvtV2ForImageClassification": (
        "PvtV2Config",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "image_size": 64,
        },
        (2, 3, 64, 64),
    ),
    "PoolFormerForImageClassification": (
        "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
        (2, 3, 64, 96),
    ),
    "CvtForImageClassification": (
        "CvtConfig",
        {"embed_dim": [16, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
        (2, 3, 64, 64),
    ),
    "LevitForImageClassification": (
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        (2, 3, 64, 64),
    ),
    "SwiftFormerForImageClassification": (
        "SwiftFormerConfig",
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]},
        (2, 3, 64, 64),
    ),
    "FocalNetForImageClassification": (
        "FocalNetConfig",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]},
        (2, 3, 64, 64),
    ),
    "SwinForImageClassification": ("SwinConfig", {"image_size": 64, **_SWIN}, (2, 3, 64, 64)),
    "Swinv2ForImageClassification": ("Swinv2Config", {"image_size": 64, **_SWIN}, (2, 3, 64, 64)),
    "Swin2SRForImageSuperResolution": (
        "Swin2SRConfig",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        (2, 3, 32, 32),
    ),
    "ViTForImageClassification": ("ViTConfig", _VIT, (2, 3, 64, 64)),
    "DeiTForImageClassification": ("DeiTConfig", _VIT, (2, 3, 64, 64)),
    "BeitForSemanticSegmentation": (
        "BeitConfig",
        {
            **_VIT,
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "use_auxiliary_head": False,
        },
        (2, 3, 64, 64),
    ),
    "Data2VecVisionForImageClassification": ("Data2VecVisionConfig", _VIT, (2, 3, 64, 64)),
    "Dinov2ForImageClassification": ("Dinov2Config", _VIT, (2, 3, 64, 64)),
    "ViTMAEForPreTraining": (
        "ViTMAEConfig",
        {
            **_VIT,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 48,
        },
        (2, 3, 64, 64),
    ),
    "YolosForObjectDetection": (
        "YolosConfig",
        {**_VIT, "image_size": [64, 64], "num_detection_tokens": 5},
        (2, 3, 64, 64),
    ),
    "VitPoseForPoseEstimation": (
        "VitPoseConfig",
        {
            "backbone_config": (
                "VitPoseBackboneConfig",
                {**_VIT, "image_size": [64, 48], "patch_size": [8, 8], "out_indices": [2]},
            )
        },
        (2, 3, 64, 48),
    ),
    "DPTForDepthEstimation": (
        "DPTConfig",
        {
            **_VIT,
            "image_size": 64,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
        (2, 3, 64, 64),
    ),
    "GLPNForDepthEstimation": (
        "GLPNConfig",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        (2, 3, 64, 96),
    ),
    "DepthAnythingForDepthEstimation": (
        "DepthAnythingConfig",
        {
            "backbone_config": (
                "Dinov2Config",
                {
                    **_VIT,
                    "num_hidden_layers": 4,
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                    "reshape_hidden_states": False,
                },
            ),
            "reassemble_hidden_size": 32,
            "patch_size": 8,
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
        },
        (2, 3, 64, 64),
    ),
    "UperNetForSemanticSegmentation": (
        "UperNetConfig",
        {
            "backbone_config": (
                "ConvNextConfig",
                {
                    "hidden_sizes": [8, 16, 16, 32],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
            ),
            "hidden_size": 16,
            "auxiliary_in_channels": 16,
            "auxiliary_channels": 8,
        },
        (2, 3, 64, 96),
    ),
    "DetrForObjectDetection": (
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": (
                _RESNET_BACKBONE[0],
                {**_RESNET_BACKBONE[1], "out_features": ["stage2"]},
            ),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_queries": 5,
        },
        (2, 3, 64, 96),
    ),
    "ConditionalDetrForObjectDetection": (
        "ConditionalDetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": (
                _RESNET_BACKBONE[0],
                {**_RESNET_BACKBONE[1], "out_features": ["stage2"]},
            ),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_queries": 5,
        },
        (2, 3, 64, 96),
    ),
    "DeformableDetrForObjectDetection": (
        "DeformableDetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": (
                _RESNET_BACKBONE[0],
                {**_RESNET_BACKBONE[1], "out_features": ["stage1", "stage2"]},
            ),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_feature_levels": 3,
            "num_queries": 5,
        },
        (2, 3, 64, 96),
    ),
    "RTDetrForObjectDetection": (
        "RTDetrConfig",
        {
            "backbone_config": (
                "RTDetrResNetConfig",
                {
                    "embedding_size": 16,
                    "hidden_sizes": [16, 16, 32, 32],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage2", "stage3", "stage4"],
                },
            ),
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [16, 32, 32],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "d_model": 32,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "num_queries": 10,
        },
        (2, 3, 64, 96),
    ),
    "RTDetrV2ForObjectDetection": (
        "RTDetrV2Config",
        {
            "backbone_config": (
                "RTDetrResNetConfig",
                {
                    "embedding_size": 16,
                    "hidden_sizes": [16, 16, 32, 32],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage2", "stage3", "stage4"],
                },
            ),
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [16, 32, 32],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "d_model": 32,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "num_queries": 10,
        },
        (2, 3, 64, 96),
    ),
    "DFineForObjectDetection": (
        "DFineConfig",
        {
            "backbone_config": (
                "HGNetV2Config",
                {"out_features": ["stage2", "stage3", "stage4"]},
            ),
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [512, 1024, 2048],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "d_model": 32,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "num_queries": 10,
            "freeze_backbone_batch_norms": False,  # frozen ones let random weights' signals die out
        },
        (2, 3, 64, 96),
    ),
    "MaskFormerForInstanceSegmentation": (
        "MaskFormerConfig",
        {
            "backbone_config": (
                "SwinConfig",
                {
                    "image_size": 64,
                    "embed_dim": 16,
                    "depths": [1, 1, 1, 1],
                    "num_heads": [2, 2, 2, 2],
                    "window_size": 2,
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
            ),
            "decoder_config": (
                "DetrConfig",
                {
                    "d_model": 32,
                    "encoder_layers": 1,
                    "decoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "decoder_attention_heads": 2,
                    "encoder_ffn_dim": 32,
                    "decoder_ffn_dim": 32,
                    "num_queries": 5,
                },
            ),
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "num_queries": 5,
        },
        (2, 3, 64, 64),
    ),
    "Mask2FormerForUniversalSegmentation": (
        "Mask2FormerConfig",
        {
            "backbone_config": (
                "SwinConfig",
                {
                    "image_size": 64,
                    "embed_dim": 16,
                    "depths": [1, 1, 1, 1],
                    "num_heads": [2, 2, 2, 2],
                    "window_size": 2,
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
            ),
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "num_attention_heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_feedforward_dim": 32,
            "dim_feedforward": 32,
            "num_queries": 5,
        },
        (2, 3, 64, 64),
    ),
    "HGNetV2ForImageClassification": ("HGNetV2Config", {}, (2, 3, 64, 96)),
    "VideoMAEForVideoClassification": (
        "VideoMAEConfig",
        {
            "image_size": 32,
            "patch_size": 8,
            "num_frames": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        },
        (2, 4, 3, 32, 32),
    ),
    "CLIPVisionModel": ("CLIPVisionConfig", {**_VIT, "projection_dim": 16}, (2, 3, 64, 64)),
    "SiglipVisionModel": ("SiglipVisionConfig", _VIT, (2, 3, 64, 64)),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "conv_dim": (16, 16, 16),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 16,
            "mask_time_prob": 0.0,
        },
        (2, 2000),
    ),
    "SuperPointForKeypointDetection": (
        "SuperPointConfig",
        {
            "encoder_hidden_sizes": [8, 8, 16, 16],
            "decoder_hidden_size": 16,
            "descriptor_decoder_dim": 16,
        },
        (2, 3, 64, 96),
    ),
    "TimmBackbone": (
        "TimmBackboneConfig",
        {"backbone": "resnet10t", "use_pretrained_backbone": False},
        (2, 3, 64, 96),
    ),
}


def _config(name: str, options: dict[str, Any]) -> Any:
    """A configuration; a value (name, options) is a configuration inside it."""
    import transformers

    made = {
        key: _config(*value)
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)
        else value
        for key, value in options.items()
    }
    return getattr(transformers, name)(**made)


def _create(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, model.partition("-")[0])(_config(config, options))


def _sam_inputs() -> tuple[dict[str, Tensor]]:
    points = torch.tensor([[[[10.0, 20.0]]]])
    return ({"pixel_values": image(1, 3, 64, 64)(), "input_points": points},)


def _sam() -> nn.Module:
    import transformers

    vision = transformers.SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        global_attn_indexes=[1],
        window_size=4,
        num_pos_feats=8,
        mlp_dim=48,
    )
    prompt = transformers.SamPromptEncoderConfig(
        hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4
    )
    mask = transformers.SamMaskDecoderConfig(
        hidden_size=16,
        mlp_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        iou_head_hidden_dim=16,
    )
    return transformers.SamModel(
        transformers.SamConfig(
            vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask
        )
    )


ENTRIES = [
    *(
        Entry(
            f"transformers/{name}", functools.partial(_create, name, config, options), image(*shape)
        )
        for name, (config, options, shape) in _MODELS.items()
    ),
    Entry("transformers/SamModel", _sam, _sam_inputs),
]
