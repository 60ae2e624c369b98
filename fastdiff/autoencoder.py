"""Latent diffusion: from an autoencoder's moments to a noised batch in one pass::

    moments = vae.encode(images).latent_dist.parameters  # of diffusers' AutoencoderKL
    noised = fastdiff.autoencoder.noise_latents(
        objective, moments, shift=vae.config.shift_factor or 0.0, scale=vae.config.scaling_factor
    )
    loss = objective.loss(network(noised.model_input, noised.model_time), noised)

Moments that are kept on disk in place of images give other latents at every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends.registry import remakes_noise
from .calls import UniformCall
from .noised import Noised
from .objective import Objective
from .ops.checks import compute_dtype
from .ops.dispatch import get as backend_of
from .ops.posterior import CLAMP, means_of
from .philox import Stream, seeded
from .showing import brief

__all__ = ["latents", "noise_latents"]


def latents(
    moments: Tensor,
    *,
    shift: Tensor | Sequence[float] | float = 0.0,
    scale: Tensor | Sequence[float] | float = 1.0,
    sample: bool = True,
    clamp: Sequence[float] = CLAMP,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,
    rng: str = "exact",
) -> Tensor:
    """Draw the latents of a batch of moments, z = (mean + exp(log-variance / 2) xi - shift) scale, in one pass: as
    ``noise_latents`` draws them, which has the arguments' meaning.

    Returns [batch, channels, ...] in ``dtype``, differentiable in the moments. Raises TypeError or ValueError for unfit
    inputs.
    """
    means_of(moments)
    seed, samples = seeded(seed, generator, ids, sample_offset, len(moments), moments.device, sample)
    xi = ops.Philox(seed, samples, Stream.POSTERIOR, rng=rng) if sample else None
    return ops.posterior(moments, xi, shift=shift, scale=scale, clamp=clamp, dtype=dtype).z


def noise_latents(
    objective: Objective,
    moments: Tensor,
    t: Any = None,
    *,
    shift: Tensor | Sequence[float] | float = 0.0,
    scale: Tensor | Sequence[float] | float = 1.0,
    sample: bool = True,
    clamp: Sequence[float] = CLAMP,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,
    keep_noise: bool | None = None,
    rng: str = "exact",
) -> Noised:
    """Draw the latents of a batch of moments, and noise them: one pass over the moments.

    z = (mean + exp(log-variance / 2) xi - shift) scale is the x0 of the result, x_t = alpha z + sigma n. With the same
    seed, t and n are those of ``objective.noise(z, seed=seed)``, bit for bit; xi is a third stream of the seed, so
    latents too depend on the seed and the index or id of the sample alone.

    Args:
        objective: a ``fastdiff.Objective``; its offset noise and input perturbation are made too.
        moments: [batch, 2 channels, ...], the means and the log-variances behind them, floating point.
        t: times of the process, as ``objective.noise`` takes them; None draws one a sample.
        shift, scale: the autoencoder's ``shift_factor`` and ``scaling_factor``: numbers, or one a channel, a list or a
            tensor [channels].
        sample: False takes the means in place of samples.
        clamp: (least, most) of the log-variance.
        dtype: of the latents; None: that of the moments.
        generator, seed, sample_offset, ids, keep_noise, rng: as ``objective.noise`` takes them.

    Returns a ``Noised``, whose x0 are the latents [batch, channels, ...]. Differentiable in the moments. Raises
    TypeError or ValueError for unfit inputs.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a fastdiff.Objective; got {brief(objective)}.")
    mean = means_of(moments)
    seed, samples = seeded(seed, generator, ids, sample_offset, len(moments), moments.device)
    dtype = moments.dtype if dtype is None else dtype
    how = {"shift": shift, "scale": scale, "clamp": clamp, "dtype": dtype}
    which = "ids" if isinstance(samples, Tensor) else "sample_offset"
    where = {"seed": seed, which: samples, "rng": rng}
    of_two = objective.noise_offset and objective.noise_offset_dim != 1
    if objective.input_perturbation or of_two or (moments.dtype == torch.float64 != dtype):
        # More noises than one pass makes; or latents of another precision than what they are made of.
        return objective.noise(latents(moments, sample=sample, **how, **where), t, keep_noise=keep_noise, **where)
    if t is None:
        call = UniformCall(seed, len(moments), Stream.TIMESTEP, samples, moments.device)
        t = objective._draw(backend_of(moments.device), call)
    rows, t = objective._rows_at(t, mean, compute_dtype(mean.new_empty(0, dtype=dtype)))
    n = ops.Philox(seed, samples, offset=objective.noise_offset, rng=rng)
    xi = ops.Philox(seed, samples, Stream.POSTERIOR, rng=rng) if sample else None
    kept = not remakes_noise(moments.device) if keep_noise is None else keep_noise
    made = ops.posterior(moments, xi, n=n, alpha=rows.alpha, sigma=rows.sigma, keep_noise=kept, **how)
    return Noised(objective, made.z, made.x_t, t, made.n, rows)
