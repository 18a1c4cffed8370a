"""Pre-norm transformers swapped to UnifiedNorm and folded: an ONNX file with nothing of a norm, computing the same."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import normfuse
from normfuse import norms
from normfuse.capture import capture
from normfuse.layers import UnifiedNorm
from normfuse.lowering.onnx import export_onnx
from tests.models.test_center_norm_models import noisy, package
from tests.models.test_unified_models import SIZES, WORDS, gpt2, picture
from tests.parity import assert_parity, randomize_norms
from tests.transformers_small import Decoder, ViT, built, images, words

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]  # what a package warns of at import

ERROR = 1e-9  # relative to the largest output, in float64
SMALL = {**SIZES, "num_hidden_layers": 1}
STATISTICS = {"ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
Made = tuple[nn.Module, Any]


def vit() -> Made:
    return built(ViT, depth=1), images(2, dtype=torch.float64)


def decoder() -> Made:
    return built(Decoder, depth=1), words(2)


def timm_vit() -> Made:
    model = package("timm").create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=1)
    return model, picture(32)


def hub_vit() -> Made:
    hub = package("transformers")
    return hub.ViTForImageClassification(hub.ViTConfig(**SMALL, image_size=32, patch_size=8)), picture(32)


def hub_deit() -> Made:
    hub = package("transformers")
    return hub.DeiTForImageClassification(hub.DeiTConfig(**SMALL, image_size=32, patch_size=8)), picture(32)


def hub_gpt2() -> Made:
    return gpt2(tie_word_embeddings=False, n_layer=1), WORDS


def hub_llama() -> Made:
    hub = package("transformers")
    biases = {"attention_bias": True, "mlp_bias": True}
    config = hub.LlamaConfig(**SMALL, **biases, num_key_value_heads=2, vocab_size=50, use_cache=False)
    config.tie_word_embeddings = False
    return hub.LlamaForCausalLM(config), WORDS


def swapped(model: nn.Module, inputs: Any) -> nn.Module:
    """Return the model in float64 with a UnifiedNorm for every norm, gains and statistics random."""
    result = normfuse.swap_norms(noisy(model), "unified", [inputs])
    assert not [m for m in result.modules() if norms.is_norm(m) and not isinstance(m, UnifiedNorm)]
    return randomize_norms(result)


def without_norms(model: nn.Module) -> nn.Module:
    """Return the model with nothing in the place of each UnifiedNorm: what a fold can reach at best."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, UnifiedNorm):
            model.set_submodule(name, nn.Identity())
    return model


def single(inputs: Any) -> Any:
    """Return inputs in float32."""
    if isinstance(inputs, Mapping):
        return {name: single(value) for name, value in inputs.items()}
    return inputs.float() if inputs.is_floating_point() else inputs


def operators(model: nn.Module, path: Path, inputs: Any) -> collections.Counter[str]:
    """Write a model, and return how often the file has each operator."""
    export_onnx(copy.deepcopy(model).float(), path, single(inputs))
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


MODELS = [vit, decoder, timm_vit, hub_vit, hub_deit, hub_gpt2, hub_llama]


@pytest.mark.parametrize("make", MODELS)
def test_no_norm_is_left_in_the_file(make: Callable[[], Made], tmp_path: Path):
    model, inputs = make()
    network = swapped(model, inputs)
    folded = normfuse.fold(network, example_inputs=inputs)
    assert norms.find_norms(capture(folded, inputs)) == []
    assert_parity(network, folded, inputs, tolerance=ERROR)
    found = operators(folded, tmp_path / "folded.onnx", inputs)
    assert not [name for name in found if "Norm" in name]
    assert not STATISTICS & set(found)
    assert normfuse.verify(network, tmp_path / "folded.onnx", inputs)


@pytest.mark.parametrize("make", [vit, decoder])
def test_the_file_is_that_of_the_network_without_norms(make: Callable[[], Made], tmp_path: Path):
    model, inputs = make()
    network = swapped(model, inputs)
    folded = operators(normfuse.fold(network, example_inputs=inputs), tmp_path / "folded.onnx", inputs)
    bare = operators(without_norms(network), tmp_path / "bare.onnx", inputs)
    added = folded - bare
    assert not bare - folded
    assert added in (collections.Counter(), collections.Counter(["Add"]))  # a head that had no bias may get one
