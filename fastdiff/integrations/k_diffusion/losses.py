"""The training losses of k-diffusion's denoisers, fused: see the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..method_swap import fuse_methods, fused_methods
from ..objects import StubNetwork, preconditioned_target, twin


def fuse(denoiser: nn.Module) -> nn.Module:
    """Fuse ``loss(input, noise, sigma)`` of a Denoiser, VDenoiser, or a denoiser of a discrete model; returns it.

    Raises TypeError for another object, and for a loss that is taken in frequency space (``scales`` other than 1).
    """
    if fused_methods(denoiser):
        return denoiser
    if not callable(getattr(denoiser, "get_scalings", None)) or not hasattr(denoiser, "inner_model"):
        raise TypeError(
            f"{type(denoiser).__name__} is no denoiser of k-diffusion: it has no get_scalings or inner_model."
        )
    if getattr(denoiser, "scales", 1) != 1:
        raise TypeError(
            f"a loss over {denoiser.scales} frequency scales is not fused: it is no mean of squared errors."
        )
    return fuse_methods(denoiser, {"loss": loss}, {"loss": _probe}, _shadow)


def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
    """Weighted mean squared error of the network's own output, [batch]."""
    wide = sigma.double()
    *c_skip, c_out, c_in = self.get_scalings(wide)
    x = ops.noise(input, c_in, c_in * wide, noise)[0]
    if not c_skip:  # the network predicts the noise
        output = self.get_eps(x, self.sigma_to_t(sigma), **kwargs)
        return ops.loss(output, None, noise, q=1.0, reduction="none")
    if hasattr(self, "get_v"):
        output = self.get_v(x, self.sigma_to_t(sigma), **kwargs)
    else:
        output = self.inner_model(x, self.sigma_to_t(sigma) if hasattr(self, "sigma_to_t") else sigma, **kwargs)
    weight = self.weighting(sigma) if hasattr(self, "weighting") else 1.0
    (c_skip,) = c_skip
    return ops.loss(
        output,
        input,
        noise,
        **preconditioned_target(c_skip, c_out, wide),
        weight=weight,
        reduction="none",
    )


def _shadow(obj: nn.Module) -> nn.Module:
    return twin(obj, inner_model=StubNetwork(learned=getattr(obj, "has_learned_sigmas", False)))


def _probe(d: nn.Module) -> Tensor:
    device = next(iter(d.buffers()), torch.empty(0)).device
    x, n = torch.randn(2, 3, 2, 4, 4, device=device)
    return d.loss(x, n, torch.tensor([0.05, 0.9, 9.0], device=device))
