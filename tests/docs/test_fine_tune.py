"""The experiment behind the tutorial on Tune mode says what the tutorial says, on fewer steps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "fine_tune.py"
ABSENT = [name for name in ("mlxtend", "sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
STEPS = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what one seed measured, by the command of the tutorial."""
    out = tmp_path_factory.mktemp("fine-tune")
    sizes = ["--seeds", "1", "--steps", str(STEPS), "--pretraining-steps", "40"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--out", str(out)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| Tune |" in done.stdout
    assert (out / "fine_tune.png").stat().st_size > 10_000
    (found,) = json.loads((out / "fine_tune.json").read_text())["runs"]
    return found


def largest(run: dict[str, Any], dtype: str, mode: str) -> float:
    differences = run[dtype][mode]["difference"]
    assert len(differences) == STEPS
    return max(differences)


def test_the_network_was_trained(run: dict[str, Any]) -> None:
    assert run["pretrained"]["mnist"] > 0.7
    for mode in ("train", "eval", "tune", "deploy"):
        first, last = (run["float32"][mode]["accuracy"][at][1] for at in (0, -1))
        assert last > first + 0.1, mode


def test_tune_follows_eval_at_every_step(run: dict[str, Any]) -> None:
    assert largest(run, "float64", "tune") < 1e-8
    assert largest(run, "float32", "tune") < 1e-4
    losses = run["float64"]
    assert losses["tune"]["loss"] == pytest.approx(losses["eval"]["loss"], rel=1e-8)


def test_train_and_deploy_do_not(run: dict[str, Any]) -> None:
    for mode in ("train", "deploy"):
        first = run["float64"][mode]["difference"][0]
        assert first > 1e-3, mode
        assert largest(run, "float64", mode) > 1e-2, mode


def test_precision_separates_rounding_from_another_method(run: dict[str, Any]) -> None:
    assert largest(run, "float64", "tune") < 1e-5 * largest(run, "float32", "tune")
    assert largest(run, "float64", "deploy") == pytest.approx(largest(run, "float32", "deploy"), rel=1e-2)


def test_tune_keeps_what_deploy_keeps(run: dict[str, Any]) -> None:
    kept = run["saved_bytes"]
    assert kept["tune"] < 1.01 * kept["deploy"]  # which keeps nothing of the statistics
    assert kept["deploy"] < 0.6 * kept["eval"]
    assert kept["train"] >= kept["eval"]
