"""Diffusion objects in the style of guided-diffusion and improved-diffusion, which DiT and others share::

    diffusion = create_gaussian_diffusion(...)
    fastdiff.integrations.guided_diffusion.fuse(diffusion)      # unfuse(diffusion) undoes it

Duck-typed by their interface: ``training_losses(model, x_start, t)``, ``p_mean_variance``, ``p_sample``,
``ddim_sample``, NumPy tables such as ``sqrt_alphas_cumprod``, and enums for what the network predicts. Respaced objects
(``_wrap_model``) included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, torch_randn
from ..ops import COLUMNS
from ..samplers.base import build_table
from ..samplers.ddpm import learned_range_columns
from ..tabulated import kept
from ..tensors import gather_rows
from .method_swap import fuse_methods, fused_methods, left_alone, unfuse
from .objects import StubNetwork, ddim_step_columns, numbers, posterior_columns, twin, x0_columns

__all__ = ["LossSecondMomentResampler", "fuse", "fused_methods", "left_alone", "unfuse"]


def fuse(diffusion: Any) -> Any:
    """Fuse ``q_sample``, ``training_losses``, ``p_mean_variance``, ``p_sample`` and ``ddim_sample``; returns it.

    What the fused methods do not compute goes to the object's own: KL losses, ``cond_fn``, ``denoised_fn``. The bound
    of a learned variance is computed by the object itself, and added to the fused squared error. ``left_alone`` says
    which methods were not replaced, and why. Raises TypeError for an object without this interface.
    """
    if fused_methods(diffusion):
        return diffusion
    needed = ("sqrt_alphas_cumprod", "posterior_mean_coef1", "model_mean_type", "model_var_type", "num_timesteps")
    missing = [name for name in needed if not hasattr(diffusion, name)]
    if missing:
        raise TypeError(
            f"{type(diffusion).__name__} has no {', '.join(missing)}: it is no diffusion object in the style of "
            f"guided-diffusion."
        )
    methods = {
        "q_sample": q_sample,
        "training_losses": training_losses,
        "p_mean_variance": p_mean_variance,
        "p_sample": p_sample,
        "ddim_sample": ddim_sample,
    }
    probes = {
        "q_sample": lambda d: d.q_sample(*_probe(d)),
        "training_losses": lambda d: d.training_losses(_stub(d), *_probe(d)),
        "p_mean_variance": lambda d: d.p_mean_variance(_stub(d), *_probe(d)),
        "p_sample": lambda d: d.p_sample(_stub(d), *_probe(d)),
        "ddim_sample": lambda d: d.ddim_sample(_stub(d), *_probe(d), eta=0.5),
    }
    return fuse_methods(diffusion, methods, probes, twin)


def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """x_t at integer ``t`` [batch]."""
    noise = torch_randn.randn_like(x_start) if noise is None else noise
    return _noised(self, x_start, t, noise)


def training_losses(
    self, model: Callable, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None, noise: Tensor | None = None
) -> dict[str, Tensor]:
    """{"loss", "mse", and "vb" with a learned variance}, each [batch]."""
    if self.loss_type.name not in ("MSE", "RESCALED_MSE"):
        own = super(type(self), self).training_losses
        return own(model, x_start, t, model_kwargs=model_kwargs, noise=noise)
    noise = torch_randn.randn_like(x_start) if noise is None else noise
    x_t = _noised(self, x_start, t, noise)
    output, values = _split(self, _call(self, model, x_t, t, model_kwargs), x_t)
    terms = {}
    if values is not None:
        # The bound trains the variance only: the mean is held.
        frozen = torch.cat([output.detach(), values], dim=1)
        bound = self._vb_terms_bpd(model=lambda *args, r=frozen: r, x_start=x_start, x_t=x_t, t=t, clip_denoised=False)[
            "output"
        ]
        terms["vb"] = bound * (self.num_timesteps / 1000.0) if self.loss_type.name == "RESCALED_MSE" else bound
    kind = self.model_mean_type.name
    p = q = None
    if kind == "EPSILON":
        q = 1.0
    elif kind == "START_X":
        p = 1.0
    else:  # the posterior mean of x_{t-1}, in x0 and noise
        p, q = gather_rows(_kept(self, "previous", _previous_table, t.device), t).unbind(-1)
    terms["mse"] = ops.loss(output, x_start, noise, p=p, q=q, reduction="none")
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms


def p_mean_variance(
    self,
    model: Callable,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable | None = None,
    model_kwargs: dict | None = None,
) -> dict[str, Tensor]:
    """{"mean", "variance", "log_variance", "pred_xstart"}, each shaped as x."""
    output = None if denoised_fn is not None else _split(self, _call(self, model, x, t, model_kwargs), x)
    if output is None or (torch.is_grad_enabled() and output[0].requires_grad):
        own, given = super(type(self), self).p_mean_variance, {"denoised_fn": denoised_fn} if denoised_fn else {}
        if output is not None:  # the network has been called
            model = _answering(output)
        return own(model, x, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs, **given)
    output, values = output
    rows = gather_rows(_kept(self, "sampling", _sampling_table, t.device), t)
    mean, x0, _ = ops.step(x, output, rows, clip=1.0 if clip_denoised else None, return_entry=False)
    low, slope = (_spread(rows[:, COLUMNS.index(name)], x) for name in ("l_0", "l_v"))
    if values is not None:
        log_variance = low + slope * values
        variance = log_variance.exp()
    else:
        log_variance, variance = low.expand(x.shape), low.exp().expand(x.shape)
        if self.model_var_type.name == "FIXED_SMALL":  # 0 at t = 0, where its logarithm is that of t = 1
            table = _kept(self, "variance", lambda d: numbers(d, "posterior_variance")[:, None], t.device)
            variance = _spread(gather_rows(table, t), x).expand(x.shape)
    return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}


def p_sample(
    self,
    model: Callable,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    *,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
) -> dict[str, Tensor]:
    """{"sample": x_{t-1}, "pred_xstart"}. The noise is drawn at t = 0 too, and not used there."""
    given = {name: f for name, f in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)) if f is not None}
    if given:
        own = super(type(self), self).p_sample
        return own(model, x, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs, **given)
    output, values = _split(self, _call(self, model, x, t, model_kwargs), x)
    rows = gather_rows(_kept(self, "sampling", _sampling_table, t.device), t)
    # A fixed variance is a learned one with v = 0, so both have the strength c_noise exp((l_0 + l_v v) / 2).
    if values is None:
        rows = rows.clone()
        rows[:, COLUMNS.index("c_noise")] *= (0.5 * rows[:, COLUMNS.index("l_0")]).exp()
    sample, x0, _ = ops.step(
        x,
        output,
        rows,
        clip=1.0 if clip_denoised else None,
        noise=torch_randn.randn_like(x),
        log_variance=values,
        return_entry=False,
    )
    return {"sample": sample, "pred_xstart": x0}


def ddim_sample(
    self,
    model: Callable,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    *,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
    eta: float = 0.0,
) -> dict[str, Tensor]:
    """{"sample": x_{t-1}, "pred_xstart"}, the noise estimate taken from the (clamped) x0 estimate."""
    given = {name: f for name, f in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)) if f is not None}
    if given:
        own = super(type(self), self).ddim_sample
        return own(model, x, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs, eta=eta, **given)
    output, _ = _split(self, _call(self, model, x, t, model_kwargs), x)
    rows = gather_rows(_kept(self, ("ddim", eta), lambda d: _ddim_table(d, eta), t.device), t)
    noise = torch_randn.randn_like(x)
    sample, x0, _ = ops.step(
        x, output, rows, clip=1.0 if clip_denoised else None, noise=noise if eta else None, return_entry=False
    )
    return {"sample": sample, "pred_xstart": x0}


class LossSecondMomentResampler:
    """Timesteps drawn in proportion to sqrt(E[loss^2]) (Nichol and Dhariwal 2021), kept on the device.

    The interface of guided-diffusion's resampler: ``sample(batch, device)`` gives (t, weights),
    ``update_with_local_losses(t, losses)`` takes the losses of all ranks (equal batches). Nothing waits for the device;
    the draws are PyTorch's, not NumPy's.

    Args:
        steps: number of timesteps, or a diffusion object that has them.
        history_per_term: how many losses of each timestep are remembered.
        uniform_prob: share of uniform draws.
    """

    def __init__(self, steps: Any, history_per_term: int = 10, uniform_prob: float = 0.001, device: Any = "cpu"):
        steps = getattr(steps, "num_timesteps", steps)
        if not isinstance(steps, int) or steps < 1 or history_per_term < 1:
            raise ValueError(
                f"steps and history_per_term must be positive integers; got {steps!r}, {history_per_term!r}."
            )
        if not 0 <= uniform_prob <= 1:
            raise ValueError(f"uniform_prob must lie in [0, 1]; got {uniform_prob!r}.")
        self.history_per_term, self.uniform_prob = history_per_term, float(uniform_prob)
        # One row more: what is not to be kept is written there.
        self._history = torch.zeros(steps + 1, history_per_term, dtype=torch.float64, device=device)
        self._counts = torch.zeros(steps + 1, dtype=torch.int64, device=device)

    def weights(self) -> Tensor:
        """float64 [steps], proportional to how often each is drawn: uniform until all have been seen often enough."""
        history, counts = self._history[:-1], self._counts[:-1]
        size = history.square().mean(1).sqrt()
        size = size / size.sum() * (1 - self.uniform_prob) + self.uniform_prob / len(size)
        return torch.where((counts >= self.history_per_term).all(), size, 1.0)

    def sample(
        self, batch_size: int, device: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(t int64 [batch_size], weights float32 [batch_size] that make the weighted mean loss unbiased)."""
        w = self.weights()
        p = w / w.sum()
        u = torch.rand(batch_size, dtype=torch.float64, device=p.device, generator=generator)
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        weights = (1 / (len(p) * p[t])).float()
        return (t, weights) if device is None else (t.to(device), weights.to(device))

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Take the losses [batch] at ``local_ts`` [batch], of every rank where there are several."""
        t, losses = local_ts.detach(), local_losses.detach()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            all_t, all_losses = ([torch.empty_like(v) for _ in range(world)] for v in (t, losses))
            torch.distributed.all_gather(all_t, t.contiguous())
            torch.distributed.all_gather(all_losses, losses.contiguous())
            t, losses = torch.cat(all_t), torch.cat(all_losses)
        self.update_with_all_losses(t, losses)

    def update_with_all_losses(self, ts: Any, losses: Any) -> None:
        """The same without other ranks. The oldest losses of a timestep are forgotten first."""
        t = torch.as_tensor(ts, device=self._counts.device).long()
        losses = torch.as_tensor(losses, device=t.device).double()
        if t.shape != losses.shape or t.ndim != 1:
            raise ValueError(f"t and losses must be [batch] alike; got {tuple(t.shape)} and {tuple(losses.shape)}.")
        same = t[:, None] == t[None, :]
        earlier = same.tril(-1).sum(1)
        forgotten = same.sum(1) - earlier > self.history_per_term
        slot = (self._counts[t] + earlier) % self.history_per_term
        self._history[torch.where(forgotten, len(self._counts) - 1, t), slot] = losses
        self._counts.index_add_(0, t, torch.ones_like(t))

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": self._history, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._history.copy_(state["history"])
        self._counts.copy_(state["counts"])


# ---------------------------------------------------------------------------------------------------------- tables


def _kept(self, key: Any, make: Callable[[Any], Tensor], device: torch.device) -> Tensor:
    """float32 [steps, ...] on ``device``, made once a device."""
    return kept(self._fastdiff.tables, (key, device), self, lambda d: make(d).float().to(device))


def _noise_table(d: Any) -> Tensor:
    return torch.stack([numbers(d, "sqrt_alphas_cumprod"), numbers(d, "sqrt_one_minus_alphas_cumprod")], -1)


def _previous_table(d: Any) -> Tensor:
    """p and q of the posterior mean of x_(t-1)."""
    mean = posterior_columns(d)
    alpha, sigma = _noise_table(d).unbind(-1)
    return torch.stack([mean["c_x0"] + mean["c_x"] * alpha, mean["c_x"] * sigma], -1)


def _x0_columns(d: Any) -> dict[str, Tensor | float]:
    kind = d.model_mean_type.name
    if kind == "PREVIOUS_X":
        mean = posterior_columns(d)
        return {"p_x": -mean["c_x"] / mean["c_x0"], "p_m": 1 / mean["c_x0"]}
    if kind not in ("START_X", "EPSILON"):
        raise NotImplementedError(f"a network that predicts {kind}")
    return x0_columns(d, {"START_X": "sample", "EPSILON": "epsilon"}[kind])


def _sampling_table(d: Any) -> Tensor:
    """Steps of DDPM; the log-variance is l_0 + l_v v, and c_noise is 0 at t = 0 and 1 elsewhere."""
    small, large = numbers(d, "posterior_log_variance_clipped"), numbers(d, "betas").log()
    variances: dict[str, Callable[[], dict[str, Any]]] = {
        "FIXED_SMALL": lambda: {"l_0": small},
        "FIXED_LARGE": lambda: {"l_0": torch.cat([numbers(d, "posterior_variance")[1:2].log(), large[1:]])},
        "LEARNED": lambda: {"l_v": 1.0},
        "LEARNED_RANGE": lambda: learned_range_columns(small, large),
    }
    columns = {"c_m": 1.0} if d.model_mean_type.name == "PREVIOUS_X" else posterior_columns(d)
    columns |= variances[d.model_var_type.name]() | _x0_columns(d)
    return build_table(d.num_timesteps, c_noise=torch.arange(d.num_timesteps) > 0, **columns)


def _ddim_table(d: Any, eta: float) -> Tensor:
    columns = ddim_step_columns(d, numbers(d, "alphas_cumprod_prev"), eta)
    return build_table(d.num_timesteps, **columns, **_x0_columns(d))


def _noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = gather_rows(_kept(self, "noise", _noise_table, t.device), t).unbind(-1)
    return ops.noise(x_start, alpha, sigma, noise)[0]


def _call(self, model: Callable, x: Tensor, t: Tensor, model_kwargs: dict | None) -> Tensor:
    if hasattr(self, "_wrap_model"):  # a respaced object tells the network the timesteps of the whole schedule
        model = self._wrap_model(model)
    return model(x, self._scale_timesteps(t), **(model_kwargs or {}))


def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(prediction, what the variance is made of, or None where it is fixed)."""
    if self.model_var_type.name not in ("LEARNED", "LEARNED_RANGE"):
        return output, None
    channels = x.shape[1]
    if output.shape != (len(x), 2 * channels, *x.shape[2:]):
        raise ValueError(
            f"a learned variance needs {2 * channels} channels of the network, prediction and variance; got "
            f"{tuple(output.shape)} for x {tuple(x.shape)}."
        )
    return output.split(channels, dim=1)


def _answering(output: tuple[Tensor, Tensor | None]) -> Callable:
    whole = output[0] if output[1] is None else torch.cat(output, dim=1)
    return lambda *args, **kwargs: whole


def _spread(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(-1, *(1,) * (x.ndim - 1))


# ---------------------------------------------------------------------------------------------------------- probes


def _probe(d: Any) -> tuple[Tensor, Tensor]:
    t = torch.tensor([0, d.num_timesteps // 2, d.num_timesteps - 1])
    return torch.rand(3, 2, 4, 4) * 2 - 1, t


def _stub(d: Any) -> StubNetwork:
    return StubNetwork(learned=d.model_var_type.name in ("LEARNED", "LEARNED_RANGE"))
