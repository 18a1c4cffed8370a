"""Swap LayerNorm and RMSNorm for UnifiedNorm, each fitted to what the old norm computes on data.

    y = gamma z + beta,   z = x / sqrt(nu + eps),   nu = E[x^2]                                (per channel)

    least squares:  s = Cov(y, x) / Var(x),   gamma = s sqrt(nu + eps),   beta = E[y] - s E[x]
    copy:           gamma and beta of the old norm

The least-squares start is the best fixed map of each channel on the data by construction. UnifiedNorm is arXiv
2208.01313; fitting it to a trained LayerNorm is a *reconstruction*, not the paper's method, which trains from scratch.
It is not LayerNorm: fine-tune afterwards, or reconstruct (:func:`normfuse.reconstruct`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normfuse.base import Match, Reason, Refused
from normfuse.calibration import Moments
from normfuse.graph import ModelGraph
from normfuse.norm_forms import Form
from normfuse.norm_swap import NormSwap
from normfuse.surgery import Spec

Start = Literal["least-squares", "copy"]
NOTE_PADDING = {"op": "note_padding"}
STARTS: tuple[Start, ...] = ("least-squares", "copy")


class SwapUnified(NormSwap):
    """LayerNorm and RMSNorm into UnifiedNorm; needs calibration data.

    Args:
        calibration: As for :func:`normfuse.swap_norms`.
        order: As for :func:`normfuse.swap_norms`.
        start: ``"least-squares"``, or ``"copy"`` for the gain and shift of the old norm.
        padding_mask: As for :func:`normfuse.swap_norms`.
        options: As for :func:`normfuse.swap_norms`.

    Raises:
        ValueError: There is no data, or an argument is none of those named.
    """

    name = "swap-unified"
    starts = STARTS

    def replacement(self, form: Form, moments: Moments) -> tuple[Spec, dict[str, Tensor]]:
        """Return a UnifiedNorm with the second moment of the data, and gain and shift of the chosen start."""
        eps = form.eps if form.eps > 0 else 1e-5
        kwargs = {"eps": eps, "dim": form.dim, **self.options, "num_features": form.size}
        nu = moments.second_moment
        gain, shift = form.gain, form.shift
        if self.start == "least-squares":
            slope, shift = moments.line()
            gain = slope * torch.sqrt(nu + kwargs["eps"])
        if not bool(torch.isfinite(torch.stack([gain, shift, nu])).all()):
            raise Refused(Reason.NONFINITE, "the fitted gain or shift is not finite")
        spec = {"class": "normfuse.layers.unified_norm.UnifiedNorm", "kwargs": kwargs}
        return spec, {"weight": gain, "bias": shift, "running_second_moment": nu}

    def apply(self, match: Match, graph: ModelGraph) -> None:
        """Put the new norm in the place of the old one; masks of the model's own are noted for it in training."""
        super().apply(match, graph)
        if NOTE_PADDING not in graph.edits:
            graph.perform(NOTE_PADDING)
