"""What TensorRT says when it does not build an engine, in one line: the node, the reason and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfuse.errors import LoweringError, MissingDependencyError, NormfuseError
from normfuse.lowering import graphs

INSTALL = "TensorRT is not installed: pip install 'normfuse[tensorrt]'"
NO_DRIVER = ("cudaError 35", "no CUDA-capable device", "driver version is insufficient", "cuInit")

_PARSER = (  # what the parser's reason contains, what to do
    ("input has type Int32", "its bias is quantized, which TensorRT does not take: quantize with --qdq tensorrt"),
    ("build-time constant", "an input that must be constant is computed: export the model itself with normfuse export"),
    ("Mixed precision", "its inputs have different types: export the model itself with normfuse export --precision"),
    ("must have the same type", "its inputs have different types: export with --precision fp16, bf16 or mixed"),
    ("zero point", "TensorRT takes symmetric scales only: quantize with --qdq tensorrt"),
    ("zeroPoint", "TensorRT takes symmetric scales only: quantize with --qdq tensorrt"),
)
_BUILDER = (
    (r"target\(s\) ([\w, ]+), because the model contains HW-specific datatypes: (\w+)",
     "{1} is not for {0}: leave these targets out, or use --precision int8"),
    (r"FP32 GEMM not supported for Turing", "sm_75 multiplies no matrices in fp32: use --precision fp16, or omit it"),
    (r"MIN<=OPT<=MAX", "the shapes of the profile contradict each other: min <= opt <= max on every axis"),
    (r"out of memory|OutOfMemory|bad_alloc", "memory ran out: build on a larger machine, or a smaller --max-shape"),
)  # fmt: skip
_FALLBACK = "the whole log is in {log}"


def translate(answer: Mapping[str, Any], job: Mapping[str, Any], log: Path) -> NormfuseError:
    """Return the error for a build that ended early.

    Args:
        answer: Of the build: the ``stage`` it ended in and what goes with that.
        job: What was asked for.
        log: Where the log is.
    """
    package = job["package"]
    stage = answer["stage"]
    if stage == "import":
        return MissingDependencyError(f"{package} cannot be imported ({answer['message']}): {INSTALL}")
    if stage == "device":
        advice = "classic TensorRT builds on the GPU that it builds for; tensorrt_rtx with --target does without"
        return MissingDependencyError(f"{package}: no NVIDIA driver or GPU here: {advice}")
    if stage == "target":
        return LoweringError(_target(package, answer))
    if stage == "profile":
        shapes = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in answer["inputs"].items())
        return LoweringError(
            f"the profile does not fit the inputs ({shapes}, -1 is any size): {_first(answer['errors'])}"
        )
    if stage == "parse":
        return LoweringError(_parse(answer, job, log))
    return LoweringError(_build(answer["errors"], log))


def _target(package: str, answer: Mapping[str, Any]) -> str:
    if "unknown" not in answer:
        return f"{package} builds for the GPU of this machine only: leave --target out, or use tensorrt_rtx"
    return f"no target {', '.join(answer['unknown'])}: {package} has {', '.join(answer['known'])}"


def _parse(answer: Mapping[str, Any], job: Mapping[str, Any], log: Path) -> str:
    found = answer["parser"]
    if not found:
        return f"TensorRT found no network in the ONNX file; {_FALLBACK.format(log=log)}"
    first = found[-1]  # the innermost is listed last
    place = _place(first["node"], Path(job["onnx"]))
    what = f"{first['operator'] or 'the file'}{place}"
    if not first["known"]:
        return f"TensorRT cannot take {what}: it has no such operator; replace that module, or export what is before it"
    advice = next((text for key, text in _PARSER if key in first["reason"]), _FALLBACK.format(log=log))
    return f"TensorRT cannot take {what}: {_first([first['reason']])}; {advice}"


def _place(node: str, onnx_file: Path) -> str:
    """Return the name of a node and of the module of the source that it comes from."""
    if not node:
        return ""
    nodes = {one.name: one for one in graphs.load(onnx_file).graph.node}
    module = graphs.module_of(nodes[node]) if node in nodes else ""
    return f" ({node}" + (f", in {module})" if module else ")")


def _build(errors: Sequence[str], log: Path) -> str:
    real = [text for text in errors if not any(sign in text for sign in NO_DRIVER)]
    for text in real:
        for pattern, advice in _BUILDER:
            if match := re.search(pattern, text):
                return f"TensorRT cannot build the engine: {advice.format(*match.groups())}"
    return f"TensorRT cannot build the engine: {_first(real or errors)}; {_FALLBACK.format(log=log)}"


def _first(errors: Sequence[str]) -> str:
    text = next((line.strip() for error in errors for line in error.splitlines() if line.strip()), "no reason given")
    return text.removeprefix("Assertion failed: ")[:300]
