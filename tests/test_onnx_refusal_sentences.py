"""Every sentence with which a fold in an ONNX graph is refused is true of a graph that is small enough to see it."""

from __future__ import annotations

import contextlib

import pytest

from normfuse.base import Refused
from tests.refusals.onnx_cases import ONNX, ONNX_DIRECT, OnnxCase
from tests.refusals.sites import ROOT, recorded, sites_in


@pytest.mark.parametrize("case", ONNX, ids=lambda case: case.sentence)
def test_sentence(case: OnnxCase):
    detail, _, hint = case.sentence.partition(" | ")
    said = [(o.refusal.detail, o.refusal.hint) for o in case.run().report.outcomes if o.refusal is not None]
    assert any(detail in text and (hint in advice if hint else True) for text, advice in said), said


@pytest.mark.parametrize("sentence", ONNX_DIRECT)
def test_sentence_asked_for_directly(sentence: str):
    with pytest.raises(Refused) as caught:
        ONNX_DIRECT[sentence]()
    assert sentence in caught.value.refusal.detail


def test_every_refusal_has_a_case():
    """Of what absorbs a map, splits it or hands it on."""
    with recorded() as places:
        for case in ONNX:
            case.run()
        for ask in ONNX_DIRECT.values():
            with contextlib.suppress(Refused):
                ask()
    files = [ROOT / "normfuse" / "lowering" / "onnx_graph" / f"{name}.py" for name in ("absorb", "branch", "follow")]
    missing = [s for s in sites_in(files) if not any(f == s.file and s.first <= line <= s.last for f, line in places)]
    assert not missing, "\n".join(map(str, missing))
