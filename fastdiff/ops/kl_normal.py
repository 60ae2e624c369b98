"""The KL divergence of an autoencoder's posterior from the standard normal distribution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..calls import KLNormalCall
from ..codes import REDUCTIONS
from . import dispatch
from .checks import compute_dtype, place_all, placed_shape
from .posterior import CLAMP, check_clamp, means_of


def kl_normal(
    moments: Tensor,  # [B, 2 C, ...]
    *,
    weight: Tensor | float = 1.0,  # [B], or another shape that place_rows takes
    clamp: Sequence[float] = CLAMP,
    reduction: str = "mean",
    row_shape: Sequence[int] | None = None,
) -> Tensor:
    """weight * KL(N(mean, exp(v)) || N(0, 1)) = weight * (mean^2 + exp(v) - v - 1) / 2 of log-variances v, in nats an
    element, reduced.

    Args:
        moments: as ``fastdiff.ops.posterior`` takes them.
        weight: rows, or a number; may require grad. A row of weight 0 adds 0 to the loss and to the gradient, whatever
            it holds.
        clamp: (least, most) of the log-variance. Where it is clamped its gradient is 0.
        reduction: "mean" over all elements of the means (times the elements of a sample: nats a sample); "sum" without
            any division; "none": one mean a row.
        row_shape: the shape of "none"'s result and of the rows; default: that of ``weight`` if it is rows, or [batch].
            [B, C] for one a (sample, channel), [1, C, 1, 1] for one a channel of the whole batch.

    Returns a scalar, or ``row_shape``: float32 (float64 with float64 moments). Sums are taken in float64 on a CPU, in
    pairs of float32 on a GPU. Differentiable in moments and weight. A batch of size 0 has the sum 0 and, as in PyTorch,
    the mean NaN.

    Raises TypeError or ValueError for unfit inputs.
    """
    shape, (least, most) = means_of(moments).shape, check_clamp(clamp)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    if row_shape is None:
        shared = not isinstance(weight, Tensor) or weight.numel() == 1
        row_shape = shape[:1] if shared else weight.shape
    placed = placed_shape("row_shape", row_shape, shape)
    (weight,) = place_all(shape, compute_dtype(moments), moments.device, weight=weight)
    call = KLNormalCall(moments, weight.expand(placed), least, most, reduction)
    result = dispatch.run(call, moments.device)
    return result.reshape(tuple(row_shape)) if reduction == "none" else result
