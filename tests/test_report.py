"""The report: what it says of each norm, how it prints, and that every reason is tested somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import normfuse
from normfuse.base import Reason, Refusal
from normfuse.report import SCHEMA_VERSION, Outcome, Report, Status
from tests.zoo import ZOO
from tests.zoo.trap import image

APPLIED = Outcome("fold-bn", Status.APPLIED, "a.bn", "BatchNorm2d", partners=("a.conv",))
REFUSAL = Refusal(Reason.EXTRA_CONSUMER, "b.conv is also read by add", "give the block an output of its own")
REFUSED = Outcome("fold-bn", Status.REFUSED, "b.bn", "BatchNorm2d", refusal=REFUSAL)
MISSED = Outcome("", Status.NOT_REACHED, "aux.bn", "BatchNorm2d")
MERGED = Outcome("merge-branches", Status.APPLIED, "block", "Block", norm=False)
REPORT = Report((APPLIED, REFUSED, MISSED, MERGED), ("fold-bn",), ("a note",))


@pytest.mark.parametrize("reason", Reason, ids=lambda r: r.name)
def test_every_reason_is_asserted_somewhere(reason: Reason):
    sources = [path.read_text() for path in Path(__file__).parent.rglob("*.py")]
    assert any(re.search(rf"\bReason\.{reason.name}\b", text) for text in sources), "no test asserts this reason"


@pytest.mark.parametrize("reason", Reason, ids=lambda r: r.name)
def test_every_reason_is_raised_somewhere(reason: Reason):
    root = Path(normfuse.__file__).parent
    sources = [path.read_text() for folder in (root, root.parent / "passes") for path in folder.rglob("*.py")]
    assert any(re.search(rf"\bReason\.{reason.name}\b", text) for text in sources), "no code gives this reason"


def test_views():
    assert REPORT.norms == (APPLIED, REFUSED, MISSED)
    assert (REPORT.applied, REPORT.refused) == ((APPLIED, MERGED), (REFUSED,))
    assert (REPORT.not_reached, REPORT.unmatched) == ((MISSED,), ())


def test_report_is_true_if_anything_was_applied():
    assert REPORT
    assert not Report((REFUSED, MISSED))
    assert not Report(())


def test_summary_counts_norms_and_reasons():
    assert REPORT.summary() == "fold-bn: 1 of 3 norms folded, 1 refused (1 extra consumer), 1 not reached"


def test_summary_without_norms():
    assert Report(()).summary() == "nothing run: 0 of 0 norms folded"


def test_text_has_one_line_per_layer():
    lines = str(REPORT).splitlines()
    assert lines[0] == REPORT.summary()
    assert len(lines) == 1 + 4 + 1
    assert lines[1].split() == ["applied", "a.conv", "<-", "a.bn"]
    assert lines[2].endswith("extra consumer: b.conv is also read by add (give the block an output of its own)")
    assert lines[-1] == "  note: a note"


def test_dictionary_is_json_with_stable_keys():
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["schema_version"] == SCHEMA_VERSION
    assert set(data) == {"schema_version", "passes", "notes", "summary", "verification", "pairs"}
    keys = {"pass", "norm", "subject", "layer", "producer", "action", "reason", "detail", "hint"}
    assert all(keys <= set(pair) for pair in data["pairs"])
    assert [pair["action"] for pair in data["pairs"]] == ["applied", "refused", "not_reached", "applied"]
    assert data["pairs"][1]["reason"] == "EXTRA_CONSUMER"
    assert data["pairs"][3]["norm"] is None


def test_report_of_a_run_is_json():
    for name in ("SharedConvTwoNorms", "BranchOnInput", "group_norm", "empty"):
        json.dumps(normfuse.inspect(ZOO[name].build(), example_inputs=ZOO[name].inputs()).to_dict())


def test_norm_that_no_pass_looks_for_says_why():
    (outcome,) = normfuse.inspect(ZOO["group_norm"].build(), example_inputs=image()).unmatched
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.UNSUPPORTED_LAYER


def test_norm_of_an_unused_branch_is_not_reached():
    (outcome,) = normfuse.inspect(ZOO["BranchOnInput"].build(), example_inputs=image()).not_reached
    assert outcome.subject == "bn2"
    assert outcome.refusal is not None
    assert outcome.refusal.reason is Reason.NOT_REACHED
