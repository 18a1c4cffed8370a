"""Measure one network. Runs in its own process, and writes each part of the result as soon as it is known.

A network that is killed by the time limit so keeps what was found before: the description, our result, the peers'.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import zoo_calibrate
import zoo_census
import zoo_networks
import zoo_outputs
import zoo_tools

SEED = 20260101
TOOLS = {"ours": zoo_tools.ours, "fx": zoo_tools.fx_fuse, "torchao": zoo_tools.torchao_fold}


def measure(name: str, record: Path) -> None:
    """Build, calibrate and measure the network, appending one JSON object per finished part to ``record``."""
    torch.set_num_threads(1)
    network = zoo_networks.networks()[name]
    subject, description = prepare(network)
    append(record, description)
    for tool, run in TOOLS.items():
        start = time.perf_counter()
        nothing = tool != "ours" and description["evaluations"] == 0
        result = {"status": "nothing to fold", "left": 0} if nothing else zoo_tools.guarded(run, subject)
        append(record, {tool: result | {"wall": round(time.perf_counter() - start, 1)}})
        gc.collect()


def prepare(network: zoo_networks.Network) -> tuple[zoo_tools.Subject, dict[str, Any]]:
    """Return the calibrated network with its expected results, and the description for the result file."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    model = network.build().double().eval()
    inputs, others = network.inputs(SEED), network.inputs(SEED + 1)
    zoo_calibrate.calibrate(model, network.calibration(SEED + 2), SEED)
    expected, expected_others = zoo_outputs.results(model, inputs), zoo_outputs.results(model, others)
    noise = zoo_outputs.noise(model, ((inputs, expected), (others, expected_others)))
    subject = zoo_tools.Subject(
        model=model,
        inputs=inputs,
        others=others,
        expected=expected,
        expected_others=expected_others,
        limit=zoo_outputs.limit(noise),
        adjacent=zoo_census.adjacent(model, inputs),
        frozen=zoo_census.frozen_evaluations(model, inputs),
    )
    return subject, description(network, subject, noise) | {"wall": round(time.perf_counter() - start, 1)}


def description(network: zoo_networks.Network, subject: zoo_tools.Subject, noise: float) -> dict[str, Any]:
    """Return what is known of a network before any tool touches it."""
    norms, batch = zoo_census.norm_modules(subject.model), zoo_census.batch_norms(subject.model)
    return {
        "network": network.name,
        "group": network.group,
        "input": ", ".join("x".join(map(str, shape)) for shape in network.shapes),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "batch_norms": len(batch),
        "other_norms": len(norms) - len(batch),
        "evaluations": zoo_census.evaluations(subject.model, subject.inputs),
        "adjacent": len(subject.adjacent),
        "noise": noise,
        "limit": subject.limit,
        "finite": zoo_outputs.finite(subject.expected),
    }


def append(record: Path, part: dict[str, Any]) -> None:
    """Append one JSON object as a line, on disk when this returns."""
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(part) + "\n")
