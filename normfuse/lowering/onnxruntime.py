"""Run ONNX files with ONNX Runtime: sessions that have what was asked for, and tensors in and out.

ONNX Runtime only warns when a provider is missing and falls back to another; here that is an error. bfloat16 has
almost no CPU kernels: such a file is opened with its bfloat16 numbers in float32 arithmetic (:func:`open_artifact`).
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from normfuse import divergence
from normfuse.errors import LoadError, LoweringError, MissingDependencyError
from normfuse.graph import Inputs
from normfuse.lowering import graphs
from normfuse.lowering.providers import CPU, RTX, add_rtx, full_names, require_present
from normfuse.outputs import input_tensors

if TYPE_CHECKING:
    import onnx
    import onnxruntime

INSTALL = "ONNX Runtime is not installed: pip install 'normfuse[onnx]'"
Optimization = Literal["all", "basic", "disabled"]
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def require() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(INSTALL) from error
    return onnxruntime


def session(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    optimization: Optimization = "all",
    threads: int | None = None,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file, or a model in memory.

    Args:
        model: The file.
        providers: Execution providers in order of preference, by ONNX Runtime's names or as ``cpu``, ``cuda``,
            ``tensorrt``, ``tensorrt_rtx`` (the plugin, which takes no other before it). Each must be granted, and
            without the CPU among them no node runs there.
        optimization: How far the graph may be optimized; ``"disabled"`` runs it as written.
        threads: Threads within an operator; None lets ONNX Runtime choose.

    Raises:
        LoadError: There is no such file, or it is not a model that ONNX Runtime can run.
        MissingDependencyError: ONNX Runtime is not installed or has no such provider.
    """
    runtime = require()
    wanted = full_names(providers)
    ours = [name for name in wanted if name != RTX]
    require_present(ours, runtime.get_available_providers(), "is not in this onnxruntime")
    options = runtime.SessionOptions()
    if RTX in wanted:
        add_rtx(runtime, options)
    if CPU not in wanted:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "disabled": levels.ORT_DISABLE_ALL,
    }[optimization]
    opened = _open(runtime, model, options, None if RTX in wanted else wanted)
    require_present(wanted, opened.get_providers(), "was not granted by this onnxruntime")
    return opened


def _open(runtime: Any, model: Any, options: Any, providers: list[str] | None) -> onnxruntime.InferenceSession:
    in_memory = not isinstance(model, str | os.PathLike)
    if not in_memory and not Path(model).is_file():
        raise LoadError(f"there is no file {os.fspath(model)}")
    source = model.SerializeToString() if in_memory else os.fspath(model)
    try:
        return runtime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        name = "the model" if in_memory else os.fspath(model)
        raise LoadError(f"ONNX Runtime cannot open {name}: {_first_line(error)}") from error


def run(opened: onnxruntime.InferenceSession, inputs: Inputs) -> tuple[Tensor, ...]:
    """Run a session and return its outputs in the order of the file.

    Args:
        opened: From :func:`session`.
        inputs: A tensor, a tuple, or a mapping. A mapping that has all names of the file's inputs is taken by name,
            everything else by position. Floating-point tensors are cast to the type that the file declares.

    Raises:
        LoweringError: The number of inputs is wrong, or the file fails on them.
    """
    return runner(opened, inputs)()


def runner(opened: onnxruntime.InferenceSession, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs the session on these inputs; what a latency measurement should call."""
    feed = _feed(opened, inputs)

    def call() -> tuple[Tensor, ...]:
        try:
            outputs = opened.run(None, feed)
        except Exception as error:  # as in _open
            raise LoweringError(f"ONNX Runtime failed: {_first_line(error)}") from error
        return tuple(torch.from_numpy(output) for output in outputs)

    return call


def _feed(opened: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, Any]:
    wanted = opened.get_inputs()
    names = [slot.name for slot in wanted]
    by_name = isinstance(inputs, Mapping) and all(isinstance(inputs.get(name), Tensor) for name in names)
    tensors = [inputs[name] for name in names] if by_name else input_tensors(inputs)
    if len(tensors) != len(names):
        raise LoweringError(f"the file takes {len(names)} inputs ({', '.join(names)}), {len(tensors)} given")
    return {slot.name: _array(tensor, slot.type) for slot, tensor in zip(wanted, tensors, strict=True)}


def _array(tensor: Tensor, declared: str) -> Any:
    dtype = _TYPES.get(declared)
    if tensor.is_floating_point() and dtype is not None and dtype.is_floating_point:
        tensor = tensor.to(dtype)
    return tensor.detach().cpu().contiguous().numpy()


@dataclass(frozen=True)
class Artifact:
    """An ONNX file that is open for verification.

    Attributes:
        path: Where it is.
        dtype: The floating-point type that holds most of its numbers; None where it has none.
        session: The open session.
        notes: What differs from running the file as it is.
    """

    path: Path
    dtype: torch.dtype | None
    session: onnxruntime.InferenceSession
    notes: tuple[str, ...] = ()

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Run it; see :func:`run`."""
        return run(self.session, inputs)


def open_artifact(path: Path) -> Artifact:
    """Open a file on the CPU to verify it.

    Raises:
        LoadError: There is no such file, or it is not a model that ONNX Runtime can run.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    model = graphs.load(path)
    dtype = graphs.main_dtype(model)
    if graphs.uses_float8(model):
        note = "float8 checked as written: ONNX Runtime has no float8 kernels on the CPU, and would try to use some"
        return Artifact(path, dtype, session(path, optimization="disabled"), (note,))
    if not graphs.uses_bfloat16(model):
        return Artifact(path, dtype, session(path))
    note = "bfloat16 numbers checked in float32 arithmetic: ONNX Runtime has no bfloat16 on the CPU"
    return Artifact(path, dtype, session(graphs.widen_bfloat16(graphs.load(path, weights=True))), (note,))


def first_divergence(reference: nn.Module, artifact: Artifact, inputs: Inputs) -> str | None:
    """Return the first layer of the source whose output in the file differs from its float64 run, if it can be found.

    The exporter writes into each node which module it comes from; the last node of a module gives its output.
    """
    model = graphs.load(artifact.path, weights=True)
    model = graphs.widen_bfloat16(model) if graphs.uses_bfloat16(model) else model
    layers, pairs = graphs.expose_layers(model), graphs.pairs(model)
    try:
        source = divergence.record_in_double(reference, inputs)
        opened = session(model, optimization="disabled")
        outputs = dict(zip([slot.name for slot in opened.get_outputs()], run(opened, inputs), strict=True))
    except Exception:  # a diagnosis must not hide the verdict it explains
        return None
    found = {(name, 0): [outputs[value]] for name, value in layers.items()}
    found |= _folded(list(source), found, pairs)
    return divergence.blame(dict(_once(source, found)), found, pairs, divergence.limit_for(artifact.dtype))


def _folded(
    order: Sequence[divergence.Call], found: Mapping[divergence.Call, list[Tensor]], pairs: Sequence[set[str]]
) -> dict[divergence.Call, list[Tensor]]:
    """Return outputs of norms that left no node: a layer followed by the norm that it absorbed gives the norm's."""
    return {
        norm: found[layer]
        for layer, norm in itertools.pairwise(order)
        if layer in found and norm not in found and any({layer[0], norm[0]} <= pair for pair in pairs)
    }


def _once(
    source: Mapping[divergence.Call, list[Tensor]], found: Mapping[divergence.Call, list[Tensor]]
) -> Iterator[tuple[divergence.Call, list[Tensor]]]:
    """Yield the layers that are called once and give one tensor of the shape that the file gives for them."""
    counts = collections.Counter(name for name, _ in source)
    for call, tensors in source.items():
        shapes = [tensor.shape for tensor in found.get(call, [])]
        if counts[call[0]] == 1 and (not shapes or shapes == [tensor.shape for tensor in tensors]):
            yield call, tensors


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
