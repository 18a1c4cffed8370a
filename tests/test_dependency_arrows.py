"""Imports point one way: a module may import its own level and those below, never above.

Imports under ``if TYPE_CHECKING`` are for checkers and exempt. An import inside a function still counts: it is late,
not absent.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up; a folder stands for everything in it.
LEVELS = (
    ("default_device", "errors", "examples", "names", "numerics", "computed", "holders", "patches"),
    ("adapters", "atomic_files", "digests", "exclusive", "named_tensors", "native", "structure"),
    ("base", "reasons", "report", "layers", "quantization", "surgery", "deploy", "manifest", "order"),
    ("affine", "graph", "call_arguments", "norm_classes", "exported_layers", "exported_modules", "torchscript"),
    ("capture", "outputs"),
    ("norms", "norm_calls", "ranks", "constant_maps", "reach", "written_norms", "operations", "shown_tensors"),
    ("branches", "scopes", "gains"),
    ("product_calls", "absorbers", "bias_trials", "absorption"),
    ("gather", "passing", "joining", "rules", "legality", "aliases", "standing_in", "routes"),
    ("pairs", "moving_statistics", "heads", "branching", "ties", "centering", "stream_rules", "streams", "as_rms_norm"),
    ("norm_forms", "families", "progress", "calibration", "blocks", "norm_swap", "statistics"),
    ("layer_quantization", "layer_ranges"),
    ("passes",),
    ("comparison", "activations", "ranges", "rerun", "divergence", "verify", "made_up_inputs", "rounding"),
    ("proof", "settlement", "outcomes", "pipeline"),
    ("whole_model_error",),
    ("formats", "architectures", "exported_program", "file_limits", "pickles", "state_dicts", "unpickle"),
    ("saving", "rebuild", "serialize", "lowering"),
    ("api", "kernels", "parameters", "quantizing", "recalibrating", "reconstruction", "swapping", "tuning"),
    ("latency",),
    ("compilation",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SURFACE = {"api", "report", "errors", "verify", "formats", "serialize", "architectures", "lowering"}
CLI_MAY = SURFACE | {"cli", "latency", "outputs", "rerun", "quantizing", "recalibrating", "swapping", "reconstruction"}
CLI_MAY |= {"atomic_files", "kernels", "made_up_inputs", "unpickle"}
ONNX_GRAPHS = ("lowering.onnx_fold", "lowering.onnx_graph")  # about ONNX through and through, and loaded late
OPTIONAL = {"onnx", "onnxscript", "onnxruntime", "onnx_ir", "tensorrt", "tensorrt_rtx", "timm", "torchvision"}
OPTIONAL |= {"transformers", "matplotlib"}


def sources() -> dict[str, Path]:
    """Return every module of the package, by dotted name below ``normfuse``."""
    files = {p.relative_to(ROOT / "normfuse"): p for p in (ROOT / "normfuse").rglob("*.py")}
    files |= {Path("passes") / p.relative_to(ROOT / "passes"): p for p in (ROOT / "passes").rglob("*.py")}
    return {dotted(path): file for path, file in files.items()}


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, *, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield ``(module, late)`` for every import that runs; late ones are inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((name, late) for name in targets(node))
        else:
            yield from imports(node, late=late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def targets(node: ast.ImportFrom) -> set[str]:
    """Return the modules of a ``from`` import: ``from normfuse.lowering import graphs`` names the module ``graphs``."""
    assert node.module is not None
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name for name in names if name.removeprefix("normfuse.") in SOURCES}
    inside = node.module == "normfuse"  # its own names are lazy, and each is one of a module
    return modules | (names if inside else set()) | ({node.module} if names - modules and not inside else set())


def part(module: str) -> str | None:
    """Return the first component below ``normfuse``, or None where the module is not ours."""
    names = module.split(".")
    return names[1] if names[0] == "normfuse" and len(names) > 1 else None


SOURCES = sources()
MODULES = sorted(name for name in SOURCES if name not in ("", "__main__"))


def imports_of(name: str) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(SOURCES[name].read_text())))


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_level(name: str):
    assert name.split(".")[0] in LEVEL


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str):
    own = LEVEL[name.split(".")[0]]
    ours = {p for module, _ in imports_of(name) if (p := part(module))} - {"__version__"}
    assert {p for p in ours if LEVEL[p] > own} == set()


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("passes")])
def test_pass_imports_no_other_machinery(name: str):
    ours = {part(module) for module, _ in imports_of(name)}
    assert not ours & {"pipeline", "verify", "api", "cli", "lowering", "serialize", "formats"}


def test_verify_knows_no_pass():
    assert not {part(module) for module, _ in imports_of("verify")} & {"passes", "pipeline"}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("cli")])
def test_command_line_stays_on_the_surface_and_loads_late(name: str):
    ours = [(p, late) for module, late in imports_of(name) if (p := part(module)) and p != "__version__"]
    assert {p for p, _ in ours} <= CLI_MAY
    assert {p for p, late in ours if not late} <= {"cli", "errors"}
    assert not {m for m, late in imports_of(name) if not late and m.split(".")[0] in {"torch", "rich", "numpy"}}


def test_no_cycles():
    known = {name: {module.removeprefix("normfuse.") for module, _ in imports_of(name)} for name in MODULES}
    order = graphlib.TopologicalSorter({name: found & set(MODULES) for name, found in known.items()})
    assert set(order.static_order()) == set(MODULES)


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith(ONNX_GRAPHS)])
def test_optional_packages_are_imported_late(name: str):
    early = {module for module, late in imports_of(name) if not late}
    assert not {module.split(".")[0] for module in early} & OPTIONAL
    assert not [module for module in early if module.removeprefix("normfuse.").startswith(ONNX_GRAPHS)]


def test_numerics_sees_tensors_not_modules():
    assert {part(module) for module, _ in imports_of("numerics")} <= {None}
    assert "torch.nn" not in {module for module, _ in imports_of("numerics")}
