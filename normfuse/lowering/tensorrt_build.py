"""Build one engine: the program that :mod:`normfuse.lowering.tensorrt` runs in a process of its own.

    python tensorrt_build.py JOB.json

The first logger of a process stays in use for every later builder, a failed build can spoil the next one, and a crash
inside TensorRT ends the process: hence one process per engine. This file imports nothing of normfuse, so that it starts
at once. It serves ``tensorrt`` 10 and 11 and ``tensorrt_rtx`` through what they have in common: a strongly typed
network, whose precision is that of the ONNX file.

The job names the package, the files and the options; the answer is written to the file that it names as ``result``.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

LAYER = re.compile(r"Name: (?P<name>.+?), LayerType: (?P<type>\w+), Inputs(?P<rest>.*)")
SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


class StageError(Exception):
    """The build ended early.

    Attributes:
        stage: ``"import"``, ``"device"``, ``"target"``, ``"parse"``, ``"profile"`` or ``"build"``.
        details: What the answer says beside that, JSON-ready.
    """

    def __init__(self, stage: str, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.stage = stage
        self.details = details | ({"message": message} if message else {})


class Log:
    """Every message of TensorRT: all go to a file, errors and the list of layers are kept."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.path.write_text("", encoding="utf-8")
        self.errors: list[str] = []
        self.layers: list[dict[str, Any]] = []

    def __call__(self, severity: str, message: str) -> None:
        """Take one message, ``severity`` being ``"ERROR"``, ``"WARNING"``, ``"INFO"`` or ``"VERBOSE"``."""
        if not message.startswith("Layers:"):
            with self.path.open("a", encoding="utf-8") as file:  # closed each time: a crash of TensorRT loses nothing
                file.write(f"[{severity}] {message}\n")
        else:
            self.layers = read_layers(message)
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)


def read_layers(text: str) -> list[dict[str, Any]]:
    """Return name, type and ONNX nodes of each layer in the message that lists them (log text, not an interface)."""
    found = (LAYER.search(line) for line in text.splitlines())
    return [_entry(m["name"], m["type"], m["rest"]) for m in found if m]


def _entry(name: str, kind: str, metadata: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "onnx": sorted(set(SOURCE.findall(metadata)))}


def main(job_file: str) -> None:
    """Do the job and write the answer; whatever happens, there is one."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    log = Log(job["log"])
    try:
        answer = build(job, log)
    except StageError as error:
        answer = {"stage": error.stage, **error.details}
    answer |= {"errors": log.errors}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def build(job: dict[str, Any], log: Log) -> dict[str, Any]:
    """Write the engine and return its description.

    Raises:
        StageError: Something is missing or wrong; nothing was written.
    """
    trt = _import(job["package"])
    device = None if targets_ahead(trt) else _require_device()
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    if builder is None:
        raise StageError("device")
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, job["onnx"])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    targets = _set_targets(trt, config, job["targets"])
    _add_profile(builder, network, config, job["shapes"])
    cache = None if targets_ahead(trt) else _timing_cache(config, job["timing_cache"])
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise StageError("build")
    Path(job["engine"]).write_bytes(memoryview(blob))
    if cache is not None:
        Path(job["new_timing_cache"]).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return {
        "stage": "done",
        "version": trt.__version__,
        "device": device,
        "targets": targets,
        "inputs": [_describe(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_describe(network.get_output(i)) for i in range(network.num_outputs)],
        "network": collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers)),
        "layers": log.layers or _inspect(trt, logger, blob),
    }


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # a library that does not load, a broken wheel
        raise StageError("import", next(iter(str(error).strip().splitlines()), type(error).__name__)) from error


def targets_ahead(trt: Any) -> bool:
    """Whether this package builds for GPUs that are not here; it has no timing cache then, as nothing is timed."""
    return hasattr(trt, "ComputeCapability")


def _logger(trt: Any, log: Log) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log(severity.name, msg)

    return Logger()


def _network_flags(trt: Any) -> int:
    """Return the flags of a network whose types are those of the file; TensorRT 11 may know no other kind."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _require_device() -> dict[str, Any]:
    """Return name and compute capability of the GPU, which classic TensorRT builds for."""
    import torch

    if not torch.cuda.is_available():
        raise StageError("device")
    return {"name": torch.cuda.get_device_name(), "sm": "sm_{}{}".format(*torch.cuda.get_device_capability())}


def _parse(trt: Any, network: Any, logger: Any, path: str) -> None:
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(path)
    if not parsed or network.num_outputs == 0:
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        raise StageError("parse", parser=[_parser_error(parser, error) for error in found])


def _parser_error(parser: Any, error: Any) -> dict[str, Any]:
    operator = error.node_operator()
    known = not operator or parser.supports_operator(operator)
    return {"node": error.node_name(), "operator": operator, "known": known, "reason": error.desc()}


def _set_targets(trt: Any, config: Any, targets: list[str]) -> list[str]:
    """Build for these GPUs (``"sm_86"``); without any, for what the package takes by itself."""
    if not targets:
        return []
    if not targets_ahead(trt):
        raise StageError("target", "ahead of time")
    known = {name.replace("SM", "sm_"): member for name, member in trt.ComputeCapability.__members__.items()}
    known = {name: member for name, member in known.items() if name.startswith("sm_")}
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise StageError("target", unknown=unknown, known=sorted(known, key=lambda name: int(name[3:])))
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        config.set_compute_capability(known[name], index)
    return targets


def _add_profile(builder: Any, network: Any, config: Any, shapes: dict[str, list[list[int]]]) -> None:
    """Give every input with an axis of any size its smallest, usual and largest shape."""
    inputs = {(value := network.get_input(i)).name: tuple(value.shape) for i in range(network.num_inputs)}
    dynamic = {name for name, shape in inputs.items() if -1 in shape}
    if set(shapes) - set(inputs) or dynamic - set(shapes):
        raise StageError("profile", inputs={name: list(shape) for name, shape in inputs.items()})
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name in sorted(dynamic):
        profile.set_shape(name, *map(tuple, shapes[name]))
    if config.add_optimization_profile(profile) < 0:
        raise StageError("profile", inputs={name: list(shape) for name, shape in inputs.items()})


def _timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    old = Path(path).read_bytes() if os.path.exists(path) else b""
    cache = config.create_timing_cache(old)
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _describe(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype.name}


def _inspect(trt: Any, logger: Any, blob: Any) -> list[dict[str, Any]]:
    """Return the layers as the inspector of a loaded engine lists them; where the log has no list, on a GPU."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(blob)
    if engine is None:
        return []
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return [
        {
            "name": one["Name"],
            "type": one.get("LayerType", ""),
            "onnx": sorted(set(SOURCE.findall(one.get("Metadata", "")))),
        }
        for one in layers
        if isinstance(one, dict)
    ]


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]  # it has a tensorrt.py too
    main(sys.argv[1])
