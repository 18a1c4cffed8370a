"""Error bounds of ShiftQuant, as functions of the channel ranges ``r_k``.

Part of the same reconstruction as :mod:`normfuse.quantization.shiftquant`. With ``tau_k = r_max 2^-g_k`` the step of
channel k is ``tau_k / q``. The expected squared error of stochastic rounding, and the squared error of nearest
rounding, are therefore at most

    M V / (4 q^2)   for a tensor (M, K),   V = sum_k tau_k^2

``V`` is compared with what other ways to share ``G`` scales would give:

    sum_k r_k^2  <=  V_opt(G)  <=  V  <=  K r_max^2
    V  <=  sum_k max(4 r_k^2, r_max^2 4^-(G-1))  <=  4 V_opt(G) + K r_max^2 4^-(G-1)

``V_opt(G)`` gives each group its own largest range as the scale, with the best partition of the channels into G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.quantization.shiftquant import Quantized, group_indices, powers_of_half


def variance_proxy(ranges: Tensor, groups: int) -> float:
    """Return ``V`` of ShiftQuant for the ranges ``(K,)``, all at least 0."""
    r = _checked(ranges, groups)
    if r.numel() == 0:
        return 0.0
    return float((r.max() * powers_of_half(group_indices(r, groups), r.dtype)).square().sum())


def variance_bound(ranges: Tensor, groups: int) -> float:
    """Return ``sum_k max(4 r_k^2, r_max^2 4^-(G-1))``, which ``V`` never exceeds."""
    r = _checked(ranges, groups)
    if r.numel() == 0:
        return 0.0
    return float((4 * r.square()).clamp(min=float(r.max()) ** 2 * 4.0 ** (1 - groups)).sum())


def optimal_variance(ranges: Tensor, groups: int) -> float:
    """Return ``V_opt``: the least sum of squared scales over all partitions of the channels into ``groups`` groups.

    By dynamic programming over the sorted ranges, where the best groups are intervals: ``O(G K^2)`` time and ``K^2``
    memory, for analysis rather than for every step.
    """
    r = _checked(ranges, groups).sort(descending=True).values.square()
    count = r.numel()
    if count == 0:
        return 0.0
    ends, starts = torch.arange(1, count + 1, device="cpu"), torch.arange(count, device="cpu")
    size = ends - starts.unsqueeze(1)  # (start, end): channels in the interval
    cost = torch.where(size > 0, size * r.unsqueeze(1), torch.inf)
    best = cost[0]  # of the first `end` channels, in one group
    for _ in range(min(groups, count) - 1):
        before = torch.cat([r.new_zeros(1), best[:-1]])  # of the channels in front of `start`
        best = (before.unsqueeze(1) + cost).min(0).values
    return float(best[-1])


def squared_error_bound(quantized: Quantized) -> float:
    """Return ``M V / (4 q^2)``: the most that the squared error of the whole tensor can be, expected or exact.

    For ``range="max"``; what a percentile clips comes on top.
    """
    rows = quantized.values.numel() // max(1, quantized.shift.numel())
    return rows * float(quantized.channel_scales().double().square().sum()) / 4


def _checked(ranges: Tensor, groups: int) -> Tensor:
    if ranges.dim() != 1 or bool((ranges < 0).any()) or groups < 1:
        raise ValueError("ranges must be a vector without negative elements, and groups at least 1")
    return ranges.detach().to(device="cpu", dtype=torch.float64)
