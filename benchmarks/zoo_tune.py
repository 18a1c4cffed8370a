"""Put every network of the zoo into Tune mode, in float64, and compare outputs and all gradients with eval mode's.

    python benchmarks/zoo_tune.py [--only GLOB] [--timeout 300] [--out benchmarks/results/zoo_tune]

Each network with a BatchNorm is built, calibrated and randomised as for ``zoo.py``, in a process of its own with one
thread. Its loss is the sum of its outputs (of a detector's: the raw predictions), each element times a fixed random
number. The error of a tensor is ``max |d| / max |reference|``, that of a network the largest over its outputs, the
gradients of all parameters and the gradient of the input. A network is right within 1e-10, or within ten times its own
float64 noise where that is larger: the same comparison after every stored number was moved by one unit in the last
place. ``OUT.jsonl`` gets one line per network, ``OUT.md`` the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
import zoo
import zoo_calibrate
import zoo_census
import zoo_networks
import zoo_outputs
import zoo_tools
import zoo_worker
from _environment import environment
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
LIMIT = 1e-10
NOISIEST = 1e-4  # above, a comparison says nothing
LARGEST = 150_000_000  # parameters; above, three sets of float64 gradients fill the memory of a small machine


def main() -> None:
    """Measure the chosen networks and write the two files."""
    parser = argparse.ArgumentParser(description="Tune mode against eval mode, gradient by gradient")
    parser.add_argument("--only", default="*", help="pattern of network names (commas separate several)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per network (default 300)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zoo_tune", help="result files, without suffix")
    options = parser.parse_args()
    lines = Path(f"{options.out}.jsonl")
    torch.set_num_threads(1)
    zoo_tools.preload()
    done = {result["network"] for result in zoo.read(lines)}
    for name in zoo_networks.networks():
        if name not in done and any(fnmatch.fnmatch(name, p) for p in options.only.split(",")):
            result = _measured(name, options.timeout)
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    Path(f"{options.out}.md").write_text(markdown(zoo.read(lines)), encoding="utf-8")


def _measured(name: str, timeout: float) -> dict[str, Any]:
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(name, sender))
    process.start()
    sender.close()
    start, result = time.perf_counter(), {"status": f"stopped after {timeout:.0f} s"}
    with contextlib.suppress(EOFError):
        if receiver.poll(timeout):
            result = receiver.recv()
    process.kill()
    process.join()
    return {"network": name, **result, "wall": round(time.perf_counter() - start, 1)}


def _send(name: str, sender: Any) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            sender.send(measure(name))
        except Exception as error:
            sender.send({"status": "raised", "message": zoo_tools.one_line(error)})


def measure(name: str) -> dict[str, Any]:
    """Return one network's errors, and how many of its norms were paired."""
    import normfuse

    network = zoo_networks.networks()[name]
    torch.manual_seed(zoo_worker.SEED)
    model = network.build().double().eval()
    if not zoo_census.batch_norms(model):
        return {"status": "no norms"}
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return {"status": "too large for this machine"}
    zoo_calibrate.calibrate(model, network.calibration(zoo_worker.SEED + 2), zoo_worker.SEED)
    model.requires_grad_(True)
    inputs = network.inputs(zoo_worker.SEED)
    perturbed = zoo_outputs._perturbed(model, 0)  # before a run: some networks hold on to tensors of their last one
    reference = gradients(model, inputs)
    noise = difference(reference, gradients(perturbed, inputs))
    del perturbed
    report = normfuse.apply(model, ["tune-mode"], inplace=True).report
    error = difference(reference, gradients(model, inputs))
    paired, norms = sum(bool(o.partners) for o in report.norms), len(report.norms)
    status = "ok" if error <= max(LIMIT, 10 * noise) else "wrong"
    if noise > NOISIEST:
        status = f"its own noise is {noise:.0e}"
    return {"status": status, "error": error, "noise": noise, "paired": paired, "norms": norms}


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Return outputs and gradients of the weighted sum of all outputs, by name."""
    inputs = copy.deepcopy(inputs)
    leaves = [t.requires_grad_() for t in zoo_outputs.tensors(inputs)]
    outputs = _raw_outputs(model, inputs)
    generator = torch.Generator().manual_seed(0)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    model.zero_grad()
    loss.backward()  # type: ignore[union-attr]
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _raw_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return what the loss is taken of: the outputs, or of a detector what no threshold has touched."""
    kept: dict[str, Any] = {}
    parts = dict(model.named_modules()) if isinstance(inputs, list) else {}
    names = [name for name in zoo_outputs.RAW_PARTS if name in parts]
    handles = [parts[name].register_forward_hook(zoo_outputs._keeper(kept, name)) for name in names]
    try:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [y for y in zoo_outputs.tensors(kept or output) if y.requires_grad]


def difference(reference: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest relative difference; infinite where one has a tensor that the other has not."""
    if reference.keys() != other.keys():
        return float("inf")
    return max(zoo_outputs._relative(value, other[name]) for name, value in reference.items() if value.numel())


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the summary as a table."""
    facts: Any = environment()
    packages = ", ".join(f"{name} {facts['packages'].get(name)}" for name in ("torch", "torchvision", "timm"))
    judged = [r for r in results if r["status"] in ("ok", "wrong")]
    right = [r for r in judged if r["status"] == "ok"]
    paired, norms = (sum(r[key] for r in judged) for key in ("paired", "norms"))
    rest = [r for r in results if r not in judged and r["status"] != "no norms"]
    lines = [
        "# Tune mode on the zoo: outputs and gradients against eval mode, float64",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['memory_gb']} GB, Python {facts['python']}, {packages}.",
        "",
        f"{len(right)} of {len(judged)} networks right; {paired} of {norms} norms applied by the layer before them,",
        "found by tracing, without example inputs.",
        "Not measured: " + (", ".join(f"{r['network']} ({r['status']})" for r in rest) or "none") + ".",
        "",
        "| network | norms | paired | error | noise | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['network']} | {r['norms']} | {r['paired']} | {r['error']:.0e} | {r['noise']:.0e} | {r['status']} |"
        for r in sorted(judged, key=lambda r: r["network"])
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
