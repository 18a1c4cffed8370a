"""The public names exist, are the ones the documentation promises, and cost nothing until used."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import normfuse

PROMISED = {
    *("fold", "fold_bn", "inspect", "apply", "export", "verify", "save", "load"),
    *("quantize", "swap_norms", "reconstruct", "compile", "Compiled"),
    *("tune_mode", "tuned", "parameter_groups", "build_kernels"),
    *("Report", "Outcome", "Status", "Reason", "Refusal", "Result", "Comparison", "Tolerance", "Examples"),
    *("NormfuseError", "CaptureError", "LoadError", "LoweringError", "RequirementError", "VerificationError"),
    *("CalibrationError", "MissingDependencyError", "DeployedModelError", "OrderError", "TuneModeError"),
}


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_all_is_what_is_promised():
    assert set(normfuse.__all__) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_name_loads_and_is_documented(name: str):
    thing = getattr(normfuse, name)
    assert callable(thing)
    assert inspect.getdoc(thing)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'foldd'"):
        normfuse.foldd  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_dir_lists_the_public_names():
    assert set(dir(normfuse)) >= PROMISED


def test_verify_is_the_function_after_its_module_was_imported():
    importlib.import_module("normfuse.verify")
    assert inspect.isfunction(normfuse.verify)
    code = "import normfuse.verify, inspect; print(inspect.isfunction(normfuse.verify))"
    assert run(code) == "True"


def test_import_loads_neither_torch_nor_an_optional_package():
    heavy = "('torch', 'numpy', 'rich', 'onnx', 'onnxruntime', 'timm', 'torchvision')"
    code = f"import sys, normfuse, normfuse.cli; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_library_imports_without_the_optional_packages():
    code = """
import sys
for name in ("onnx", "onnxscript", "onnxruntime", "onnx_ir", "timm", "torchvision", "rich", "click"):
    sys.modules[name] = None
import normfuse
for name in normfuse.__all__:
    getattr(normfuse, name)
print("imported")
"""
    assert run(code) == "imported"


def test_errors_are_one_family():
    kinds = [getattr(normfuse, name) for name in PROMISED if name.endswith("Error")]
    assert all(issubclass(kind, normfuse.NormfuseError) for kind in kinds)
    assert issubclass(normfuse.MissingDependencyError, ImportError)
