from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from normfuse.cli import main

Run = Callable[..., Result]


def small_model() -> nn.Sequential:
    """Return Conv, BatchNorm, ReLU, twice, and a classifier; 3 to 8 channels, statistics and gains randomised."""
    layers: list[nn.Module] = []
    for channels in (3, 4):
        norm = nn.BatchNorm2d(channels + 1)
        norm.running_mean, norm.running_var = torch.randn(channels + 1), torch.rand(channels + 1) + 0.5
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        layers += [nn.Conv2d(channels, channels + 1, 3, padding=1), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


@pytest.fixture
def model_file(model: nn.Sequential, folder: Path) -> str:
    torch.save(model, folder / "model.pt")
    return "model.pt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that what a command leaves behind shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Run the command line in this process."""
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args], prog_name="normfuse")


@pytest.fixture
def refuses(run: Run, folder: Path) -> Callable[..., str]:
    """Run a command that must fail: one line, no stack trace, nothing on standard output, no file left behind."""

    def call(*args: object, code: int) -> str:
        before = sorted(os.listdir(folder))
        result = run(*args)
        assert result.exit_code == code, result.output
        assert sorted(os.listdir(folder)) == before
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        return lines[0]

    return call
