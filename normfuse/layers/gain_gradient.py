"""The gradient of the gain of a norm that a product applies.

    dJ/dgamma = r (<V, W> + (b - mean) S) = r (sum of G (W x + b - mean))

The first form costs next to nothing, since ``V`` is there (:mod:`normfuse.layers.scaled`). But its terms cancel where
values have a mean that is large beside their deviation, and with them the digits that ``V`` has. Their size is

    T = r sqrt(sum over k of (V_k W_k)^2 + ((b - mean) S)^2)

per channel, and where ``|T| > 4 |dJ/dgamma|``, over all channels, the second form is taken: the output is made again,
for this pair alone, and the gradient is eval mode's. Nothing is kept for that; it costs one more product. In ordinary
networks ``|T|`` is 0.8 to 3 times the gradient, so the error of what the first form gives is in proportion to that of
``V``, which eval mode has too.

To compare them would make a program wait for its GPU. There the second form is taken for norms with a mean that is more
than 4 deviations away from the bias, which is looked up when the statistics change (and at each step where a product
makes its channels in another order than the norm's).
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.layers.fixed_statistics import Statistics
from normfuse.layers.products import Matrix, Product
from normfuse.layers.scratch import times

CANCELLATION = 4
"""How many times as large as the gradient its terms may be, and a mean as its deviation."""


def gain_gradient(
    v: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product, by: Tensor | None
) -> tuple[Tensor, bool]:
    """Return ``r (<V, W> + (b - mean) S)``, ``(C,)``, and whether its terms cancel so far that it is not precise.

    Args:
        v: ``V``, or what is ``by`` times as large.
        total: ``S``, ``(C,)``.
        weight: ``W``.
        bias: ``b``, or None.
        norm: What the norm computes by.
        product: The product.
        by: What ``v`` must be divided by, ``(C,)``, or None.
    """
    products, rstd = times(product.by_output(v), product.by_output(weight)), norm.rstd()
    within = tuple(range(1, products.dim())) if products.dim() == weight.dim() else (1, *range(3, products.dim()))
    dots, centred = products.sum(within).flatten(), norm.centre(bias) * total
    if by is not None:
        dots = dots.div_(by)
    made = (dots + centred).mul_(rstd)
    if not made.is_cpu:
        return made, norm.distance(bias) > CANCELLATION
    sizes = torch.linalg.vector_norm(products, dim=within).flatten()
    terms = torch.hypot(sizes if by is None else sizes.div_(by), centred).mul_(rstd)
    return made, float(terms.dot(terms)) > CANCELLATION**2 * float(made.dot(made))


def gain_gradient_from_output(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Statistics, product: Product
) -> Tensor:
    """Return ``r (sum of G (W x + b - mean))``, ``(C,)``, as eval mode takes it."""
    y = product.run(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if isinstance(product, Matrix):
        grad, y = grad.reshape(-1, grad.shape[-1]), y.reshape(-1, y.shape[-1])
    run, only = torch.ops.aten.native_batch_norm_backward.default, [False, True, False]
    return run(grad, y, norm.gain, norm.mean, norm.var, None, None, False, norm.eps, only)[1]
