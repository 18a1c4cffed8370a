"""Padding is in no statistic of a swapped norm in training: the model's own mask says what it is."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.layers import UnifiedNorm, replayed_statistics
from normfuse.layers.padding import ForgetPadding, NotePadding
from normfuse.layers.second_moment import SecondMomentNorm

LENGTHS = (7, 4, 5)
WORDS = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PADDED = torch.tensor([[place >= length for place in range(7)] for length in LENGTHS])


class Attending(nn.Module):
    """Masked means over the tokens, between norms: what is padding reaches no token."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        kept = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        kept = kept.to(x.dtype)[..., None] if kept.dtype == torch.bool or kept.max() > 0 else (kept == 0)[..., None]
        x = self.before(x)
        x = x + self.layer((x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True))
        return self.after(x)


class Model(nn.Module):
    """A part that takes a mask, in a model that calls it something else."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.part, self.form = Attending(), form

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padded = torch.arange(x.shape[1]) >= lengths[:, None]
        return self.part(x, self.form(padded))


FORMS = {
    "bool": lambda padded: ~padded,
    "int": lambda padded: (~padded).long(),
    "float": lambda padded: (~padded).double(),
    "added": lambda padded: torch.zeros(padded.shape).masked_fill(padded, -torch.inf),
}


def swapped(model: nn.Module, *inputs: Tensor) -> Any:
    result = normfuse.swap_norms(model.double(), calibration=[inputs], progress=False, options={"warmup_steps": 2})
    assert any(isinstance(m, UnifiedNorm) for m in result.modules())
    return result.train()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    norms = {n: m for n, m in model.named_modules() if isinstance(m, SecondMomentNorm)}
    return {f"{n}.{key}": buffer for n, m in norms.items() for key, buffer in m.named_buffers()}


def assert_same_statistics(one: nn.Module, other: nn.Module) -> None:
    for key, value in statistics(one).items():
        torch.testing.assert_close(statistics(other)[key], value, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("form", FORMS)
def test_statistics_do_not_depend_on_what_stands_at_the_padding(form: str):
    model = swapped(Model(FORMS[form]), WORDS, torch.tensor(LENGTHS))
    other = copy.deepcopy(model)
    for step in range(4):
        for each, filling in ((model, 1.0), (other, 100.0)):
            x = torch.where(PADDED[..., None], filling, WORDS + step)
            (each(x, torch.tensor(LENGTHS))[~PADDED] ** 3).sum().backward()
    assert_same_statistics(model, other)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10)


def test_statistics_are_those_of_the_tokens_alone():
    """Sequences in a padded batch, and their tokens in one that needs no padding."""
    model = swapped(Attending(), WORDS)
    alone, polluted = copy.deepcopy(model.before), copy.deepcopy(model.before)
    padded = torch.where(PADDED[..., None], 50.0, WORDS)
    model(padded, attention_mask=~PADDED)
    alone(WORDS[~PADDED])  # (tokens, C)
    polluted(padded)
    for name, value in alone.named_buffers():
        torch.testing.assert_close(model.before.get_buffer(name), value, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(polluted.running_second_moment, alone.running_second_moment)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("size", [3, 7])
def test_encoders_of_torch(batch_first: bool, size: int):
    """Also where there are as many sequences as tokens, and only the layout tells them apart."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=True)
    source = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    x = torch.randn(size, 7, 8, dtype=torch.float64)
    padded = torch.arange(7) >= torch.arange(size)[:, None] % 5 + 3
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    model = swapped(source, order(x))
    other = copy.deepcopy(model)
    for each, filling in ((model, 0.0), (other, 30.0)):
        each(order(torch.where(padded[..., None], filling, x)), src_key_padding_mask=padded)
    assert_same_statistics(model, other)


def test_a_checkpoint_replays_the_padding():
    class Checkpointed(Attending):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            run = partial(checkpoint, use_reentrant=False, context_fn=replayed_statistics)
            return run(super().forward, x, attention_mask)

    plain = swapped(Attending(), WORDS)
    again = copy.deepcopy(plain)
    again.__class__ = Checkpointed
    for model in (plain, again):
        (model(WORDS.clone().requires_grad_(), ~PADDED)[~PADDED] ** 3).sum().backward()
    assert_same_statistics(plain, again)
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10)


def test_a_mask_that_fits_other_tokens_is_warned_of():
    class Joined(Attending):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.after(torch.cat([x, x], 1))

    model = swapped(Joined(), WORDS)
    with pytest.warns(UserWarning, match="pass padding_mask to it"):
        model(WORDS, ~PADDED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(WORDS, torch.ones(3, 7))  # nothing is padding
        model(WORDS)
        model.eval()(WORDS, ~PADDED)


def test_masks_are_forgotten_with_their_call():
    class Failing(Attending):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            if x.shape[0] == 1:
                raise RuntimeError("one sequence is too few")
            return super().forward(x, attention_mask)

    model = swapped(Failing(), WORDS)
    with pytest.raises(RuntimeError, match="too few"):
        model(WORDS[:1], ~PADDED[:1])
    before = copy.deepcopy(model)
    model(WORDS)
    for norm in (before.before, before.after):
        assert norm.step == 0
    before.before(WORDS)
    assert torch.equal(model.before.running_second_moment, before.before.running_second_moment)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_fold_and_copies_keep_it(tmp_path: Path, suffix: str):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    source = nn.Sequential(layer).double()
    fresh = copy.deepcopy(source)
    model = normfuse.swap_norms(source.eval(), calibration=[WORDS], progress=False)
    normfuse.save(model, tmp_path / f"m{suffix}")
    loaded = normfuse.load(tmp_path / f"m{suffix}", model=None if suffix == ".pt" else fresh)
    kinds = {type(hook) for m in loaded.modules() for hook in m._forward_pre_hooks.values()}
    assert kinds == {NotePadding}
    assert {type(hook) for m in loaded.modules() for hook in m._forward_hooks.values()} == {ForgetPadding}
    loaded.train()[0](WORDS, src_key_padding_mask=PADDED)
    folded = normfuse.fold(loaded.eval(), example_inputs=WORDS)
    assert not [m for m in folded.modules() if isinstance(m, SecondMomentNorm)]
    torch.testing.assert_close(folded(WORDS), loaded(WORDS), rtol=1e-10, atol=1e-10)


def test_compiled_models_run():
    model = swapped(Attending(), WORDS)
    compiled: Any = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    full = torch.ones(3, 7, dtype=torch.bool)
    torch.testing.assert_close(compiled(WORDS, full), model(WORDS, full))
