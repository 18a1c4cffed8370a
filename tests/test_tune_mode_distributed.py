"""Tune mode under DDP and FSDP2: two processes do what one does with the whole batch in eval mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tune_mode_worker
from tests.gradients import assert_same

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("DDP before", "DDP after", "FSDP2")


@pytest.fixture(scope="module", params=["in Python", "compiled"])
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the first of two processes saved, without and with the compiled kernels."""
    output = tmp_path_factory.mktemp("tune_mode") / "results.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if request.param == "compiled":
        folder = request.getfixturevalue("kernel_folder")
        environment |= {"NORMFUSE_KERNELS": "1", "NORMFUSE_CACHE_DIR": str(folder)}
    subprocess.run(
        [*launch, "-m", "tests.tune_mode_worker", str(output)], cwd=ROOT, env=environment, timeout=240, check=True
    )
    return torch.load(output)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    """Return what eval mode gives on the whole batch."""
    return tune_mode_worker.train(tune_mode_worker.network(), slice(None))


@pytest.mark.parametrize("what", ["gradients", "state"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(way: str, what: str, one_process: dict[str, Any], two_processes: dict[str, Any]) -> None:
    """The gradients of the first step, and parameters and statistics after two."""
    assert_same(one_process[what], two_processes[way][what], 1e-8 if what == "state" else 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_outputs_after_training(way: str, one_process: dict[str, Any], two_processes: dict[str, Any]) -> None:
    """Twice without gradients: what the first call kept is right for the second."""
    share = {index: y[: tune_mode_worker.SHARE] for index, y in one_process["outputs"].items()}
    assert_same(share, two_processes[way]["outputs"], 1e-8)


def test_statistics_did_not_move(two_processes: dict[str, Any]) -> None:
    for name, buffer in tune_mode_worker.network().named_buffers():
        assert all(torch.equal(buffer, two_processes[way]["state"][name]) for way in WAYS), name
