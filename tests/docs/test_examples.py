"""The documentation is true: links lead somewhere, and its Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made on the web."""
    text = ANY_FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    targets = LINK.findall(ANY_FENCE.sub("", page.read_text()))
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_id(page)} links to {link}"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{page_id(page)} links to {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if FENCE.search(p.read_text())], ids=page_id)
def test_code_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    text = page.read_text()
    for block in FENCE.finditer(text):
        # Blank lines in front give a traceback the line numbers of the page.
        code = "\n" * (text[: block.start(1)].count("\n")) + block.group(1)
        exec(compile(code, str(page), "exec"), namespace)


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs" / "index.md"
    seen, queue = set(), [index]
    while queue:
        page = queue.pop()
        if page not in seen:
            seen.add(page)
            queue += [
                p for link in links(page) if (p := (page.parent / link.partition("#")[0]).resolve()).suffix == ".md"
            ]
    assert set((ROOT / "docs").rglob("*.md")) <= seen
