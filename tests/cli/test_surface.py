"""The command line as a whole: help, versions, usage errors, exit codes, and what it costs to ask for help."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import normfuse
from normfuse import errors
from normfuse.cli import COMMANDS
from normfuse.cli.command import EXIT_CODES, failure


def test_help_lists_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_the_common_options(run, command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in ("--json", "--verbose", "--quiet", "--no-color"))


def test_version(run):
    assert run("--version").stdout.strip() == f"normfuse, version {normfuse.__version__}"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_neither_torch_nor_rich(command: str):
    code = f"""
import sys
sys.argv = ["normfuse", *{command.split()!r}, "--help"]
from normfuse.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "rich", "numpy", "onnx") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage:" in done.stdout


def test_runs_as_a_module():
    command = [sys.executable, "-m", "normfuse", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert normfuse.__version__ in done.stdout


def test_no_arguments_prints_help_and_is_a_usage_error(run):
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["foldd", "model.pt"], "No such command"),
        (["fold"], "Missing argument 'MODEL'"),
        (["fold", "nothing.pt"], "there is no such file"),
        (["inspect", "."], "is a folder"),
        (["fold", "model.pt", "--nonsense"], "No such option"),
        (["fold", "model.pt", "--input-shape", "x:3xthree"], "is not a shape"),
        (["fold", "model.pt", "--input-shape", "0,3"], "is not a shape"),
        (["fold", "model.pt", "--arch-kwargs", "depth"], "is not key=value"),
        (["fold", "model.pt", "-o", "missing/out.pt"], "there is no folder missing"),
        (["fold", "model.pt", "-o", "out.onnx"], "should end in .pt"),
        (["fold", "model.pt", "--json", "missing/out.json"], "there is no folder missing"),
        (["fold", "model.pt", "--device", "abacus"], "--device abacus"),
        (["fold", "model.pt", "--num-inputs", "0"], "0 is not in the range"),
        (["export", "model.pt", "-o", "model.tflite"], "should end in .onnx"),
        (["export", "model.pt", "--dynamic", "x:first"], "is not an axis"),
        (["export", "model.pt", "--precision", "int7"], "'int7' is not one of"),
        (["export", "model.pt", "--precision", "int8"], "--precision int8 needs --calib"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(refuses, model_file, args: list[str], text: str):
    assert text in refuses(*args, code=2)


@pytest.mark.parametrize(("command", "name"), [("fold", "model.folded.pt"), ("export", "model.onnx")])
def test_nothing_is_overwritten_unasked(refuses, model_file, folder: Path, command: str, name: str):
    (folder / name).write_text("precious")
    assert f"{name} exists" in refuses(command, model_file, code=2)
    assert (folder / name).read_text() == "precious"


def test_the_json_file_is_not_overwritten_unasked(refuses, model_file, folder: Path):
    (folder / "report.json").write_text("precious")
    assert "report.json exists" in refuses("inspect", model_file, "--json", "report.json", code=2)
    assert (folder / "report.json").read_text() == "precious"


def test_missing_device_is_exit_5(refuses, model_file):
    assert "not available here" in refuses("inspect", model_file, "--device", "cuda:99", code=5)


def test_every_error_has_its_exit_code():
    codes = {kind: failure(kind("text")).exit_code for kind in EXIT_CODES}
    assert codes == EXIT_CODES
    assert failure(errors.NormfuseError("text")).exit_code == 1


def test_stack_trace_only_on_request(run, model_file):
    args = ("inspect", model_file, "--input-shape", "1,7,8,8")
    assert "Traceback" not in run(*args).stderr
    verbose = run(*args, "-v")
    assert "Traceback" in verbose.stderr
    assert verbose.exit_code == 4


def test_what_the_system_refuses_is_one_line(refuses, model_file, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "report.json")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    args = ("inspect", model_file, "--input-shape", "1,3,8,8", "--json", "report.json", "-q")
    assert "report.json: No space left on device" in refuses(*args, code=1)


def test_no_escape_codes_off_a_terminal(run, model_file):
    assert "\x1b" not in run("inspect", model_file).output


def test_output_is_closed_to_what_the_model_prints(run, folder: Path):
    (folder / "noisy.py").write_text(
        "import torch\n"
        "class Noisy(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        print('noise')\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    return torch.nn.Sequential(Noisy(4, 4))\n"
    )
    result = run("inspect", "noisy:make", "--json", "-")
    assert result.exit_code == 0, result.output
    assert "noise" not in result.stdout
    assert "noise" in result.stderr
    assert os.listdir(folder) == ["noisy.py"] or "__pycache__" in os.listdir(folder)
