"""Run a worker module in two processes that find each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_two(worker: str, folder: Path) -> list[dict[str, Any]]:
    """Return what each of two processes saved: ``python -m WORKER RANK 2 RENDEZVOUS FILE``."""
    files = [folder / f"{rank}.pt" for rank in range(2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [
        [sys.executable, "-m", worker, str(rank), "2", str(folder / "rendezvous"), str(file)]
        for rank, file in enumerate(files)
    ]
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    return [torch.load(file) for file in files]
