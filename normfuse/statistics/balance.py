"""AdaB2N: BatchNorm for continual learning, balanced over the tasks in a batch and over time.

*Overcoming Recency Bias of Normalization Statistics in Continual Learning*, arXiv 2310.08855, with the choices of the
authors' code. Sample i is of task t(i); ``n_j`` samples of the batch are of task j; each norm learns logits ``phi_j``:

    w_j   = (exp(phi_j) + n_j) / sum over seen tasks of the same;    weight of sample i: w_t(i) / n_t(i)
    mu_B  = sum_i weight_i E_space[x_i];    var_B = sum_i weight_i E_space[(x_i - mu_B)^2]
    eta_1 = m^kappa;    eta_t = eta_(t-1) / (eta_(t-1) + (1 - m)^kappa)         kappa = 1: m;  kappa = 0: 1/t
    mu_hat <- (1 - eta) mu_hat + eta mu_B;    var_hat <- (1 - eta) var_hat + eta var_B
    penalty = sum over norms of [ MSE(mu_B, mu_hat) + MSE(var_B, var_hat) ]     (after the update)

During the first task the moments are the ordinary ones. In eval mode the layer is the BatchNorm it was, and folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.layers.second_moment import statistics_dtype
from normfuse.statistics.adapting import AdaptingNorm, adapting, enter, leave, moments_of

LOGITS = "task_logits"


@dataclass
class Balance:
    """The state of one norm.

    Attributes:
        kappa: Of the schedule.
        momentum: m.
        rate: eta of the last step; 0 before the first.
        tasks: The task of each sample of the next batch, ``(N,)``; None for ordinary moments.
        seen: Number of tasks seen, the present one included.
        penalty: Of the last batch.
    """

    kappa: float
    momentum: float
    rate: float = 0.0
    tasks: Tensor | None = None
    seen: int = 1
    penalty: Tensor | None = None

    def advance(self) -> float:
        """Return eta of this step."""
        before, keep = self.rate, (1 - self.momentum) ** self.kappa
        self.rate = before / (before + keep) if before else self.momentum**self.kappa
        return self.rate


class BalancedNorm(AdaptingNorm):
    """A BatchNorm that trains on balanced moments."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``, ``(N, C, *)``, normalized by the balanced moments in training mode, else as stored."""
        layer, state = cast(Any, self), cast(Balance, self.adaptation)
        if not self.training:
            return self.by_stored(input)
        balanced = state.tasks is not None and state.seen > 1
        mean, variance = self._balanced(input, state) if balanced else moments_of(input)
        output = self.normalized(input, mean, variance)
        eta = state.advance()
        with torch.no_grad():
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), eta)
            layer.running_var.lerp_(variance.to(layer.running_var.dtype), eta)
            if getattr(layer, "num_batches_tracked", None) is not None:
                layer.num_batches_tracked += 1
        stored = layer.running_mean.to(mean.dtype).clone(), layer.running_var.to(mean.dtype).clone()
        state.penalty = F.mse_loss(mean, stored[0]) + F.mse_loss(variance, stored[1])
        return output

    def _balanced(self, x: Tensor, state: Balance) -> tuple[Tensor, Tensor]:
        logits = cast(Tensor, getattr(self, LOGITS))[: state.seen]
        tasks = cast(Tensor, state.tasks).to(x.device)
        if tasks.shape[0] != x.shape[0]:
            raise ValueError(f"{tasks.shape[0]} tasks were given for a batch of {x.shape[0]} samples")
        x = x.to(statistics_dtype(x.dtype))
        counts = torch.bincount(tasks, minlength=state.seen).to(x.dtype)
        weights = logits.to(x.dtype).exp() + counts
        each = (weights / weights.sum())[tasks] / counts[tasks]  # (N,)
        mean = _over_space(x).T @ each
        centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
        return mean, _over_space(centred.square()).T @ each

    def clear(self) -> None:
        """Remove the logits."""
        del self._parameters[LOGITS]


class AdaB2N:
    """Trains a model with AdaB2N; the model is edited in place.

    Each BatchNorm gets a parameter ``task_logits`` until :meth:`finish`, so make the optimizer afterwards.

    Args:
        model: Any module with BatchNorms.
        tasks: How many tasks there will be.
        kappa: 1 for the momentum of the norm, 0 for the mean over all batches; the authors search 0.1, 0.4, 0.7, 1.
        include: Globs of qualified names; only these norms. All, if empty.
        exclude: Globs of qualified names of norms to leave alone.

    Raises:
        OrderError: The model is folded, or has computed weights.
        ValueError: An argument is out of range, a norm has no momentum, or none stores statistics.

    Example:
        >>> balance = AdaB2N(model, tasks=5)  # doctest: +SKIP
        >>> for task, loader in enumerate(loaders):  # doctest: +SKIP
        ...     for x, y, tasks in loader:  # tasks of the replayed samples are below `task`
        ...         balance.set_tasks(tasks)
        ...         loss = F.cross_entropy(model(x), y) + 0.1 * balance.penalty()
        ...     balance.end_task()
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: int,
        *,
        kappa: float = 0.4,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if tasks < 1 or not 0 <= kappa <= 1:
            raise ValueError("give tasks >= 1 and kappa from 0 to 1")
        self.model, self.tasks = model, tasks
        enter(model, BalancedNorm, lambda norm: self._state(norm, kappa), include, exclude)

    def _state(self, norm: Any, kappa: float) -> Balance:
        momentum = getattr(norm, "momentum", None)
        if momentum is None:
            raise ValueError("AdaB2N needs BatchNorms with a momentum")
        like = norm.running_mean
        norm.register_parameter(LOGITS, nn.Parameter(torch.zeros(self.tasks, dtype=like.dtype, device=like.device)))
        return Balance(kappa, momentum)

    @property
    def norms(self) -> list[Any]:
        """The norms that take part."""
        return [norm for norm in adapting(self.model).values() if isinstance(norm.adaptation, Balance)]

    def set_tasks(self, tasks: Tensor | None) -> None:
        """Say of which task each sample of the next batches is: ``(N,)``, from 0; None for ordinary moments.

        Raises:
            ValueError: A task was not seen yet.
        """
        for norm in self.norms:
            if tasks is not None and tasks.numel() and int(tasks.max()) >= norm.adaptation.seen:
                raise ValueError(f"task {int(tasks.max())} has not begun: end_task() ends the one before")
            norm.adaptation.tasks = tasks

    def penalty(self) -> Tensor:
        """Return the sum over the norms of how far the last batch is from the stored statistics; a scalar.

        Raises:
            ValueError: No batch has run in training mode.
        """
        terms = [norm.adaptation.penalty for norm in self.norms if norm.adaptation.penalty is not None]
        if not terms:
            raise ValueError("no batch has run in training mode yet")
        return torch.stack(terms).sum()

    def end_task(self) -> None:
        """Say that a task has ended, and the next begins."""
        for norm in self.norms:
            norm.adaptation.seen = min(norm.adaptation.seen + 1, self.tasks)
            norm.adaptation.tasks = None

    def finish(self) -> nn.Module:
        """Return the model with plain BatchNorms, on the statistics that were learned."""
        return leave(self.model)


def _over_space(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) if x.dim() > 2 else x
