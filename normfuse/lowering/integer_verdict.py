"""When a file of integers computes what its source does: by the direction of each output, and by its largest entries.

Numbers of 8 bits are no rounding of the source that a bound on each element could hold. With r the output of the source
in float64, y that of the file, and a row a sample of an output of shape (N, C), a file passes where

    cosine(r, y) >= min_cosine                                       for each output
    rows with the same largest entry  >=  min_top1 rows              over all outputs of that shape

A row counts as agreeing where the source itself holds the two entries no further apart than one step of the type at the
largest element, ``max|r| / q``: that much the rounding of the output alone explains.
"""

from __future__ import annotations

import dataclasses

from normfuse.comparison import Comparison

MIN_COSINE = 0.9
MIN_TOP1 = 0.9
STEPS = {"int8": 1 / 127, "fp8": 1 / 16}
"""One step at the largest element, relative to it: of E4M3, whose numbers have four significant bits, at least."""


def disagreeing(found: Comparison, step: float) -> int:
    """Return how many rows have another largest entry by more than a step."""
    return sum(lead > step for lead in found.top1_leads)


def judged(
    found: Comparison, subject: str, *, step: float, min_cosine: float = MIN_COSINE, min_top1: float = MIN_TOP1
) -> Comparison:
    """Return the comparison with the verdict on integers; one that has failed already keeps its reason.

    Args:
        found: The comparison of the file with its source.
        subject: What the source is, for the reason.
        step: What rounding explains between two entries, relative to the largest element.
        min_cosine: The least cosine similarity of each output.
        min_top1: The least part of the rows whose largest entry is the same.
    """
    failure = found.failure or _failure(found, subject, step, min_cosine, min_top1)
    return dataclasses.replace(found, passed=not failure, failure=failure, tolerance=None)


def _failure(found: Comparison, subject: str, step: float, min_cosine: float, min_top1: float) -> str:
    if not found.cosine >= min_cosine:
        return f"cosine {found.cosine:.6f} to {subject}, at least {min_cosine:g} is asked for"
    rows, wrong = found.top1[1] if found.top1 else 0, disagreeing(found, step)
    if rows - wrong >= min_top1 * rows:
        return ""
    return (
        f"top-1 {rows - wrong}/{rows}: so many rows have the same largest entry as {subject}, or one at most a step "
        f"below; at least {min_top1:.0%} are asked for"
    )
