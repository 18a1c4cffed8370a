"""A file is written whole or not at all, whatever ends the write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from normfuse.atomic_files import staged, write_text
from normfuse.errors import LoweringError, NormfuseError


def test_the_file_and_what_goes_with_it_take_their_places(tmp_path: Path):
    with staged(tmp_path / "m.onnx") as target:
        target.write_text("model")
        target.with_name("m.onnx.data").write_text("data")
        assert not (tmp_path / "m.onnx").exists()
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").read_text() == "model"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_whatever_ends_a_write_the_old_file_is_whole(error: BaseException, tmp_path: Path):
    path = tmp_path / "m.pt"
    path.write_text("old")

    def write() -> None:
        with staged(path) as target:
            target.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert os.listdir(tmp_path) == ["m.pt"]
    assert path.read_text() == "old"


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path):
    """And what a living one is about to write is not, nor anything of another file."""
    write = "with staged(sys.argv[1]) as target: target.touch(); os._exit(9)"
    program = f"import os, sys; from normfuse.atomic_files import staged\n{write}"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "m.pt")], check=False)
    left = os.listdir(tmp_path)
    assert len(left) == 1
    with staged(tmp_path / "other.pt") as target:
        target.write_text("x")
    assert left[0] in os.listdir(tmp_path)
    with staged(tmp_path / "m.pt") as first, staged(tmp_path / "m.pt") as second:
        assert left[0] not in os.listdir(tmp_path)
        first.write_text("first")
        second.write_text("second")
    assert sorted(os.listdir(tmp_path)) == ["m.pt", "other.pt"]
    assert (tmp_path / "m.pt").read_text() == "first"


def test_files_are_on_the_disk_before_they_take_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("flush"), flush(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names))[1])
    write_text(tmp_path / "x.json", "{}")
    assert done == ["flush", "replace", "flush"]


@pytest.mark.parametrize("error", [NormfuseError, LoweringError])
def test_a_folder_that_is_not_there(error: type[NormfuseError], tmp_path: Path):
    with pytest.raises(error, match="cannot write"), staged(tmp_path / "no" / "m.pt", error):
        pytest.fail("there is nowhere to write to")
