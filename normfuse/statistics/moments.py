"""Mean and variance of each channel, in one pass over any number of batches and processes.

A batch of n tokens with mean m and sum of squared differences s is merged into what was seen before (N, M, S) by the
update of Chan, Golub and LeVeque (*Updating formulae and a pairwise algorithm for computing sample variances*, 1979):

    d = m - M;    M <- M + d n / (N + n);    S <- S + s + d^2 N n / (N + n);    N <- N + n

Mean M and variance S / N are then those of all tokens at once, whatever the batches were, up to rounding in float64.
The mean of the batches' variances is not: it lacks the variance of their means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Group = dist.ProcessGroup | Literal["world"] | None


class ChannelMoments:
    """Moments of ``C`` channels, in float64 on the CPU.

    Attributes:
        count: N, the number of tokens.
        mean: M, ``(C,)``.
        squares: S, the sum of squared differences from the mean, ``(C,)``.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size).double()
        self.squares = torch.zeros(size).double()

    def reset(self) -> None:
        """Forget every token."""
        self.count = 0
        self.mean, self.squares = torch.zeros_like(self.mean), torch.zeros_like(self.squares)

    def add(self, tokens: Tensor) -> None:
        """Merge the tokens of a batch, ``(tokens, C)`` in float64."""
        if tokens.shape[0]:
            variance, mean = torch.var_mean(tokens, 0, correction=0)
            self.merge(tokens.shape[0], mean.cpu(), variance.cpu() * tokens.shape[0])

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Merge ``count`` tokens with this mean and sum of squared differences, each ``(C,)`` in float64."""
        total = self.count + count
        if total == 0:
            return
        step = mean - self.mean
        self.mean = self.mean + step * count / total
        self.squares = self.squares + squares + step.square() * self.count * count / total
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The variance of all tokens, not corrected for their number: ``(C,)``."""
        return self.squares / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """``E[x^2]``, ``(C,)``."""
        return self.variance + self.mean.square()

    @property
    def is_finite(self) -> bool:
        """Whether every moment is a number."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.squares).all())


def gather(moments: Sequence[ChannelMoments], group: Group, device: torch.device) -> None:
    """Give each process the moments over all processes of a group, in place; the same to the last bit.

    Args:
        moments: Of the same channels, in the same order, in each process.
        group: ``"world"``, a process group, or None, where nothing is to do.
        device: Where the group communicates, unless it is a gloo group.
    """
    if group is None or not moments:
        return
    handle = None if group == "world" else group
    packed = torch.cat([torch.cat([m.mean.new_tensor([m.count]), m.mean, m.squares]) for m in moments])
    packed = packed.to("cpu" if dist.get_backend(handle) == "gloo" else device)
    received = [torch.empty_like(packed) for _ in range(dist.get_world_size(handle))]
    dist.all_gather(received, packed, group=handle)
    parts = [values.cpu().split([1 + 2 * len(m.mean) for m in moments]) for values in received]
    for index, one in enumerate(moments):
        size = len(one.mean)
        one.reset()
        for part in parts:
            count, mean, squares = part[index].split([1, size, size])
            one.merge(int(count), mean, squares)
