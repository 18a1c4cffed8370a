"""Compiled libraries: built on request only, found again, and used only when right and the user's own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import normfuse
from normfuse import NormfuseError, native

Kernels = native.Kernels[ctypes.CDLL]
_CAPTURED: Any = {"capture_output": True, "text": True, "check": True}


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Return kernels of one function, which is right when its answer is 42, and an empty folder for them."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NORMFUSE_KERNELS")
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    library = native.Library(tmp_path / "answer.c", headers=(tmp_path / "answer.h",))
    return native.Kernels(lambda: library, ctypes.CDLL, lambda opened: opened.answer() == 42)


def test_nothing_is_compiled_by_itself(kernels: Kernels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert kernels.get() is None
    assert not native.cache_directory().exists()


def test_built_once(kernels: Kernels):
    assert kernels.get() is None
    path = kernels.build()
    assert path.parent == native.cache_directory()
    assert not path.stat().st_mode & 0o077
    assert kernels.get() is not None
    before = path.stat().st_mtime_ns
    assert kernels.build() == path
    assert path.stat().st_mtime_ns == before
    kernels.build(force=True)
    assert path.stat().st_mtime_ns != before
    assert sorted(path.parent.iterdir()) == [path, path.with_name(f"{path.name}.sha256")]


def test_turned_off(kernels: Kernels, monkeypatch: pytest.MonkeyPatch):
    kernels.build()
    with kernels.unused():
        assert kernels.get() is None
    assert kernels.get() is not None
    monkeypatch.setenv("NORMFUSE_KERNELS", "0")
    kernels.forget()
    assert kernels.get() is None


def test_another_library_for_all_that_it_depends_on(kernels: Kernels):
    library = kernels.library()
    paths = [library.path, replace(library, flags=("-DX",)).path, replace(library, key="2").path]
    library.headers[0].write_text("#define ANSWER 43\n")
    paths.append(library.path)
    library.source.write_text("int answer(void) { return 44; }\n")
    paths.append(library.path)
    assert len(set(paths)) == 5


@pytest.mark.parametrize("damage", ["cut off", "no digest", "another digest", "text", "changed"])
def test_damaged_libraries_are_not_opened_but_built_again(kernels: Kernels, damage: str):
    """To open one that is cut off could end the process."""
    path = kernels.build()
    digest = path.with_name(f"{path.name}.sha256")
    whole = path.read_bytes()
    if damage == "no digest":
        digest.unlink()
    elif damage == "another digest":
        digest.write_text("0" * 64)
    else:
        path.unlink()  # this process has it open: what is mapped may not be cut
        path.touch(mode=0o700)
        path.write_bytes({"cut off": whole[:5000], "text": b"not a library", "changed": whole[:-1] + b"x"}[damage])
    kernels.forget()
    assert kernels.get() is None
    assert kernels.build() == path
    assert kernels.get() is not None


def test_wrong_libraries_are_not_used(kernels: Kernels):
    kernels.library().source.write_text("int answer(void) { return 41; }\n")
    with pytest.raises(NormfuseError, match="does not reproduce"):
        kernels.build()


def test_what_killed_builds_left_is_removed(kernels: Kernels):
    folder = native.cache_directory()
    old, young = folder / ".build-old", folder / ".build-young"
    for left in (old, young):
        left.mkdir(parents=True, mode=0o700)
        (left / "x.so").write_text("half")
    os.utime(old, (0, 0))
    folder.chmod(0o700)
    kernels.build()
    assert not old.exists()
    assert young.exists()


def test_a_compiler_that_does_not_end(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nsleep 600\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native, "LONGEST", 0.5)
    with pytest.raises(NormfuseError, match=r"did not compile answer\.c within 0\.5 seconds"):
        kernels.build()
    assert not list(native.cache_directory().iterdir())


def test_links_and_folders_above(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = kernels.build()
    linked = tmp_path / "linked"
    linked.mkdir(mode=0o700)
    (linked / path.name).symlink_to(path)
    assert not native.is_private(linked / path.name)
    (tmp_path / "door").symlink_to(path.parent)
    assert native.is_private(tmp_path / "door" / path.name)
    tmp_path.chmod(0o777)
    assert not native.is_private(path)
    tmp_path.chmod(0o1777)  # as /tmp: others may add their own, and touch nothing else
    assert native.is_private(path)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "cache").symlink_to(path.parent)
    assert not native.is_private(shared / "cache" / path.name)
    tmp_path.chmod(0o700)


def test_what_others_can_write_is_not_used(kernels: Kernels):
    path = kernels.build()
    path.chmod(0o777)
    assert kernels.load(path) is None
    path.chmod(0o700)
    assert kernels.load(path) is not None
    path.parent.chmod(0o777)
    assert kernels.load(path) is None
    with pytest.raises(NormfuseError, match="others can write to"):
        kernels.build()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_failing_compiler_is_named(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, compiler: str):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NormfuseError, match="cannot"):
        kernels.build()
    assert not list(native.cache_directory().iterdir())
    monkeypatch.delenv("CC")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(NormfuseError, match="no C compiler found: install gcc or clang, or set CC"):
        kernels.build()


def test_error_of_the_compiler_is_the_message(kernels: Kernels):
    kernels.library().source.write_text("int answer(void) { return ; }\nthis is no C\n")
    with pytest.raises(NormfuseError, match=r"cannot compile answer.c: .*error"):
        kernels.build()


def test_unknown_kernels():
    with pytest.raises(ValueError, match="no kernels are called 'tuned': choose from tune-mode, integer-norms"):
        normfuse.build_kernels("tuned")


def test_found_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NORMFUSE_KERNELS")
    tmp_path.chmod(0o700)
    code = "import sys, normfuse.kernels as k; print(len(k.{}), k.built_kernels())"
    try:
        build = subprocess.run([sys.executable, "-c", code.format("build_kernels('integer-norms')")], **_CAPTURED)
    except subprocess.CalledProcessError as error:
        pytest.skip(error.stderr)
    again = subprocess.run([sys.executable, "-c", code.format("built_kernels()")], **_CAPTURED)
    assert build.stdout == again.stdout == "1 ['integer-norms']\n"
