"""``normfuse doctor``: versions, devices, and which parts work here."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from typing import Any

import click

import normfuse
from normfuse.cli import arguments, source
from normfuse.cli.command import Command
from normfuse.cli.output import Output

PARTS = {
    "onnx": ("onnx", "normfuse[onnx]", "writes and folds ONNX files"),
    "onnxscript": ("onnxscript", "normfuse[onnx]", "writes ONNX files"),
    "onnx-ir": ("onnx_ir", "normfuse[onnx]", "folds ONNX files"),
    "onnxruntime": ("onnxruntime", "normfuse[onnx]", "runs and verifies ONNX files"),
    "tensorrt-rtx": ("tensorrt_rtx", "normfuse[tensorrt]", "builds engines ahead of time, without a GPU"),
    "tensorrt": ("tensorrt", "tensorrt", "builds and runs engines on the GPU of this machine"),
    "torchvision": ("torchvision", "normfuse[zoo]", "torchvision:NAME, and pickled torchvision models"),
    "timm": ("timm", "normfuse[zoo]", "timm:NAME, and pickled timm models"),
}


@click.command("doctor", cls=Command)
@arguments.output_options
def command(out: Output) -> None:
    """Show versions and devices, and which parts work on this machine and why not."""
    import torch

    from normfuse.kernels import built_kernels

    out.document["environment"] = source.environment()
    parts = {name: _part(*known) for name, known in PARTS.items()}
    built = built_kernels()
    out.document |= {"parts": parts, "devices": _devices(), "kernels": built}
    out.rows(
        [
            ("  normfuse", normfuse.__version__, ""),
            ("  python", platform.python_version(), platform.platform()),
            ("  torch", torch.__version__, f"{torch.get_num_threads()} threads on {', '.join(_devices())}"),
            *((f"  {name}", part["version"] or "missing", part["detail"]) for name, part in parts.items()),
            _engines(parts, _devices()),
            _kernels(built),
        ]
    )
    out.finish()


def _devices() -> list[str]:
    import torch

    cards = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cards]


def _part(module: str, extra: str, purpose: str) -> dict[str, Any]:
    """Return whether a package can be imported, not merely found, and the command that helps if not."""
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        reason = f" ({error})" if importlib.util.find_spec(module) else ""
        return {"works": False, "version": None, "detail": f"{purpose}: pip install '{extra}'{reason}"}
    except Exception as error:  # a package may be broken in any way
        return {"works": False, "version": None, "detail": f"{purpose}: broken: {error}"}
    return {"works": True, "version": _version(module, loaded), "detail": f"{purpose}{_providers(module, loaded)}"}


def _version(module: str, loaded: Any) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(loaded, "__version__", "unknown"))


def _providers(module: str, loaded: Any) -> str:
    if module != "onnxruntime":
        return ""
    return f" on {', '.join(loaded.get_available_providers())}"


def _engines(parts: dict[str, Any], devices: list[str]) -> tuple[str, str, str]:
    """Return which package would build an engine here, and where it would run."""
    builders = [name for name in ("tensorrt-rtx", "tensorrt") if parts[name]["works"]]
    if len(devices) == 1:
        builders = [name for name in builders if name == "tensorrt-rtx"]
    if not builders:
        return "  engines", "missing", "export -o MODEL.engine: pip install 'normfuse[tensorrt]'"
    where = "and run on this GPU" if len(devices) > 1 else "but do not run: no GPU"
    return "  engines", "yes", f"built by {', '.join(builders)} {where}"


def _kernels(built: list[str]) -> tuple[str, str, str]:
    """Return which compiled kernels are used here, and how to get them."""
    if built:
        return "  kernels", "yes", f"compiled for this processor: {', '.join(built)}"
    return "  kernels", "not built", "faster Tune mode and integer norms on CPUs: normfuse.build_kernels()"
