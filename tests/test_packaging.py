"""What is built holds every package once, and ``passes`` has one name only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip vendors the same parser, and is there wherever a virtual environment is
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed for the build, so that no build output lands in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("normfuse", "passes"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(hook: str, source: Path, out: Path) -> Path:
    """Call one PEP 517 hook of the installed setuptools and return the file it wrote."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True, text=True
    )
    return out / done.stdout.strip().splitlines()[-1]


def modules(folder: str) -> set[Path]:
    """Return the modules of a folder relative to it; links are not followed."""
    return {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}


def kernel_sources() -> set[str]:
    """Return the files in C and C++, which are compiled on request."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "normfuse").rglob("*.[ch]*")}


@pytest.mark.slow
def test_wheel_holds_each_module_once(source: Path, tmp_path: Path):
    with zipfile.ZipFile(build("build_wheel", source, tmp_path)) as wheel:
        names = wheel.namelist()
    assert len(names) == len(set(names))
    expected = {Path("normfuse") / p for p in modules("normfuse")} | {
        Path("normfuse/passes") / p for p in modules("passes")
    }
    assert {Path(name) for name in names if name.endswith(".py")} == expected
    assert {"normfuse/py.typed", *kernel_sources()} <= set(names)


@pytest.mark.slow
def test_sdist_holds_the_passes_in_their_own_folder(source: Path, tmp_path: Path):
    with tarfile.open(build("build_sdist", source, tmp_path)) as sdist:
        names = [n.partition("/")[2] for n in sdist.getnames()]
    assert {f"passes/{path}" for path in modules("passes")} <= set(names)
    assert {"LICENSE", "README.md", "pyproject.toml", "normfuse/py.typed", *kernel_sources()} <= set(names)


def test_package_list_is_the_folders(project: dict):
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "normfuse").rglob("__init__.py")}
    folders |= {Path("normfuse") / p.parent.relative_to(ROOT) for p in (ROOT / "passes").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(f.parts) for f in folders}


def test_link_to_passes_is_there_for_the_tools():
    assert (ROOT / "normfuse" / "passes").resolve() == ROOT / "passes"


def test_passes_has_one_name():
    command = [sys.executable, "-c", "import passes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: import normfuse.passes, not passes" in done.stderr


def test_every_constraint_is_an_exact_version():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(line.count("==") == 1 for line in lines)


def test_version_is_the_newest_of_the_changelog():
    import normfuse

    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == normfuse.__version__
