"""BatchNorms whose statistics follow the data they see, until they are frozen or left.

As in Tune mode, a layer of the user's changes its class, to a subclass made here; the object, its parameters and its
buffers stay, and it has its own class back afterwards. What a kind of norm does with statistics ``mean, var`` of its
own, of a batch or of each sample, is what the layer's class does with the stored ones:

    x' = (x - mean) / sqrt(var + eps) * sqrt(var_hat + eps) + mean_hat;    y = layer(x') in eval mode

so that a class that does more than normalize (timm's ``BatchNormAct2d``) does it here too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from normfuse.capture import unwrap
from normfuse.layers.change_of_class import TunedLayer
from normfuse.layers.second_moment import statistics_dtype
from normfuse.order import ADAPTING, Step, is_adapting, require
from normfuse.statistics.stored import batch_norms
from normfuse.structure import restored_on_error

M = TypeVar("M", bound=nn.Module)


class AdaptingNorm(nn.Module):
    """Base of the kinds: each has a ``forward``, and its state in one object of its own."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Name the class, which no module holds, by what it was made from."""
        cls = cast(Any, type(self))
        return _rebuild, (cls._normfuse_kind, cls._normfuse_class), dict(vars(self))

    @property
    def adaptation(self) -> Any:
        """The state of the adaptation."""
        return vars(self)[ADAPTING]

    def require_fixable(self) -> None:
        """Raise where no fixed map does what the norm does.

        Raises:
            ValueError: None does.
        """

    def fix(self) -> None:
        """Write what the norm does now into its stored statistics, where they are not that already."""

    def clear(self) -> None:
        """Remove what the adaptation added to the layer."""

    def normalized(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return what the layer's class makes of ``x``, ``(N, C, *)``, by these statistics, ``(C,)`` or ``(N, C)``."""
        layer: Any = self
        with self._copied_statistics():
            return self._moved(layer, x, mean, variance)

    def _moved(self, layer: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
        own, target = (
            (m.to(mean.dtype).reshape(shape), torch.rsqrt(v.to(mean.dtype) + layer.eps).reshape(shape))
            for m, v in ((mean, variance), (layer.running_mean, layer.running_var))
        )
        moved = (x.to(mean.dtype) - own[0]) * own[1] / target[1] + target[0]
        return self.by_stored(moved.to(x.dtype))

    @contextlib.contextmanager
    def _copied_statistics(self) -> Iterator[None]:
        """Let autograd keep copies of the stored statistics, which may be updated before it is done with them."""
        held = {key: self._buffers[key] for key in ("running_mean", "running_var")}
        self._buffers.update({key: cast(Tensor, value).clone() for key, value in held.items()})
        try:
            yield
        finally:
            self._buffers.update(held)

    def by_stored(self, x: Tensor) -> Tensor:
        """Return what the layer's class makes of ``x`` in eval mode."""
        training, self.training = self.training, False
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            self.training = training


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of a batch ``(N, C, *)``, each ``(C,)``, in float32 or better."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), axes, correction=0)
    return mean, variance


def enter(
    model: M, kind: type[AdaptingNorm], state: Callable[[Any], Any], include: Sequence[str], exclude: Sequence[str]
) -> M:
    """Let the BatchNorms of a model adapt as ``kind`` does, in place; one that adapts already is left as it is.

    Args:
        model: Any module; wrappers such as DDP are looked through.
        kind: What the norms become.
        state: Makes the state of one norm.
        include: Globs of qualified names; all, if empty.
        exclude: Globs of qualified names.

    Raises:
        OrderError: The model is folded, or has computed weights.
        ValueError: It is in Tune mode, or no BatchNorm with stored statistics is among those chosen.
    """
    inner = unwrap(model)
    require(inner, Step.RECALIBRATE)
    if any(isinstance(module, TunedLayer) for module in inner.modules()):
        raise ValueError("the model is in Tune mode, which fixes statistics; normfuse.tune_mode(model, False) ends it")
    norms = batch_norms(inner, include, exclude)
    if not norms:
        raise ValueError("no BatchNorm of this model, of those chosen, stores statistics to start from")
    with restored_on_error(inner):
        for norm in norms.values():
            if not is_adapting(norm):
                vars(norm)[ADAPTING] = state(norm)
                norm.__class__ = _adapting_class(kind, type(norm))
    return model


def adapting(model: nn.Module) -> dict[str, Any]:
    """Return the norms of a model that adapt, by name."""
    return {name: module for name, module in unwrap(model).named_modules() if is_adapting(module)}


def freeze(model: M) -> M:
    """End adaptation: fix the statistics of every norm as they are now, in place, and return the model.

    The model can then be folded. What "now" is, each method says.

    Raises:
        ValueError: A method normalizes each sample by its own statistics, which no fixed map does; nothing is changed.
    """
    norms = adapting(model)
    for norm in norms.values():
        norm.require_fixable()
    inner = unwrap(model)
    with restored_on_error(inner, inner.buffers()):
        for norm in norms.values():
            norm.fix()
        return leave(model)


def leave(model: M) -> M:
    """End adaptation: give every norm its class back, in place, and return the model.

    The stored statistics are those from before, unless the method itself updates them; trained parameters stay.
    """
    with restored_on_error(unwrap(model)):
        for norm in adapting(model).values():
            norm.clear()
            norm.__class__ = type(norm)._normfuse_class
            del vars(norm)[ADAPTING]
    return model


@functools.cache
def _adapting_class(kind: type[AdaptingNorm], cls: type[nn.Module]) -> type[nn.Module]:
    members = {"__module__": __name__, "_normfuse_kind": kind, "_normfuse_class": cls}
    return type(f"{kind.__name__}_{cls.__name__}", (kind, cls), members)


def _rebuild(kind: type[AdaptingNorm], cls: type[nn.Module]) -> nn.Module:
    made = _adapting_class(kind, cls)
    return made.__new__(made)
