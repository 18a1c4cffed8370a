"""The passes: one file per pass, and ``PASSES``, from a pass's name to its class."""

from __future__ import annotations

if __name__ != "normfuse.passes":  # one class must never exist twice
    raise ImportError("import normfuse.passes, not passes")

from normfuse.base import Pass
from normfuse.passes.center_norm import CenterNorm
from normfuse.passes.duplicate_shared import DuplicateShared
from normfuse.passes.equalize_ranges import EqualizeRanges
from normfuse.passes.fold_affine import FoldAffine
from normfuse.passes.fold_bn import FoldBN
from normfuse.passes.materialize import Materialize
from normfuse.passes.merge_branches import MergeBranches
from normfuse.passes.prune_constant import PruneConstant
from normfuse.passes.quantize import Quantize
from normfuse.passes.recalibrate import Recalibrate
from normfuse.passes.shiftquant import ShiftQuantOff, ShiftQuantTraining
from normfuse.passes.swap_l1 import SwapL1
from normfuse.passes.swap_unified import SwapUnified
from normfuse.passes.tune_mode import TuneMode

_ALL: tuple[type[Pass], ...] = (
    CenterNorm,
    DuplicateShared,
    EqualizeRanges,
    FoldAffine,
    FoldBN,
    Materialize,
    MergeBranches,
    PruneConstant,
    Quantize,
    Recalibrate,
    ShiftQuantOff,
    ShiftQuantTraining,
    SwapL1,
    SwapUnified,
    TuneMode,
)
PASSES: dict[str, type[Pass]] = {one.name: one for one in _ALL}
