"""SAR: reliable and sharpness-aware entropy minimization at test time, of the gains and shifts of norms.

*Towards Stable Test-Time Adaptation in Dynamic Wild World*, arXiv 2302.12400, with the choices of the authors' code.
With the entropy ``H_i`` of the prediction of sample i, trained parameters ``theta``, and the base optimizer's step:

    S_1 = {i: H_i(theta) < E_0};   g = grad mean_S1 H(theta);   theta' = theta + r g / (|g| + 1e-12)
    S_2 = {i in S_1: H_i(theta') < E_0};   g' = grad mean_S2 H(theta');   theta <- step(theta, g')
    e   <- 0.9 e + 0.1 mean_S2 H(theta'), at first mean_S2 H(theta');    if e < e_0: theta, optimizer as at the start

E_0 = 0.4 ln(classes), r = 0.05, e_0 = 0.2. BatchNorms work on the statistics of the batch. Where no sample is reliable
the gradient is 0 and the step that of the optimizer's momentum. After a return to the start the average starts afresh;
the authors' code keeps it, and may return at the next step again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.capture import unwrap
from normfuse.norms import is_norm
from normfuse.order import Step, require
from normfuse.statistics.adapting import adapting, freeze, leave
from normfuse.statistics.alpha import batch_statistics
from normfuse.statistics.stored import batch_norms, chosen
from normfuse.statistics.unmix import Components

LAST_STAGE = ("*layer4*", "*blocks.9*", "*blocks.10*", "*blocks.11*", "norm", "*norm.*")
"""What the authors leave out: the last stage of ResNets, the last blocks and the final norm of ViT-Base."""
_MARGIN = 0.4


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each prediction, ``(N,)``, in nats, from logits ``(N, classes)``."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def sar_parameters(model: nn.Module, *, exclude: Sequence[str] = LAST_STAGE) -> list[nn.Parameter]:
    """Return gains and shifts of the norms of a model, without those of its last stage, and freeze everything else.

    Args:
        model: Any module.
        exclude: Globs of qualified names of norms to leave alone; :data:`LAST_STAGE` by default.

    Raises:
        ValueError: No norm with a gain or shift is left.
    """
    found: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if is_norm(module) and chosen(name, (), exclude):
            affine = (module._parameters.get(key) for key in ("weight", "bias"))
            found |= {id(parameter): parameter for parameter in affine if parameter is not None}
    if not found:
        raise ValueError("no norm of this model, of those chosen, has a gain or shift to adapt; folding removes them")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in found)
    return list(found.values())


class SAR:
    """Adapts a classifier to each batch it is called on; the model is edited in place.

    The model is put into eval mode, its BatchNorms onto the statistics of the batch, unless they adapt already
    (:func:`normfuse.statistics.unmix_tns`). Everything but what is trained is frozen. The authors prefer models with
    LayerNorm or GroupNorm, whose statistics do not depend on the batch.

    Args:
        model: Returns logits ``(N, classes)``.
        optimizer: Makes the base optimizer from the parameters; by default SGD with lr 2.5e-4 and momentum 0.9, which
            the authors use for ResNet-50 at a batch of 64 (1e-3 for ViT).
        margin: E_0; by default 0.4 ln(classes), with 1000 classes the authors' value.
        radius: r.
        reset_below: e_0; 0 never goes back to the start.
        exclude: As for :func:`sar_parameters`.

    Attributes:
        average: e; None before the first reliable sample.
        resets: How often the parameters went back to the start.

    Raises:
        OrderError: The model is folded, or has computed weights: folding moves gains and shifts into weights.
        ValueError: No norm has a gain or shift.

    Example:
        >>> adapted = SAR(model)  # doctest: +SKIP
        >>> for images in stream:  # doctest: +SKIP
        ...     predictions = adapted(images).argmax(1)
        >>> model = adapted.finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        margin: float | None = None,
        radius: float = 0.05,
        reset_below: float = 0.2,
        exclude: Sequence[str] = LAST_STAGE,
    ) -> None:
        self.model = unwrap(model)
        require(self.model, Step.RECALIBRATE)
        self.parameters = sar_parameters(self.model, exclude=exclude)
        if batch_norms(self.model):
            batch_statistics(self.model)
        self.model.eval()
        self.optimizer = optimizer(self.parameters) if optimizer else _sgd(self.parameters)
        self.margin, self.radius, self.reset_below = margin, radius, reset_below
        self.average: float | None = None
        self.resets = 0
        self._start = [parameter.detach().clone() for parameter in self.parameters]
        self._optimizer_start = copy.deepcopy(self.optimizer.state_dict())

    @torch.enable_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits of a batch, computed before the step that adapts to it: ``(N, classes)``."""
        self.optimizer.zero_grad()
        logits = self.model(*args, **kwargs)
        margin = _MARGIN * math.log(logits.shape[1]) if self.margin is None else self.margin
        first = entropy(logits)
        reliable = first.detach() < margin
        _mean(first, reliable).backward()
        before = self._climb()
        second = entropy(self.model(*args, **kwargs))
        reliable = reliable & (second.detach() < margin)
        _mean(second, reliable).backward()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if reliable.any():
            self._follow(float(second.detach()[reliable].mean()))
        return logits.detach()

    def reset(self) -> None:
        """Go back to the parameters and the optimizer of the start."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._start, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self._optimizer_start))
        self.average = None

    def finish(self) -> nn.Module:
        """Return the model with its norms fixed: on the pooled statistics of the batches seen, where they had none.

        Each batch was seen twice, before and after the climb. Norms that UnMix-TNS adapts go back to stored statistics.
        """
        unmixed = any(isinstance(norm.adaptation, Components) for norm in adapting(self.model).values())
        return leave(self.model) if unmixed else freeze(self.model)

    @torch.no_grad()
    def _climb(self) -> list[Tensor]:
        """Move the parameters along the gradient by the radius, and return what they were."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm() if grads else torch.zeros(())
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad * (self.radius / (norm + 1e-12)))
        self.optimizer.zero_grad()
        return before

    def _follow(self, loss: float) -> None:
        self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        if self.average < self.reset_below:
            self.reset()
            self.resets += 1


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values, 0 with a gradient of 0 if there are none."""
    return values[chosen].sum() / max(int(chosen.sum()), 1)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=2.5e-4, momentum=0.9)
