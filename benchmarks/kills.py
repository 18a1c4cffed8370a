"""Kill every writing command at random moments, and look at what is there: the old file or the new one, whole.

    python benchmarks/kills.py [--kills 200] [--out benchmarks/results/kills.json]

Each command writes over a file that exists. It is ended by SIGKILL, SIGTERM or SIGINT after a random part of the time
that it takes undisturbed. Then the destination must hold the bytes of the old file, or a file that loads; the model and
the data must be as they were; and nothing else may be left, after SIGKILL once the same command has run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from torch import nn

HERE = Path(__file__).resolve().parent
SHAPE = ("--input-shape", "1x3x8x8")
COMMANDS = {
    "fold": ("fold", "model.pt", "-o", "out.pt", *SHAPE),
    "fold to safetensors": ("fold", "model.pt", "-o", "out.safetensors", *SHAPE),
    "fold onnx": ("fold", "model.onnx", "-o", "out.onnx"),
    "export": ("export", "model.pt", "-o", "out.onnx", *SHAPE),
    "quantize": ("quantize", "model.pt", "--calib", "data.pt", "-o", "out.pt"),
    "recalibrate": ("recalibrate", "model.pt", "--calib", "data.pt", "-o", "out.pt"),
    "swap": ("swap", "model.pt", "--to", "l1", "--calib", "data.pt", "-o", "out.pt"),
    "inspect": ("inspect", "model.pt", "--json", "out.json", *SHAPE),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def prepare(folder: Path) -> None:
    """Write the model, an ONNX file and data."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    torch.save(model, folder / "model.pt")
    torch.save(torch.randn(8, 3, 8, 8), folder / "data.pt")
    run(folder, ("export", "model.pt", "-o", "model.onnx", "--no-fold-bn", *SHAPE)).wait()


def run(folder: Path, command: tuple[str, ...]) -> subprocess.Popen[Any]:
    """Start a command in a folder."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "normfuse", *command, "--force"], cwd=folder, **quiet)


def contents(folder: Path, output: str) -> dict[str, bytes]:
    """Return what is in a folder, but for the output and what goes with it."""
    names = {output, f"{output}.data"}
    return {
        name: (folder / name).read_bytes() if (folder / name).is_file() else b""
        for name in os.listdir(folder)
        if name not in names
    }


def is_whole(path: Path) -> bool:
    """Whether a file loads."""
    try:
        if path.suffix == ".json":
            return bool(json.loads(path.read_text()))
        if path.suffix == ".onnx":
            import onnx

            return bool(onnx.load(path).graph.node)
        from normfuse.serialize import read

        arch = torch.load(path.parent / "model.pt", weights_only=False) if path.suffix == ".safetensors" else None
        return read(path, model=arch).model is not None
    except Exception:  # whatever a broken file raises
        return False


def once(folder: Path, name: str, seconds: float, number: signal.Signals, rng: random.Random) -> str:
    """Kill one run; return what is wrong afterwards, empty if nothing."""
    command = COMMANDS[name]
    output = command[command.index("-o" if "-o" in command else "--json") + 1]
    old = b"old"
    (folder / output).write_bytes(old)
    before = contents(folder, output)
    process = run(folder, command)
    time.sleep(rng.uniform(0.3, 1.05) * seconds)
    process.send_signal(number)
    process.wait()
    problem = (
        "" if (folder / output).read_bytes() == old or is_whole(folder / output) else "the file is neither old nor new"
    )
    if number is signal.SIGKILL:
        run(folder, command).wait()
    left = contents(folder, output)
    if left != before:
        problem = problem or f"left or changed: {sorted(set(left) ^ set(before)) or 'values'}"
    (folder / f"{output}.data").unlink(missing_ok=True)
    return problem


def main() -> int:
    """Kill, write the result, and return the exit code."""
    parser = argparse.ArgumentParser(description="writing commands, killed at random moments")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kills.json", help="the result")
    options = parser.parse_args()
    rng, problems, counts = random.Random(0), [], dict.fromkeys(COMMANDS, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        usual: dict[str, float] = {}
        for count in range(options.kills):
            command = list(COMMANDS)[count % len(COMMANDS)]
            if command not in usual:
                begin = time.perf_counter()
                run(folder, COMMANDS[command]).wait()
                usual[command] = time.perf_counter() - begin
                for left in folder.glob("out.*"):
                    left.unlink()
            number = SIGNALS[count // len(COMMANDS) % len(SIGNALS)]
            problem = once(folder, command, usual[command], number, rng)
            counts[command] += 1
            if problem:
                problems.append(f"{command}, {number.name}: {problem}")
                print(problems[-1], flush=True)
            for left in folder.glob("out.*"):
                left.unlink()
    result = {"environment": environment(), "kills": options.kills, "commands": counts, "problems": problems}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{options.kills} kills, {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
