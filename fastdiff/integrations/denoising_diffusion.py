"""Objects of denoising-diffusion-pytorch, fused: GaussianDiffusion, its continuous-time kin and ElucidatedDiffusion::

    diffusion = GaussianDiffusion(unet, image_size=32)
    fastdiff.integrations.denoising_diffusion.fuse(diffusion)      # unfuse(diffusion) undoes it

Its Trainer, its loops and its state dict work as before; draws and results are the same. Duck-typed: the package is not
imported.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, torch_randn
from ..prediction import get as prediction_kind
from ..samplers.base import build_table
from ..tabulated import kept
from .method_swap import fuse_methods, fused_methods, left_alone, unfuse
from .objects import (
    StubNetwork,
    ddim_step_columns,
    numbers,
    posterior_columns,
    preconditioned_target,
    twin,
    x0_columns,
)

__all__ = ["fuse", "fused_methods", "left_alone", "unfuse"]


def fuse(diffusion: nn.Module, *, immiscible: str | None = None) -> nn.Module:
    """Fuse what can be of ``diffusion``; returns it.

    Replaced are, where they are the known ones: ``q_sample``, ``p_losses``, ``p_sample`` and ``ddim_sample`` of
    GaussianDiffusion; ``q_sample`` and ``p_losses`` of the continuous-time classes; ``forward`` of ElucidatedDiffusion.
    ``left_alone(diffusion)`` says what was not, and why.

    Args:
        immiscible: for an object with immiscible=True, whose q_sample permutes the noise that x_t sees while the target
            keeps the old order: "as_upstream" keeps it so, "both" permutes it for the target too, which is what the
            method's paper does (Li et al. 2024).

    Raises TypeError for an object of no known kind, ValueError for an immiscible one without that choice.
    """
    if fused_methods(diffusion):
        return diffusion
    if hasattr(diffusion, "sqrt_one_minus_alphas_cumprod") and hasattr(diffusion, "p_losses"):
        permutes = bool(getattr(diffusion, "immiscible", False))
        if permutes and immiscible not in ("as_upstream", "both"):
            raise ValueError(
                "this object is immiscible, and its p_losses permutes the noise of x_t but not of the target: choose "
                "immiscible='as_upstream' (the same numbers) or 'both' (the method as published)."
            )
        methods = {"q_sample": q_sample, "p_losses": p_losses, "p_sample": p_sample, "ddim_sample": ddim_sample}
        probes = {
            "q_sample": lambda d: d.q_sample(*_probe(d)),
            "p_losses": lambda d: d.p_losses(*_probe(d), loss_reduction="none"),
            "p_sample": lambda d: [d.p_sample(_probe(d)[0], t) for t in (d.num_timesteps - 1, d.num_timesteps // 2, 0)],
            "ddim_sample": lambda d: d.ddim_sample(_probe(d)[0].shape),
        }
        if permutes and immiscible == "both":  # differs on purpose
            probes["p_losses"] = None
        return fuse_methods(diffusion, methods, probes, _shadow("model"), immiscible=immiscible)
    if hasattr(diffusion, "preconditioned_network_forward"):
        probes = {"forward": lambda d: d.forward(_images(d).sigmoid(), loss_reduction="none")}
        return fuse_methods(diffusion, {"forward": elucidated_forward}, probes, _shadow("net"))
    if callable(getattr(diffusion, "log_snr", None)) and hasattr(diffusion, "p_losses"):
        probes = {
            "q_sample": lambda d: d.q_sample(_images(d), _times(d)),
            "p_losses": lambda d: d.p_losses(_images(d), _times(d), loss_reduction="none"),
        }
        methods = {"q_sample": continuous_q_sample, "p_losses": continuous_p_losses}
        return fuse_methods(diffusion, methods, probes, _shadow("model"))
    raise TypeError(
        f"{type(diffusion).__name__} is no GaussianDiffusion, continuous-time or elucidated diffusion of "
        f"denoising-diffusion-pytorch that is known here."
    )


# ----------------------------------------------------------------------------------------------- GaussianDiffusion


def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """x_t at integer ``t`` [batch]."""
    noise = torch_randn.randn_like(x_start) if noise is None else noise
    return ops.noise(x_start, *_levels(self, t), _permuted(self, x_start, noise))[0]


def p_losses(
    self,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    offset_noise_strength: float | None = None,
    loss_reduction: str = "mean",
) -> Tensor:
    """The loss: a scalar, or one a sample with ``loss_reduction="none"``. A given ``noise`` is not written to."""
    given = noise
    noise = torch_randn.randn_like(x_start) if given is None else given
    strength = getattr(self, "offset_noise_strength", 0.0) if offset_noise_strength is None else offset_noise_strength
    if strength > 0.0:
        offset = strength * torch.randn(x_start.shape[:2], device=self.device)[:, :, None, None]
        noise = noise.add_(offset) if given is None else noise + offset
    alpha, sigma = _levels(self, t)
    seen = _permuted(self, x_start, noise)
    if self._fastdiff.options.get("immiscible") == "both":
        noise = seen
    x = ops.noise(x_start, alpha, sigma, seen)[0]
    condition = None
    if self.self_condition and random.random() < 0.5:
        with torch.no_grad():
            condition = self.model_predictions(x, t).pred_x_start.detach()
    output = self.model(x, t, condition)
    p, q = {"pred_noise": (None, 1.0), "pred_x0": (1.0, None), "pred_v": (-sigma, alpha)}[self.objective]
    reduction = "none" if loss_reduction == "none" else "mean"
    return ops.loss(output, x_start, noise, p=p, q=q, weight=self.loss_weight[t], reduction=reduction)


@torch.inference_mode()
def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x_{t-1}, x0 estimate), the estimate clamped to [-1, 1]."""
    output = self.model(x, torch.full((len(x),), t, device=self.device, dtype=torch.long), x_self_cond)
    noise = torch_randn.randn_like(x) if t > 0 else None
    y, x0, _ = ops.step(x, output, _posterior(self)[t], clip=1.0, noise=noise, return_entry=False)
    return y, x0


@torch.inference_mode()
def ddim_sample(self, shape: tuple[int, ...], return_all_timesteps: bool = False) -> Tensor:
    """A whole DDIM run of ``sampling_timesteps`` steps."""
    times = torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1).int().tolist()[::-1]
    table = _ddim(self, times)
    x = torch_randn.randn(shape, device=self.device)
    x0, images = None, [x]
    for index, (time, following) in enumerate(zip(times[:-1], times[1:])):
        output = self.model(
            x,
            torch.full((shape[0],), time, device=self.device, dtype=torch.long),
            x0 if self.self_condition else None,
        )
        noise = torch_randn.randn_like(x) if following >= 0 else None  # drawn whatever eta, as upstream
        used = noise if self.ddim_sampling_eta else None
        x, x0, _ = ops.step(x, output, table[index], clip=1.0, noise=used, return_entry=False)
        images.append(x)
    return self.unnormalize(torch.stack(images, dim=1) if return_all_timesteps else x)


def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
    return self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]


def _permuted(self, x_start: Tensor, noise: Tensor) -> Tensor:
    if not getattr(self, "immiscible", False):
        return noise
    with torch.amp.autocast(x_start.device.type, enabled=False):
        return noise[self.noise_assignment(x_start, noise)]


def _posterior(self) -> Tensor:
    """float32 [num_timesteps, len(COLUMNS)], on the object's device."""

    def make(d: Any) -> Tensor:
        noise = (0.5 * numbers(d, "posterior_log_variance_clipped")).exp()
        columns = posterior_columns(d) | x0_columns(d, prediction_kind(d.objective).name)
        return build_table(len(noise), noise.device, c_noise=noise, **columns).float()

    return kept(self._fastdiff.tables, "posterior", self, make)


def _ddim(self, times: list[int]) -> Tensor:
    """float32 [steps, len(COLUMNS)] of the steps between these times, [steps + 1], on the object's device."""

    def make(d: Any) -> Tensor:
        device = d.betas.device
        index, following = (torch.tensor(part, device=device) for part in (times[:-1], times[1:]))
        before = torch.where(following < 0, 1.0, numbers(d, "alphas_cumprod", following.clamp(min=0)))
        columns = ddim_step_columns(d, before, d.ddim_sampling_eta, index)
        columns |= x0_columns(d, prediction_kind(d.objective).name, index)
        return build_table(len(index), device, **columns).float()

    return kept(self._fastdiff.tables, ("ddim", tuple(times)), self, make)


# ------------------------------------------------------------------------------------------------- continuous time


def continuous_q_sample(self, x_start: Tensor, times: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
    """(x_t, log SNR), and (alpha, sigma) too where the object predicts v."""
    noise = torch_randn.randn_like(x_start) if noise is None else noise
    log_snr, alpha, sigma = _continuous_levels(self, times)
    x = ops.noise(x_start, alpha, sigma, noise)[0]
    if not _predicts_v(self):
        return x, log_snr
    shape = (-1,) + (1,) * (x_start.ndim - 1)
    return x, log_snr, alpha.reshape(shape), sigma.reshape(shape)


def continuous_p_losses(
    self, x_start: Tensor, times: Tensor, noise: Tensor | None = None, loss_reduction: str = "mean"
) -> Tensor:
    """The loss at ``times`` in [0, 1]; a learned schedule gets its gradient."""
    noise = torch_randn.randn_like(x_start) if noise is None else noise
    log_snr, alpha, sigma = _continuous_levels(self, times)
    output = self.model(ops.noise(x_start, alpha, sigma, noise)[0], log_snr)
    weight: Tensor | float = 1.0
    if getattr(self, "min_snr_loss_weight", False):
        snr = log_snr.exp()
        weight = snr.clamp(max=self.min_snr_gamma) / snr
    p, q = (-sigma, alpha) if _predicts_v(self) else (None, 1.0)
    reduction = "none" if loss_reduction == "none" else "mean"
    return ops.loss(output, x_start, noise, p=p, q=q, weight=weight, reduction=reduction)


def _predicts_v(self) -> bool:
    return any(cls.__name__.startswith("VParam") for cls in type(self).__mro__)


def _continuous_levels(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_snr = self.log_snr(times)
    return log_snr, log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


# ------------------------------------------------------------------------------------------------------ elucidated


def elucidated_forward(
    self, images: Tensor, *args: Any, sigma: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
) -> Tensor:
    """The loss of images in [0, 1]. The network's own output is compared, in which the weighting is about 1."""
    size = (self.channels, self.image_size, self.image_size)
    if images.shape[1:] != size:
        raise AssertionError(f"images must be [batch, {', '.join(map(str, size))}]; got {tuple(images.shape)}.")
    x0 = images * 2 - 1
    sigma = self.noise_distribution(len(x0)) if sigma is None else sigma
    noise = torch_randn.randn_like(x0)
    wide = sigma.double()
    c_skip, c_out, c_in = self.c_skip(wide), self.c_out(wide), self.c_in(wide)
    condition = None
    if self.self_condition and random.random() < 0.5:
        with torch.no_grad():
            noised = ops.noise(x0, 1.0, sigma, noise)[0]
            condition = self.preconditioned_network_forward(noised, sigma).detach()
    output = self.net(ops.noise(x0, c_in, c_in * wide, noise)[0], self.c_noise(sigma), condition)
    return ops.loss(
        output,
        x0,
        noise,
        **preconditioned_target(c_skip, c_out, wide),
        weight=self.loss_weight(wide) * c_out**2,
        reduction="none" if loss_reduction == "none" else "mean",
    )


# ---------------------------------------------------------------------------------------------------------- probes


def _shadow(network: str) -> Any:
    def make(obj: nn.Module) -> nn.Module:
        made = twin(obj, **{network: StubNetwork(_device(obj))})
        if "sampling_timesteps" in made.__dict__:
            made.__dict__["sampling_timesteps"] = min(obj.sampling_timesteps, 8)
        return made

    return make


def _images(d: Any) -> Tensor:
    height, width = d.image_size if isinstance(d.image_size, (tuple, list)) else (d.image_size, d.image_size)
    return torch.randn(3, d.channels, height, width, device=_device(d))


def _times(d: Any) -> Tensor:
    return torch.tensor([0.05, 0.5, 0.95], device=_device(d))


def _probe(d: Any) -> tuple[Tensor, Tensor]:
    t = torch.tensor([0, d.num_timesteps // 2, d.num_timesteps - 1], device=d.betas.device)
    return torch.randn(3, d.channels, 4, 4, device=d.betas.device), t


def _device(d: nn.Module) -> torch.device:
    return next(iter(d.parameters()), torch.empty(0)).device
