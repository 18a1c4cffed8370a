"""Vision models of transformers in integers: they cast their pixels to the dtype of a layer's weight."""

from __future__ import annotations

import pytest
import torch

import normfuse
from tests.models.test_center_norm_models import package
from tests.parity import error

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]  # what a package warns of at import

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = {"image_size": 16, "patch_size": 4}


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Siglip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_vision_models_in_integers(kind: str, dtype: torch.dtype):
    hub = package("transformers")
    name = "SiglipVision" if kind == "Siglip" else kind
    config, build = getattr(hub, f"{name}Config"), getattr(hub, f"{name}Model")
    model = build(config(**SIZES, **PATCHES)).eval().to(dtype)
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1  # as integers, all would be zero
    quantized = normfuse.quantize(model, calibration=[{"pixel_values": pixels}])
    assert quantized.dtype == dtype
    found, expected = (m(pixels).last_hidden_state.float() for m in (quantized, model))
    assert error(expected, found) < 0.1
