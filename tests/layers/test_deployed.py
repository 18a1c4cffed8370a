"""The layers that stand only in folded models."""

from __future__ import annotations

import pytest
import torch

from normfuse.layers.deployed import ChannelPad


@pytest.mark.parametrize("padding", [(1, 2), (1, 0, 2, 1), (1, 1, 0, 2, 3, 0)])
def test_channel_pad_is_a_constant_pad_per_channel(padding: tuple[int, ...]) -> None:
    axes = len(padding) // 2
    x = torch.randn(2, 3, *[4] * axes, dtype=torch.float64)
    layer = ChannelPad(padding, 3).double()
    layer.value.copy_(torch.tensor([0.0, -1.5, 1e3]))
    constants = layer.value.tolist()
    expected = [torch.nn.functional.pad(x[:, c : c + 1], padding, value=v) for c, v in enumerate(constants)]
    assert torch.equal(layer(x), torch.cat(expected, 1))


def test_channel_pad_keeps_its_values_in_the_state_dict() -> None:
    assert list(ChannelPad((1, 1), 3).state_dict()) == ["value"]
