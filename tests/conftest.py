"""What every test runs under: one thread, a fixed seed, and no test of a device that is not there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

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
    from normfuse import NormfuseError
    from normfuse.layers import scaled_convolution

    folder = tmp_path_factory.getbasetemp().parent / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = scaled_convolution.library()
    target = folder / library.path.name
    with filelock.FileLock(folder / "lock"):
        if not target.exists():
            try:
                library.compile(target)
            except NormfuseError as error:
                pytest.skip(str(error))
    return folder


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
