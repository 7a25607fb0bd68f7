"""timm: every module of timm.models that has convolutions, and every kind of convolution in it."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from zoo.entry import Entry, image, names_in

__all__ = ["ENTRIES"]

_ANY_SIZE = names_in("""
    caformer_s18 convformer_s18 convmixer_768_32 convnext_atto_ols convnext_zepto_rms
    cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny cspresnet50 davit_tiny
    densenetblur121d dla46_c dm_nfnet_f0 dpn48b eca_vovnet39b ecaresnet26t edgenext_xx_small
    efficientnet_cc_b0_4e efficientnet_lite0 efficientvim_m1 efficientvit_b0 efficientvit_l1
    efficientvit_m0 ese_vovnet19b_slim_dw ese_vovnet39b_evos fasternet_t0 fastvit_sa12
    fastvit_t8 focalnet_tiny_srf gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050
    hardcorenas_a hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto lambda_resnet26t
    lcnet_035 lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0 mambaout_femto
    mixnet_s mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035
    mobilenetv4_hybrid_medium mobilenetv5_base mobileone_s0 mobilevit_xxs mobilevitv2_050
    mvitv2_tiny nasnetalarge nextvit_small nf_ecaresnet26 nf_regnet_b0 nf_resnet26 pnasnet5large
    poolformerv2_s12 pvt_v2_b0 pvt_v2_b2_li rdnet_tiny regnetv_040 regnetx_002 regnety_002
    regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t
    resnetblur18 resnetv2_18 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit rexnet_100
    sam2_hiera_tiny selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    test_byobnet test_convnext test_convnext3 test_efficientnet test_efficientnet_evos
    test_efficientnet_gn test_mambaout test_nfnet test_resnet test_vit tf_efficientnet_b0
    tf_efficientnet_cc_b0_4e tf_efficientnetv2_b0 tf_mixnet_s tiny_vit_5m_224 tresnet_m
    twins_pcpvt_small twins_svt_small vgg11_bn xception41 xcit_nano_12_p8_224
""")
"""Run on 64 x 96 pixels."""

_SIZE_GIVEN = names_in("""
    coat_tiny eca_botnext26ts_256 efficientformerv2_s0 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224
    levit_128s levit_conv_128s maxvit_tiny_tf_224 maxxvit_rmlp_nano_rw_256 nest_tiny pit_ti_224
    sebotnet33ts_256 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    test_coatnet test_maxvit test_vit3 test_vit_relpos tnt_s_patch16_224 visformer_tiny
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
""")
"""Built for 64 x 64 pixels by ``img_size=``."""

_OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "bat_resnext26ts": (256, {}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 2}),
    "convit_tiny": (64, {"img_size": 64, "depth": 3}),
    "deepseek_vit_412m": (224, {"depth": 2, "embed_dim": 128, "num_heads": 2}),
    "deit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "eca_halonext26ts": (256, {}),
    "efficientformer_l1": (224, {}),
    "eva02_tiny_patch14_224": (64, {"img_size": 64, "depth": 2}),
    "inception_resnet_v2": (96, {}),
    "inception_v3": (96, {}),
    "inception_v4": (96, {}),
    "lamhalobotnet50ts_256": (128, {"img_size": 128}),
    "qwen3_vit_88m": (64, {"depth": 2}),
    "samvit_base_patch16_224": (64, {"depth": 4}),
    "vit_tiny_patch16_dinov3_qkvb": (64, {"depth": 2}),
}
"""By name: pixels per side, and options; models made smaller, and those that need a size."""

_REPARAMETRISED = ("fastvit_t8", "mobileone_s0", "repvgg_a0", "repvit_m0_9")


def _create(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **options)


def _reparametrised(name: str) -> nn.Module:
    from timm.utils import reparameterize_model

    return reparameterize_model(_create(name))


def _entry(name: str, height: int, width: int, **options: Any) -> Entry:
    build = functools.partial(_create, name, **options)
    # CondConv2d: the weights are a mixture that each image chooses.
    refused = "computed from the model's input|CondConv2d" if "_cc_" in name else ""
    return Entry(f"timm/{name}", build, image(2, 3, height, width), refused=refused)


ENTRIES = [
    *(_entry(name, 64, 96) for name in _ANY_SIZE),
    *(_entry(name, 64, 64, img_size=64) for name in _SIZE_GIVEN),
    *(_entry(name, size, size, **options) for name, (size, options) in _OTHERS.items()),
    *(
        Entry(
            f"timm/{name}+reparametrised",
            functools.partial(_reparametrised, name),
            image(2, 3, 64, 96),
        )
        for name in _REPARAMETRISED
    ),
]
