"""LayerNorm and RMSNorm by the mean absolute deviation.

Over the m values of a token, with f = sqrt(pi/2) or 1:

    L1LayerNorm:  mu = E[x];   s = E[|x - mu|];   y = gamma (x - mu) / (f s + eps) + beta
    L1RMSNorm:                 s = E[|x|];        y = gamma x / (f s + eps)

A reconstruction: the L1 layers of arXiv 2411.10948 are known by its abstract only. The conversion from the L2 layer is
not exact, as ``s / sigma`` differs from token to token; ``gamma = f kappa gamma_2`` with kappa its mean, measured by
:func:`normfuse.layers.mean_deviation.deviation_ratio`, or ``sqrt(2/pi)``, that of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfuse.layers.mean_deviation import GAUSSIAN_RATIO, Sets, deviation_factor, normalize

if TYPE_CHECKING:
    from typing_extensions import Self


class L1TokenNorm(nn.Module):
    """Base of L1LayerNorm and L1RMSNorm.

    Attributes:
        centred: Whether the mean of the token is subtracted.
    """

    centred: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float,
        gaussian: bool,
        parameters: dict[str, bool],
        **options: Any,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not shape or min(shape) < 1 or eps <= 0:
            raise ValueError("give a normalized_shape of sizes >= 1 and eps > 0")
        self.normalized_shape: tuple[int, ...] = shape
        self.eps = eps
        self.gaussian = gaussian
        for name, present in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)) if present else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gain 1 and shift 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token of ``x``.

        Args:
            x: ``(*, *normalized_shape)``.

        Returns:
            Shape and dtype of ``x``; statistics are computed in float32, or in float64 where ``x`` is.

        Raises:
            ValueError: The trailing axes have other sizes.
            TypeError: ``x`` is not floating-point.
        """
        shape = self.normalized_shape
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point input, not {x.dtype}")
        if tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"input {tuple(x.shape)} does not end in {shape}")
        axes = tuple(range(-len(shape), 0))
        sets = Sets(axes, shape, self.eps, deviation_factor(self.gaussian), self.centred)
        return normalize(x, self.weight, self.bias, sets)

    def extra_repr(self) -> str:
        """Show the arguments."""
        text = f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"
        return f"{text}, gaussian=True" if self.gaussian else text


class L1LayerNorm(L1TokenNorm):
    """LayerNorm that divides by the mean absolute deviation; a reconstruction, see the module.

    Args:
        normalized_shape: Sizes of the trailing axes.
        eps: Added to the deviation.
        elementwise_affine: Whether there is a gain, ``weight``, of ``normalized_shape``.
        bias: Whether there is a shift, ``bias``, beside the gain.
        gaussian: Multiply the deviation by sqrt(pi/2), with which it estimates the standard deviation of Gaussian
            values, so that a network that had LayerNorm starts close to where it was.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of range.
    """

    centred = True

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        gaussian: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parameters = {"weight": elementwise_affine, "bias": elementwise_affine and bias}
        super().__init__(normalized_shape, eps, gaussian, parameters, device=device, dtype=dtype)

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm, kappa: float = GAUSSIAN_RATIO, *, gaussian: bool = False) -> Self:
        """Return the layer that comes closest to a LayerNorm; not equal to it.

        Args:
            norm: The LayerNorm. Its eps, under the root, is not carried over where it matters: tokens of hardly any
                deviation.
            kappa: The mean of ``s / sigma`` over tokens.
            gaussian: As for the class.

        Raises:
            TypeError: ``norm`` is not a LayerNorm.
            ValueError: ``kappa`` is not in (0, 1], where ``s / sigma`` always is.
        """
        return _converted(cls, norm, nn.LayerNorm, kappa, gaussian)


class L1RMSNorm(L1TokenNorm):
    """RMSNorm that divides by the mean magnitude, without centring; a reconstruction, see the module.

    Args:
        normalized_shape: Sizes of the trailing axes.
        eps: Added to the mean magnitude.
        elementwise_affine: Whether there is a gain, ``weight``, of ``normalized_shape``.
        bias: Whether there is a shift, ``bias``, beside the gain; torch's RMSNorm has none.
        gaussian: Multiply the mean magnitude by sqrt(pi/2), with which it estimates the root mean square of Gaussian
            values of mean 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of range.
    """

    centred = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = False,
        *,
        gaussian: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parameters = {"weight": elementwise_affine, "bias": elementwise_affine and bias}
        super().__init__(normalized_shape, eps, gaussian, parameters, device=device, dtype=dtype)

    @classmethod
    def from_rms_norm(cls, norm: nn.RMSNorm, kappa: float = GAUSSIAN_RATIO, *, gaussian: bool = False) -> Self:
        """Return the layer that comes closest to an RMSNorm; see :meth:`L1LayerNorm.from_layer_norm`.

        Args:
            norm: The RMSNorm.
            kappa: The mean over tokens of the mean magnitude over the root mean square.
            gaussian: As for the class.

        Raises:
            TypeError: ``norm`` is not an RMSNorm.
            ValueError: ``kappa`` is not in (0, 1].
        """
        return _converted(cls, norm, nn.RMSNorm, kappa, gaussian)


@torch.no_grad()
def _converted(cls: Any, norm: Any, source: type[nn.Module], kappa: float, gaussian: bool) -> Any:
    if type(norm) is not source:
        raise TypeError(f"{type(norm).__name__} is not a {source.__name__}")
    if not 0 < kappa <= 1:
        raise ValueError(f"kappa is the mean of s / sigma, which lies in (0, 1], not {kappa}")
    bias = getattr(norm, "bias", None)
    options: dict[str, Any] = {"gaussian": gaussian, "elementwise_affine": True}
    if source is nn.LayerNorm:
        options["bias"] = bias is not None
    given: Tensor | None = norm.weight  # type: ignore[assignment]
    if given is not None:
        options.update(device=given.device, dtype=given.dtype)
    new = cls(norm.normalized_shape, **options)
    new.weight.fill_(deviation_factor(gaussian) * kappa)
    if given is not None:
        new.weight.copy_(deviation_factor(gaussian) * kappa * given.to(torch.float64))
    if bias is not None:
        new.bias.copy_(bias)
    return new.train(norm.training)
