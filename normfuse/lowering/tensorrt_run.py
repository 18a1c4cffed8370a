"""Open an engine and run it, after what is beside it says that it can run here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.atomic_files import staged
from normfuse.errors import LoadError, LoweringError, MissingDependencyError
from normfuse.graph import Inputs
from normfuse.lowering.engine_sidecar import Sidecar, read_sidecar
from normfuse.outputs import input_tensors

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_WORDS = {"fp16": torch.float16, "mixed": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Engine:
    """An engine that is open on a GPU.

    Attributes:
        path: Where it is.
        sidecar: Its description.
        dtype: The floating-point type that it was written in.
        notes: What differs from running the engine as it is.
    """

    path: Path
    sidecar: Sidecar
    dtype: torch.dtype
    _context: Any
    _loaded: Any  # TensorRT needs it as long as the context
    notes: tuple[str, ...] = field(default=())

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Run it and return its outputs on the CPU, in the order of the engine.

        Args:
            inputs: A tensor, a tuple, or a mapping. A mapping with all names of the engine's inputs is taken by name,
                everything else by position. Floating-point tensors are cast to the type of the engine.

        Raises:
            LoweringError: The number of inputs is wrong, or a shape is outside the profile.
        """
        names = list(self.sidecar.shapes)
        given: Mapping[str, object] = inputs if isinstance(inputs, Mapping) else {}
        found = [value for name in names if isinstance(value := given.get(name), Tensor)]
        tensors = found if len(found) == len(names) else input_tensors(inputs)
        if len(tensors) != len(names):
            raise LoweringError(f"the engine takes {len(names)} inputs ({', '.join(names)}), {len(tensors)} given")
        held = [self._give(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        outputs = [self._take(name) for name in self.sidecar.outputs]
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise LoweringError(f"{self.path}: TensorRT failed to run it")
        stream.synchronize()
        del held
        return tuple(output.cpu() for output in outputs)

    def save_runtime_cache(self, path: str | os.PathLike[str]) -> None:
        """Keep the kernels that ``tensorrt_rtx`` compiled so far, for :func:`open_engine`.

        Raises:
            LoweringError: This package compiles none when an engine runs.
        """
        config = getattr(self._context, "get_runtime_config", lambda: None)()
        if config is None or not hasattr(config, "get_runtime_cache"):
            raise LoweringError(f"{self.sidecar.tensorrt['package']} has no runtime cache")
        with staged(path, LoweringError) as target:
            target.write_bytes(memoryview(config.get_runtime_cache().serialize()))

    def _give(self, name: str, tensor: Tensor) -> Tensor:
        low, _, high = self.sidecar.shapes[name]
        shape = tuple(tensor.shape)
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            raise LoweringError(
                f"{self.path}: {name} has shape {shape}, the engine takes {tuple(low)} to {tuple(high)}"
            )
        placed = tensor.to("cuda", _TYPES[self.sidecar.dtypes[name]]).contiguous()
        self._context.set_input_shape(name, shape)
        self._context.set_tensor_address(name, placed.data_ptr())
        return placed

    def _take(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        output = torch.empty(shape, dtype=_TYPES[self.sidecar.dtypes[name]], device="cuda")
        self._context.set_tensor_address(name, output.data_ptr())
        return output


def open_engine(path: str | os.PathLike[str], *, runtime_cache: str | os.PathLike[str] | None = None) -> Engine:
    """Open an engine on the first GPU, after its description was checked against the package and the GPU.

    Args:
        path: The engine, with ``<path>.json`` beside it.
        runtime_cache: Where ``tensorrt_rtx`` keeps the kernels that it compiles when an engine first runs; it is read
            if it exists, and written by :meth:`Engine.save_runtime_cache`. ``tensorrt`` has no such cache.

    Raises:
        LoadError: It has no description, is damaged, or was built by another version or for another GPU.
        MissingDependencyError: The package that built it is not installed, or there is no GPU.
    """
    engine = Path(path)
    sidecar = read_sidecar(engine)
    sidecar.require_file(engine)
    package = sidecar.tensorrt["package"]
    try:
        trt = importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{engine}: {package} is not installed: pip install {package}") from error
    sidecar.require_package(trt.__version__, engine)
    if not torch.cuda.is_available():
        raise MissingDependencyError(f"{engine}: an engine runs on an NVIDIA GPU, and none can be used here")
    sidecar.require_gpu(torch.cuda.get_device_capability(), torch.cuda.get_device_name(), engine)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    loaded = runtime.deserialize_cuda_engine(engine.read_bytes())
    if loaded is None:
        raise LoadError(f"{engine}: {package} {trt.__version__} does not open it: rebuild it")
    context = _context(loaded, None if runtime_cache is None else Path(runtime_cache))
    return Engine(engine, sidecar, _WORDS.get(sidecar.precision, torch.float32), context, (runtime, loaded))


def _context(loaded: Any, cache_file: Path | None) -> Any:
    if cache_file is None or not hasattr(loaded, "create_runtime_config"):
        return loaded.create_execution_context()
    config = loaded.create_runtime_config()
    if hasattr(config, "create_runtime_cache"):
        cache = config.create_runtime_cache()
        if cache_file.is_file():
            cache.deserialize(cache_file.read_bytes())
        config.set_runtime_cache(cache)
    return loaded.create_execution_context(config)


def open_artifact(path: Path) -> Engine:
    """Open an engine to verify it; see :func:`open_engine`."""
    return open_engine(path)


def first_divergence(_reference: nn.Module, _artifact: Engine, _inputs: Inputs) -> str | None:
    """Return None: an engine shows no value but its outputs."""
    return None
