"""``reconstruct``: the swapped network comes nearer to the original, the same way each time, also interrupted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import reconstruction
from tests.parity import assert_parity
from tests.transformers_small import Decoder, ViT, built, images, words


def pair(kind: type[nn.Module] = ViT, data: Any = None, **options: Any) -> tuple[nn.Module, nn.Module, list[Any]]:
    model = built(kind)
    batches = list(images(16).split(4)) if data is None else data
    return model, normfuse.swap_norms(model, "unified", batches, **options), batches


def distance(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs) - other(inputs)).square().mean())


def same(first: nn.Module, second: nn.Module) -> bool:
    states = (first.state_dict(), second.state_dict())
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(("kind", "batches"), [(ViT, list(images(16).split(4))), (Decoder, list(words(16).split(4)))])
def test_comes_nearer(kind: type[nn.Module], batches: list[Tensor]):
    model, swapped, _ = pair(kind, batches)
    before = distance(model, swapped, torch.cat(batches))
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    assert normfuse.reconstruct(model, swapped, batches, steps=24, lr=2e-3, progress=False) is swapped
    assert distance(model, swapped, torch.cat(batches)) < 0.5 * before
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in swapped.parameters())
    folded = normfuse.fold(swapped, example_inputs=batches[0])
    assert_parity(swapped, folded, batches[0], tolerance=1e-4)


def test_with_swap_norms():
    model, plain, batches = pair()
    fitted = normfuse.swap_norms(model, "unified", batches, reconstruct=8)
    by_hand = normfuse.reconstruct(model, plain, batches, steps=8)
    assert same(fitted, by_hand)
    inside = built(ViT)
    assert normfuse.swap_norms(inside, "unified", batches, reconstruct={"steps": 8}, inplace=True) is inside
    assert same(inside, fitted)


def test_only_the_chosen_blocks():
    model, swapped, batches = pair()
    start = {name: value.clone() for name, value in swapped.state_dict().items()}
    normfuse.reconstruct(model, swapped, batches, steps=5, blocks=["blocks.1"], end_to_end=0)
    changed = {name.rpartition(".")[0] for name, v in swapped.named_parameters() if not torch.equal(v, start[name])}
    assert changed
    norms = {"blocks.0.norm1", "blocks.0.norm2", "norm"}  # their gains follow their statistics
    assert {name for name in changed if not name.startswith("blocks.1")} <= norms


@pytest.mark.parametrize("at", [1, 7, 14, 20])
def test_goes_on_where_it_was_interrupted(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconstruction, "_SAVE_EVERY", 3)
    model, swapped, batches = pair()
    straight = normfuse.reconstruct(model, pair()[1], batches, steps=8, seed=3)
    count, real = 0, reconstruction._Fit._batch

    def interrupted(self: Any, stage: int, step: int) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return real(self, stage, step)

    file = tmp_path / "fit.pt"
    with monkeypatch.context() as patched:
        patched.setattr(reconstruction._Fit, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            normfuse.reconstruct(model, swapped, batches, steps=8, seed=3, checkpoint=file)
    resumed = normfuse.reconstruct(model, pair()[1], batches, steps=8, seed=3, checkpoint=file)
    assert same(straight, resumed)
    assert os.listdir(tmp_path) == ["fit.pt"]
    again = normfuse.reconstruct(model, pair()[1], batches, steps=8, seed=3, checkpoint=file)  # nothing left to do
    assert same(straight, again)


def test_checkpoint_of_another_fit(tmp_path: Path):
    model, swapped, batches = pair()
    normfuse.reconstruct(model, swapped, batches, steps=1, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="the checkpoint of another fit"):
        normfuse.reconstruct(model, swapped, batches, steps=2, checkpoint=tmp_path / "fit.pt")


def test_a_fit_that_makes_it_worse_is_undone():
    model, swapped, batches = pair()
    with torch.no_grad():
        before = swapped(batches[0])
    normfuse.reconstruct(model, swapped, batches, steps=5, lr=1e3)
    with torch.no_grad():
        assert torch.allclose(swapped(batches[0]), before, atol=1e-5)


def test_what_cannot_be_fitted():
    model, swapped, batches = pair()
    with pytest.raises(ValueError, match="no norm of this model was swapped"):
        normfuse.reconstruct(model, model, batches)
    with pytest.raises(ValueError, match="no module of the model is called nothing"):
        normfuse.reconstruct(model, swapped, batches, blocks=["nothing"])
    with pytest.raises(ValueError, match="needs calibration data"):
        normfuse.reconstruct(model, swapped, None)
    with pytest.raises(ValueError, match="half-precision"):
        normfuse.reconstruct(model.half(), swapped.half(), batches)


def test_modes_and_random_state_are_left_alone():
    model, swapped, batches = pair()
    model.train()
    swapped.train()
    state = torch.get_rng_state()
    normfuse.reconstruct(model, swapped, batches, steps=2)
    assert model.training
    assert swapped.training
    assert torch.equal(torch.get_rng_state(), state)


class Twice(nn.Module):
    """A block that is called twice, on values that share their padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())])

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        for _ in range(2):
            x = x + self.layers[0](x)
        return {"states": x, "mask": attention_mask}


def test_a_block_of_two_calls_and_padding():
    torch.manual_seed(0)
    model, mask = Twice().eval(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 6)
    clean = [{"x": x, "attention_mask": mask}]
    dirty = [{"x": x.masked_fill((mask == 0)[..., None], 1e4), "attention_mask": mask}]
    fitted = [normfuse.swap_norms(model, "unified", data, reconstruct=6) for data in (clean, dirty)]
    assert same(*fitted)
