"""A command that is ended in the middle says so, leaves nothing, and its report goes nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SLOW = """
import os, signal, sys, threading, time
import normfuse.saving
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it aside for a background job
write = normfuse.saving._write_torch
def slow(*args):
    write(*args)
    print("writing", flush=True, file=sys.__stdout__)
    time.sleep(60)
normfuse.saving._write_torch = slow
from normfuse.cli import main
sys.argv = ["normfuse", "fold", "model.pt", "-o", "out.pt", "--force", "--input-shape", "1x3x8x8"]
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGTERM, "Terminated", 143), (signal.SIGINT, "Interrupted", 130)]
)
def test_a_signal_inside_a_save(number: signal.Signals, word: str, code: int, model_file: str, folder: Path):
    (folder / "out.pt").write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stdout is not None
    while "writing" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.strip().splitlines()[-1] == word
    assert (folder / "out.pt").read_text() == "old"
    assert sorted(os.listdir(folder)) == ["model.pt", "out.pt"]


@pytest.mark.parametrize("place", ["j.pt", "./j.pt", "model.pt", "j.pt.json"])
def test_the_report_is_written_over_nothing_else(place: str, refuses: Callable[..., str], model_file: str):
    text = refuses("fold", model_file, "-o", "j.pt", "--json", place, "--force", code=2)
    assert "name another" in text


def test_the_report_is_not_written_over_the_default_output(refuses: Callable[..., str], model_file: str):
    assert "name another" in refuses("fold", model_file, "--json", "model.folded.pt", code=2)


def test_nothing_in_the_current_folder_is_imported(folder: Path):
    """``python -m`` puts the folder first; only ``--arch package.module:factory`` looks there."""
    for name in ("timm", "torchvision", "click", "rich", "torch"):
        (folder / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    done = subprocess.run(
        [sys.executable, "-m", "normfuse", "inspect", "timm:resnet18"], capture_output=True, text=True, cwd=folder
    )
    assert not (folder / "ran").exists(), done.stderr
