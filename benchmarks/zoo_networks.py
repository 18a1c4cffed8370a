"""The networks of the zoo: every torchvision builder, and timm members chosen family by family.

A network is a name, how to build it without weights, and the shapes of a small input that it accepts. Sizes are the
smallest of 64, 96, ... that run; a network needs an entry of its own only where that is not 64.
The table of timm families was made by ``python benchmarks/zoo_survey.py``, which can be run again for a newer timm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SMALLEST_OF_TIMM_FAMILY = {
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "convmixer": "convmixer_768_32",
    "cpubone": "cpubone_nano",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "maxvit_pico_rw_256",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "nasnet": "nasnetalarge",
    "nextvit": "nextvit_small",
    "pnasnet": "pnasnet5large",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "tresnet": "tresnet_m",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_small_resnet50d_s16_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

FURTHER_TIMM = (
    # the networks on which the peers failed, and other traps
    *("mixnet_s", "tf_mixnet_s", "mobileone_s0", "ghostnetv3_100", "efficientnet_b0", "tf_efficientnet_b0"),
    *("regnety_002", "regnetz_005", "resnetv2_50", "resnetv2_50d", "coatnet_pico_rw_224", "coatnet_bn_0_rw_224"),
    *("maxvit_tiny_tf_224", "mobilenetv4_hybrid_medium", "mobilenetv4_conv_small", "levit_conv_128s"),
    *(
        "mobilevitv2_050",
        "repvgg_a0",
        "gernet_s",
        "resnet51q",
        "eca_botnext26ts_256",
        "sebotnet33ts_256",
        "bat_resnext26ts",
    ),
    *("fastvit_sa12", "test_byobnet", "test_efficientnet", "test_coatnet", "test_maxvit", "test_resnet"),
    # other members of large families
    *("efficientnetv2_rw_t", "tinynet_e", "lcnet_035", "fbnetc_100", "fbnetv3_b", "mnasnet_small", "spnasnet_100"),
    *("mobilenetv3_large_100", "mobilenet_edgetpu_v2_xs", "resnet18d", "resnet50", "resnetblur18", "ecaresnet26t"),
    *("seresnext26t_32x4d", "res2net50_14w_8s", "skresnext50_32x4d", "cspresnet50", "hgnet_tiny", "dla34"),
    *("xception65", "regnetv_040", "resnest26d", "dpn68", "vovnet39a"),
    # weight-standardized convolutions, LayerNorm and GroupNorm only
    *("nf_regnet_b0", "dm_nfnet_f0", "resnetv2_50x1_bit", "convnext_atto", "poolformer_s12", "vit_tiny_patch16_224"),
)

SIZE: Mapping[str, int] = {  # input height and width where 64 is too small
    **dict.fromkeys(("torchvision/inception_v3", "torchvision/quantized_inception_v3"), 96),
    **dict.fromkeys(("torchvision/maxvit_t", "torchvision/s3d", "torchvision/mvit_v1_b", "torchvision/mvit_v2_s"), 224),
    **dict.fromkeys(("timm/inception_v3", "timm/inception_v4", "timm/inception_resnet_v2"), 96),
    **dict.fromkeys(("timm/test_coatnet", "timm/test_maxvit"), 160),
    **dict.fromkeys(("timm/efficientformer_l1", "timm/efficientformerv2_s0", "timm/levit_128s"), 224),
    **dict.fromkeys(("timm/levit_conv_128s", "timm/visformer_tiny", "timm/vit_small_resnet50d_s16_224"), 224),
    **dict.fromkeys(("timm/volo_d1_224", "timm/coatnet_pico_rw_224", "timm/coatnet_bn_0_rw_224"), 224),
    **dict.fromkeys(("timm/maxvit_tiny_tf_224", "timm/vit_tiny_patch16_224"), 224),
    **dict.fromkeys(("timm/maxvit_pico_rw_256", "timm/eca_botnext26ts_256", "timm/sebotnet33ts_256"), 256),
    **dict.fromkeys(("timm/bat_resnext26ts", "timm/halonet_h1"), 256),
}

BUILD: Mapping[str, Mapping[str, Any]] = {  # what a builder needs to accept 64 pixels
    **{f"torchvision/vit_{kind}": {"image_size": 64} for kind in ("b_16", "b_32", "l_16", "l_32")},
    "torchvision/vit_h_14": {"image_size": 56},
}

# Thresholds that let detections of a random network through, and few enough of them to be quick.
ONE_STAGE: Mapping[str, Any] = {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50}
TWO_STAGE: Mapping[str, Any] = {
    "box_score_thresh": 0.0,
    "box_detections_per_img": 8,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 30,
}


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    Attributes:
        name: Its name in the result file: ``"torchvision/resnet50"``.
        group: ``"classification"``, ``"detection"``, ...
        build: Returns the network with random weights, in training mode.
        shapes: Shapes of the positional arguments of its ``forward``.
        listed: Whether ``forward`` takes one list of images without a batch axis (the detectors).
    """

    name: str
    group: str
    build: Callable[[], nn.Module] = field(repr=False)
    shapes: tuple[tuple[int, ...], ...]
    listed: bool = False

    def inputs(self, seed: int) -> Any:
        """Return float64 pictures: a tuple of positional arguments, or the detectors' list."""
        generator = torch.Generator().manual_seed(seed)
        made = [picture(shape, generator) for shape in self.shapes]
        return made if self.listed else tuple(made)

    def calibration(self, seed: int) -> Any:
        """Return more pictures than :meth:`inputs` has: on a map of one pixel, two pictures are no statistics."""
        generator = torch.Generator().manual_seed(seed)
        pictures = 16 if max(self.shapes[0]) < 128 and self.group != "video" else 4
        if self.listed:
            return [picture(self.shapes[0], generator) for _ in range(pictures)]
        return tuple(picture((pictures, *shape[1:]), generator) for shape in self.shapes)


def picture(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return soft blobs with a little noise, in about 0 to 1.

    Plain noise would do no good: averaged by a few convolutions, all pictures of it are the same, and statistics
    calibrated to their tiny differences make a network chaotic.
    """
    channels_on = shape[-3:] if len(shape) < 5 else shape[-4:]
    flat = (math.prod(shape[: len(shape) - len(channels_on)]), *channels_on)
    coarse = torch.rand((*flat[:2], *(4 for _ in flat[2:])), generator=generator, dtype=torch.float64)
    mode = "bilinear" if len(flat) == 4 else "trilinear"
    soft = torch.nn.functional.interpolate(coarse, flat[2:], mode=mode)
    noise = torch.rand(flat, generator=generator, dtype=torch.float64)
    return (0.8 * soft + 0.2 * noise).reshape(shape)


def networks() -> dict[str, Network]:
    """Return every network of the zoo by name; imports torchvision and timm."""
    return {network.name: network for network in (*_torchvision(), *_frozen(), *_timm())}


def _torchvision() -> Iterator[Network]:
    from torchvision import models

    for name in models.list_models():
        group = _group(models.get_model_builder(name).__module__)
        arguments = _arguments(name, group)
        shapes, listed = _shapes(name, group)
        build = _raft if group == "optical_flow" else models.get_model
        yield Network(f"torchvision/{name}", group, lambda b=build, n=name, a=arguments: b(n, **a), shapes, listed)


def _raft(name: str, **arguments: Any) -> nn.Module:
    """Build RAFT so that its grid of coordinates, float32 whatever the weights are, has their type."""
    from torchvision import models
    from torchvision.models.optical_flow import raft

    make, model = raft.make_coords_grid, models.get_model(name, **arguments)

    def typed(*where: Any, **options: Any) -> Any:
        return make(*where, **options).to(next(model.parameters()).dtype)

    setattr(raft, "make_coords_grid", typed)  # noqa: B010
    return model


def _group(module: str) -> str:
    part = module.split(".")[2]
    known = {"detection", "segmentation", "video", "optical_flow", "quantization"}
    return part if part in known else "classification"


def _arguments(name: str, group: str) -> dict[str, Any]:
    """No weights anywhere; small images; few but some detections."""
    arguments: dict[str, Any] = {"weights": None, **BUILD.get(f"torchvision/{name}", {})}
    if group in ("detection", "segmentation"):
        arguments["weights_backbone"] = None
    if group == "quantization":
        arguments["quantize"] = False  # the float network with its stubs; the int8 one has no norms left
    if group == "detection":
        arguments |= TWO_STAGE if "rcnn" in name else ONE_STAGE
        if not name.startswith("ssd"):
            arguments.update(min_size=128, max_size=128)
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    return arguments


def _shapes(name: str, group: str) -> tuple[tuple[tuple[int, ...], ...], bool]:
    size = 56 if name == "vit_h_14" else SIZE.get(f"torchvision/{name}", 64)
    if group == "detection":
        return ((3, 128, 128),), True
    if group == "video":
        frames = 16 if name.startswith(("s3d", "mvit")) else 8
        return ((1, 3, frames, size, size),), False
    if group == "optical_flow":
        return ((1, 3, 128, 128), (1, 3, 128, 128)), False
    return ((2, 3, size, size),), False


def _frozen() -> Iterator[Network]:
    """Networks built with ``FrozenBatchNorm2d``, which torchvision's detectors use around trained weights."""
    from torchvision import models
    from torchvision.ops import FrozenBatchNorm2d

    yield Network(
        "torchvision/resnet50+frozen",
        "classification",
        lambda: models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d),
        ((2, 3, 64, 64),),
    )


def _timm() -> Iterator[Network]:
    import timm

    for name in dict.fromkeys([*SMALLEST_OF_TIMM_FAMILY.values(), *FURTHER_TIMM]):
        key = f"timm/{name}"
        size = SIZE.get(key, 64)
        arguments = BUILD.get(key, {})
        yield Network(
            key, "timm", lambda n=name, a=arguments: timm.create_model(n, pretrained=False, **a), ((2, 3, size, size),)
        )
