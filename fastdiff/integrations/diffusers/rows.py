"""The coefficients of diffusers' schedulers, as rows of ``fastdiff.ops.step``: from the numbers that a scheduler holds
(``alphas_cumprod``, ``sigmas``), in float64. Where they have a sampler here, its functions make them.

A function returns columns: dictionaries of float64 tensors, one entry a row. ``p_x`` and ``p_m`` give what the
scheduler calls the predicted original sample, or whatever it keeps of the model's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import prediction as kinds
from ...process import EDM, Levels, Process, RectifiedFlow
from ...samplers.ddim import ddim_columns
from ...samplers.dpm import multistep_weights
from ...samplers.euler import euler_columns
from ...samplers.unipc import bend

Columns = dict[str, Tensor]
MIN_VARIANCE = 1e-20  # what diffusers clamps the posterior variance at


def converted(
    kind: str, alpha: Tensor, sigma: Tensor, to: str = "sample", process: Process | None = None
) -> tuple[Tensor, Tensor]:
    """(k_x, k_m) of the estimate ``to`` from a prediction of ``kind`` at levels (alpha, sigma)."""
    return kinds.conversion(kind, to, Levels(alpha, alpha, sigma, process))  # type: ignore[arg-type]


def estimate(kind: str, alpha: Tensor, sigma: Tensor, process: Process | None = None) -> Columns:
    p_x, p_m = converted(kind, alpha, sigma, "sample", process)
    return {"p_x": p_x, "p_m": p_m}


def ddpm(now: Tensor, before: Tensor, kind: str, variance: str) -> Columns:
    """From alpha_bar ``now`` to alpha_bar ``before``, both in the scheduler's dtype. Ho et al. 2020, equations 6 and 7.

    diffusers rounds alpha_t = now / before to that dtype, and with a thousand steps 1 - alpha_t is left with four
    digits: the quotient is taken as it has it, and nothing else is.
    """
    kept = (now / before).double()
    now, before = now.double(), before.double()
    beta = 1 - kept
    posterior = ((1 - before) / (1 - now) * beta).clamp(min=MIN_VARIANCE)
    columns = estimate(kind, now.sqrt(), (1 - now).sqrt())
    columns |= {"c_x0": before.sqrt() * beta / (1 - now), "c_x": kept.sqrt() * (1 - before) / (1 - now)}
    if variance == "learned_range":
        one, low, high = torch.ones_like(now), posterior.log(), beta.log()
        return columns | {"c_noise": one, "l_0": (high + low) / 2, "l_v": (high - low) / 2}
    return columns | {"c_noise": (beta if variance == "fixed_large" else posterior).sqrt()}


def ddim(now: Tensor, before: Tensor, kind: str, eta: float, rederive: bool) -> Columns:
    """As ``ddpm``. Song et al. 2021, equations 12 and 16. ``rederive``: the noise estimate is that of a clipped x0.

    What is left of the noise, 1 - before - variance, cancels: it is taken as diffusers has it too.
    """
    variance = (1 - before) / (1 - now) * (1 - now / before)
    deviation = eta * variance**0.5
    direction = (1 - before - deviation**2) ** 0.5
    now, before = now.double(), before.double()
    alpha, sigma = now.sqrt(), (1 - now).sqrt()
    epsilon = None if rederive else converted(kind, alpha, sigma, "epsilon")
    columns = ddim_columns(alpha, sigma, before.sqrt(), direction.double(), epsilon)
    return columns | {"c_noise": deviation.double()} | estimate(kind, alpha, sigma)


def lcm(now: Tensor, before: Tensor, t: Tensor, last: Tensor, kind: str, scaling: float, clips: bool) -> Columns:
    """Luo et al. 2023, algorithm 3. What is returned beside the result is c_out x0 + c_skip x: the entry that is kept
    or, where nothing is clipped, the estimate itself."""
    now, before, scaled, data = now.double(), before.double(), scaling * t.double(), 0.5
    skip, out = data**2 / (scaled**2 + data**2), scaled / torch.hypot(scaled, torch.full_like(scaled, data))
    factor, noise = torch.where(last, 1.0, before.sqrt()), torch.where(last, 0.0, (1 - before).sqrt())
    columns = estimate(kind, now.sqrt(), (1 - now).sqrt()) | {"c_noise": noise}
    if clips:
        return columns | {"h_x": skip, "h_x0": out, "c_x": factor * skip, "c_x0": factor * out}
    columns |= {"p_x": skip + out * columns["p_x"], "p_m": out * columns["p_m"]}
    return columns | {"c_x0": factor}


def _at_one(sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha = 1, and the sigmas from and to which steps go."""
    return torch.ones_like(sigmas[1:]), sigmas[:-1], sigmas[1:]


def euler(sigmas: Tensor, kind: str, sigma_data: float | None = None, sign: int = 1) -> Columns:
    """Along a straight line in the space of x0 + sigma n; the entry is the x0 estimate in float32."""
    alpha, sigma, end = _at_one(sigmas)
    p_x, p_m = converted(kind, alpha, sigma, process=None if sigma_data is None else EDM(sigma_data))
    columns = {"p_x": p_x, "p_m": sign * p_m, "h_x": p_x, "h_m": sign * p_m}
    return columns | euler_columns(alpha, sigma, (alpha, end))


def euler_ancestral(sigmas: Tensor, kind: str) -> Columns:
    """As ``euler``, from sigmas in the scheduler's dtype. Where noise falls by much, what is left of it after the new
    noise is a rounding error, or NaN: it is taken as diffusers has it."""
    before, after = sigmas[:-1], sigmas[1:]
    up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
    down = ((after**2 - up**2) ** 0.5).double()
    alpha, sigma, _ = _at_one(sigmas.double())
    p_x, p_m = converted(kind, alpha, sigma)
    columns = {"p_x": p_x, "p_m": p_m, "h_x": p_x, "h_m": p_m, "c_noise": up.double()}
    return columns | euler_columns(alpha, sigma, (alpha, down))


def heun(sigmas: Tensor, kind: str) -> tuple[Columns, Columns]:
    """(first, second) call of a step, by the index of the call. The first keeps the slope; the second reads where the
    step began, H1, and that slope, H2."""
    alpha, sigma, end = _at_one(sigmas)
    first = estimate(kind, alpha, sigma) | euler_columns(alpha, sigma, (alpha, end))
    first |= {"h_x": 1 / sigma, "h_x0": -1 / sigma}
    half = torch.cat([torch.full_like(sigma[:1], torch.nan), sigma.diff()]) / 2
    second = estimate(kind, alpha, sigma) | {"c_h1": alpha, "c_h2": half, "c_x": half / sigma, "c_x0": -half / sigma}
    return first, second


def flow_euler(sigmas: Tensor) -> Columns:
    """x + (sigma' - sigma) velocity."""
    one, sigma, end = _at_one(sigmas)
    return {"c_x": one, "c_m": end - sigma}


def flow_stochastic(sigmas: Tensor) -> Columns:
    """(1 - sigma') x0 + sigma' noise."""
    one, sigma, end = _at_one(sigmas)
    return {"p_x": one, "p_m": -sigma, "c_x0": one - end, "c_noise": end}


def flow_heun(sigmas: Tensor) -> tuple[Columns, Columns]:
    """As ``heun``, for velocities."""
    one, sigma, _ = _at_one(sigmas)
    half = torch.cat([torch.full_like(sigma[:1], torch.nan), sigma.diff()]) / 2
    return flow_euler(sigmas) | {"h_m": one}, {"c_h1": one, "c_h2": half, "c_m": half}


def levels_of(sigmas: Tensor, flow: bool) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the sigmas of DPM-Solver and UniPC: sigma / alpha with variance preserved, or of a flow."""
    if flow:
        return 1 - sigmas, sigmas
    alpha = 1 / torch.hypot(torch.ones_like(sigmas), sigmas)
    return alpha, sigmas * alpha


def _multistep(sigmas: Tensor, flow: bool, kind: str, keeps: str) -> tuple[Columns, Tensor, Tensor, Tensor, Tensor]:
    """(estimate kept, log-SNR [rows + 1], factor on x, factor on the estimates, alpha or sigma at the end)."""
    alpha, sigma = levels_of(sigmas, flow)
    process = RectifiedFlow() if flow else None
    p_x, p_m = converted(kind, alpha[:-1], sigma[:-1], keeps, process)
    logs = alpha.log() - sigma.log()
    over = sigma if keeps == "sample" else alpha
    scale = (alpha if keeps == "sample" else sigma)[1:]
    return {"p_x": p_x, "p_m": p_m}, logs, over[1:] / over[:-1], scale, sigma[1:]


def _behind(logs: Tensor, order: int) -> list[Tensor]:
    """lambda_(k - j) - lambda_(k - j - 1), j = 0 .. order - 2; NaN where there is none."""
    steps = logs.diff()
    missing = torch.full((order,), torch.nan, dtype=torch.float64, device="cpu")
    return [torch.cat([missing[:j], steps])[: len(steps)] for j in range(1, order)]


def dpm_solver(sigmas: Tensor, flow: bool, kind: str, algorithm: str, midpoint: bool, order: int) -> Columns:
    """DPM-Solver and DPM-Solver++, multistep, of this order; Lu et al. 2022. History: the estimates before."""
    noises, sde = not algorithm.endswith("++"), algorithm.startswith("sde")
    columns, logs, ratio, scale, end = _multistep(sigmas, flow, kind, "epsilon" if noises else "sample")
    h = logs.diff()
    z = -h if noises else (2 * h if sde else h)
    # The sign of a half in diffusers' third order of the SDE is another than in the integral it stands for.
    bent = 1.0 if sde and order == 3 else 0.0
    weights = multistep_weights(z, [step / h for step in _behind(logs, order)], midpoint, bent)
    if noises and sde:
        weights = [2 * weight for weight in weights]
        columns["c_noise"] = end * torch.expm1(2 * h).sqrt()
    elif sde:
        ratio = ratio * torch.exp(-h)
        columns["c_noise"] = end * (-torch.expm1(-2 * h)).sqrt()
    columns["c_x"] = ratio
    return columns | {f"c_h{j}" if j else "c_x0": scale * weight for j, weight in enumerate(weights)}


def unipc(
    sigmas: Tensor, flow: bool, kind: str, keeps: str, solver: str, order: int
) -> tuple[Columns, Columns, Columns]:
    """(whole, corrector, predictor) of this order; Zhao et al. 2023.

    ``whole``: a step that is not corrected, from the model's output; history: the estimates before. ``corrector``: what
    the last step should have been, from the model's output at its end; history: where it began, and the estimates from
    there on. ``predictor``: from there, with the estimate in place of the model's output; history as of ``whole``.
    """
    columns, logs, ratio, scale, _ = _multistep(sigmas, flow, kind, keeps)
    h = logs.diff()
    sign = 1 if keeps == "sample" else -1
    behind = _behind(logs, order)
    places, total = [], torch.zeros_like(h)
    for step in behind:
        total = total - step
        places.append(total / h)
    first = -torch.expm1(-sign * h)

    def weights(corrects: bool) -> Tensor:
        found = bend(sign * h, places, corrects, solver)
        found[..., 1] += first
        if solver == "bh1":  # which diffusers has as 0 times infinity on the way to clean data
            found = torch.where(h.isfinite()[:, None], found, torch.nan)
        return scale[:, None] * found

    ahead, back = weights(False), weights(True)
    predictor = {"c_x": ratio} | {f"c_h{j}" if j else "c_m": ahead[:, j + 1] for j in range(order)}
    whole = columns | {"c_x": ratio} | {f"c_h{j}" if j else "c_x0": ahead[:, j + 1] for j in range(order)}
    # The corrector of the step before: its row is that of the step after it, where it runs.
    nan = torch.full_like(ratio[:1], torch.nan)
    corrector = {"c_h1": torch.cat([nan, ratio[:-1]]), "c_x0": torch.cat([nan, back[:-1, 0]])}
    corrector |= {f"c_h{j + 2}": torch.cat([nan, back[:-1, j + 1]]) for j in range(order)}
    return whole, columns | corrector, predictor


def folded(columns: Columns) -> Columns:
    """The same where the estimate is not clipped: what it adds is written as what x and the model's output add, so that
    nothing is rounded, or cancels, on the way."""
    columns = dict(columns)
    for to, of_x, of_m in (("c_x0", "c_x", "c_m"), ("h_x0", "h_x", "h_m")):
        factor = columns.pop(to, None)
        if factor is not None:
            columns[of_x] = columns.get(of_x, 0.0) + factor * columns["p_x"]
            columns[of_m] = columns.get(of_m, 0.0) + factor * columns["p_m"]
    return columns
