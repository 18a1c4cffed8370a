"""Every sentence of a refusal is true of a model that is small enough to see it, and its advice works when followed."""

from __future__ import annotations

import contextlib

import pytest

from normfuse.base import Refused
from tests.refusals.cases import Case, applied
from tests.refusals.direct_cases import DIRECT
from tests.refusals.holding_cases import HOLDING
from tests.refusals.layer_cases import LAYERS
from tests.refusals.norm_cases import NORMS
from tests.refusals.pass_cases import PASSES
from tests.refusals.route_cases import ROUTES
from tests.refusals.sites import recorded, sites

CASES: list[Case] = [*ROUTES, *NORMS, *LAYERS, *HOLDING, *PASSES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.sentence)
def test_sentence(case: Case):
    said = [(o.refusal.detail, o.refusal.hint) for o in case.run().outcomes if o.refusal is not None]
    assert any(case.detail in detail and case.hint == hint for detail, hint in said), said


@pytest.mark.parametrize("case", [c for c in CASES if c.advice is not None], ids=lambda case: case.sentence)
def test_advice_works(case: Case):
    assert not applied(case.run())
    assert applied(case.run(advised=True))


@pytest.mark.parametrize("sentence", DIRECT)
def test_sentence_asked_for_directly(sentence: str):
    with pytest.raises(Refused) as caught:
        DIRECT[sentence]()
    assert sentence in caught.value.refusal.detail


def test_every_refusal_has_a_case():
    """A refusal that is new, or that nothing can lead to any longer, shows here."""
    with recorded() as places:
        for case in CASES:
            case.run()
        for ask in DIRECT.values():
            with contextlib.suppress(Refused):
                ask()
    missing = [s for s in sites() if not any(f == s.file and s.first <= line <= s.last for f, line in places)]
    assert not missing, "\n".join(map(str, missing))
