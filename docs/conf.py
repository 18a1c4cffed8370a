"""The documentation site: ``sphinx-build -W docs out/site``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import normfuse

project = "normfuse"
version = release = normfuse.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "myst.xref_missing"]  # links out of docs/; the tests resolve every link
html_theme = "furo"
html_title = f"normfuse {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
exclude_patterns: list[str] = []


def formulas(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Set what is indented in a module's docstring, its mathematics, as it is written."""
    if what != "module":
        return
    given, inside = lines[:], False
    lines.clear()
    for before, line in zip(["", *given], given, strict=False):
        if line and not line.startswith("    "):
            inside = False
        elif line and not before and not inside:
            inside = True
            lines += ["::", ""]
        lines.append(line)


def setup(app: object) -> None:
    """Connect what changes docstrings on their way to a page."""
    app.connect("autodoc-process-docstring", formulas)  # type: ignore[attr-defined]
