"""Damaged files of every format: one line, no hang, no memory beyond the limits, no value changed silently.

``benchmarks/fuzz_files.py`` runs over more of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.damaged.samples import SAMPLES

COUNT = 1200

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLES)
def test_damaged_files(kind: str, tmp_path: Path):
    from tests.damaged.judging import Files

    files = Files(kind, tmp_path)
    problems = {seed: problem for seed in range(COUNT) if (problem := files.judge(seed))}
    assert problems == {}
