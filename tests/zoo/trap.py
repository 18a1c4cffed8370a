"""How a hostile model is registered: the class, its example input, and the verdict on each of its norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.base import Reason
from normfuse.report import Status
from tests.parity import Inputs, randomize_norms

FOLDED = Status.APPLIED
Verdict = Reason | Status
ZOO: dict[str, Trap] = {}


@dataclass(frozen=True, slots=True)
class Trap:
    """A hostile model.

    Attributes:
        build: Returns a fresh model with random weights and norms, in eval mode; the same at each call.
        inputs: Makes its example input.
        verdicts: By norm: ``FOLDED``, the reason of the refusal, or another status.
        tolerance: For :func:`tests.parity.assert_parity`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    verdicts: Mapping[str, Verdict]
    tolerance: float | None = None


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same random input at each call; (2, 4, 6, 6) by default."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, 4, 6, 6)), generator=generator, dtype=torch.float64).to(dtype)


def trap(
    *shape: int,
    name: str = "",
    inputs: Callable[[], Inputs] | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    positive: bool = False,
    prepare: Callable[[nn.Module], Any] | None = None,
    **verdicts: Verdict,
) -> Callable[[Any], Any]:
    """Register a model class, or a function that makes a model, in ``ZOO``.

    Args:
        shape: Of the one input tensor; the default is that of :func:`image`.
        name: In ``ZOO``; that of the class by default.
        inputs: Makes other inputs than one tensor.
        dtype: Of the model and its input.
        tolerance: See :class:`Trap`.
        positive: Give its norms positive gains.
        prepare: What to do with the model last; may return another.
        verdicts: By norm; dots of its name are written ``__``, and ``1`` is written ``_1``.
    """

    def register(build: Any) -> Any:
        def make() -> nn.Module:
            torch.manual_seed(0)
            model = randomize_norms(build().to(dtype).eval(), positive=positive)
            prepared = None if prepare is None else prepare(model)
            return prepared if isinstance(prepared, nn.Module) else model

        key = name or build.__name__
        assert key not in ZOO, key
        named = {norm.removeprefix("_").replace("__", "."): verdict for norm, verdict in verdicts.items()}
        ZOO[key] = Trap(key, make, inputs or (lambda: image(*shape, dtype=dtype)), named, tolerance)
        return build

    return register
