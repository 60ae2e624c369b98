"""The terms of the variational bound: KL divergence, density or likelihood of a bin, and mean squared error, in one."""

from __future__ import annotations

from torch import Tensor

from ..calls import GaussianCall
from ..codes import REDUCTIONS
from ..philox import Philox
from . import dispatch
from .checks import check_alike, check_floating, compute_dtype, place_all
from .noise import check_noise


def gaussian_kl(
    output: Tensor,  # [B, C, ...]; with l_v [B, 2 C, ...]
    x0: Tensor | None,  # [B, C, ...]
    n: Tensor | Philox | None,  # [B, C, ...]
    *,
    p: Tensor | float | None = None,  # [B], or another shape that place_rows takes
    q: Tensor | float | None = None,  # as p
    scale: Tensor | float,  # as p
    l_0: Tensor | float,  # as p
    l_v: Tensor | float | None = None,  # as p
    l_q: Tensor | float,  # as p
    half_width: Tensor | float | None = None,  # as p
    weight: Tensor | float = 1.0,  # as p
    simple_weight: Tensor | float = 0.0,  # as p
    freeze_mean: bool = False,
    reduction: str = "mean",
    row_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """weight * rho + simple_weight * e^2, reduced: the terms of the variational bound, in nats an element.

    With the error e = prediction - (p x0 + q n), the mean of the model's Gaussian differs from the true one by
    d = scale e. Its log-variance is L = l_0 + l_v v, where v is what the network says of it. By ``half_width`` a row is

    - the KL divergence of the true Gaussian, of log-variance l_q, from the model's, where it is negative or None:
      rho = (exp(z) - 1 - z + d^2 exp(-L)) / 2, z = l_q - L;
    - the negative log-density of data that lies d from the model's mean, where it is 0:
      rho = (L + ln(2 pi) + d^2 exp(-L)) / 2;
    - minus the logarithm of the probability of the data's bin, where it is positive (Ho et al. 2020, eq. 13): the data
      x0 in [-1, 1] stands for a bin of that half-width (1/255 for images of 8 bits), the outermost of which reach to
      infinity (x0 below -0.999 or above 0.999). The normal distribution function is approximated by a tanh, and the
      probability is at least 1e-12, as in the code of Ho et al. and of Nichol and Dhariwal.

    Args:
        output: the network's output, any floating-point dtype: the prediction; with ``l_v`` the prediction and v, in
            the two halves of dimension 1.
        x0, n: data and noise, shaped as the prediction. x0 is not read where p is None, but in rows of bins; n not
            where q is None. A ``Philox`` makes the noise again.
        p, q, scale, l_0, l_v, l_q, half_width, weight, simple_weight: rows (``fastdiff.ops.checks.place_rows``) or
            numbers. A term of weight 0 adds 0 to the loss and to the gradient, whatever the row holds.
        freeze_mean: rho teaches v alone: the prediction is a constant in it (Nichol and Dhariwal 2021). It is not in
            e^2.
        reduction: "mean" over all elements of the prediction; "sum" without any division; "none": one mean a row.
        row_shape: the shape of "none"'s result and of the rows; default: that of ``weight``, else of ``simple_weight``
            if they are rows, or [batch].

    Returns a scalar, or ``row_shape``: float32 (float64 with float64 inputs). Sums are taken in float64. Differentiable
    in everything that is a tensor, but for which kind a row is. A batch of size 0 has the sum 0 and, as in PyTorch, the
    mean NaN.

    Raises TypeError or ValueError for unfit inputs.
    """
    n = n if q is not None else None
    if p is None and half_width is None:
        x0 = None
    elif x0 is None:
        raise ValueError("x0 is needed: with p for the target, with half_width to find the bins at the ends.")
    prediction = _prediction(output, l_v is not None)
    name = "output" if l_v is None else "the prediction (half of output)"
    if x0 is not None:
        check_floating(x0=x0)
        check_alike(**{name: prediction, "x0": x0})
    if n is not None:
        check_noise(**{name: prediction, "noise": n})
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    shape, device = prediction.shape, output.device
    dtype = compute_dtype(output, x0, n if isinstance(n, Tensor) else None)
    if row_shape is None:
        rows = (w for w in (weight, simple_weight) if isinstance(w, Tensor) and w.numel() != 1)
        row_shape = tuple(next((w.shape for w in rows), shape[:1]))
    if not isinstance(simple_weight, Tensor) and simple_weight == 0:
        simple_weight = None
    coefficients = {"p": p, "q": q, "scale": scale, "l_0": l_0, "l_v": l_v, "l_q": l_q, "half_width": half_width}
    *placed, weight, simple_weight = place_all(
        shape, dtype, device, **coefficients, weight=weight, simple_weight=simple_weight
    )
    weight = weight.expand(tuple(row_shape) + (1,) * (len(shape) - len(row_shape)))
    call = GaussianCall(output, x0, n, *placed, weight, simple_weight, bool(freeze_mean), reduction)
    result = dispatch.run(call, device)
    return result.reshape(row_shape) if reduction == "none" else result


def _prediction(output: Tensor, learned: bool) -> Tensor:
    """The part of the network's output that is the prediction; ``learned``: v is behind it."""
    check_floating(output=output)
    if not output.ndim:
        raise ValueError("output must have a batch dimension; got a scalar.")
    if not learned:
        return output
    if output.ndim < 2 or output.shape[1] % 2:
        raise ValueError(
            f"output has shape {tuple(output.shape)}: with l_v its dimension 1 holds the prediction and, behind it, as "
            "many channels of v. Leave l_v out if the network does not learn the variance."
        )
    return output.chunk(2, 1)[0]
