"""Random ONNX graphs: a fold is right to rounding, keeps the interface and the source, and fails on none."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering.graphs.judging import judge, random_graph


@given(st.integers(0, 2**32))
@settings(max_examples=100)
def test_random_graph_folds_to_the_same_values(seed: int):
    verdict = judge(random_graph(random.Random(seed)))
    assert verdict.kind in ("right", "unusable"), verdict.detail


def test_random_graphs_have_norms_that_fold_and_norms_that_stay():
    """What the property says would be empty if nothing folded."""
    verdicts = [judge(random_graph(random.Random(seed))) for seed in range(60)]
    folded, norms = sum(v.folded for v in verdicts), sum(v.norms for v in verdicts)
    assert 0.2 * norms < folded < 0.9 * norms
    assert sum(v.kind == "unusable" for v in verdicts) < 6
