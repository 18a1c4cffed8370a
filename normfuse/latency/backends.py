"""The ways to run a model that are compared: eager and compiled PyTorch, CUDA graphs, ONNX Runtime, TensorRT.

Each makes of a model and its inputs something that only has to be called, and counts what the call runs: ATen
operations in eager mode, generated kernels where Inductor compiled, nodes after ONNX Runtime's own optimization, layers
of an engine.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.errors import LoweringError, MissingDependencyError
from normfuse.graph import Inputs
from normfuse.names import require_plain_names
from normfuse.outputs import arguments, named_inputs


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to run on its inputs.

    Attributes:
        call: Runs it.
        candidate: What :func:`normfuse.verify` compares with the source: a module or a file.
        nodes: How many operations one call runs, None where it cannot be told.
        norms: How many of them normalize.
        run: Runs a file on other inputs, by name, and returns its outputs in order; None for a module.
        kept: What has to live as long as the call.
    """

    call: Callable[[], Any]
    candidate: nn.Module | Path
    nodes: int | None = None
    norms: int | None = None
    run: Callable[[Inputs], Sequence[Tensor]] | None = None
    kept: tuple[Any, ...] = field(default=())


def eager(model: nn.Module, inputs: Inputs, folder: Path, *, keep_norms: bool) -> Prepared:
    """Run the model as it is."""
    call = _caller(model, inputs)
    counts = _operations(call)
    return Prepared(call, model, sum(counts.values()), _norms(counts))


def compiled(model: nn.Module, inputs: Inputs, folder: Path, *, keep_norms: bool) -> Prepared:
    """Run the model by ``torch.compile``, in one graph or, where it breaks, several."""
    from torch._inductor import metrics

    require_plain_names(model, "the model", LoweringError)  # the compiler pastes them into code
    torch.compiler.reset()
    before = metrics.generated_kernel_count
    module = cast(nn.Module, torch.compile(model, dynamic=False))
    call = _caller(module, inputs)
    try:
        call()
    except Exception as error:  # Inductor's errors share no base class with those of the compiler it calls
        raise LoweringError(f"torch.compile failed: {_first_line(error)}") from error
    return Prepared(call, module, metrics.generated_kernel_count - before or None)


def cuda_graph(model: nn.Module, inputs: Inputs, folder: Path, *, keep_norms: bool) -> Prepared:
    """Run the model's kernels from one CUDA graph, without the time of launching them."""
    if not torch.cuda.is_available():
        raise MissingDependencyError("a CUDA graph needs an NVIDIA GPU, and none can be used here")
    direct, stream = _caller(model, inputs), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is allocated and chosen at first calls must not be captured
            direct()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = direct()
    counts = _operations(direct)
    return Prepared(graph.replay, model, sum(counts.values()), _norms(counts), kept=(outputs,))


def onnxruntime(model: nn.Module, inputs: Inputs, folder: Path, *, keep_norms: bool) -> Prepared:
    """Run the model's ONNX file in ONNX Runtime, on as many threads as torch has."""
    from normfuse.lowering import lower

    path = folder / "model.onnx"
    lower(model, path, inputs, fold_bn=not keep_norms)
    provider = "CUDAExecutionProvider" if _on_gpu(model) else "CPUExecutionProvider"
    return of_file(path, named_inputs(model, inputs), folder, provider)


def of_file(path: Path, inputs: Inputs, folder: Path, provider: str = "CPUExecutionProvider") -> Prepared:
    """Run an ONNX file in ONNX Runtime, on as many threads as torch has."""
    from normfuse.lowering import graphs
    from normfuse.lowering import onnxruntime as runtime

    opened = runtime.session(path, providers=[provider], threads=torch.get_num_threads())
    counts = graphs.op_counts(graphs.load(_optimized(path, folder, provider)))
    call, run = runtime.runner(opened, inputs), functools.partial(runtime.run, opened)
    return Prepared(call, path, sum(counts.values()), _norms(counts), run)


def _optimized(path: Path, folder: Path, provider: str) -> Path:
    """Return the file that ONNX Runtime makes of a file when it opens it."""
    from normfuse.lowering.onnxruntime import require

    runtime, target = require(), folder / f"{path.stem}.optimized.onnx"
    options = runtime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(target)
    runtime.InferenceSession(str(path), options, providers=[provider])
    return target


def tensorrt(model: nn.Module, inputs: Inputs, folder: Path, *, keep_norms: bool) -> Prepared:
    """Run the model's engine, from inputs and to outputs in the memory of the CPU."""
    from normfuse.lowering import lower
    from normfuse.lowering.tensorrt import installed
    from normfuse.lowering.tensorrt_run import open_engine

    if not installed():
        raise MissingDependencyError("TensorRT is not installed: pip install tensorrt, or tensorrt_rtx")
    if not torch.cuda.is_available():
        raise MissingDependencyError("an engine runs on an NVIDIA GPU, and none can be used here")
    path = folder / "model.engine"
    lower(model, path, inputs, fold_bn=not keep_norms)
    opened, given = open_engine(path), named_inputs(model, inputs)
    sidecar = opened.sidecar
    return Prepared(lambda: opened.run(given), path, len(sidecar.layers), len(sidecar.norm_layers), opened.run)


BACKENDS: dict[str, Callable[..., Prepared]] = {
    "eager": eager,
    "compile": compiled,
    "cudagraph": cuda_graph,
    "onnxruntime": onnxruntime,
    "tensorrt": tensorrt,
}
"""What prepares a model, by name."""


def present(model: nn.Module) -> list[str]:
    """Return the backends that this machine has for a model where it is."""
    from importlib.util import find_spec

    found = ["eager", "compile"]
    if _on_gpu(model):
        found.append("cudagraph")
    if find_spec("onnxruntime") and find_spec("onnx") and find_spec("onnxscript"):
        found.append("onnxruntime")
    if torch.cuda.is_available() and (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
        found.append("tensorrt")
    return found


class _Counter(TorchDispatchMode):
    """Counts the ATen operations that reach the dispatcher, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _operations(call: Callable[[], object]) -> collections.Counter[str]:
    with torch.no_grad(), _Counter() as counter:  # inference_mode would hide what composite operations consist of
        call.__wrapped__()  # type: ignore[attr-defined]
    return counter.counts


def _norms(counts: collections.Counter[str]) -> int:
    return sum(count for name, count in counts.items() if "norm" in name.lower())


def _caller(model: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    args, kwargs = arguments(inputs)

    def plain() -> Any:
        return model(*args, **kwargs)

    return torch.inference_mode()(plain)


def _on_gpu(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
