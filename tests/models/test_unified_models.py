"""Networks of timm and transformers, swapped to UnifiedNorm: every norm of a pre-norm network folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import Reason, api, norms
from normfuse.capture import capture
from normfuse.layers import UnifiedNorm
from tests.models.test_center_norm_models import noisy, package
from tests.parity import assert_parity, randomize_norms

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]  # what a package warns of at import

ERROR = 1e-9  # relative to the largest output, in float64
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def swapped(model: nn.Module, inputs: Any) -> nn.Module:
    """Return the model with every norm swapped, then gains and statistics randomised."""
    result = normfuse.swap_norms(noisy(model), "unified", [inputs])
    assert not [m for m in result.modules() if norms.is_norm(m) and not isinstance(m, UnifiedNorm)]
    return randomize_norms(result)


def left(model: nn.Module, inputs: Any, **options: Any) -> list[str]:
    """Fold, compare, and return the norms that are left in the graph."""
    folded = normfuse.fold(model, example_inputs=inputs, **options)
    assert_parity(model, folded, inputs, tolerance=ERROR)
    return [norm.name for norm in norms.find_norms(capture(folded, inputs))]


def picture(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


WORDS = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    ],
)
def test_timm_vit(name: str, options: Mapping[str, Any]):
    model = package("timm").create_model(name, num_classes=5, **options)
    inputs = picture(options["img_size"])
    network = swapped(model, inputs)
    assert sum(isinstance(m, UnifiedNorm) for m in network.modules()) == 5
    assert left(network, inputs) == []


def test_timm_channels_first():
    """ConvNeXt: LayerNorm over axis 1, some behind a convolution, some before one."""
    model = package("timm").create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    network = swapped(model, picture(64))
    assert {m.dim for m in network.modules() if isinstance(m, UnifiedNorm)} == {1}
    assert left(network, picture(64)) == []


def test_transformers_vit():
    hub = package("transformers")
    model = hub.ViTForImageClassification(hub.ViTConfig(**SIZES, image_size=32, patch_size=8))
    network = swapped(model, picture(32))
    assert left(network, picture(32)) == []


def gpt2(**options: Any) -> nn.Module:
    hub = package("transformers")
    sizes = {"vocab_size": 50, "n_positions": 20, "n_embd": 24, "n_layer": 2, "n_head": 4, **options}
    return hub.GPT2LMHeadModel(hub.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))


def test_gpt2_with_and_without_tied_words():
    assert left(swapped(gpt2(tie_word_embeddings=False), WORDS), WORDS) == []
    tied = swapped(gpt2(), WORDS)
    assert left(tied, WORDS) == ["transformer.ln_f"]
    assert left(tied, WORDS, duplicate_shared=True) == []
    report = normfuse.inspect(tied, api.EXACT_PASSES, example_inputs=WORDS)
    assert [o.refusal.reason for o in report.refused if o.refusal] == [Reason.SHARED_PARAMETER]


def test_gpt2_norms_that_stay_give_gain_and_shift_to_conv1d():
    """Its layers are ``addmm``: a UnifiedNorm folds into them, and of a LayerNorm only the statistics are left."""
    source = noisy(gpt2(tie_word_embeddings=False))
    network = randomize_norms(normfuse.swap_norms(source, "unified", [WORDS], exclude=["*.1.ln_*"]))
    folded = normfuse.fold(network, example_inputs=WORDS)
    assert_parity(network, folded, WORDS, tolerance=ERROR)
    kept = {norm.name: folded.get_submodule(norm.name) for norm in norms.find_norms(capture(folded, WORDS))}
    assert list(kept) == ["transformer.h.1.ln_1", "transformer.h.1.ln_2"]
    assert [(m.weight, m.bias) for m in kept.values()] == [(None, None)] * 2


def test_llama_rms_norm():
    hub = package("transformers")
    config = hub.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50, use_cache=False, attention_bias=True)
    config.mlp_bias = True
    network = swapped(hub.LlamaForCausalLM(config), WORDS)
    assert left(network, WORDS) == []


def test_bert_post_norms_stay_with_the_reason():
    hub = package("transformers")
    network = swapped(hub.BertModel(hub.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=20)), WORDS)
    report = normfuse.inspect(network, api.EXACT_PASSES, example_inputs=WORDS)
    assert [o.subject for o in report.applied] == ["embeddings.LayerNorm"]
    assert {o.refusal.reason for o in report.refused if o.refusal} == {Reason.EXTRA_CONSUMER}
