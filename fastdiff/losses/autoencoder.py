"""The loss of a variational autoencoder: reconstruction and KL divergence, each in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..numeric import check_numbers
from ..ops.checks import check_alike, check_floating
from ..ops.posterior import CLAMP, check_clamp, means_of

RECONSTRUCTIONS = ("mse", "l1", "huber", "likelihood", "laplace")
# Of a density: the elementwise function, its factor beside exp(-s), and what is added to an element, in s.
_DENSITIES = {"likelihood": ("mse", 0.5, 0.5, 0.5 * math.log(2 * math.pi)), "laplace": ("l1", 1.0, 1.0, math.log(2))}


class Parts(NamedTuple):
    """The two terms of the loss, which is their sum: float32 [] (float64 with float64 inputs)."""

    reconstruction: Tensor
    divergence: Tensor  # beta times the KL divergence


class AutoencoderLoss(nn.Module):
    """Reconstruction + beta KL(N(mean, exp(v)) || N(0, 1)) of an autoencoder's moments (Kingma and Welling 2014; beta:
    Higgins et al. 2017).

    By ``reduction`` the two are "sum": sums over a sample, averaged over the batch, so that with a likelihood the loss
    is the negative evidence bound in nats a sample where beta is 1 (Higgins et al.'s beta; latent diffusion's
    ``kl_weight`` of about 1e-6); or "mean": means over all pixels, and over all latents, as many trainers have them,
    whose beta is (latents / pixels) times that of "sum".

    Args:
        reconstruction: of the error e between what was decoded and the images:
            "mse" e^2, "l1" abs(e), "huber" with delta = 1.
            "likelihood": -ln of a Gaussian density, (e^2 exp(-s) + s + ln(2 pi)) / 2, whose log-variance s is one
            number, learned with the networks (Rybkin et al. 2021, sigma-VAE).
            "laplace": -ln of a Laplace density, abs(e) exp(-s) + s + ln 2: that of taming-transformers and latent
            diffusion, whose losses leave the ln 2 out; s is their ``logvar``.
        beta: the factor of the divergence; may be set anew between steps (annealing).
        free_bits: lambda of Kingma et al. 2016 (inverse autoregressive flow, eq. 15), in nats: of each channel of the
            latents, with the divergence summed over its positions and averaged over the batch, max(lambda, divergence)
            counts, so that a channel below lambda is not pushed further. 0: the divergence itself.
        log_variance: s at the start.
        learn: whether s is a parameter, to be given to the optimizer; otherwise it is a buffer.
        clamp: (least, most) of the moments' log-variance; where it is clamped its gradient is 0.
        reduction: "sum" or "mean", as said.

    ``loss(decoded, images, moments)`` returns a scalar, float32 (float64 with float64 inputs), differentiable in all
    three and in ``log_variance``. Without free bits a gradient costs no further pass on a CPU.

    Raises TypeError or ValueError for unfit arguments.
    """

    def __init__(
        self,
        reconstruction: str = "mse",
        beta: float = 1.0,
        free_bits: float = 0.0,
        *,
        log_variance: float = 0.0,
        learn: bool = True,
        clamp: Sequence[float] = CLAMP,
        reduction: str = "sum",
    ):
        super().__init__()
        if reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction must be one of {', '.join(RECONSTRUCTIONS)}; got {reconstruction!r}.")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be sum (over a sample) or mean; got {reduction!r}.")
        check_numbers(beta=beta, free_bits=free_bits, log_variance=log_variance)
        if not free_bits >= 0:
            raise ValueError(f"free_bits must be at least 0; got {free_bits!r}.")
        if reconstruction not in _DENSITIES and log_variance != 0:
            raise ValueError(f"log_variance is that of a likelihood; {reconstruction!r} has none.")
        self.reconstruction, self.beta, self.free_bits, self.reduction = reconstruction, beta, free_bits, reduction
        self.clamp = check_clamp(clamp)
        s = torch.tensor(float(log_variance)) if reconstruction in _DENSITIES else None
        if s is not None and learn:
            self.log_variance = nn.Parameter(s)
        else:
            self.register_buffer("log_variance", s)

    def forward(self, decoded: Tensor, images: Tensor, moments: Tensor) -> Tensor:
        """The loss: the sum of ``parts``."""
        parts = self.parts(decoded, images, moments)
        return parts.reconstruction + parts.divergence

    def parts(self, decoded: Tensor, images: Tensor, moments: Tensor) -> Parts:
        """The terms of the loss.

        Args:
            decoded, images: [batch, ...], of one shape, floating point.
            moments: [batch, 2 channels, ...]: what the encoder gave.

        Raises TypeError or ValueError for unfit inputs.
        """
        check_floating(decoded=decoded, images=images)
        check_alike(decoded=decoded, images=images)
        mean = means_of(moments)
        if mean.device != decoded.device or len(mean) != len(decoded):
            raise ValueError(
                f"moments of {len(mean)} samples on {mean.device} and {len(decoded)} decoded ones on {decoded.device} "
                "do not go together."
            )
        return Parts(self._reconstruction(decoded, images), self._divergence(moments, mean.shape))

    def _reconstruction(self, decoded: Tensor, images: Tensor) -> Tensor:
        elements = math.prod(decoded.shape[1:]) if self.reduction == "sum" else 1
        if self.reconstruction not in _DENSITIES:
            function, c = ("smooth_l1", 1.0) if self.reconstruction == "huber" else (self.reconstruction, None)
            return ops.loss(decoded, images, None, p=1.0, function=function, c=c, weight=float(elements))
        function, factor, of_s, constant = _DENSITIES[self.reconstruction]
        s = self.log_variance.to(torch.promote_types(self.log_variance.dtype, torch.float32))
        error = ops.loss(decoded, images, None, p=1.0, function=function, weight=elements * factor * torch.exp(-s))
        return error + (elements * (of_s * s + constant)).to(error.dtype)

    def _divergence(self, moments: Tensor, shape: torch.Size) -> Tensor:
        elements = math.prod(shape[1:])
        if not self.free_bits:
            weight = float(self.beta) * (elements if self.reduction == "sum" else 1)
            return ops.kl_normal(moments, weight=weight, clamp=self.clamp)
        rows = (1, shape[1], *(1,) * (len(shape) - 2))
        means = ops.kl_normal(moments, clamp=self.clamp, reduction="none", row_shape=rows)
        divergence = (means * math.prod(shape[2:])).clamp(min=self.free_bits).sum()
        return float(self.beta) * (divergence if self.reduction == "sum" else divergence / max(1, elements))

    def extra_repr(self) -> str:
        return f"{self.reconstruction!r}, beta={self.beta}, free_bits={self.free_bits}, reduction={self.reduction!r}"
