"""The documentation site builds without a warning, docstrings included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_site_builds_without_warnings(tmp_path: Path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, "docs", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "python" / "surface.html").read_text()
    assert "normfuse.tuning.tune_mode" in page
    assert "gamma" in (tmp_path / "site" / "reference" / "python" / "passes.html").read_text()
