"""The operations on an autoencoder's moments: latents and their noising in one, and the KL divergence from N(0, 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import PosteriorCall, halves_of
from ..codes import DATA
from ..numeric import check_numbers
from ..philox import Philox
from . import dispatch
from .checks import check_floating, compute_dtype, place_all
from .noise import check_noise

CLAMP = (-30.0, 20.0)  # of diffusers' DiagonalGaussianDistribution


class Posterior(NamedTuple):
    """Latents, and what they were noised to. x_t and n are None where nothing was noised."""

    z: Tensor  # [B, C, ...]
    x_t: Tensor | None  # [B, C, ...]
    n: Tensor | Philox | None  # [B, C, ...]


def posterior(
    moments: Tensor,  # [B, 2 C, ...]
    xi: Tensor | Philox | None,  # [B, C, ...]
    *,
    shift: Tensor | Sequence[float] | float = 0.0,  # [C], or another shape that place_rows takes
    scale: Tensor | Sequence[float] | float = 1.0,  # as shift
    n: Tensor | Philox | None = None,  # [B, C, ...]
    alpha: Tensor | float | None = None,  # [B], or another shape that place_rows takes
    sigma: Tensor | float | None = None,  # as alpha
    clamp: Sequence[float] = CLAMP,
    dtype: torch.dtype | None = None,
    keep_noise: bool = True,
) -> Posterior:
    """z = (mean + exp(log-variance / 2) xi - shift) scale, and x_t = alpha z + sigma n, in one pass.

    Args:
        moments: what the encoder of an autoencoder gives, any floating-point dtype: the means, and the log-variances,
            in the two halves of dimension 1 (``vae.encode(x).latent_dist.parameters`` of diffusers).
        xi: standard normal noise shaped as the means, or a ``Philox`` to make it from. None: z is made of the mean (the
            mode of the posterior).
        shift, scale: the autoencoder's ``shift_factor`` and ``scaling_factor``: numbers, or one a channel (a list too).
        n, alpha, sigma: the noise and the rows of ``fastdiff.ops.noise``, all three or none: none makes z alone.
        clamp: (least, most) of the log-variance. Where it is clamped its gradient is 0.
        dtype: of z and x_t; None: that of the moments.
        keep_noise: True returns noise n that was made here as a tensor. False returns the ``Philox``.

    Returns (z, x_t, n): z and x_t in ``dtype``, x_t made of z as it is stored; n as it was given, or the noise that was
    made, in float32 (float64 with float64 inputs or ``dtype``). Without n the last two are None. Differentiable in
    everything that is a tensor; by the moments in one pass too.

    Raises TypeError or ValueError for unfit inputs.
    """
    mean, (least, most) = means_of(moments), check_clamp(clamp)
    shape = mean.shape
    given = [check_noise(latents=mean, **{name: noise}) for name, noise in (("xi", xi), ("noise", n))]
    if len({n is None, alpha is None, sigma is None}) > 1:
        raise ValueError("n, alpha and sigma go together: pass all three for x_t, or none for the latents alone.")
    if dtype is None:
        dtype = moments.dtype
    elif dtype not in DATA:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    if isinstance(shift, (int, float)) and shift == 0:
        shift = None
    shift, scale = (_by_channel(name, value, shape) for name, value in (("shift", shift), ("scale", scale)))
    wide = torch.float64 if dtype == torch.float64 else compute_dtype(moments, *given)
    placed = place_all(shape, wide, moments.device, shift=shift, scale=scale, alpha=alpha, sigma=sigma)
    call = PosteriorCall(moments, xi, *placed[:2], n, *placed[2:], least, most, dtype, bool(keep_noise))
    return Posterior(*dispatch.run(call, moments.device))


def means_of(moments: Tensor) -> Tensor:
    """The means, a view without a gradient. Raises TypeError or ValueError for what is no batch of moments."""
    check_floating(moments=moments)
    if moments.ndim < 2 or moments.shape[1] % 2:
        raise ValueError(
            f"moments has shape {tuple(moments.shape)}: its dimension 1 holds the means and, behind them, as many "
            "channels of log-variances, [batch, 2 channels, ...]."
        )
    return halves_of(moments.detach())[0]


def check_clamp(clamp: Sequence[float]) -> tuple[float, float]:
    """(least, most). Raises TypeError or ValueError unless these are two numbers in order."""
    try:
        least, most = clamp
    except (TypeError, ValueError):
        raise ValueError(f"clamp must be (least, most) of the log-variance; got {clamp!r}.") from None
    check_numbers(least=least, most=most)
    if not least <= most:
        raise ValueError(f"clamp must be (least, most) of the log-variance, in this order; got {clamp!r}.")
    return float(least), float(most)


def _by_channel(name: str, rows: Any, shape: torch.Size) -> Tensor | float | None:
    """One number a channel as rows."""
    if isinstance(rows, (list, tuple)):
        check_numbers(**{f"{name}[{k}]": number for k, number in enumerate(rows)})
        rows = torch.tensor(rows, dtype=torch.float64, device="cpu")
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.numel() == 1:
        return rows
    if len(rows) != shape[1]:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, but the latents {shape[1]} channels: one number each.")
    return rows.reshape(1, -1, *(1,) * (len(shape) - 2))
