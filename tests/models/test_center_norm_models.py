"""``center-norm`` on architectures of timm, torchvision and transformers, with every parameter randomised."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from normfuse import Reason, Report, Status, api
from tests.parity import assert_parity, randomize_norms

pytestmark = pytest.mark.models

ERROR = 1e-9  # relative to the largest output, in float64
PASSES = ("fold-affine", "center-norm")
TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
TEXT = {**TRANSFORMER, "vocab_size": 50, "max_position_embeddings": 20}


def noisy(model: nn.Module) -> nn.Module:
    """Return a model in float64 and eval mode in which no bias, token or LayerScale is zero, nor any two are equal."""
    generator = torch.Generator().manual_seed(1)
    randomize_norms(model.double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.1)
    return model


def package(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def centred(model: nn.Module, inputs: Any, passes: tuple[str, ...] = PASSES) -> tuple[nn.Module, Report]:
    """Run the passes, and compare."""
    result = api.apply(model, passes, example_inputs=inputs)
    assert_parity(model, result.model, inputs, tolerance=ERROR)
    return result.model, result.report


def norm_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many RMSNorms and how many LayerNorms a model has."""
    kinds = (nn.RMSNorm, nn.LayerNorm)
    return tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in kinds)  # type: ignore[return-value]


def reasons(report: Report) -> dict[Reason, int]:
    found = [outcome.refusal.reason for outcome in report.norms if outcome.refusal]
    return {reason: found.count(reason) for reason in dict.fromkeys(found)}


SMALL = {"img_size": 64, "num_classes": 10}


@pytest.mark.parametrize(
    ("name", "options", "norms"),
    [
        ("vit_tiny_patch16_224", SMALL, 25),
        ("deit_tiny_distilled_patch16_224", SMALL, 25),
        ("deit3_small_patch16_224", SMALL, 25),
        ("cait_xxs24_224", SMALL, 53),
        ("beit_base_patch16_224", {**SMALL, "depth": 2}, 5),
        ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}, 25),
        ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56}, 25),
    ],
)
def test_every_norm_of_a_timm_network(name: str, options: Mapping[str, Any], norms: int):
    source = noisy(package("timm").create_model(name, **options))
    size = options["img_size"]
    model, _ = centred(source, torch.randn(2, 3, size, size, dtype=torch.float64))
    assert norm_counts(model) == (norms, 0)


@pytest.mark.parametrize(
    ("name", "options", "norms", "refused"),
    [
        # the first stage is written by the norm of the patches; patches are merged in front of a norm over four places
        ("swin_tiny_patch4_window7_224", SMALL, 6, {Reason.POST_NORM: 4, Reason.AXIS: 19}),
        ("swinv2_tiny_window8_256", SMALL, 28, {Reason.POST_NORM: 1}),  # norms end the branches, behind one layer each
        ("mixer_s32_224", SMALL, 0, {Reason.AXIS: 17}),  # half of the writers write along the tokens
        ("convnext_atto", {"num_classes": 10}, 1, {Reason.POST_NORM: 1, Reason.AXIS: 12, Reason.EXTRA_CONSUMER: 3}),
        ("vit_base_patch16_siglip_224", {**SMALL, "depth": 2}, 5, {Reason.EXTRA_CONSUMER: 1}),  # the head reads a sum
        ("vit_base_patch16_clip_224", {**SMALL, "depth": 2}, 1, {Reason.POST_NORM: 5}),
    ],
)
def test_some_norms_of_a_timm_network(name: str, options: Mapping[str, Any], norms: int, refused: Mapping[Reason, int]):
    source = noisy(package("timm").create_model(name, **options))
    model, report = centred(source, torch.randn(2, 3, 64, 64, dtype=torch.float64), ("center-norm",))
    assert (norm_counts(model)[0], reasons(report)) == (norms, refused)


def test_vision_transformer_of_torchvision():
    """Its attention is ``nn.MultiheadAttention``, whose output projection writes to the stream."""
    build = package("torchvision").models.VisionTransformer
    source = noisy(build(32, 8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=48, num_classes=5))
    model, _ = centred(source, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert norm_counts(model) == (5, 0)


PIXELS = {"pixel_values": (2, 3, 32, 32)}
WORDS = {"input_ids": (2, 8)}
GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 0}
OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 24}


def transformer(config: str, options: Mapping[str, Any], model: str) -> nn.Module:
    """Return a small model of the package transformers, from a configuration alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that it imports
        library = package("transformers")
        return noisy(getattr(library, model)(getattr(library, config)(**options)))


def inputs_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return random pictures, or words none of which is padding."""
    pictures = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items() if len(shape) == 4}
    return pictures or {name: torch.randint(3, 50, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("config", "options", "name", "shapes", "norms", "left"),
    [
        ("ViTConfig", VISION, "ViTForImageClassification", PIXELS, 5, 0),
        ("DeiTConfig", VISION, "DeiTForImageClassificationWithTeacher", PIXELS, 5, 0),
        ("BeitConfig", VISION, "BeitForImageClassification", PIXELS, 5, 0),
        ("Dinov2Config", VISION, "Dinov2Model", PIXELS, 5, 0),
        ("GPT2Config", {**GPT2, "eos_token_id": 0}, "GPT2LMHeadModel", WORDS, 5, 0),
        ("OPTConfig", OPT, "OPTForCausalLM", WORDS, 5, 0),
        ("GPTNeoXConfig", TEXT, "GPTNeoXForCausalLM", WORDS, 5, 0),
        ("MegatronBertConfig", TEXT, "MegatronBertForMaskedLM", WORDS, 5, 1),  # the last reads a GELU
    ],
)
def test_transformers_with_norms_in_front(
    config: str, options: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]], norms: int, left: int
):
    model, _ = centred(transformer(config, options, name), inputs_of(shapes))
    assert norm_counts(model) == (norms, left)


@pytest.mark.parametrize(
    ("config", "options", "name", "shapes", "refused"),
    [
        ("BertConfig", TEXT, "BertForMaskedLM", WORDS, {Reason.POST_NORM: 4, Reason.OPAQUE_OPERATION: 1}),
        ("RobertaPreLayerNormConfig", TEXT, "RobertaPreLayerNormModel", WORDS, {Reason.POST_NORM: 5}),
        ("CLIPVisionConfig", VISION, "CLIPVisionModel", PIXELS, {Reason.POST_NORM: 5}),
        ("BloomConfig", {**GPT2, "hidden_size": 24}, "BloomModel", WORDS, {Reason.POST_NORM: 5}),
    ],
)
def test_transformers_with_a_norm_in_the_stream(
    config: str,
    options: Mapping[str, Any],
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    refused: Mapping[Reason, int],
):
    """Only the norm of the embedding itself reads nothing that a norm wrote."""
    model, report = centred(transformer(config, options, name), inputs_of(shapes), ("center-norm",))
    assert reasons(report) == refused
    assert norm_counts(model)[0] == 1


def test_gpt2_says_that_its_embedding_is_untied():
    source = transformer("GPT2Config", {**GPT2, "eos_token_id": 0}, "GPT2LMHeadModel")
    model, report = centred(source, inputs_of(WORDS), ("center-norm",))
    (untied,) = [outcome for outcome in report.outcomes if not outcome.norm]
    assert (untied.status, untied.subject) == (Status.APPLIED, "transformer.wte.weight")
    assert untied.partners == ("lm_head.weight",)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert not torch.equal(model.transformer.wte.weight, model.lm_head.weight)
