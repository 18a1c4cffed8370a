"""Running an engine, on a double of TensorRT's runtime with its tensors on the CPU: no machine here has the GPU."""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from normfuse.errors import LoweringError
from normfuse.lowering.tensorrt_run import Engine, _context
from tests.lowering.test_engine_files import sidecar


class Context:
    """Adds one to its input; addresses are taken literally, as TensorRT does."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.address: dict[str, int] = {}

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.address[name] = address

    def execute_async_v3(self, _stream: int) -> bool:
        count = torch.Size(self.shape).numel()
        source, target = ((ctypes.c_float * count).from_address(self.address[name]) for name in ("x", "y"))
        for i in range(count):
            target[i] = source[i] + 1
        return True


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    stream = types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    original, empty = torch.Tensor.to, torch.empty
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _device, dtype=None: original(self, dtype))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
    described = sidecar(tmp_path / "x.engine", dtypes={"x": "FLOAT", "y": "FLOAT"})
    return Engine(tmp_path / "x.engine", described, torch.float32, Context(), None)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: {"other name": x}])
def test_inputs_by_name_or_position(engine: Engine, wrap: Any):
    x = torch.randn(2, 3).double()
    (y,) = engine.run(wrap(x))
    torch.testing.assert_close(y, x.float() + 1)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4), (2, 3, 1)])
def test_a_shape_outside_the_profile_is_named(engine: Engine, shape: tuple[int, ...]):
    with pytest.raises(LoweringError, match=r"x has shape .*, the engine takes \(1, 3\) to \(4, 3\)"):
        engine.run(torch.ones(shape))


def test_the_number_of_inputs(engine: Engine):
    with pytest.raises(LoweringError, match=r"takes 1 inputs \(x\), 2 given"):
        engine.run((torch.ones(1, 3), torch.ones(1, 3)))


def test_a_failed_run_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine._context, "execute_async_v3", lambda _stream: False)
    with pytest.raises(LoweringError, match="TensorRT failed to run it"):
        engine.run(torch.ones(1, 3))


def test_the_runtime_cache_is_read_and_written(engine: Engine, tmp_path: Path):
    cache = types.SimpleNamespace(read=b"", serialize=lambda: b"kernels")
    cache.deserialize = lambda blob: vars(cache).update(read=blob)
    config = types.SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda _: None)
    config.get_runtime_cache = lambda: cache
    loaded = types.SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=lambda *given: given)
    (tmp_path / "old").write_bytes(b"old kernels")
    assert _context(loaded, tmp_path / "old") == (config,)
    assert cache.read == b"old kernels"
    assert _context(loaded, None) == ()
    engine._context.get_runtime_config = lambda: config
    engine.save_runtime_cache(tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"kernels"
    del engine._context.get_runtime_config
    with pytest.raises(LoweringError, match="has no runtime cache"):
        engine.save_runtime_cache(tmp_path / "new")
