"""One of the two models of a loop, with its optimizer: in Tune mode, or plain with its norms in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normfuse.layers.change_of_class import TunedLayer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.02, weight_decay=1e-3, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-3, eps=1e-3, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, eps=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3, eps=1e-3),
}


class Side:
    """A model, what makes its inputs from a seed, and its optimizer."""

    def __init__(self, model: nn.Module, inputs: Callable[[int], Tensor], optimizer: str, *, tuned: bool) -> None:
        self.tuned, self.kind = tuned, optimizer
        self.model, self.inputs = model, inputs
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())
        self.handles: list[Any] = []
        self.seen: list[Tensor] = []
        self.train(True)

    def train(self, mode: bool) -> None:
        """Put everything but the norms in a mode."""
        self.model.train(mode)
        self.settle()

    def settle(self) -> None:
        """Put the norms that are not in Tune mode in eval mode, as it has them."""
        for norm in self.norms():
            if not isinstance(norm, TunedLayer):
                norm.eval()

    def replace(self, model: nn.Module) -> None:
        """Go on with a copy of the model, and the optimizer's state."""
        state = copy.deepcopy(self.optimizer.state_dict())
        self.model, self.handles = model, []
        self.renew()
        self.optimizer.load_state_dict(state)

    def renew(self) -> None:
        """Give the optimizer the parameters that there are now."""
        self.optimizer = OPTIMIZERS[self.kind](self.model.parameters())

    def norms(self) -> list[Any]:
        """Return the norms, in the order of the model."""
        return [module for module in self.model.modules() if isinstance(module, _NormBase)]

    def products(self) -> list[Any]:
        """Return the convolutions and linear layers, in the order of the model."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    def values(self, x: Tensor, seed: int) -> Tensor:
        """Return the outputs for a batch."""
        torch.manual_seed(seed)
        return self.model(x.clone())

    def step(self, x: Tensor, seed: int, loss: Callable[[Side, Tensor, int], Tensor], clip: float | None) -> Tensor:
        """Train on a batch; return the loss."""
        self.optimizer.zero_grad()
        value = loss(self, x, seed)
        if value.requires_grad:
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
        return value.detach()

    def state(self) -> dict[str, Tensor]:
        """Return all that the model holds and all gradients, by name."""
        grads = {f"gradient of {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {**{name: t.detach() for name, t in self.model.state_dict().items()}, **grads}
