"""k-diffusion's samplers, by its names and arguments: see the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import torch_randn
from ...process import EDM
from ...samplers import DPMSolverPP, Euler, EulerAncestral, Heun, Sampler
from ...sampling import sample
from ...sigma_schedules import exponential, karras


def sample_euler(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method, with churn (Karras et al. 2022, algorithm 2)."""
    visited, end = _levels(sigmas)
    sampler = Euler(sigmas=visited, final_sigma=end, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _run(sampler, model, x, sigmas, extra_args, callback, disable, None, draws=len(visited))


def sample_euler_ancestral(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Euler's method to a lower level, and noise up to the next."""
    visited, end = _levels(sigmas)
    sampler = EulerAncestral(sigmas=visited, final_sigma=end, eta=eta, s_noise=s_noise)
    draws = sum(sigma > 0 for sigma in (*visited[1:], end))
    return _run(sampler, model, x, sigmas, extra_args, callback, disable, noise_sampler, draws)


def sample_heun(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method, with churn (Karras et al. 2022, algorithm 2)."""
    visited, end = _levels(sigmas)
    sampler = Heun(sigmas=visited, final_sigma=end, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _run(sampler, model, x, sigmas, extra_args, callback, disable, None, draws=len(visited))


def sample_dpmpp_2m(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M)."""
    visited, end = _levels(sigmas)
    sampler = DPMSolverPP(sigmas=visited, final_sigma=end, lower_order_final=False)
    return _run(sampler, model, x, sigmas, extra_args, callback, disable, None)


def sample_dpmpp_2m_sde(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) SDE."""
    visited, end = _levels(sigmas)
    sampler = DPMSolverPP(
        sigmas=visited, final_sigma=end, eta=eta, s_noise=s_noise, solver_type=solver_type, lower_order_final=False
    )
    return _run(sampler, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_3m_sde(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """DPM-Solver++(3M) SDE. Its second order is what k-diffusion calls "heun" for the second."""
    visited, end = _levels(sigmas)
    sampler = DPMSolverPP(
        sigmas=visited, final_sigma=end, order=3, eta=eta, s_noise=s_noise, solver_type="heun", lower_order_final=False
    )
    return _run(sampler, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Karras sigmas and a 0 behind them, float32 [n + 1]."""
    return _with_zero(karras(n, sigma_min, sigma_max, rho), device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Exponential sigmas and a 0 behind them, float32 [n + 1]."""
    return _with_zero(exponential(n, sigma_min, sigma_max), device)


def _with_zero(sigmas: Tensor, device: torch.device | str) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device, torch.float32)


def _levels(sigmas: Tensor) -> tuple[list[float], float]:
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be a tensor [steps + 1] of at least 2; got {sigmas!r}.")
    *visited, end = sigmas.tolist()
    return visited, end


def _run(
    sampler: Sampler,
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None,
    callback: Callable[[dict[str, Any]], None] | None,
    disable: bool | None,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None,
    draws: int = 0,
) -> Tensor:
    """``draws``: for how many steps k-diffusion draws noise, whether or not it is used. So many are drawn here too, so
    that what comes after is the same."""
    arguments = {} if extra_args is None else extra_args
    plan = sampler.plan(EDM(), None, "sample")
    steps = list(range(len(plan.times))) if plan.steps is None else list(plan.steps)
    hats, drawn, row = plan.times.tolist(), 0, -1

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal drawn
        if draws and step >= draws:
            return torch.zeros_like(x)  # of the step to clean data
        if noise_sampler is not None:
            return noise_sampler(sigmas[step], sigmas[step + 1])
        for _ in range(max(1, step + 1 - drawn) if draws else 1):
            z = torch_randn.randn_like(x)
            drawn += 1
        return z

    def denoiser(seen: Tensor, sigma: Tensor) -> Tensor:
        nonlocal row
        row += 1
        denoised = model(seen, sigma, **arguments)
        if callback is not None and (row == 0 or steps[row] != steps[row - 1]):
            hat = torch.as_tensor(hats[row], dtype=sigmas.dtype, device=sigmas.device)
            i = steps[row]
            callback({"x": seen, "i": i, "sigma": sigmas[i], "sigma_hat": hat, "denoised": denoised})
        return denoised

    found = sample(
        denoiser,
        tuple(x.shape),
        EDM(),
        sampler,
        prediction="sample",
        x=x,
        dtype=x.dtype,
        noise=noise,
        progress=not disable,
        callback=None if callback is None else _ignore,
    )
    if noise_sampler is None:
        for _ in range(drawn, draws):
            torch.randn_like(x)
    assert isinstance(found, Tensor)
    return found


def _ignore(*_: object) -> None:
    """A callback: with one, x is a new tensor at every step."""
