"""The arithmetic as training scripts and schedulers write it in plain PyTorch: what fastdiff is compared with.

Functions of tensors alone, so that ``torch.compile`` can have them; each result in the dtype such a script gives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SNR_GAMMA = 5.0
LATENT_SHIFT, LATENT_SCALE = 0.1159, 0.3611


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """[batch] as [batch, 1, ...]."""
    return rows.view(-1, *(1,) * (like.ndim - 1))


def noising_ddpm(x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    a = alpha_bar.to(x0.dtype)[t]
    return spread(a**0.5, x0) * x0 + spread((1 - a) ** 0.5, x0) * noise


def noising_flow(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    sigmas = spread(sigma, x0).to(x0.dtype)
    return (1.0 - sigmas) * x0 + sigmas * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    a = alpha_bar.to(x0.dtype)[t]
    return spread(a**0.5, x0) * noise - spread((1 - a) ** 0.5, x0) * x0


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (loss.mean(dim=list(range(1, loss.ndim))) * weight).mean()


def snr(t: Tensor, alpha_bar: Tensor) -> Tensor:
    a = alpha_bar[t]
    return a / (1 - a)


def loss_epsilon(prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    ratio = snr(t, alpha_bar)
    return weighted_mse(prediction, noise, ratio.clamp(max=SNR_GAMMA) / ratio)


def loss_v(prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    ratio = snr(t, alpha_bar)
    weight = ratio.clamp(max=SNR_GAMMA) / (ratio + 1)
    return weighted_mse(prediction, velocity(x0, noise, t, alpha_bar), weight)


def loss_flow(prediction: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    target = noise - x0
    weighting = torch.ones_like(spread(sigma, x0))
    loss = weighting.float() * (prediction.float() - target.float()) ** 2
    return loss.reshape(target.shape[0], -1).mean(1).mean()


def hybrid_loss(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """L_simple + 0.001 L_vlb of Nichol and Dhariwal 2021, the latter as their functions ``normal_kl`` and
    ``discretized_gaussian_log_likelihood`` compute it. ``table``: see ``peers``."""
    prediction, v = output.float().chunk(2, 1)
    scale, middle, half, true, half_width, weight = (spread(row, x0) for row in table[t].unbind(1))
    x0, noise = x0.float(), noise.float()
    log_variance = middle + half * v
    difference = scale * (prediction.detach() - noise)
    kl = 0.5 * (-1.0 + log_variance - true + torch.exp(true - log_variance) + difference**2 * torch.exp(-log_variance))
    inverse = torch.exp(-0.5 * log_variance)
    above, below = _normal_cdf(inverse * (half_width - difference)), _normal_cdf(inverse * (-half_width - difference))
    log_above, log_below = above.clamp(min=1e-12).log(), (1.0 - below).clamp(min=1e-12).log()
    log_between = (above - below).clamp(min=1e-12).log()
    likelihood = torch.where(x0 < -0.999, log_above, torch.where(x0 > 0.999, log_below, log_between))
    bound = torch.where(spread(t, x0) == 0, -likelihood, kl)
    return F.mse_loss(prediction, noise) + (weight * bound).mean()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh((2.0 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def latents(moments: Tensor, xi: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """As diffusers' ``DiagonalGaussianDistribution`` and training scripts have it, with Flux's shift and scale."""
    mean, log_variance = moments.chunk(2, 1)
    z = mean + torch.exp(0.5 * torch.clamp(log_variance, -30.0, 20.0)) * xi
    z = (z - LATENT_SHIFT) * LATENT_SCALE
    return z, noising_ddpm(z, noise, t, alpha_bar)


def divergence(moments: Tensor) -> Tensor:
    mean, log_variance = moments.float().chunk(2, 1)
    log_variance = torch.clamp(log_variance, -30.0, 20.0)
    return 0.5 * (mean**2 + torch.exp(log_variance) - 1.0 - log_variance).mean()


def row_moments(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    a, b = a.float(), b.float()
    rows, difference = tuple(range(1, a.ndim)), a - b
    return (
        (a * a).sum(rows),
        (a * b).sum(rows),
        (b * b).sum(rows),
        (difference * difference).sum(rows),
        difference.abs().sum(rows),
        b.abs().sum(rows),
        a.sum(rows),
        b.sum(rows),
    )


def ddpm_mean(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The posterior's mean between the levels of cumulated alphas a (now) and b (next)."""
    beta = 1 - a / b
    return b**0.5 * beta / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x


def ddpm_epsilon(x: Tensor, model_output: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x0 = ((x - (1 - a) ** 0.5 * model_output) / a**0.5).clamp(-1, 1)
    return ddpm_mean(x, x0, a, b) + ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5 * noise


def ddpm_v(x: Tensor, model_output: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x0 = (a**0.5 * x - (1 - a) ** 0.5 * model_output).clamp(-1, 1)
    return ddpm_mean(x, x0, a, b) + ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5 * noise


def euler(x: Tensor, model_output: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    return (x.float() + (next_sigma - sigma) * model_output).to(model_output.dtype)
