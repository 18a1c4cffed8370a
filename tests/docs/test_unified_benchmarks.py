"""The benchmarks of UnifiedNorm do what their documentation says, at a tiny size."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.layers import UnifiedNorm
from tests.parity import assert_parity, randomize_norms

ROOT = Path(__file__).resolve().parents[2]
ABSENT = [name for name in ("mlxtend", "matplotlib") if importlib.util.find_spec(name) is None]
SWAPPED = ("UnifiedNorm, copied", "UnifiedNorm, least squares, reconstructed", "BatchNorm, least squares")

pytestmark = pytest.mark.slow
needs_digits = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Make the scripts importable by the names that they have for each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def task() -> Any:
    """Return the ViT's task with a smaller network, twenty steps, and little data to measure on."""
    made = script("unified_vit").task(20)

    def few(seed: int) -> Any:
        data = made.data(seed)
        parts = {split: type(data.test)(*(t[:64] for t in getattr(data, split))) for split in ("validation", "test")}
        return dataclasses.replace(data, **parts, calibration=data.calibration[:2])

    small = script("pre_norm").ViT
    return dataclasses.replace(
        made, build=lambda norm: small(norm, 16, 1), data=few, reconstruction={"steps": 4, "end_to_end": 4, "lr": 1e-3}
    )


@needs_digits
def test_a_run_measures_every_variant_and_goes_on_where_it_stopped(task: Any, tmp_path: Path):
    protocol = script("swap_protocol")
    out, names = tmp_path / "found", [protocol.ORIGINAL, *SWAPPED]
    given = argparse.Namespace(seeds="0", variants=";".join(names[:2]), out=out, kept=tmp_path / "kept", fresh=False)
    first = protocol.run(task, given)
    given.variants = ";".join(names)
    result = protocol.run(task, given)
    assert result["runs"][:2] == first["runs"]  # the seconds too: nothing was run again
    assert json.loads(out.with_suffix(".json").read_text()) == result
    assert out.with_suffix(".png").stat().st_size > 5_000
    assert [record["variant"] for record in result["runs"]] == names
    for record in result["runs"][1:]:
        assert record["steps"] == 2  # a tenth
        assert record["folded"]["norms_left"] == 0
        assert record["folded"]["difference"] < 1e-4
        tried = [t["validation"]["loss"] for t in result["trials"] if t["variant"] == record["variant"]]
        chosen = [
            t for t in result["trials"] if t["variant"] == record["variant"] and t["setting"] == record["setting"]
        ]
        assert chosen[0]["validation"]["loss"] == min(tried)
        assert chosen[0]["validation"] == record["after"]["validation"]
    assert not [t for t in result["trials"] if "test" in t]


@needs_digits
def test_an_interrupted_training_ends_where_it_would_have(task: Any, tmp_path: Path):
    swap_task, data = script("swap_task"), task.data(0)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return task.build(nn.LayerNorm)

    whole, part = network(), network()
    swap_task.train(whole, data, 101, 1e-3, 0, checkpoint=tmp_path / "whole.pt")

    def breaks(steps: int, seed: int) -> Iterator[Any]:
        yield from itertools.islice(data.train(steps, seed), 100)
        raise KeyboardInterrupt

    broken = dataclasses.replace(data, train=breaks)
    with pytest.raises(KeyboardInterrupt):
        swap_task.train(part, broken, 101, 1e-3, 0, checkpoint=tmp_path / "part.pt")
    resumed = network()
    swap_task.train(resumed, data, 101, 1e-3, 0, checkpoint=tmp_path / "part.pt")
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_batch_norm_takes_the_place_of_unified_norm():
    pre_norm = script("pre_norm")
    images = torch.randn(8, 1, 28, 28, dtype=torch.float64)
    source = randomize_norms(pre_norm.ViT(UnifiedNorm, 16, 2).double().eval())
    swapped = script("as_batch_norm").as_batch_norm(source, [images]).double()
    assert sum(isinstance(module, pre_norm.OverTokens) for module in swapped.modules()) == 5
    assert_parity(source, swapped, images, tolerance=1e-5)  # its statistics are float32
    reads: list[torch.Tensor] = []
    swapped.norm.register_forward_hook(lambda m, args, y: reads.append(args[0]))
    swapped(images)
    assert torch.allclose(swapped.norm.norm.running_mean, reads[0].mean((0, 1)), atol=1e-5)


def test_decoding_reads_what_came_before():
    decoder = script("pre_norm").Decoder(nn.LayerNorm, 20, 12, 16, 1, 2).double().eval()
    tokens = torch.randint(0, 20, (2, 6))
    block, x = decoder.blocks[0], decoder.words(tokens) + decoder.places.weight[:6]
    whole = block(x)
    q, k, v = block.qkv(block.norm1(x[:, :5])).reshape(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    assert torch.allclose(block(x[:, 5:], (k, v)), whole[:, 5:], atol=1e-12)
    assert q.shape == k.shape


def test_text_is_split_by_file_and_spelled_in_full():
    docstrings = script("docstrings")
    parts, text = docstrings.parts(60), docstrings.docstrings(300, 60)
    assert all(parts.values())
    assert docstrings.docstrings(300, 60).digest == text.digest
    spelled = "".join(text.words[number] for number in text.validation.tolist() if number < len(text.words))
    unknown = int((text.validation == len(text.words)).sum())
    assert len(spelled) + unknown == len(parts["validation"])
    assert max(int(part.max()) for part in (text.train, text.test)) < text.size == 301


def test_agreement_of_embeddings():
    sentences = script("sentences")
    one = nn.functional.normalize(torch.randn(30, 8), dim=1)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    same = sentences.agreement(one, one @ rotation)
    assert min(same["pearson"], same["spearman"], same["nearest"]) > 0.999  # similarities do not see a rotation
    assert same["cosine"] < 0.9
    other = sentences.agreement(one, nn.functional.normalize(torch.randn(30, 8), dim=1))
    assert abs(other["spearman"]) < 0.5


def test_sentences_are_prose():
    found = script("sentences")._of("Return the largest of all the values that were given. x = f(y); z = {1: 2, 3: 4}.")
    assert found == ["Return the largest of all the values that were given."]


def test_variants_of_a_step_of_decoding(monkeypatch: pytest.MonkeyPatch):
    networks, benchmark = script("latency_networks"), script("unified_latency")
    monkeypatch.setattr(networks, "DEPTH", 1)
    case = dataclasses.replace(networks.CASES["decode-1"], calls=1)

    def build(norm: Any) -> nn.Module:
        made = networks.OneToken(norm)
        made.decoder.blocks = made.decoder.blocks[:1]
        return made

    case = dataclasses.replace(case, build=build)
    records = benchmark.measured(case, "eager", torch.device("cpu"), 2)
    assert [r["variant"] for r in records] == [*networks.ORIGINALS, "UnifiedNorm", "folded", "norm removed"]
    assert records[-1]["ratio"] == 1
