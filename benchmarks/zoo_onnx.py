"""Export every network of the zoo to ONNX, folded and unfolded, and compare ONNX Runtime with a float64 run.

    python benchmarks/zoo_onnx.py [--only GLOB] [--timeout 300] [--seconds S] [--out benchmarks/results/zoo_onnx]

Each network is built, calibrated and randomised as for ``zoo.py``, cast to float32, and written in a process of its own
with one thread: once as ``normfuse export`` writes it, folded, and once with ``--no-fold-bn``, every norm a node. Both
files are verified on two inputs by :func:`normfuse.verify`, whose judge is the float64 run of the float32 network:
right is what rounding explains. Results that are in the file already are not made again. ``OUT.jsonl`` gets one line
per network, ``OUT.md`` the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import zoo
import zoo_calibrate
import zoo_networks
import zoo_tools
import zoo_worker
from _environment import environment

HERE = Path(__file__).resolve().parent
LARGEST = 150_000_000  # parameters; above, the float64 run and the file do not fit a small machine together
NOISIEST = 1e-2  # what the source itself loses in float32, above which a float32 file cannot be judged
FORMS = ("folded", "unfolded")


def main() -> None:
    """Measure the chosen networks and write the two files."""
    parser = argparse.ArgumentParser(description="ONNX Runtime against a float64 run, folded and unfolded")
    parser.add_argument("--only", default="*", help="pattern of network names (commas separate several)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per network (default 300)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further network after this")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zoo_onnx", help="result files, without suffix")
    options = parser.parse_args()
    lines, end = Path(f"{options.out}.jsonl"), time.monotonic() + options.seconds
    torch.set_num_threads(1)
    zoo_tools.preload()
    done = {result["network"] for result in zoo.read(lines)}
    for name in zoo_networks.networks():
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options.only.split(","))
        if wanted and name not in done and time.monotonic() < end:
            result = _measured(name, options.timeout)
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    Path(f"{options.out}.md").write_text(markdown(zoo.read(lines)), encoding="utf-8")


def _measured(name: str, timeout: float) -> dict[str, Any]:
    """Return the result of one network; what was known before the time was up is kept."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, sender))
    process.start()
    sender.close()
    start, result = time.perf_counter(), _both(f"stopped after {timeout:.0f} s")
    with contextlib.suppress(EOFError):
        while receiver.poll(max(0.0, timeout - (time.perf_counter() - start))):
            result |= receiver.recv()
    if process.is_alive():
        process.kill()
    process.join()
    return {"network": name, **result, "wall": round(time.perf_counter() - start, 1)}


def _send(name: str, sender: Any) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            prepared = prepare(name)
        except Exception as error:
            sender.send(_both("raised", message=zoo_tools.one_line(error)))
            return
        if prepared is None:
            sender.send(_both("too large for this machine"))
            return
        for form in FORMS:
            sender.send({form: export(*prepared, folded=form == "folded")})


def _both(status: str, **details: str) -> dict[str, Any]:
    return {form: {"status": status, **details} for form in FORMS}


def prepare(name: str) -> tuple[Any, Any, Any] | None:
    """Return a network in float32 and two inputs for it; None where it is too large."""
    from normfuse import rerun

    network = zoo_networks.networks()[name]
    torch.manual_seed(zoo_worker.SEED)
    model = network.build().double().eval()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return None
    zoo_calibrate.calibrate(model, network.calibration(zoo_worker.SEED + 2), zoo_worker.SEED)
    inputs = (network.inputs(zoo_worker.SEED + offset) for offset in (0, 1))
    return model.float(), *(rerun.cast_inputs(item, torch.float32) for item in inputs)


def export(model: Any, inputs: Any, others: Any, *, folded: bool) -> dict[str, Any]:
    """Return what came of one form of the network: how far its file is from the float64 run, and its norms."""
    import normfuse
    from normfuse import lowering
    from normfuse.api import EXACT_PASSES
    from normfuse.errors import NormfuseError
    from normfuse.rerun import Samples

    def fold(source: Any) -> Any:
        return normfuse.apply(source, EXACT_PASSES, example_inputs=inputs)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        try:
            written = lowering.export(model, path, example_inputs=inputs, fold_bn=folded, fold=fold, verify=False)
        except NormfuseError as error:
            return {"status": "not exported", "message": str(error)}
        except Exception as error:
            return {"status": "raised", "message": zoo_tools.one_line(error)}
        try:
            found = normfuse.verify(model, path, Samples((inputs, others)))  # type: ignore[arg-type]
        except NormfuseError as error:
            return {"status": "not run", "message": str(error)}
    figures = found.to_dict()
    keys = ("max_rel", "reference_error", "cosine", "failure", "judge", "diverges_at")
    norms = sum(count for operator, count in written.info.nodes.items() if operator.endswith("Normalization"))
    status = "ok" if found else "wrong"
    if not found and found.reference_error > NOISIEST:
        status = f"its own error in float32 is {found.reference_error:.0e}"
    return {
        "status": status,
        **{key: figures[key] for key in keys},
        "nodes": sum(written.info.nodes.values()),
        "norm_nodes": norms,
        "opset": written.info.opset,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the summary as a table, and what was not written or not right."""
    facts: Any = environment()
    packages = ", ".join(f"{name} {facts['packages'].get(name)}" for name in ("torch", "timm", "onnx", "onnxruntime"))
    lines = [
        "# The zoo in ONNX Runtime, against a float64 run",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['memory_gb']} GB, Python {facts['python']}, {packages}.",
        "",
    ]
    for form in FORMS:
        states = [result[form]["status"] for result in results]
        judged = [state for state in states if state in ("ok", "wrong", "not run")]
        right = judged.count("ok")
        lines.append(f"{form}: {right} of {len(judged)} networks right that could be judged, of {len(results)}.  ")
    lines += ["", "| network | norm nodes | folded | max rel | noise | unfolded | max rel |", "| --- " * 7 + "|"]
    for result in sorted(results, key=lambda r: r["network"]):
        a, b = result["folded"], result["unfolded"]
        norms = f"{b.get('norm_nodes', '')} -> {a.get('norm_nodes', '')}"
        cells = (norms, a["status"], _number(a, "max_rel"), _number(a, "reference_error"))
        lines.append(f"| {result['network']} | {' | '.join(cells)} | {b['status']} | {_number(b, 'max_rel')} |")
    reasons = [f"- {r['network']}, {form}: {_reason(r[form])}" for r in results for form in FORMS if _reason(r[form])]
    return "\n".join([*lines, "", *(["Not written or not right:", ""] if reasons else []), *reasons]) + "\n"


def _number(part: dict[str, Any], key: str) -> str:
    value = part.get(key)
    return "" if value is None else f"{value:.0e}"


def _reason(part: dict[str, Any]) -> str:
    return part.get("failure") or part.get("message") or ("" if part["status"] == "ok" else part["status"])


if __name__ == "__main__":
    main()
