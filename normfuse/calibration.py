"""Calibration data, and what norms do on it: streaming moments of each channel.

Over the tokens S of all batches, with x what a norm reads and y what it should write, channel by channel:

    s = Cov(y, x) / Var(x)          the least-squares slope            y ~ s x + (E[y] - s E[x])
    nu = E[x^2]                     the second moment
    1 - R^2 = 1 - Cov(y, x)^2 / (Var(x) Var(y))    what no fixed map of the channel can explain

Moments are kept in float64 about their mean, and a batch is merged into them by the update of Chan, Golub and LeVeque
(*Updating formulae and a pairwise algorithm for computing sample variances*, 1979).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.capture import eval_mode
from normfuse.default_device import runs_users_code
from normfuse.errors import CalibrationError
from normfuse.graph import Inputs
from normfuse.outputs import arguments, map_tensors

Calibration = Tensor | Mapping[str, Any] | Iterable[Any]
PaddingMask = Callable[[Any], "Tensor | None"]
Listener = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""Called with what a norm read, what it returned, and the padding of the batch."""
_CONSTANT = 1e-20
"""Variance, relative to the squared mean, below which a channel does not vary but by rounding."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One item of the data: what the model is called on, and which tokens are padding, ``(B, T)``, if any."""

    inputs: Inputs
    padding: Tensor | None


class Batches:
    """The items of calibration data as calls of a model, on its device and in its precision.

    An item is what the model is called on, as ``example_inputs``: a tensor, a tuple of positional arguments or a
    mapping of keyword arguments. Of a *list*, which a ``DataLoader`` makes of ``(input, label)`` pairs, only the first
    element counts. Data that is itself one tensor or one mapping is a single item.

    Args:
        calibration: The items; they are read more than once, so an iterator is refused.
        model: What they are for.
        padding_mask: Returns for an item a bool tensor ``(B, T)``, True at padding, or None. By default the
            ``attention_mask`` of a mapping says it, where it has two axes.

    Raises:
        ValueError: There is no data, or it is an iterator.
        CalibrationError: An item, when it is read, holds NaN or infinity.
    """

    def __init__(
        self, calibration: Calibration | None, model: nn.Module, padding_mask: PaddingMask | None = None
    ) -> None:
        if calibration is None:
            raise ValueError("this needs calibration data: pass calibration=, a DataLoader or a list of inputs")
        items = [calibration] if isinstance(calibration, Tensor | Mapping) else calibration
        if not isinstance(items, Iterable):
            raise ValueError(f"calibration is a tensor, a mapping or an iterable, not a {type(calibration).__name__}")
        if isinstance(items, Iterator):
            raise ValueError("calibration data is read more than once: pass a DataLoader or a list, not an iterator")
        self.items = items
        self.padding_mask = padding_mask or _attention_padding
        tensors = [*model.parameters(), *model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for item in self.items:
            empty = False
            yield self.batch(item)
        if empty:
            raise ValueError("the calibration data is empty")

    def first(self) -> Inputs:
        """Return the inputs of the first item."""
        return next(iter(self)).inputs

    def batch(self, item: Any) -> Batch:
        """Return one item of the data, moved to where the model is."""
        item = item[0] if isinstance(item, list) and item else item
        padding = self.padding_mask(item)
        map_tensors(item, _require_finite)
        return Batch(map_tensors(item, self._moved), None if padding is None else padding.to(self.device))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else None)


def _require_finite(tensor: Tensor) -> Tensor:
    """Return a tensor of the data, all of whose values are finite; a mask of 0 and -inf is none of data.

    Raises:
        CalibrationError: It holds NaN or infinity.
    """
    if tensor.is_floating_point():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad and not bool(((tensor == 0) | (tensor == -torch.inf)).all()):
            text = f"{bad} of {tensor.numel()} values of the calibration data are NaN or infinite"
            raise CalibrationError(f"{text}: leave out or mend the samples that hold them")
    return tensor


def _attention_padding(item: Any) -> Tensor | None:
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    return mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Moments:
    """Moments of pairs of channels ``x`` and ``y``, each ``(tokens, C)``, in float64."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean_x, self.mean_y = torch.zeros(size).double(), torch.zeros(size).double()
        self.var_x, self.var_y, self.cov = (torch.zeros(size).double() for _ in range(3))  # sums, not yet over count

    def add(self, x: Tensor, y: Tensor) -> None:
        """Merge the tokens of a batch."""
        new = x.shape[0]
        if new == 0:
            return
        mean_x, mean_y = x.mean(0), y.mean(0)
        from_x, from_y = x - mean_x, y - mean_y
        sums = [(p * q).sum(0).cpu() for p, q in ((from_x, from_x), (from_y, from_y), (from_x, from_y))]
        step_x, step_y = mean_x.cpu() - self.mean_x, mean_y.cpu() - self.mean_y
        weight = self.count * new / (self.count + new)
        self.var_x += sums[0] + step_x * step_x * weight
        self.var_y += sums[1] + step_y * step_y * weight
        self.cov += sums[2] + step_x * step_y * weight
        self.count += new
        self.mean_x += step_x * new / self.count
        self.mean_y += step_y * new / self.count

    @property
    def second_moment(self) -> Tensor:
        """``E[x^2]``, ``(C,)``."""
        return self.var_x / max(self.count, 1) + self.mean_x.square()

    @property
    def is_finite(self) -> bool:
        """Whether every moment is a number."""
        return bool(torch.isfinite(torch.stack([self.var_x, self.var_y, self.cov, self.mean_x, self.mean_y])).all())

    def line(self) -> tuple[Tensor, Tensor]:
        """Return slope and intercept, each ``(C,)``, of y on x; a channel that does not vary gets the constant E[y]."""
        varies = self.var_x > _CONSTANT * self.count * self.mean_x.square()
        slope = torch.where(varies, self.cov / torch.where(varies, self.var_x, 1.0), 0.0)
        return slope, self.mean_y - slope * self.mean_x

    def unexplained(self) -> float:
        """Return 1 - R^2 over all channels: the mean squared error of the line over the variance of y."""
        slope, _ = self.line()
        total = float(self.var_y.sum())
        return float((self.var_y - slope * self.cov).clamp(min=0).sum()) / total if total > 0 else 0.0


class Enough(BaseException):
    """Ends a forward pass whose remainder is of no interest; not an Exception, which a forward may catch."""


@torch.no_grad()
@runs_users_code
def listen(model: nn.Module, listeners: Mapping[nn.Module, Listener], batches: Iterable[Batch]) -> None:
    """Run a model in eval mode on data, and hand each call of some norms to their listeners.

    A listener that raises :class:`Enough` ends the pass over its batch.
    """
    padding: list[Tensor | None] = [None]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = (*args, *kwargs.values())
        if len(read) == 1 and not kwargs and isinstance(read[0], Tensor) and isinstance(output, Tensor):
            listeners[module](read[0], output, padding[0])

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in listeners]
    try:
        with eval_mode(model), module_path():
            for batch in batches:
                padding[0] = batch.padding
                args, kwargs = arguments(batch.inputs)
                with contextlib.suppress(Enough):
                    model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def module_path() -> Iterator[None]:
    """Keep ``nn.TransformerEncoderLayer`` from computing its norms without calling them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
