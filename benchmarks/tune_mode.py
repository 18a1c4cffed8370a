"""Training steps in Tune mode, beside every other way to train ConvBN blocks on fixed statistics.

    python benchmarks/tune_mode.py [--networks resnet50,mobilenet_v2] [--settings all,last-stage,norm-only]
        [--modes train,eval,tune,mmengine,deploy] [--batch 8] [--size 128] [--rounds 8] [--device cpu|cuda]
        [--channels-last] [--autocast bfloat16] [--compiled] [--compile-limit 600]
        [--out benchmarks/results/tune_mode-cpu]

``OUT.json`` gets one record per network, setting and mode, with machine and versions; ``OUT.png`` the picture. What the
file holds of other networks and settings stays, unless ``--fresh``. Deploy and Eval always take part: ratios are to
them. Without a GPU everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tune_plot
from _environment import environment, version
from torch import nn
from tune_measure import difference, peak_bytes, saved_bytes, step_times
from tune_modes import BASELINES, COMPILED, EAGER, SETTINGS, UnavailableError, Variant, compile_now, variant
from tune_networks import DEFAULT, NETWORKS, Batch, Network

HERE = Path(__file__).resolve().parent
CHECKED = 2  # images in the float64 comparison
LIMIT = 1e-8


def main() -> None:
    """Measure, print, and write the result files."""
    options = _options()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or HERE / "results" / f"tune_mode-{device}"
    path = out.with_name(out.name + ".json")
    records = [] if options.fresh or not path.exists() else json.loads(path.read_text(encoding="utf-8"))["records"]
    for name in options.networks:
        for setting in options.settings:
            found = list(_measured(NETWORKS[name], setting, torch.device(device), options))
            records = [r for r in records if (r["network"], r["setting"]) != (name, setting)] + found
            _write(path, records, device, options)
    tune_plot.draw(out.with_name(out.name + ".png"), json.loads(path.read_text(encoding="utf-8")))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time and memory of a training step in every ConvBN mode")
    parser.add_argument("--networks", type=_names(NETWORKS), default=list(DEFAULT))
    parser.add_argument("--settings", type=_names(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--modes", type=_names((*EAGER, *COMPILED)), default=[*EAGER, *COMPILED])
    parser.add_argument("--batch", type=int, default=8, help="images (default 8; a quarter of it for detectors)")
    parser.add_argument("--size", type=int, default=128, help="height and width (default 128; twice it for detectors)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"))
    parser.add_argument("--compiled", action="store_true", help="run the compiled modes too")
    parser.add_argument("--compile-limit", type=float, default=600, help="seconds for each (default 600)")
    parser.add_argument("--out", type=Path, help="result files, without suffix")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need two rounds or more")
    return options


def _names(known: Any) -> Any:
    """Return a parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def _measured(
    network: Network, setting: str, device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield one record per mode."""
    torch._dynamo.reset()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    count, size = (max(options.batch // 4, 1), 2 * options.size) if network.detects else (options.batch, options.size)
    batch = network.batch(count, size)
    model = network.built(batch).to(device, memory_format=layout)  # type: ignore[call-overload]
    batch = batch.to(device, torch.float32, layout)
    precision = getattr(torch, options.autocast) if options.autocast else None
    modes = [m for m in (*EAGER, *COMPILED) if m in options.modes or m in BASELINES]
    about = {"network": network.name, "setting": setting, "batch": count, "size": size, "rounds": options.rounds}
    records = {m: about | {"mode": m} for m in modes if m not in COMPILED or options.compiled}
    variants = dict(_variants(model, network, setting, batch, precision, records, options.compile_limit))
    for mode, found in _differences(model, network, setting, batch, variants).items():
        records[mode]["difference"] = found
    for mode, made in variants.items():
        records[mode] |= {"peak_bytes": peak_bytes(made, batch), "saved_bytes": saved_bytes(made, batch)}
    for mode, times in step_times(variants, batch, options.rounds).items():
        records[mode] |= times
    for record in records.values():
        print(tune_plot.line(record, records["deploy"]), flush=True)
        yield record


def _variants(
    model: nn.Module,
    network: Network,
    setting: str,
    batch: Batch,
    precision: torch.dtype | None,
    records: dict[str, dict[str, Any]],
    limit: float,
) -> Iterator[tuple[str, Variant]]:
    """Yield what can be built, and compiled where it is to be; leave a message in the record of what cannot."""
    for mode, record in records.items():
        try:
            if mode in COMPILED and network.detects:
                raise UnavailableError("a detector is no single graph")
            made = variant(mode, model, network, setting, batch, precision)
            if mode in COMPILED:
                record |= compile_now(made, batch, limit)
            yield mode, made
        except UnavailableError as error:
            record["message"] = str(error)


def _differences(
    model: nn.Module, network: Network, setting: str, batch: Batch, variants: dict[str, Variant]
) -> dict[str, dict[str, Any]]:
    """Return how far each mode is from Eval: in float64 on a few images; compiled modes as they are measured."""
    wide = batch.first(CHECKED).to(next(model.parameters()).device, torch.float64, torch.contiguous_format)
    source = copy.deepcopy(model).double()
    reference = variant("eval", source, network, setting, wide)
    found: dict[str, dict[str, Any]] = {}
    for mode, made in variants.items():
        if mode in COMPILED:
            found[mode] = {"dtype": "float32", **difference(made, variants["eval"], batch)}
        elif mode not in ("train", "eval"):
            wide_variant = variant(mode, source, network, setting, wide)
            found[mode] = {"dtype": "float64", **difference(wide_variant, reference, wide)}
            if found[mode]["gradient"] > LIMIT:
                print(f"WRONG: {network.name} {setting} {mode}: {found[mode]}", flush=True)
    return found


def _write(path: Path, records: list[dict[str, Any]], device: str, options: argparse.Namespace) -> None:
    facts = {
        "environment": environment() | {"mmengine": version("mmengine")},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "clock": "events" if device == "cuda" else "process CPU time",
        "threads": options.threads,
        "channels_last": options.channels_last,
        "autocast": options.autocast,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
