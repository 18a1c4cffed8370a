"""The record a folded model carries: what was folded, with which versions, and how to rebuild its structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import normfuse
from normfuse import deploy
from normfuse.report import Report

SCHEMA_VERSION = 2
"""1: of version 0.1.0, without digests. 2: with a digest of each tensor, in files."""


def make_manifest(model: nn.Module, before: list[str], edits: list[dict[str, Any]], report: Report) -> dict[str, Any]:
    """Return the manifest of a model that was just folded, as JSON-ready values.

    Args:
        model: The folded model.
        before: The keys of its ``state_dict`` before the passes ran.
        edits: The structural edits, in order, for :func:`normfuse.surgery.replay`.
        report: The report of the run.

    A model that was folded before keeps the edits and pairs of the earlier runs in front.
    """
    earlier = deploy.manifest_of(model) or {"edits": [], "pairs": [], "passes": [], "keys": {"before": before}}
    floats = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": "normfuse",
        "version": normfuse.__version__,
        "torch": torch.__version__,
        "passes": [*earlier["passes"], *report.passes],
        "edits": [*earlier["edits"], *edits],
        "pairs": [*earlier["pairs"], *(outcome.to_dict() for outcome in report.outcomes)],
        "keys": {"before": earlier["keys"]["before"], "after": list(model.state_dict())},
        "dtype": str(floats[0]) if floats else None,
        "verify": None,
    }
