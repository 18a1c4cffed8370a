"""A causal language model on real text: LayerNorm to UnifiedNorm, fine-tuned and folded. Perplexity, three seeds.

    python benchmarks/unified_lm.py [--seeds 0,1,2] [--variants NAME;NAME] [--out benchmarks/results/unified_lm]

The text is docstrings of Python's standard library (``docstrings.py``), split by source file into training, validation
and test. A seed decides the weights, the batches and the pieces that calibrate. Perplexity is per token, over 32768
tokens of the validation or test text in pieces of 64. ``OUT.json`` gets every trial and every record,
with the version of Python and the digest of the text; ``OUT.png`` the picture.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import swap_protocol
import torch
from docstrings import Docstrings, docstrings
from pre_norm import Decoder
from swap_task import Data, Examples, Task
from torch import Tensor

CONTEXT, BATCH, CALIBRATION = 64, 16, 32  # tokens, pieces, batches of pieces
STEPS, LR, DEPTH = 800, 3e-3, 3
FILES, MEASURED = 300, 32768  # source files of the text, in order of their names; tokens of each evaluation
RECONSTRUCTION = {"steps": 50, "lr": 1e-3, "end_to_end": 100}


def task(text: Docstrings, steps: int = STEPS) -> Task:
    """Return the task, with so many steps of training from scratch."""
    sizes = {"tokens": {split: len(getattr(text, split)) for split in ("train", "validation", "test")}}
    return Task(
        name="unified_lm",
        metric="perplexity",
        build=lambda norm: Decoder(norm, words=text.size, context=CONTEXT, depth=DEPTH),
        data=lambda seed: _data(text, seed),
        steps=steps,
        lr=LR,
        filtration=False,
        reconstruction=RECONSTRUCTION,
        facts={
            "network": "pre-norm decoder: width 64, depth 3, 4 heads, context 64, output layer of its own",
            "data": {
                "text": f"docstrings of {FILES} files of the standard library",
                "sha256": text.digest,
                "words": text.size,
                **sizes,
            },
            "calibration": CALIBRATION * BATCH,
            "steps": steps,
            "lr": LR,
            "batch": BATCH,
            "reconstruction": RECONSTRUCTION,
        },
    )


def _data(text: Docstrings, seed: int) -> Data:
    calibration = [batch.inputs for batch in _pieces(text.train, CALIBRATION, seed + 2000)]
    return Data(
        lambda steps, order: _pieces(text.train, steps, order),
        _all(text.validation[:MEASURED]),
        _all(text.test[:MEASURED]),
        calibration,
    )


def _pieces(tokens: Tensor, steps: int, seed: int) -> Iterator[Examples]:
    """Yield batches of pieces that start anywhere; the label of a token is the next one."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        pieces = tokens[starts + torch.arange(CONTEXT + 1)]
        yield Examples(pieces[:, :-1], pieces[:, 1:])


def _all(tokens: Tensor) -> Examples:
    """Return the text in pieces one after the other; a rest is left out."""
    count = (len(tokens) - 1) // CONTEXT
    inputs, labels = (part[: count * CONTEXT].reshape(count, CONTEXT) for part in (tokens, tokens[1:]))
    return Examples(inputs, labels)


def main() -> int:
    """Run what is missing, print the table, draw the picture."""
    swap_protocol.run(task(docstrings(files=FILES)), swap_protocol.options("unified_lm"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
