"""The published norms: what each becomes in a folded model and why, as reports and ``docs/reference/norms.md`` say it.

A norm is of a family by the name of its class or of a class that it derives from, so that no package is imported.
What a report says of a LayerNorm or RMSNorm is what it computes when it is run, not what its name promises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from normfuse.base import Reason, Refusal
from normfuse.graph import ModelGraph
from normfuse.norm_forms import identify
from normfuse.norms import Norm

Verdict = Literal["folds", "partial", "materialises", "stays", "no norm"]


@dataclass(frozen=True, slots=True)
class Family:
    """A published norm.

    Attributes:
        name: What it is called in its field.
        classes: A pattern of the class and function names that it has in code, all of the name.
        verdict: Whether it folds, loses a part, makes a weight plain, or stays.
        why: What it does, as the rest of a sentence that starts with its name.
        source: Paper, and where its layer is.
        advice: What a user can do, if anything.
        reason: The reason of the report where it stays.
        reconstruction: Whether equations were not taken from the paper or the authors' code.
    """

    name: str
    classes: str
    verdict: Verdict
    why: str
    source: str
    advice: str = ""
    reason: Reason = Reason.UNSUPPORTED_LAYER
    reconstruction: bool = False


_BATCH = "is a fixed map per channel in eval mode"
_GAIN = "its gain and shift can move into what reads it: fold-affine"

FAMILIES: tuple[Family, ...] = (
    Family(
        "Riemannian BatchNorm", r"LieB(atch)?N\w*|\w*SPD\w*|\w*(Riemann|Poincare|Lorentz)\w*B(atch)?N\w*", "stays",
        "normalises points of a manifold, where a fold of weights has no meaning", "2403.11261, 2303.14027",
    ),
    Family("Ghost BatchNorm", r"Ghost(BatchNorm|BN)\w*", "folds", _BATCH,
           "1705.08741; `normfuse.layers.GhostBatchNorm2d`", reconstruction=True),
    Family("estimated BatchNorm", r"Est(imated)?(BatchNorm|BN)\w*", "folds", _BATCH,
           "1911.09738; `normfuse.layers.EstimatedBatchNorm2d`"),
    Family("L1 BatchNorm", r"L1BatchNorm\w*", "folds", _BATCH, "1802.09769; `normfuse.layers.L1BatchNorm2d`"),
    Family("BatchNorm", r"(Sync|Frozen|Lazy)?BatchNorm(Act)?\w*|batch_norm", "folds", _BATCH,
           "1502.03167; `torch.nn.BatchNorm2d`", "fold-bn"),
    Family("Online Normalization", r"OnlineNorm\w*", "partial",
           "is a fixed map per channel in eval mode, before a clamp or a layer scaling that stays",
           "1905.05894; `normfuse.layers.OnlineNorm`"),
    Family("ActNorm", r"ActNorm\w*", "folds", "is a fixed map per channel, once its first batch was seen",
           "1807.03039; `normfuse.layers.ActNorm`"),
    Family("UnifiedNorm", r"UnifiedNorm\w*", "folds", _BATCH, "2208.01313; `normfuse.layers.UnifiedNorm`"),
    Family("PowerNorm", r"(Mask(ed)?)?PowerNorm\w*", "partial",
           "is a fixed map per channel in eval mode, after a group scaling that depends on the token",
           "2003.07845; `normfuse.layers.PowerNorm`"),
    Family("layer scaling", r"LayerScaling", "stays", "divides each sample by its own root mean square",
           "1905.05894; `normfuse.layers.online_norm.LayerScaling`"),
    Family("InstanceNorm", r"(Lazy)?InstanceNorm\w*|instance_norm", "partial",
           "normalises each sample by its own statistics; with running statistics it folds as BatchNorm",
           "1607.08022; `torch.nn.InstanceNorm2d`", _GAIN),
    Family("pRMSNorm", r"(Partial|p)RMSNorm\w*", "partial", "divides each token by the root mean square of its first "
           "channels", "1910.07467; `normfuse.layers.PartialRMSNorm`", _GAIN),
    Family("L1 LayerNorm", r"L1(Layer|RMS)Norm\w*", "partial",
           "divides each token by its own mean absolute deviation", "2411.10948; `normfuse.layers.L1LayerNorm`", _GAIN,
           reconstruction=True),
    Family("RMSNorm", r"\w*R(MS|ms)_?Norm\w*|rms_norm", "partial", "divides each token by its own root mean square",
           "1910.07467; `torch.nn.RMSNorm`", _GAIN),
    Family("LayerNorm", r"\w*(Layer|LAYER)_?Norm\w*|layer_norm|TENorm|WrappedTorchNorm", "partial",
           "normalises each token by its own mean and variance", "1607.06450; `torch.nn.LayerNorm`",
           f"{_GAIN}; center-norm can make it an RMSNorm, swap-unified one that folds"),
    Family("EvoNorm", r"EvoNorm\w*", "partial",
           "divides by statistics of each sample, and holds its activation: nothing is appended or dropped",
           "2004.02967; `timm.layers.EvoNorm2dB0`", _GAIN),
    Family("Batch-Channel Normalization", r"(Batch)?Channel(Group)?Norm\w*|BCNorm|GN", "partial",
           "normalises groups of channels of each sample; the BatchNorm before it folds",
           "1911.09738; `normfuse.layers.BatchChannelNorm`"),
    Family("GroupNorm", r"\w*Group_?Norm\w*|group_norm", "partial",
           "normalises each group of channels of each sample by its own statistics",
           "1803.08494; `torch.nn.GroupNorm`", _GAIN),
    Family("ScaleNorm", r"ScaleNorm\w*", "partial", "divides each token by its own length",
           "1910.05895; `normfuse.layers.ScaleNorm`", _GAIN),
    Family("QKNorm", r"QKNorm\w*", "stays", "divides each query and key by its own length",
           "2010.04245; `normfuse.layers.QKNorm`"),
    Family("Region Normalization", r"\w*Region\w*Norm\w*|RN_\w+", "stays",
           "takes its statistics from the batch, also in eval mode, within regions of a mask: what it returns for a "
           "sample depends on the other samples", "1911.10375; `normfuse.layers.RegionNorm`",
           "evaluate with the batch size that matters", Reason.BATCH_STATISTICS),
    Family("GDN", r"I?GDN\w*", "stays", "divides each channel by a sum over the others at the same place",
           "1511.06281; `normfuse.layers.GDN`"),
    Family("response normalization", r"(Local|Filter|Global)ResponseNorm\w*|CrossMapLRN2d", "stays",
           "divides by squares of its own input", "1911.09737, 2301.00808; `torch.nn.LocalResponseNorm`, timm"),
    Family("phase-correction norm", r"PCNorm\w*", "stays",
           "normalises amplitudes in the frequency domain by statistics of its input", "2303.02328",
           reconstruction=True),
)  # fmt: skip

# Not norms of activations in themselves; the passes know them by what they are made of.
COMPOUNDS: tuple[Family, ...] = (
    Family("IBN", r"", "partial", "is an InstanceNorm on the first channels and a BatchNorm, which folds, on the rest",
           "1807.09441; `normfuse.layers.IBN`"),
    Family("adaptive deviation (ADQ)", r"", "partial",
           "is a block behind a BatchNorm, which folds, times a scale of each sample",
           "2208.14839; `normfuse.layers.AdaptiveDeviation`"),
    Family("Galerkin attention", r"", "partial",
           "has a LayerNorm on keys and values, whose gain moves where no product is between", "2105.14995", _GAIN),
    Family("SELU", r"", "no norm", "normalises by itself: no norm is missing, and no map is moved across it",
           "1706.02515; `torch.nn.SELU`"),
    Family("normalizer-free constants", r"", "materialises",
           "multiplies branches and activations by constants, which move into the weights around them",
           "2101.08692; `normfuse.layers.ConstantScale`", "fold-affine"),
)  # fmt: skip
_PLAIN = "makes the weight plain: materialize, then fold"
WEIGHTS: tuple[Family, ...] = (
    Family("weight norm", r"", "materialises", "is g v / |v|", "1602.07868; `torch.nn.utils.parametrizations`", _PLAIN),
    Family("spectral norm", r"", "materialises", "is W / (u'W v) with the stored u and v",
           "1802.05957; `torch.nn.utils.parametrizations`", _PLAIN),
    Family("weight standardization", r"", "materialises", "is W without mean and deviation, in three variants",
           "1903.10520; `normfuse.layers.WeightStandardization`, timm's `StdConv2d`", _PLAIN),
    Family("scaled weight standardization", r"", "materialises", "has a gain and the gain of the activation too",
           "2101.08692, 2102.06171; `normfuse.layers.ScaledWeightStandardization`, timm's `ScaledStdConv2d`", _PLAIN),
    Family("FixNorm", r"", "materialises", "is a table of unit vectors, computed once for embedding and projection",
           "1910.05895; `normfuse.layers.FixNorm`", _PLAIN),
    Family("weight conditioning", r"", "materialises", "is W with rows of length one",
           "2409.03424; `normfuse.layers.RowEquilibration`", _PLAIN, reconstruction=True),
    Family("weight compander", r"", "materialises", "is a arctan(v / b)",
           "2306.16993; `normfuse.layers.WeightCompander`", _PLAIN, reconstruction=True),
    Family("any other parametrization", r"", "materialises", "is evaluated once, by its own code",
           "`torch.nn.utils.parametrize`", _PLAIN),
)  # fmt: skip


def family_of(module: nn.Module | None, layer: str = "") -> Family | None:
    """Return the family of a norm module, or of a function of torch by its name; None if it has no known name."""
    names = [cls.__name__ for cls in type(module).__mro__] if module is not None else [layer.partition(",")[0]]
    return next((f for name in names for f in FAMILIES if re.fullmatch(f.classes, name)), None)


def stays(norm: Norm, graph: ModelGraph) -> bool:
    """Whether nothing of a norm can move, whatever is around it."""
    family = family_of(graph.module(norm.module) if norm.module is not None else None, norm.layer)
    return family is not None and family.verdict == "stays"


def explain(norm: Norm, graph: ModelGraph, ran: tuple[str, ...] = ()) -> Refusal:
    """Return why a norm, of which no pass moved anything, stays as it is; and what to do beyond the passes that ran."""
    module = graph.module(norm.module) if norm.module is not None else None
    family = family_of(module, norm.layer)
    if norm.layer == "BatchNorm, written out":
        text = f"{norm.name} takes its statistics from the batch, also in eval mode"
        return Refusal(Reason.BATCH_STATISTICS, text, "use torch.nn.BatchNorm1d to 3d")
    form = identify(module) if module is not None else None
    if form is not None and (family is None or family.name in ("LayerNorm", "RMSNorm", "pRMSNorm", "ScaleNorm")):
        family = next(f for f in FAMILIES if f.name == ("LayerNorm" if form.kind == "layer" else "RMSNorm"))
        return _stayed(f"{norm.name} is {form}, which {family.why}", family, ran)
    if family is None:
        text = f"no rule knows what {norm.name} ({norm.layer}) computes, and no pass of this run has anything to move"
        return Refusal(Reason.UNSUPPORTED_LAYER, text)
    if "fold-bn" in ran and family.verdict == "folds":  # it was looked at, and found to be no such map
        text = f"{norm.name} ({norm.layer}) is {family.name} by name, but does more than add and multiply constants"
        return Refusal(Reason.FORWARD_OVERRIDDEN, text)
    return _stayed(f"{norm.name} is {family.name}, which {family.why}", family, ran)


def _stayed(text: str, family: Family, ran: tuple[str, ...]) -> Refusal:
    """Return the refusal of a norm that stays, without advice to run a pass that ran and found nothing to move."""
    advice = [part for part in family.advice.split("; ") if not any(name in part for name in ran)]
    if _GAIN in family.advice and _GAIN not in advice:
        text += "; fold-affine finds no gain and no shift of it to move"
    return Refusal(family.reason, text, "; ".join(advice))


def notes(norms: list[Norm], graph: ModelGraph) -> Iterator[str]:
    """Yield a warning for each norm whose result for one sample depends on the others of its batch."""
    for norm in norms:
        family = family_of(graph.module(norm.module) if norm.module is not None else None, norm.layer)
        if family is not None and family.name == "Region Normalization":
            yield f"{norm.name} ({family.name}) takes its statistics from the batch, also in eval mode"


def page() -> str:
    """Return ``docs/reference/norms.md``."""
    return "\n".join([_HEAD, *_table(FAMILIES), "", _COMPOUND, *_table(COMPOUNDS), "", _WEIGHT, *_table(WEIGHTS), ""])


def _table(families: tuple[Family, ...]) -> Iterator[str]:
    yield "| family | verdict | it ... | to do | source, layer |"
    yield "| --- | --- | --- | --- | --- |"
    for f in families:
        label = "; a *reconstruction*" if f.reconstruction else ""
        yield f"| {f.name} | {f.verdict} | {f.why} | {f.advice or '-'} | {f.source}{label} |"


_HEAD = """# Norms

What becomes of each published norm, and of what normalises weights. `normfuse inspect` says the same of each layer of a
model, by its class or, for a LayerNorm or RMSNorm, by what it computes when it is run.

- *folds*: in eval mode it is a fixed map per channel, and moves into the weights around it.
- *partial*: a part of it folds or moves; the rest depends on its input, and stays.
- *stays*: nothing of it can move.
- *materialises*: it computes a weight, which becomes a plain one.

Numbers are arXiv identifiers. A *reconstruction* follows from what is published of a method; its formula was not taken
from the paper or the authors' code.

## Norms of activations

A norm is found as a layer, as a call of a torch function, or written out in torch operations (`x - x.mean(-1)` and what
follows). A layer that only adds and multiplies constants in eval mode, whatever its name promises, folds as what it is.
Layers of Apex, Megatron and Transformer Engine are known by name. In an ONNX file, a LayerNorm that is written out in
small nodes becomes one `LayerNormalization`.
"""
_COMPOUND = """## Made of norms
"""
_WEIGHT = """## Norms of weights
"""
