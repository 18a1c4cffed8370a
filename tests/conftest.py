"""What every test runs under: one thread, a fixed seed, and no test of a device that is not there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and NumPy read them: the suite runs in several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NORMFUSE_KERNELS"] = "0"  # whatever this machine has built; the tests of kernels build their own

import filelock
import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("normfuse", derandomize=True, deadline=None)
hypothesis.settings.load_profile("normfuse")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, in whichever order and process it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with Tune mode's compiled kernels, built once for all processes of the test run."""
    from normfuse import NormfuseError, native
    from normfuse.layers import normalized_convolution

    folder = tmp_path_factory.getbasetemp().parent / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = normalized_convolution.library()
    target = folder / library.path.name
    with filelock.FileLock(folder / "lock"):
        if not native.is_whole(target):
            try:
                library.compile(target)
            except NormfuseError as error:
                pytest.skip(str(error))
    return folder


@pytest.fixture
def kernels(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run one test with Tune mode's compiled kernels; return what makes a convolution."""
    from normfuse.layers import normalized_convolution

    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(kernel_folder))
    monkeypatch.delenv("NORMFUSE_KERNELS", raising=False)
    normalized_convolution.kernels.forget()
    found = normalized_convolution.kernels.get()
    assert found is not None
    yield found
    normalized_convolution.kernels.forget()


@pytest.fixture(params=["python", "kernels"])
def form(request: pytest.FixtureRequest) -> str:
    """Run one test twice, without and with Tune mode's compiled kernels; return which of the two it is."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a device or a package that is missing."""
    missing = {
        "gpu": "" if torch.cuda.is_available() else "no CUDA device",
        "tensorrt": "" if importlib.util.find_spec("tensorrt_rtx") else "tensorrt_rtx is not installed",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
