"""The layers that make the outputs of a network: of real architectures, and of small ones with nested heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.heads import head_layers

RPN = ["rpn.head.cls_logits", "rpn.head.bbox_pred"]
BOXES = ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"]
TORCHVISION: dict[str, tuple[dict[str, Any], list[str]]] = {
    "resnet18": ({}, ["fc"]),
    "vgg11": ({}, ["classifier.6"]),
    "vit_b_16": ({}, ["heads.head"]),
    "googlenet": ({"init_weights": False}, ["aux1.fc2", "aux2.fc2", "fc"]),
    "inception_v3": ({"init_weights": False}, ["AuxLogits.fc", "fc"]),
    "deeplabv3_mobilenet_v3_large": ({"aux_loss": True}, ["classifier.4", "aux_classifier.4"]),
    "fcn_resnet50": ({"aux_loss": True}, ["classifier.4", "aux_classifier.4"]),
    "lraspp_mobilenet_v3_large": ({}, ["classifier.low_classifier", "classifier.high_classifier"]),
    "fasterrcnn_mobilenet_v3_large_fpn": ({}, [*RPN, *BOXES]),
    "maskrcnn_resnet50_fpn": ({}, [*RPN, *BOXES, "roi_heads.mask_predictor.mask_fcn_logits"]),
    "keypointrcnn_resnet50_fpn": ({}, [*RPN, *BOXES, "roi_heads.keypoint_predictor.kps_score_lowres"]),
    "retinanet_resnet50_fpn": ({}, ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"]),
    "ssdlite320_mobilenet_v3_large": (
        {},
        [f"head.{kind}_head.module_list.{i}.1" for kind in ("classification", "regression") for i in range(6)],
    ),
}


@pytest.mark.models
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str):
    models = pytest.importorskip("torchvision").models
    options, expected = TORCHVISION[name]
    weights = dict.fromkeys(("weights", "weights_backbone"))
    if not any(part in name for part in ("fpn", "ssd", "deeplab", "fcn", "lraspp")):
        del weights["weights_backbone"]
    with torch.device("meta"):
        model = models.get_model(name, **weights, **options)
    assert head_layers(model) == expected


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "expected"),
    [("deit_tiny_distilled_patch16_224", ["head", "head_dist"]), ("resnet18", ["fc"]), ("convnext_tiny", ["head.fc"])],
)
def test_timm(name: str, expected: list[str]):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert head_layers(model) == expected
    assert head_layers(nn.DataParallel(model)) == [f"module.{head}" for head in expected]


def small(**options: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, **options}


TRANSFORMERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "BertForSequenceClassification": ("BertConfig", small(), ["classifier"]),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", small(), ["cls_classifier", "distillation_classifier"]),
    "YolosForObjectDetection": ("YolosConfig", small(), ["class_labels_classifier", "bbox_predictor"]),
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 1, "n_embd": 16, "n_head": 2}, ["lm_head"]),
}


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str):
    transformers = pytest.importorskip("transformers")
    config, options, expected = TRANSFORMERS[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**options))
    assert head_layers(model) == expected


class Model(nn.Module):
    """A body of width 8, and modules beside it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        for name, part in parts.items():
            self.add_module(name, part)


class Predictor(nn.Module):
    """Two layers in a row, the last of which has two others beside it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.shared, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)
        self.classes, self.boxes = nn.Linear(6, classes), nn.Linear(6, 4)


def linear() -> nn.Linear:
    return nn.Linear(8, 3)


SMALL: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "one layer": (linear, [""]),
    "a sequence": (lambda: nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 2)), ["2"]),
    "no name says it": (lambda: Model(out=linear()), ["out"]),
    "two heads": (lambda: Model(head=linear(), other_head=linear()), ["head", "other_head"]),
    "a norm at the end": (
        lambda: Model(head=nn.Sequential(linear(), nn.BatchNorm1d(3), linear(), nn.BatchNorm1d(3))),
        ["head.2", "head.3"],
    ),
    "a list": (lambda: Model(heads=nn.ModuleList([linear(), nn.Sequential(linear())])), ["heads.0", "heads.1.0"]),
    "a dictionary": (
        lambda: Model(classifiers=nn.ModuleDict({"a": linear(), "b": linear()})),
        ["classifiers.a", "classifiers.b"],
    ),
    "a module of several": (lambda: Model(predictor=Predictor(5)), ["predictor.classes", "predictor.boxes"]),
    "flattened": (
        lambda: Model(aux_classifier=nn.Sequential(nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(18, 3))),
        ["aux_classifier.2"],
    ),
    "further inside": (lambda: Model(detector=Model(head=linear())), ["detector.head"]),
    "wrapped": (lambda: nn.DataParallel(Model(fc=linear())), ["module.fc"]),
    "attention is no head": (lambda: Model(multihead=nn.MultiheadAttention(8, 2), last=linear()), ["last"]),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str):
    make, expected = SMALL[name]
    model = make()
    assert head_layers(model) == expected
    groups = normfuse.parameter_groups(model, "head")
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [key for key, _ in model.named_parameters() if any(key.startswith(h) for h in expected)]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_whatever_the_number_of_classes(classes: int):
    """One that divides a later layer's width is no reason to take the two for a chain."""
    assert head_layers(Model(predictor=Predictor(classes))) == ["predictor.classes", "predictor.boxes"]
