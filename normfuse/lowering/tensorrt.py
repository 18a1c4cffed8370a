"""Build TensorRT engines from ONNX files, with ``tensorrt`` 10 or 11 or with ``tensorrt_rtx``.

The network is strongly typed: its precision is that of the file, and no builder flag changes it. ``tensorrt_rtx`` needs
no GPU and builds for the targets it is given; ``tensorrt`` builds for the GPU of the machine. Each build runs in a
process of its own (:mod:`normfuse.lowering.tensorrt_build`), whose log is kept beside the engine; beside it too is the
description of the engine (:mod:`normfuse.lowering.engine_sidecar`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from normfuse import __version__
from normfuse.atomic_files import staged
from normfuse.errors import LoweringError, MissingDependencyError
from normfuse.lowering import engine_errors, engine_norms, graphs
from normfuse.lowering.engine_sidecar import Package, Sidecar, sha256, sidecar_path
from normfuse.lowering.profiles import Profile, ShapeRequest

SCRIPT = Path(__file__).with_name("tensorrt_build.py")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to build.

    Attributes:
        package: Which TensorRT; None for ``tensorrt`` where it is installed, has a GPU and no targets are asked for,
            and else ``tensorrt_rtx``.
        targets: The GPUs, ``("sm_86", "sm_89")``; only ``tensorrt_rtx`` builds for those that are not here. Without
            any, ``tensorrt_rtx`` builds for Ampere and later.
        shapes: The shapes of inputs with axes of any size.
        timing_cache: A file that ``tensorrt`` reads and rewrites, which makes the next build faster. ``tensorrt_rtx``
            times nothing while it builds.
        keep_onnx: Whether the ONNX file stays, beside the engine.
        source: The model file, whose hash the description records.
    """

    package: Package | None = None
    targets: tuple[str, ...] = ()
    shapes: ShapeRequest = field(default_factory=ShapeRequest)
    timing_cache: Path | None = None
    keep_onnx: bool = False
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.package is not None and self.package not in get_args(Package):
            raise ValueError(f"package {self.package!r} is not one of {', '.join(get_args(Package))}")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was built.

    Attributes:
        path: The engine; its description and its log are beside it.
        size_bytes: Its size.
        sidecar: The description.
        notes: What a reader should know about it.
    """

    path: Path
    size_bytes: int
    sidecar: Sidecar
    notes: tuple[str, ...]


def installed() -> tuple[Package, ...]:
    """Return the packages that are installed, whether or not they work here."""
    return tuple(name for name in get_args(Package) if importlib.util.find_spec(name) is not None)


def choose(options: EngineOptions) -> Package:
    """Return the package that is to build.

    Raises:
        MissingDependencyError: It is not installed.
    """
    present = installed()
    if options.package is not None:
        if options.package not in present:
            raise MissingDependencyError(f"{options.package} is not installed: pip install {options.package}")
        return options.package
    if not present:
        raise MissingDependencyError(engine_errors.INSTALL)
    return "tensorrt" if "tensorrt" in present and not options.targets and _has_gpu() else present[0]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def build_engine(
    onnx_file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    options: EngineOptions | None = None,
    profiles: Mapping[str, Profile] | None = None,
    precision: str = "fp32",
) -> EngineInfo:
    """Build an engine from an ONNX file; the engine, its description and its log appear together, or nothing.

    Args:
        onnx_file: The file; its types are those of the engine.
        path: The engine: ``x.engine``. ``x.engine.json`` and ``x.engine.log`` are written beside it.
        options: What to build with and for.
        profiles: The shapes of each input that has axes of any size.
        precision: What to call the types of the file in the description.

    Raises:
        LoweringError: TensorRT cannot take the file, or not for these targets or shapes; the log is kept.
        MissingDependencyError: TensorRT is not installed, or needs a GPU that is not here.
    """
    options = options or EngineOptions()
    package = choose(options)
    with staged(path, LoweringError) as target:
        job = {
            "package": package,
            "onnx": os.path.abspath(onnx_file),
            "engine": os.fspath(target),
            "result": os.fspath(target) + ".answer",
            "log": os.fspath(target) + ".log",
            "targets": list(options.targets),
            "shapes": {name: profile.to_list() for name, profile in (profiles or {}).items()},
            "timing_cache": os.fspath(options.timing_cache) if options.timing_cache else None,
            "new_timing_cache": os.fspath(target) + ".timing",
        }
        answer = _run(job)
        sidecar = _describe(answer, job, Path(onnx_file), options, precision)
        sidecar.write(sidecar_path(target))
        _keep_timing_cache(job, options)
        size = target.stat().st_size
    return EngineInfo(Path(path), size, sidecar, tuple(_notes(sidecar, options)))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Run the build in a process of its own and return its answer.

    Raises:
        LoweringError: It ended early; see :func:`normfuse.lowering.engine_errors.translate` for this and the next.
        MissingDependencyError: Something is missing.
    """
    job_file, result, log = Path(job["result"] + ".job"), Path(job["result"]), Path(job["log"])
    job_file.write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", os.fspath(SCRIPT), os.fspath(job_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    job_file.unlink()
    if not result.exists():  # it crashed
        kept = _keep_log(log, done.stderr)
        raise LoweringError(f"TensorRT ended with code {done.returncode} while it built the engine; the log is {kept}")
    answer = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    if answer["stage"] != "done":
        needs_log = answer["stage"] in ("parse", "build")
        raise engine_errors.translate(answer, job, _keep_log(log, done.stderr) if needs_log else log)
    return answer


def _keep_log(log: Path, errors: str) -> Path:
    """Move the log of a build that failed to where it outlives the command, and return where that is."""
    handle, name = tempfile.mkstemp(prefix="normfuse-engine-", suffix=".log")
    with open(handle, "w", encoding="utf-8") as kept:
        if log.exists():
            kept.write(log.read_text(encoding="utf-8"))
        kept.write(errors)
    return Path(name)


def _keep_timing_cache(job: Mapping[str, Any], options: EngineOptions) -> None:
    new = Path(job["new_timing_cache"])
    if new.exists() and options.timing_cache is not None:
        with staged(options.timing_cache, LoweringError) as place:
            shutil.move(new, place)


def _describe(
    answer: Mapping[str, Any], job: Mapping[str, Any], onnx_file: Path, options: EngineOptions, precision: str
) -> Sidecar:
    norms = engine_norms.norm_nodes(graphs.load(onnx_file))
    fixed = {one["name"]: [one["shape"]] * 3 for one in answer["inputs"]}
    onnx_hash, device = sha256(onnx_file), answer["device"]
    return Sidecar(
        tensorrt={"package": job["package"], "version": answer["version"]},
        target=answer["targets"] or ([device["sm"]] if device else []),
        device=device,
        precision=precision,
        shapes=fixed | job["shapes"],
        dtypes={one["name"]: one["dtype"] for one in (*answer["inputs"], *answer["outputs"])},
        outputs={one["name"]: one["shape"] for one in answer["outputs"]},
        layers=answer["layers"],
        norm_layers=list(engine_norms.norm_layers(answer["layers"], norms)),
        network=answer["network"],
        source_sha256=sha256(options.source) if options.source else onnx_hash,
        onnx_sha256=onnx_hash,
        engine_sha256=sha256(job["engine"]),
        normfuse=__version__,
    )


def _notes(sidecar: Sidecar, options: EngineOptions) -> list[str]:
    notes = []
    if not sidecar.layers:
        notes.append("this TensorRT did not list the layers: whether a norm is left is not known")
    if sidecar.device is None:
        notes.append("the engine was built ahead of time and has not run; its ONNX file was checked in its place")
    if options.timing_cache is not None and sidecar.tensorrt["package"] == "tensorrt_rtx":
        notes.append("tensorrt_rtx times nothing while it builds: the timing cache was not used")
    return notes
