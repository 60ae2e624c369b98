"""The loss objects of EDM and EDM2: ``loss = loss_fn(net=net, images=images, labels=labels)``.

The originals return a full-size tensor of weighted squared errors, of which the training loop takes the sum. These
return its sums a sample, [batch, 1, ...], so that ``loss.sum().mul(scaling / batch).backward()`` stays as it is; a mean
for a report is ``loss.sum() / images.numel()``. The draws are the originals'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops, torch_randn
from ..ops.checks import check_floating

__all__ = ["EDM2Loss", "EDMLoss", "VELoss", "VPLoss"]


class EDMLoss:
    """Karras et al. 2022, table 1: ln sigma ~ N(P_mean, P_std^2), weight (sigma^2 + d^2) / (sigma d)^2 on x0.

    ``net(x, sigma, labels, augment_labels=...)`` returns the denoised image, as EDM's preconditioned networks do.
    """

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        if not P_std > 0 or not sigma_data > 0:
            raise ValueError(f"P_std and sigma_data must be positive; got {P_std!r} and {sigma_data!r}.")
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def sigma(self, images: Tensor) -> Tensor:
        return (_draw(torch.randn, images) * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def __call__(self, net: Any, images: Tensor, labels: Tensor | None = None, augment_pipe: Any = None) -> Tensor:
        """Sums of the weighted squared error a sample, [batch, 1, ...]. Raises TypeError for integer images."""
        check_floating(images=images)
        sigma = self.sigma(images)
        y, augment_labels = augment_pipe(images) if augment_pipe is not None else (images, None)
        x = ops.noise(y, 1.0, sigma, torch_randn.randn_like(y))[0]
        denoised = net(x, sigma, labels, augment_labels=augment_labels)
        return _sums(denoised, y, self.weight(sigma.double()))


class VPLoss(EDMLoss):
    """EDM's loss for the VP formulation of Song et al. 2021: t uniform in [epsilon_t, 1], weight sigma(t)^-2."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5):
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def sigma(self, images: Tensor) -> Tensor:
        t = 1 + _draw(torch.rand, images) * (self.epsilon_t - 1)
        # expm1 keeps the digits that exp(...) - 1 loses at small t.
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma**-2


class VELoss(VPLoss):
    """EDM's loss for the VE formulation: ln sigma uniform in [ln sigma_min, ln sigma_max], weight 1 / sigma^2."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed; got {sigma_min!r} and {sigma_max!r}.")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sigma(self, images: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** _draw(torch.rand, images)


class EDM2Loss(EDMLoss):
    """Karras et al. 2024 (EDM2), equations 14 to 16 and 21: the error over exp(u), plus u, with u from the network.

    ``net(x, sigma, labels, return_logvar=True)`` returns (denoised image, u [batch, 1, ...]).
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5):
        super().__init__(P_mean, P_std, sigma_data)

    def __call__(self, net: Any, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Sums a sample of weight / exp(u) (D - x0)^2 + u, [batch, 1, ...]; differentiable in D and u."""
        check_floating(images=images)
        sigma = self.sigma(images)
        x = ops.noise(images, 1.0, sigma, torch_randn.randn_like(images))[0]
        denoised, logvar = net(x, sigma, labels, return_logvar=True)
        logvar = logvar.reshape(sigma.shape)
        weight = self.weight(sigma.double()) * torch.exp(-logvar.double())
        return _sums(denoised, images, weight) + logvar.float() * (images.numel() // max(1, len(images)))


def _draw(distribution: Any, images: Tensor) -> Tensor:
    return distribution((len(images), *(1,) * (images.ndim - 1)), device=images.device)


def _sums(denoised: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    means = ops.loss(denoised, x0, None, p=1.0, weight=weight, reduction="none")
    return means * (x0.numel() // max(1, len(x0)))
