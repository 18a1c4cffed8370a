"""The reference page of reasons says what the code says."""

from __future__ import annotations

from pathlib import Path

from normfuse.base import Reason
from normfuse.reasons import EXPLANATIONS, page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "reasons.md"


def test_every_reason_is_explained() -> None:
    assert list(EXPLANATIONS) == list(Reason)


def test_the_page_is_the_generated_one() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "write it again: python -c 'from normfuse.reasons import page; print(page(), end=\"\")'"
