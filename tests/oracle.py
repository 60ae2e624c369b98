"""The independent truth: every formula of fastdiff restated from its paper, in NumPy alone.

Nothing here imports torch or fastdiff, and nothing here was written by looking at fastdiff's code. Arithmetic is
``np.longdouble`` (64-bit mantissa on x86, unit roundoff 5.4e-20) wherever a cumulative product or a cancellation would
cost digits of a float64, so that the oracle's own error is far below the 1e-12 that the tests ask for.

Papers, by the short names used below:

- DDPM: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239)
- IDDPM: Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (2102.09672)
- DDIM: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models" (2010.02502)
- SDE: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations" (2011.13456)
- LDM: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (2112.10752)
- PD: Salimans, Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (2202.00512)
- EDM: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (2206.00364)
- TrigFlow: Lu, Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2410.11081)
- MLSGM: Song, Durkan, Murray, Ermon 2021, "Maximum Likelihood Training of Score-Based Diffusion Models" (2101.09258)
- RF: Liu et al. 2022 (2209.03003), Lipman et al. 2022 "Flow Matching" (2210.02747); SD3: Esser et al. 2024 (2403.03206)
- MinSNR: Hang et al. 2023 (2303.09556); P2: Choi et al. 2022 (2204.00227); Debiased: Yu et al. 2023 (2310.08442)
- ZTSNR: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2305.08891)
- LPIPS: Zhang et al. 2018 (1801.03924); focal frequency loss: Jiang et al. 2021 (2012.12821)
- VDM: Kingma et al. 2021, "Variational Diffusion Models" (2107.00630)
- Random123: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from statistics import NormalDist

import numpy as np

LD = np.longdouble
UNIT = 2.0**-53  # unit roundoff of float64, for the tests' error bounds
INF = float("inf")


def ld(x) -> np.ndarray:
    """A longdouble array of x (exact for float64 input)."""
    return np.asarray(x, dtype=LD)


def assert_close(actual, expected, rel=1e-12, absolute=0.0, label="") -> None:
    """|actual - expected| <= absolute + rel |expected|, elementwise, with the worst place named on failure.

    `rel` and `absolute` may be arrays (an error bound by element). Infinities must agree; NaN never passes.
    """
    actual, expected = np.broadcast_arrays(ld(actual), ld(expected))
    rel, absolute = np.broadcast_to(ld(rel), expected.shape), np.broadcast_to(ld(absolute), expected.shape)
    with np.errstate(invalid="ignore"):
        error = np.where(actual == expected, LD(0), np.abs(actual - expected))
        bound = absolute + rel * np.abs(np.where(np.isfinite(expected), expected, 0))
    bad = ~(error <= bound)
    if bad.any():
        worst = int(np.argmax(np.where(bad, np.where(np.isfinite(error), error - bound, LD(np.inf)), LD(-np.inf))))
        a, e, b = actual.ravel()[worst], expected.ravel()[worst], bound.ravel()[worst]
        raise AssertionError(
            f"{label}: {int(bad.sum())} of {bad.size} differ; at flat index {worst}: {a!r}, expected {e!r} within {b!r}"
        )


PI = LD(4) * np.arctan(LD(1))  # pi to the longdouble's last digit (math.pi is a float64)


# --------------------------------------------------------------------------------------------------------------------
# Beta schedules
# --------------------------------------------------------------------------------------------------------------------


def betas_linear(steps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """DDPM section 4: "constants increasing linearly from beta_1 = 1e-4 to beta_T = 0.02"."""
    if steps == 1:
        return ld([start])
    i = ld(np.arange(steps))
    return LD(start) + (LD(end) - LD(start)) * i / LD(steps - 1)


def betas_scaled_linear(steps: int, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """LDM's schedule: the square roots are linear. beta_i = (sqrt(b0) + (sqrt(b1) - sqrt(b0)) i / (T-1))^2."""
    if steps == 1:
        return ld([start])
    i = ld(np.arange(steps))
    root0, root1 = np.sqrt(LD(start)), np.sqrt(LD(end))
    return (root0 + (root1 - root0) * i / LD(steps - 1)) ** 2


def betas_cosine(steps: int, s: float = 0.008, beta_max: float = 0.999) -> np.ndarray:
    """IDDPM eq. 17: abar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), and 1 - abar_t/abar_{t-1} <= 0.999."""
    t = ld(np.arange(steps + 1)) / LD(steps)
    f = np.cos((t + LD(s)) / (1 + LD(s)) * PI / 2) ** 2
    abar = f / f[0]
    return np.minimum(1 - abar[1:] / abar[:-1], LD(beta_max))


def alpha_bar(betas) -> np.ndarray:
    """DDPM eq. 4: abar_t = prod_{s<=t} (1 - beta_s)."""
    return np.cumprod(1 - ld(betas))


def zero_terminal_snr_alpha_bar(betas) -> np.ndarray:
    """ZTSNR algorithm 1: shift sqrt(abar) so that its last value is 0, scale it so that its first is unchanged."""
    root = np.sqrt(alpha_bar(betas))
    first, last = root[0], root[-1]
    root = (root - last) * first / (first - last)
    root[-1] = 0  # (last - last) * anything, said out loud
    return root**2


def zero_terminal_snr_betas(betas) -> np.ndarray:
    """ZTSNR algorithm 1, second half: betas back from the rescaled cumulative product."""
    abar = zero_terminal_snr_alpha_bar(betas)
    return np.concatenate([1 - abar[:1], 1 - abar[1:] / abar[:-1]])


# --------------------------------------------------------------------------------------------------------------------
# Moments of rows, and what is made of them. Arrays are [batch, ...]; a row is a sample.
# --------------------------------------------------------------------------------------------------------------------


def _within(x) -> tuple[int, ...]:
    return tuple(range(1, np.ndim(x)))


def norm(x) -> np.ndarray:
    """The Euclidean norm of each sample, [batch, 1, ...]."""
    return np.sqrt((ld(x) ** 2).sum(_within(x), keepdims=True))


def meanflow_weight(prediction, target, c, p) -> np.ndarray:
    """MeanFlow (2505.13447) eq. 22: w = 1 / (||Delta||_2^2 + c)^p of the error Delta; [batch]."""
    return 1 / ((norm(ld(prediction) - ld(target)) ** 2).reshape(-1) + LD(c)) ** LD(p)


def dmd_gradient(x, fake, real) -> np.ndarray:
    """DMD (2311.18828) eq. 7 and 8: (mu_fake - mu_real) C S / ||mu_real - x||_1; C S is the number of elements."""
    size = np.abs(ld(real) - ld(x)).mean(_within(x), keepdims=True)
    return (ld(fake) - ld(real)) / size


def nft_loss(prediction, x0) -> np.ndarray:
    """DiffusionNFT (2509.16117), adaptive weighting: ||x_theta - x0||^2 / mean(abs(x_theta - x0)); [batch]."""
    e = ld(prediction) - ld(x0)
    return (e**2).sum(_within(e)) / np.abs(e).mean(_within(e))


def cfg_zero_star(cond, uncond, scale) -> np.ndarray:
    """CFG-Zero* (2503.18886) algorithm 1: s = v_cond . v_uncond / ||v_uncond||^2; (1 - w) s v_uncond + w v_cond."""
    cond, uncond = ld(cond), ld(uncond)
    s = (cond * uncond).sum(_within(cond), keepdims=True) / norm(uncond) ** 2
    return (1 - LD(scale)) * s * uncond + LD(scale) * cond


def projected_guidance(cond, uncond, scale, r, eta) -> np.ndarray:
    """APG (2410.02416) algorithm 1 without momentum: the difference, rescaled to a norm of at most r, has a part along
    the conditional prediction and one orthogonal to it; cond + (w - 1) (orthogonal + eta parallel)."""
    cond, uncond = ld(cond), ld(uncond)
    difference = cond - uncond
    difference = difference * np.minimum(1, LD(r) / norm(difference))
    unit = cond / norm(cond)
    parallel = (difference * unit).sum(_within(cond), keepdims=True) * unit
    return cond + (LD(scale) - 1) * (difference - parallel + LD(eta) * parallel)


def rescaled_guidance(cond, uncond, scale, phi) -> np.ndarray:
    """ZTSNR (2305.08891) eq. 14 to 16: guidance with the standard deviation of the conditional prediction, mixed."""
    cond, uncond = ld(cond), ld(uncond)
    guided = uncond + LD(scale) * (cond - uncond)
    spread = {name: x.std(_within(x), keepdims=True) for name, x in (("cond", cond), ("guided", guided))}
    return LD(phi) * guided * spread["cond"] / spread["guided"] + (1 - LD(phi)) * guided


def teacache_change(now, before) -> np.ndarray:
    """TeaCache (2411.19108) eq. 4: the relative L1 distance ||O_t - O_t+1||_1 / ||O_t+1||_1 of all."""
    return np.abs(ld(now) - ld(before)).sum() / np.abs(ld(before)).sum()


# --------------------------------------------------------------------------------------------------------------------
# alpha and sigma: x_t = alpha x0 + sigma n
# --------------------------------------------------------------------------------------------------------------------


def vp_alpha_sigma(abar, t) -> tuple[np.ndarray, np.ndarray]:
    """DDPM eq. 4: q(x_t | x0) = N(sqrt(abar_t) x0, (1 - abar_t) I)."""
    a = ld(abar)[np.asarray(t)]
    return np.sqrt(a), np.sqrt(1 - a)


def flow_shift(t, shift: float = 1.0) -> np.ndarray:
    """SD3 eq. 23 (resolution shift): s = shift t / (1 + (shift - 1) t)."""
    t, shift = ld(t), LD(shift)
    return shift * t / (1 + (shift - 1) * t)


def flow_alpha_sigma(t, shift: float = 1.0, sigma_min: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Flow matching with an optimal-transport path (Lipman et al. eq. 20-22, time reversed so that t = 1 is noise).

    1 - s is written as (1-t)/(1+(shift-1)t), which does not cancel near t = 1.
    """
    t, shift, sigma_min = ld(t), LD(shift), LD(sigma_min)
    alpha = (1 - t) / (1 + (shift - 1) * t)
    return alpha, flow_shift(t, shift) + sigma_min * alpha


def edm_alpha_sigma(t) -> tuple[np.ndarray, np.ndarray]:
    """EDM section 2: x = y + n, n ~ N(0, sigma^2 I); t is sigma itself."""
    t = ld(t)
    return np.ones_like(t), t


def _vpsde_integral(t, beta_min, beta_max) -> np.ndarray:
    """The integral of beta(s) = b0 + s (b1 - b0) from 0 to t."""
    t, b0, b1 = ld(t), LD(beta_min), LD(beta_max)
    return b0 * t + (b1 - b0) * t * t / 2


def vpsde_alpha_sigma(t, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """SDE eq. 33 (appendix C): mean x0 exp(-B/2), variance 1 - exp(-B), B the integral of beta."""
    b = _vpsde_integral(t, beta_min, beta_max)
    return np.exp(-b / 2), np.sqrt(-np.expm1(-b))


def subvpsde_alpha_sigma(t, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """SDE eq. 29 (appendix B/C): mean x0 exp(-B/2), standard deviation 1 - exp(-B)."""
    b = _vpsde_integral(t, beta_min, beta_max)
    return np.exp(-b / 2), -np.expm1(-b)


def vesde_alpha_sigma(t, sigma_min: float = 0.01, sigma_max: float = 50.0) -> tuple[np.ndarray, np.ndarray]:
    """SDE eq. 30 (appendix C): sigma(t) = sigma_min (sigma_max / sigma_min)^t, mean x0."""
    t = ld(t)
    return np.ones_like(t), LD(sigma_min) * (LD(sigma_max) / LD(sigma_min)) ** t


def vpsde_diffusion_squared(t, beta_min: float = 0.1, beta_max: float = 20.0) -> np.ndarray:
    """SDE eq. 11/32: g(t)^2 = beta(t)."""
    return LD(beta_min) + ld(t) * (LD(beta_max) - LD(beta_min))


def subvpsde_diffusion_squared(t, beta_min: float = 0.1, beta_max: float = 20.0) -> np.ndarray:
    """SDE eq. 12: g(t)^2 = beta(t) (1 - exp(-2 B))."""
    b = _vpsde_integral(t, beta_min, beta_max)
    return vpsde_diffusion_squared(t, beta_min, beta_max) * -np.expm1(-2 * b)


def vesde_diffusion_squared(t, sigma_min: float = 0.01, sigma_max: float = 50.0) -> np.ndarray:
    """SDE eq. 30: g(t) = sigma_min (sigma_max/sigma_min)^t sqrt(2 log(sigma_max/sigma_min))."""
    _, sigma = vesde_alpha_sigma(t, sigma_min, sigma_max)
    return sigma**2 * 2 * np.log(LD(sigma_max) / LD(sigma_min))


def trigflow_alpha_sigma(t, sigma_data: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """TrigFlow section 3: x_t = cos(t) x0 + sin(t) z with z ~ N(0, sigma_d^2 I), t in [0, pi/2].

    The last t is the float64 number pi/2, where the cosine is taken to be 0: it is what is left up to that number.
    """
    t = ld(t)
    return np.sin(LD(math.pi / 2) - t), LD(sigma_data) * np.sin(t)


def cosine_alpha_sigma(t) -> tuple[np.ndarray, np.ndarray]:
    """PD section 2: alpha = cos(pi t/2), sigma = sin(pi t/2), t in [0, 1]. (cos(x) = sin(pi/2 - x), exact at t = 1.)"""
    t = ld(t)
    return np.sin(PI / 2 * (1 - t)), np.sin(PI / 2 * t)


def trigflow_diffusion_squared(t, sigma_data: float = 0.5) -> np.ndarray:
    """VDM appendix: g^2 = d(sigma^2)/dt - 2 (d log alpha/dt) sigma^2, here 2 d^2 sin cos + 2 tan d^2 sin^2."""
    return 2 * LD(sigma_data) ** 2 * np.tan(ld(t))


def cosine_diffusion_squared(t) -> np.ndarray:
    """The same for alpha = cos(pi t/2), sigma = sin(pi t/2): pi tan(pi t/2)."""
    return PI * np.tan(PI / 2 * ld(t))


def snr(alpha, sigma) -> np.ndarray:
    """VDM section 3.2: SNR = alpha^2 / sigma^2 (infinite where sigma is 0)."""
    alpha, sigma = ld(alpha), ld(sigma)
    with np.errstate(divide="ignore"):
        return np.where(sigma == 0, LD(np.inf), alpha**2 / np.where(sigma == 0, 1, sigma) ** 2)


# --------------------------------------------------------------------------------------------------------------------
# Posterior
# --------------------------------------------------------------------------------------------------------------------


def posterior(betas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DDPM eq. 7: the mean's coefficients of x0 and x_t, and the variance of q(x_{t-1} | x_t, x0), abar_{-1} = 1."""
    betas = ld(betas)
    abar = alpha_bar(betas)
    prev = np.concatenate([ld([1.0]), abar[:-1]])
    c_x0 = np.sqrt(prev) * betas / (1 - abar)
    c_xt = np.sqrt(1 - betas) * (1 - prev) / (1 - abar)
    variance = (1 - prev) / (1 - abar) * betas
    return c_x0, c_xt, variance


def posterior_log_variance(betas, first: str) -> np.ndarray:
    """The log of DDPM's posterior variance; its entry 0 (log 0) is log(1e-20), or entry 1 again (IDDPM's code)."""
    _, _, variance = posterior(betas)
    out = np.empty_like(variance)
    out[1:] = np.log(variance[1:])
    out[0] = np.log(LD("1e-20")) if first == "clamp" else out[1]
    return out


# --------------------------------------------------------------------------------------------------------------------
# Predictions: each kind's target as a formula of x0 and n, and each kind's way back to x0
# --------------------------------------------------------------------------------------------------------------------


def edm_preconditioning(sigma, sigma_data: float = 0.5) -> dict[str, np.ndarray]:
    """EDM table 1, last column: c_skip, c_out, c_in, c_noise."""
    sigma, d = ld(sigma), LD(sigma_data)
    with np.errstate(divide="ignore"):
        noise = np.log(sigma) / 4
    root = np.sqrt(sigma**2 + d**2)
    return {"c_skip": d**2 / root**2, "c_out": sigma * d / root, "c_in": 1 / root, "c_noise": noise}


def target(kind: str, x0, n, alpha, sigma, *, sigma_data=0.5, sigma_min=0.0, posterior_coefficients=None) -> np.ndarray:
    """What a network of this kind is trained to say, as a direct formula of x0 and the noise.

    epsilon: DDPM eq. 12. v: PD section 4 / appendix D (v = alpha n - sigma x0, divided by sqrt(alpha^2 + sigma^2)
    where that is not 1). flow: RF (velocity n - x0), with sigma_min Lipman et al. eq. 23. score: SDE eq. 7 with a
    Gaussian kernel, -(x_t - alpha x0)/sigma^2. trigflow: TrigFlow eq. 4, dx/dt = cos(t) sigma_d n - sin(t) x0 at the
    angle whose tangent is sigma/(alpha sigma_d). edm: EDM eq. 8, (x0 - c_skip x)/c_out, in the space x = x_t/alpha of
    noise level sigma/alpha. previous_sample: DDPM eq. 7.
    """
    x0, n, alpha, sigma = ld(x0), ld(n), ld(alpha), ld(sigma)
    x_t = alpha * x0 + sigma * n
    if kind == "epsilon":
        return n + 0 * x_t
    if kind == "sample":
        return x0 + 0 * x_t
    if kind == "v_prediction":
        return (alpha * n - sigma * x0) / np.hypot(alpha, sigma)
    if kind == "flow":
        return (1 - LD(sigma_min)) * n - x0 + 0 * x_t
    if kind == "reversed_flow":
        return x0 - (1 - LD(sigma_min)) * n + 0 * x_t
    if kind == "score":
        return -(x_t - alpha * x0) / sigma**2
    if kind == "trigflow":
        d = LD(sigma_data)
        sin, cos = np.sin(np.arctan2(sigma, alpha * d)), np.sin(np.arctan2(alpha * d, sigma))
        return cos * d * n - sin * x0
    if kind == "edm":
        d = LD(sigma_data)
        with np.errstate(divide="ignore", invalid="ignore"):
            level = sigma / alpha
            c = edm_preconditioning(level, sigma_data)
            # x0 - c_skip (x0 + level n), with 1 - c_skip = level^2/(level^2 + d^2) said without its cancellation
            rest = level**2 / (level**2 + d**2)
            value = (rest * x0 - c["c_skip"] * level * n) / c["c_out"]
        value = np.where(sigma == 0, -n, value)  # c_out -> 0: (x0 sigma/d - n d) / sqrt(sigma^2 + d^2) -> -n
        return np.where(alpha == 0, x0 / d, value)  # sigma/alpha -> inf: the same expression -> x0/d
    if kind == "previous_sample":
        c_x0, c_xt = posterior_coefficients
        return ld(c_x0) * x0 + ld(c_xt) * x_t
    raise KeyError(kind)


def to_x0(kind: str, x_t, m, alpha, sigma, *, sigma_data=0.5, sigma_min=0.0, posterior_coefficients=None) -> np.ndarray:
    """x0 from x_t and the model's output m; one direct formula for each kind (no 2x2 system solved)."""
    x_t, m, alpha, sigma = ld(x_t), ld(m), ld(alpha), ld(sigma)
    if kind == "epsilon":  # DDPM eq. 15
        return (x_t - sigma * m) / alpha
    if kind == "sample":
        return m + 0 * x_t + 0 * alpha
    if kind == "v_prediction":  # PD appendix D; in sigma space x/(sigma^2+1) - sigma v/sqrt(sigma^2+1)
        return alpha * x_t / (alpha**2 + sigma**2) - sigma * m / np.hypot(alpha, sigma)
    if kind in ("flow", "reversed_flow"):
        m = m if kind == "flow" else -m
        a, keep = alpha, 1 - LD(sigma_min)
        return (keep * x_t - sigma * m) / (keep * a + sigma)  # the divisor is 1 for a rectified flow
    if kind == "score":  # Tweedie: E[x0] = (x_t + sigma^2 score)/alpha
        return (x_t + sigma**2 * m) / alpha
    if kind == "trigflow":  # TrigFlow eq. 5: cos(t) x - sin(t) m, of an x of deviation sigma_d
        d = LD(sigma_data)
        norm = np.hypot(sigma, alpha * d)
        return alpha * d / norm * (x_t * d / norm) - sigma / norm * m
    if kind == "edm":  # EDM eq. 7: D = c_skip x + c_out F
        c = edm_preconditioning(sigma / alpha, sigma_data)
        return c["c_skip"] * (x_t / alpha) + c["c_out"] * m
    if kind == "previous_sample":
        c_x0, c_xt = posterior_coefficients
        return (m - ld(c_xt) * x_t) / ld(c_x0)
    raise KeyError(kind)


# --------------------------------------------------------------------------------------------------------------------
# Weightings. Each returns the weight of the squared error of the prediction, scalar by scalar, with the limits at
# SNR = 0 (alpha = 0) and SNR = infinity (sigma = 0) written out. An infinite limit is 0 by fastdiff's policy.
# --------------------------------------------------------------------------------------------------------------------

KINDS = ("epsilon", "sample", "v_prediction", "flow", "reversed_flow", "score", "edm", "trigflow")
FLOAT32_MAX = float(np.finfo(np.float32).max)


def _jacobian_squared(kind: str, s: LD, sigma: LD, d: LD) -> LD:
    """(d x0 / d m)^2 for 0 < SNR < infinity, read off the formulas of `to_x0` (flow: of a rectified flow)."""
    if kind == "epsilon":
        return 1 / s
    if kind == "sample":
        return LD(1)
    if kind == "v_prediction":
        return 1 / (s + 1)
    if kind in ("flow", "reversed_flow"):
        return sigma**2
    if kind == "score":
        return sigma**2 / s  # (sigma^2/alpha)^2
    if kind == "edm":
        return d**2 / (1 + s * d**2)  # c_out^2 at sigma/alpha = s^-1/2
    if kind == "trigflow":
        return 1 / (1 + s * d**2)  # sin^2 of the angle
    raise KeyError(kind)


def _policy(w) -> LD:
    w = LD(w)
    return LD(0) if not np.isfinite(w) or w > FLOAT32_MAX else w


def _rows(f, *arrays) -> np.ndarray:
    arrays = np.broadcast_arrays(*[ld(a) for a in arrays])
    out = np.empty(arrays[0].shape, dtype=LD)
    for i in np.ndindex(out.shape):
        out[i] = _policy(f(*[LD(a[i]) for a in arrays]))
    return out


def _snr(alpha: LD, sigma: LD) -> LD:
    return LD(np.inf) if sigma == 0 else (alpha / sigma) ** 2


def _flow_like(kind: str) -> bool:
    return kind in ("flow", "reversed_flow")


def weight_uniform(kind, alpha, sigma):
    """DDPM eq. 14 (L_simple)."""
    return _rows(lambda a, s: LD(1), alpha, sigma)


def weight_min_snr(kind, alpha, sigma, gamma=5.0, form="paper", sigma_data=0.5):
    """MinSNR section 3.4: w = min(SNR, gamma) on x0; on epsilon divided by SNR, on v by SNR + 1.

    The other forms met for v: "plus_one" min(SNR, gamma)/SNR + 1, "shifted" min(SNR + 1, gamma)/(SNR + 1), "epsilon"
    min(gamma/SNR, 1).
    """
    g, d = LD(gamma), LD(sigma_data)

    def row(a, s):
        r = _snr(a, s)
        if kind == "v_prediction" and form == "plus_one":
            return LD(2) if r == 0 else LD(1) if np.isinf(r) else min(r, g) / r + 1
        if kind == "v_prediction" and form == "shifted":
            return LD(0) if np.isinf(r) else min(r + 1, g) / (r + 1)
        if kind == "v_prediction" and form == "epsilon":
            return LD(1) if r <= g else g / r
        if r == 0:
            return {"epsilon": LD(1), "score": s**2}.get(kind, LD(0))
        if np.isinf(r):
            return {"sample": g}.get(kind, LD(0))
        return min(r, g) * _jacobian_squared(kind, r, s, d)

    return _rows(row, alpha, sigma)


def weight_soft_min_snr(kind, alpha, sigma, gamma=5.0, sigma_data=0.5):
    """Soft min-SNR (Crowson et al. 2024, HDiT, section 4.4): SNR gamma/(SNR + gamma) on x0."""
    g, d = LD(gamma), LD(sigma_data)

    def row(a, s):
        r = _snr(a, s)
        if r == 0:
            return {"epsilon": LD(1), "score": s**2}.get(kind, LD(0))
        if np.isinf(r):
            return {"sample": g}.get(kind, LD(0))
        return r * g / (r + g) * _jacobian_squared(kind, r, s, d)

    return _rows(row, alpha, sigma)


def weight_truncated_snr(kind, alpha, sigma, sigma_data=0.5):
    """PD section 4: max(SNR, 1) on x0 ("truncated SNR")."""
    d = LD(sigma_data)

    def row(a, s):
        r = _snr(a, s)
        if r == 0:  # weight 1 on x0
            return {"epsilon": INF, "score": INF, "sample": 1, "v_prediction": 1, "edm": d**2, "trigflow": 1}.get(
                kind, s**2
            )
        if np.isinf(r):  # weight SNR on x0
            return {"epsilon": 1, "score": 0, "sample": INF, "v_prediction": 1, "edm": 1, "trigflow": 1 / d**2}.get(
                kind, a**2
            )
        return max(r, LD(1)) * _jacobian_squared(kind, r, s, d)

    return _rows(row, alpha, sigma)


def weight_snr(kind, alpha, sigma, power=1.0):
    """SNR^power on the prediction's own error (PD section 4 for the power 1 on x0, which is epsilon's plain error)."""

    def row(a, s):
        r, p = _snr(a, s), LD(power)
        if p == 0:
            return LD(1)
        if r == 0:
            return LD(0) if p > 0 else LD(np.inf)
        if np.isinf(r):
            return LD(np.inf) if p > 0 else LD(0)
        return r**p

    return _rows(row, alpha, sigma)


def weight_p2(kind, alpha, sigma, gamma=1.0, k=None):
    """P2 eq. 8: 1/(k + SNR)^gamma; k = 1, for v 2."""
    k = LD((2.0 if kind == "v_prediction" else 1.0) if k is None else k)

    def row(a, s):
        r, g = _snr(a, s), LD(gamma)
        if np.isinf(r):
            return LD(1) if g == 0 else LD(0)
        return (k + r) ** -g

    return _rows(row, alpha, sigma)


def weight_debiased(kind, alpha, sigma, cap=1000.0, v_form="reciprocal", sigma_data=0.5):
    """Debiased eq. 10: 1/sqrt(SNR) on epsilon, SNR capped; v in the two forms in use; others carried over."""
    top, d = LD(cap), LD(sigma_data)

    def row(a, s):
        r = _snr(a, s)
        c = min(r, top)
        if kind == "v_prediction":
            return 1 / (c + 1) if v_form == "reciprocal" else 1 / np.sqrt(c + 1)
        if kind == "epsilon":
            return LD(np.inf) if r == 0 else 1 / np.sqrt(c)
        if r == 0:  # epsilon's weight, times SNR J^2 where J^2 stays finite; the score's is sigma^2/sqrt(SNR)
            return LD(np.inf) if kind == "score" else LD(0)
        if np.isinf(r):
            base = 1 / np.sqrt(top)
            rows = {"sample": LD(np.inf), "score": LD(0), "edm": base, "trigflow": base / d**2}
            return rows.get(kind, base * a**2)
        return r / np.sqrt(c) * _jacobian_squared(kind, r, s, d)

    return _rows(row, alpha, sigma)


def weight_inverse_alpha_bar(kind, alpha, sigma):
    """1/abar = 1/alpha^2."""
    return _rows(lambda a, s: LD(np.inf) if a == 0 else 1 / a**2, alpha, sigma)


def weight_edm(kind, alpha, sigma, sigma_data=0.5, prediction_sigma_data=None):
    """EDM table 1: lambda(sigma) = (sigma^2 + d^2)/(sigma d)^2 on x0, sigma meaning sigma/alpha."""
    d = LD(sigma_data)
    dp = d if prediction_sigma_data is None else LD(prediction_sigma_data)

    def row(a, s):
        if a == 0:  # sigma/alpha infinite: 1/d^2 on x0
            on_x0 = 1 / d**2
            return {
                "epsilon": LD(np.inf),
                "score": LD(np.inf),
                "sample": on_x0,
                "v_prediction": on_x0,
                "edm": on_x0 * dp**2,
                "trigflow": on_x0,
            }.get(kind, on_x0 * s**2)
        if s == 0:  # SNR on x0
            return {"epsilon": 1, "score": 0, "sample": INF, "v_prediction": 1, "edm": 1, "trigflow": 1 / dp**2}.get(
                kind, a**2
            )
        level = s / a
        return (level**2 + d**2) / (level * d) ** 2 * _jacobian_squared(kind, (a / s) ** 2, s, dp)

    return _rows(row, alpha, sigma)


def weight_sigma_sqrt(kind, alpha, sigma):
    """SD3's training script ("sigma_sqrt"): sigma^-2."""
    return _rows(lambda a, s: LD(np.inf) if s == 0 else 1 / s**2, alpha, sigma)


def weight_cosmap(kind, alpha, sigma):
    """SD3 section 3.1, "CosMap" density: 2/(pi - 2 pi s + 2 pi s^2)."""
    return _rows(lambda a, s: 2 / (PI * (1 - 2 * s + 2 * s**2)), alpha, sigma)


def weight_sigma_linear(kind, alpha, sigma, slope=3.0):
    """NeMo's flow trainer: 1 + shift sigma."""
    return _rows(lambda a, s: 1 + LD(slope) * s, alpha, sigma)


def weight_interpolated(table, place):
    """Straight lines through table[k] at k / (K - 1)."""
    table, found = ld(table), []
    for s in ld(place).flat:
        k = min(int(s * (len(table) - 1)), len(table) - 2)
        left, right = LD(k) / (len(table) - 1), LD(k + 1) / (len(table) - 1)
        found.append((table[k] * (right - s) + table[k + 1] * (s - left)) / (right - left))
    return np.array(found).reshape(np.shape(place))


def adaptive_weights(errors, c, p):
    """MeanFlow: w = 1 / (S + c)^p."""
    return 1 / (ld(errors) + LD(c)) ** LD(p)


def weight_bell(steps: int) -> np.ndarray:
    """The bell ("bsmntw"), t at its place out of 1000: y = exp(-2((t-500)/1000)^2), then (y - min) N/sum."""
    t = ld(np.arange(steps)) * 1000 / LD(steps)
    y = np.exp(-2 * ((t - 500) / LD(1000)) ** 2)
    y = y - y.min()
    return y * LD(steps) / y.sum()


def weight_likelihood(kind, alpha, sigma, diffusion_squared, sigma_data=0.5):
    """SDE eq. 7 with lambda(t) = g(t)^2 (Song, Durkan et al. 2021, likelihood weighting): g^2 on the score's error.

    Carried over by |d score/d m|: score = -n/sigma = (alpha x0 - x_t)/sigma^2.
    """
    d = LD(sigma_data)

    def row(a, s, g2):
        if kind == "score":
            return g2
        if s == 0:
            return LD(np.inf)
        if kind == "epsilon":
            return g2 / s**2
        if kind == "sample":
            return g2 * a**2 / s**4
        return g2 * a**2 / s**4 * _jacobian_squared(kind, (a / s) ** 2, s, d)

    return _rows(row, alpha, sigma, diffusion_squared)


# --------------------------------------------------------------------------------------------------------------------
# Likelihood
# --------------------------------------------------------------------------------------------------------------------


def mixture_log_density(x, weights, means, stds, alpha=1.0, sigma=0.0) -> np.ndarray:
    """log p(x_t) in nats, x_t = alpha x0 + sigma n, x0 of a mixture of isotropic Gaussians: x [B, D], means [K, D].

    A sum of Gaussians with means alpha mu_k and variances alpha^2 std_k^2 + sigma^2.
    """
    x, w, mu, std = ld(x)[:, None], ld(weights), LD(alpha) * ld(means), ld(stds)
    variance = (LD(alpha) * std) ** 2 + LD(sigma) ** 2
    logs = np.log(w) - ((x - mu) ** 2).sum(-1) / (2 * variance) - x.shape[-1] / LD(2) * np.log(2 * PI * variance)
    top = logs.max(1, keepdims=True)
    return (top + np.log(np.exp(logs - top).sum(1, keepdims=True)))[:, 0]


# --------------------------------------------------------------------------------------------------------------------
# Error functions, textbook forms. `decimal_*` are the same formulas with 60 digits, for the places where even a
# longdouble of the textbook form has lost its digits (|e| << c, |e| << 1).
# --------------------------------------------------------------------------------------------------------------------


def loss_mse(e):
    return ld(e) ** 2


def loss_l1(e):
    return np.abs(ld(e))


def loss_huber(e, delta=1.0):
    """Huber 1964: e^2/2 within delta, delta (|e| - delta/2) beyond."""
    e, d = np.abs(ld(e)), LD(delta)
    return np.where(e <= d, e**2 / 2, d * (e - d / 2))


def loss_smooth_l1(e, beta=1.0):
    """Girshick 2015 with a width: e^2/(2 beta) within beta, |e| - beta/2 beyond; |e| for beta = 0."""
    e, b = np.abs(ld(e)), LD(beta)
    if b == 0:
        return e
    return np.where(e < b, e**2 / (2 * b), e - b / 2)


def loss_pseudo_huber(e, c=0.1, form="plain"):
    """Charbonnier et al. 1997; sqrt(e^2 + c^2) - c, times 1 (plain), 2c (scaled) or 2 (normalized)."""
    e, c = ld(e), ld(c)
    scale = {"plain": ld(1), "scaled": 2 * c, "normalized": ld(2)}[form]
    return scale * (np.sqrt(e**2 + c**2) - c)


def pseudo_huber_c(schedule, c, *, t=None, steps=None, alpha=None, sigma=None):
    """c by row (Khrapov et al. 2024, 2403.16728): constant; exponential c^(t/T); SNR (1-c)/(1+sigma/alpha)^2 + c."""
    c = LD(c)
    if schedule == "constant":
        return c
    if schedule == "exponential":
        return np.exp(np.log(c) * ld(t) / LD(steps))
    if schedule == "snr":
        return (1 - c) / (1 + ld(sigma) / ld(alpha)) ** 2 + c
    raise KeyError(schedule)


def loss_log_cosh(e):
    """log(cosh(e))."""
    return np.log(np.cosh(ld(e)))


def decimal_pseudo_huber(e: float, c: float, form: str = "plain") -> float:
    with localcontext() as context:
        context.prec = 60
        e_, c_ = Decimal(float(e)), Decimal(float(c))
        scale = {"plain": Decimal(1), "scaled": 2 * c_, "normalized": Decimal(2)}[form]
        return float(scale * ((e_ * e_ + c_ * c_).sqrt() - c_))


def decimal_log_cosh(e: float) -> float:
    with localcontext() as context:
        context.prec = 60
        x = Decimal(float(e))
        return float(((x.exp() + (-x).exp()) / 2).ln())


# --------------------------------------------------------------------------------------------------------------------
# Terms of the variational bound
# --------------------------------------------------------------------------------------------------------------------


def latents(moments, xi, shift, scale, clamp):
    """Kingma & Welling 2014, eq. 10: mu + sigma * eps, of moments whose channels are mu and then ln sigma^2; minus the
    autoencoder's shift, times its scale (Flux's and diffusers' shift_factor and scaling_factor)."""
    channels = np.shape(moments)[1] // 2
    mu, log_variance = ld(moments)[:, :channels], np.clip(ld(moments)[:, channels:], *map(ld, clamp))
    variance = np.exp(log_variance)
    return (mu + np.sqrt(variance) * ld(xi) - ld(shift)) * ld(scale)


def normal_divergence(moments, clamp):
    """Kingma & Welling 2014, appendix B: -(1 + ln sigma^2 - mu^2 - sigma^2) / 2, each element."""
    channels = np.shape(moments)[1] // 2
    mu, log_variance = ld(moments)[:, :channels], np.clip(ld(moments)[:, channels:], *map(ld, clamp))
    return -(1 + log_variance - mu**2 - np.exp(log_variance)) / 2


def gaussian_divergence(d, log_variance, l_q):
    """KL(N(mu_q, e^l_q) || N(mu_p, e^L)) in nats, d = mu_p - mu_q: ln(sigma_p/sigma_q) + (sigma_q^2 + d^2) / (2
    sigma_p^2) - 1/2."""
    d, p, q = ld(d), ld(log_variance), ld(l_q)
    return (p - q) / 2 + (np.exp(q) + d**2) / (2 * np.exp(p)) - LD(1) / 2


def gaussian_density(d, log_variance):
    """-ln N(d; 0, e^L)."""
    variance = np.exp(ld(log_variance))
    return np.log(2 * np.arccos(LD(-1)) * variance) / 2 + ld(d) ** 2 / (2 * variance)


def gaussian_bin(d, log_variance, x0, half_width):
    """DDPM eq. 13: -ln of the probability of the bin of x0 under a Gaussian of mean x0 + d, at least 1e-12. As in the
    authors' code, the outermost bins are those of data beyond 0.999, and the normal distribution function is
    (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3))) / 2."""
    d, x0, h = (np.broadcast_to(ld(v), np.shape(x0)) for v in (d, x0, half_width))
    sigma = np.exp(ld(log_variance) / 2)

    def cdf(a):
        with np.errstate(over="ignore"):  # (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x)), which keeps its digits
            return 1 / (1 + np.exp(-2 * np.sqrt(2 / np.arccos(LD(-1))) * (a + LD("0.044715") * a**3)))

    plus, minus = (-d + h) / sigma, (-d - h) / sigma
    # In the upper tail by symmetry: 1 - (1 - x) would lose digits.
    between = np.where(minus > 0, cdf(-minus) - cdf(-plus), cdf(plus) - cdf(minus))
    probability = np.where(x0 < -0.999, cdf(plus), np.where(x0 > 0.999, cdf(-minus), between))
    return -np.log(np.maximum(probability, LD("1e-12")))


# --------------------------------------------------------------------------------------------------------------------
# Sampler steps
# --------------------------------------------------------------------------------------------------------------------


def ddpm_step(x, x0, abar_t, abar_prev, z, variance="fixed_small", log_fraction=None) -> np.ndarray:
    """DDPM algorithm 2 with eq. 7, beta = 1 - abar_t/abar_prev (a strided beta, IDDPM eq. 19).

    variance: "fixed_small" is beta-tilde, "fixed_large" beta (DDPM section 3.2); "learned": `log_fraction` is the log
    of the variance itself; "learned_range": IDDPM eq. 15, exp(v log beta + (1 - v) log beta-tilde), v = (f + 1)/2.
    """
    x, x0, a, b = ld(x), ld(x0), LD(abar_t), LD(abar_prev)
    beta = 1 - a / b
    mean = np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * x
    small = (1 - b) / (1 - a) * beta
    if variance == "fixed_small":
        std = np.sqrt(small)
    elif variance == "fixed_large":
        std = np.sqrt(beta)
    elif variance == "learned":
        std = np.exp(ld(log_fraction) / 2)
    else:
        v = (ld(log_fraction) + 1) / 2
        std = np.exp((v * np.log(beta) + (1 - v) * np.log(small)) / 2)
    return mean + std * ld(z)


def ddim_step(x, x0, eps, abar_t, abar_prev, eta=0.0, z=0.0) -> np.ndarray:
    """DDIM eq. 12 with sigma of eq. 16."""
    a, b = LD(abar_t), LD(abar_prev)
    std = LD(eta) * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    return np.sqrt(b) * ld(x0) + np.sqrt(1 - b - std**2) * ld(eps) + std * ld(z)


def ancestral_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s, z=0.0) -> np.ndarray:
    """VDM eq. 25 to 29 (appendix A): q(z_s | z_t, x) of any Gaussian process, alpha_{t|s} = alpha_t/alpha_s."""
    a, b, c, d = LD(alpha_t), LD(sigma_t), LD(alpha_s), LD(sigma_s)
    ratio = a / c
    forward = b**2 - ratio**2 * d**2  # sigma_{t|s}^2
    mean = ratio * d**2 / b**2 * ld(x) + c * forward / b**2 * ld(x0)
    return mean + np.sqrt(forward) * d / b * ld(z)


# --------------------------------------------------------------------------------------------------------------------
# Timestep samplers: the quantile function (inverse CDF, or for "mode" and its like the paper's map) of each
# --------------------------------------------------------------------------------------------------------------------


def ndtri(u) -> np.ndarray:
    """Inverse of the normal CDF (Wichura's AS 241 in Python's standard library, about 16 digits)."""
    inverse = NormalDist().inv_cdf
    u = np.asarray(u, dtype=np.float64)
    return np.array([inverse(float(v)) for v in u.ravel()]).reshape(u.shape)


def quantile_uniform_log_snr(u, alpha_sigma, low, high) -> np.ndarray:
    """MLSGM section 4.4: t with the density g(t)^2/(sigma(t)^2 Z) on [low, high], alpha_sigma(t) being the process.

    d log(alpha^2/sigma^2)/dt = -g^2/sigma^2 (VDM section 3.2 with SDE eq. 29), so its quantile function is where the
    log SNR has fallen by the part u of its whole fall. Found by bisection, 80 halvings in longdouble.
    """

    def log_snr(t):
        alpha, sigma = alpha_sigma(t)
        return 2 * (np.log(alpha) - np.log(sigma))

    u = ld(u)
    below, above = np.full_like(u, LD(low)), np.full_like(u, LD(high))
    goal = log_snr(LD(low)) + u * (log_snr(LD(high)) - log_snr(LD(low)))
    for _ in range(80):
        middle = (below + above) / 2
        more = log_snr(middle) > goal
        below, above = np.where(more, middle, below), np.where(more, above, middle)
    return (below + above) / 2


def quantile_uniform(u, low=0.0, high=1.0):
    return LD(low) + (LD(high) - LD(low)) * ld(u)


def quantile_logit_normal(u, mean=0.0, std=1.0):
    """SD3 eq. 19: t = sigmoid(normal)."""
    return 1 / (1 + np.exp(-(LD(mean) + LD(std) * ld(ndtri(u)))))


def quantile_mode(u, scale=1.29):
    """SD3 eq. 20: f(u) = 1 - u - s (cos^2(pi u/2) - 1 + u)."""
    u = ld(u)
    return 1 - u - LD(scale) * (np.cos(PI / 2 * u) ** 2 - 1 + u)


def quantile_cosmap(u):
    """SD3 eq. 21: t = 1 - 1/(tan(pi u/2) + 1)."""
    return 1 - 1 / (np.tan(PI / 2 * ld(u)) + 1)


def quantile_cubic(u):
    """T2I-Adapter section 3.3: t = (1 - (t/T)^3) T with t/T uniform."""
    return 1 - ld(u) ** 3


def rotated_van_der_corput(u) -> np.ndarray:
    """(u_0 + v_i) mod 1, v_i being the binary digits of i, mirrored at the point."""
    u = ld(u)
    mirrored = [LD(int(f"{i:b}"[::-1], 2)) / LD(2 ** len(f"{i:b}")) for i in range(u.size)]
    return np.mod(u.ravel()[0] + np.array(mirrored), 1).reshape(u.shape)


def quantile_log_normal(u, mean=-1.2, std=1.2):
    """EDM table 1: ln(sigma) ~ N(P_mean, P_std^2)."""
    return np.exp(LD(mean) + LD(std) * ld(ndtri(u)))


def stratify(u) -> np.ndarray:
    """VDM appendix I.1: (u_0 + i/B) mod 1."""
    u = ld(u)
    return np.mod(u.ravel()[0] + ld(np.arange(u.size)) / LD(u.size), 1).reshape(u.shape)


def to_index(t, steps: int) -> np.ndarray:
    """A fraction of the range as the index of a discrete process: floor(t steps), 1 belonging to the last step."""
    return np.clip(np.floor(ld(t) * steps), 0, steps - 1).astype(np.int64)


# --------------------------------------------------------------------------------------------------------------------
# Philox4x32-10 and the normal transform
# --------------------------------------------------------------------------------------------------------------------

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter, key, rounds: int = 10) -> np.ndarray:
    """Random123, section 3.3 and philox.h: counter [..., 4] and key (lo, hi) of 32-bit words -> [..., 4] uint32."""
    c = [np.asarray(counter, dtype=np.uint64)[..., i] & _MASK for i in range(4)]
    k0, k1 = np.uint64(int(key[0]) & 0xFFFFFFFF), np.uint64(int(key[1]) & 0xFFFFFFFF)
    for _ in range(rounds):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        c = [(product1 >> _SHIFT) ^ c[1] ^ k0, product1 & _MASK, (product0 >> _SHIFT) ^ c[3] ^ k1, product0 & _MASK]
        k0 = (k0 + np.uint64(0x9E3779B9)) & _MASK
        k1 = (k1 + np.uint64(0xBB67AE85)) & _MASK
    return np.stack(c, axis=-1).astype(np.uint32)


def philox_words(seed: int, samples: int, groups: int, stream: int = 0, sample_offset: int = 0) -> np.ndarray:
    """[samples, groups, 4] words: counter (group, stream, sample low, sample high), key (seed low, seed high)."""
    seed %= 2**64
    ids = [(sample_offset + b) % 2**64 for b in range(samples)]
    counter = np.empty((samples, groups, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(groups, dtype=np.uint64)
    counter[..., 1] = stream
    counter[..., 2] = np.array([i & 0xFFFFFFFF for i in ids], dtype=np.uint64)[:, None]
    counter[..., 3] = np.array([i >> 32 for i in ids], dtype=np.uint64)[:, None]
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


_F = np.float32


def fma32(a, b, c) -> np.ndarray:
    """fp32 fused multiply-add, correctly rounded (to nearest even) for every input without overflow.

    The product of two fp32 is exact in float64. Its sum with c is rounded to odd (the rounding error by Knuth's
    two-sum tells whether the sum was inexact), and a value rounded to odd with 53 >= 24 + 2 bits rounds to fp32 as the
    exact value would (Boldo and Melquiond 2008), so nothing is rounded twice.
    """
    p = np.asarray(a, dtype=_F).astype(np.float64) * np.asarray(b, dtype=_F).astype(np.float64)
    c = np.asarray(c, dtype=_F).astype(np.float64)
    p, c = np.broadcast_arrays(p, c)
    s = p + c
    bb = s - p
    error = (p - (s - bb)) + (c - bb)
    even = (np.ascontiguousarray(s).view(np.uint64) & np.uint64(1)) == 0
    odd = np.nextafter(s, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, odd, s).astype(_F)


def fma32_exact(a: float, b: float, c: float) -> np.float32:
    """The same by rational arithmetic, one value at a time: the check of `fma32`."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    guess = _F(float(exact))
    neighbours = [guess, np.nextafter(guess, _F(np.inf)), np.nextafter(guess, _F(-np.inf))]
    distance = [abs(Fraction(float(v)) - exact) for v in neighbours]
    best = [v for v, d in zip(neighbours, distance, strict=True) if d == min(distance)]
    return next(v for v in best if len(best) == 1 or int(v.view(np.uint32)) % 2 == 0)


LOG_POLYNOMIAL = (
    0.20757412910461426,
    -0.326762855052948,
    0.34424856305122375,
    -0.397684723138809,
    0.49943119287490845,
    -0.6667121648788452,
    1.000006914138794,
    -1.9999998807907104,
)


def box_muller(i1, i2) -> tuple[np.ndarray, np.ndarray]:
    """Two uint32 words -> two fp32 standard normals; every step one IEEE fp32 operation (shared/kernels.md)."""
    i1, i2 = np.asarray(i1, dtype=np.uint32), np.asarray(i2, dtype=np.uint32)
    # y = -2 ln u, u = (i1|1) 2^-32: mantissa around sqrt(1/2), exponent apart
    f = (i1 | np.uint32(1)).astype(np.float64).astype(_F)  # uint32 -> float64 is exact, then one rounding
    bits = f.view(np.uint32)
    e = (bits - np.uint32(0x3F3504F3)) & np.uint32(0xFF800000)  # wraps as uint32
    t = (bits - e).view(_F) - _F(1)
    p = np.full(t.shape, _F(LOG_POLYNOMIAL[0]))
    for coefficient in LOG_POLYNOMIAL[1:]:
        p = fma32(p, t, _F(coefficient))
    exponent = e.view(np.int32).astype(np.float64).astype(_F)
    y = fma32(p, t, fma32(exponent, _F(-1.6525916635146132e-07), _F(44.361419677734375)))
    r = np.sqrt(np.maximum(y, _F(1e-30)).astype(np.float64)).astype(_F)  # 53 >= 2*24 + 2: correctly rounded
    # angle: a in [-1/2, 1/2), sine and cosine of a quarter turn, times sqrt(1/2)
    a = ((i2 >> np.uint32(9)) + np.uint32(0x3F800000)).view(_F) - _F(1.5)
    z = a * a
    s = a * fma32(z, fma32(z, _F(0.05512253), _F(-0.45665085882)), _F(1.1107191455))
    c = fma32(z, fma32(z, fma32(z, _F(-0.01442851647), _F(0.1793213209912)), _F(-0.872355524)), _F(0.70710676169))
    n1 = (r * (c - s)).view(np.uint32) ^ ((i2 & np.uint32(1)) << np.uint32(31))
    n2 = (r * (c + s)).view(np.uint32) ^ (((i2 >> np.uint32(1)) & np.uint32(1)) << np.uint32(31))
    return n1.view(_F), n2.view(_F)


def box_muller_float64(i1, i2) -> tuple[np.ndarray, np.ndarray]:
    """What the transform means, in float64 with library functions: r cos(phi), r sin(phi) up to the same signs."""
    i1, i2 = np.asarray(i1, dtype=np.uint32), np.asarray(i2, dtype=np.uint32)
    r = np.sqrt(-2 * np.log((i1 | np.uint32(1)).astype(np.float64) / 2.0**32))
    phi = ((i2 >> np.uint32(9)).astype(np.float64) / 2.0**23 - 0.5) * math.pi / 2 + math.pi / 4
    sign1 = 1 - 2 * (i2 & np.uint32(1)).astype(np.float64)
    sign2 = 1 - 2 * ((i2 >> np.uint32(1)) & np.uint32(1)).astype(np.float64)
    return sign1 * r * np.cos(phi), sign2 * r * np.sin(phi)


def normals_of_elements(seed: int, sample: int, elements, stream: int = 0) -> np.ndarray:
    """fp32 normals of the ``elements`` of one sample, any integers of [0, 2^42). Counter = (group mod 2^32, stream with
    group div 2^32 flipped in its top 8 bits, sample low, sample high), group = element div 4."""
    elements = np.asarray(elements, dtype=np.uint64)
    group, lane = elements // np.uint64(4), (elements % np.uint64(4)).astype(int)
    counter = np.empty((*elements.shape, 4), dtype=np.uint64)
    counter[..., 0] = group % np.uint64(2**32)
    counter[..., 1] = np.uint64(stream) ^ (group // np.uint64(2**32) * np.uint64(2**24))
    counter[..., 2], counter[..., 3] = sample % 2**32, sample % 2**64 // 2**32
    words = philox4x32(counter, (seed % 2**32, seed % 2**64 // 2**32))
    four = np.stack([*box_muller(words[..., 0], words[..., 1]), *box_muller(words[..., 2], words[..., 3])], -1)
    return np.take_along_axis(four, lane[..., None], -1)[..., 0]


def normal(seed: int, shape, stream: int = 0, sample_offset: int = 0) -> np.ndarray:
    """fp32 normals [B, ...]: element i of a sample is lane i mod 4 of group i div 4."""
    samples, elements = shape[0], math.prod(shape[1:])
    words = philox_words(seed, samples, -(-elements // 4), stream, sample_offset)
    n0, n1 = box_muller(words[..., 0], words[..., 1])
    n2, n3 = box_muller(words[..., 2], words[..., 3])
    lanes = np.stack([n0, n1, n2, n3], axis=-1).reshape(samples, -1)
    return lanes[:, :elements].reshape(shape)


def uniforms(seed: int, samples: int, count: int, stream: int, sample_offset: int = 0) -> np.ndarray:
    """float64 [samples, count] in (0, 1): 52 bits and a half more. Number k has two of the four words of group k div 2:
    the first two if k is even."""
    words = philox_words(seed, samples, count // 2 + 1, stream, sample_offset).astype(np.uint64)
    found = np.empty((samples, count))
    for k in range(count):
        a, b = words[:, k // 2, k % 2 * 2], words[:, k // 2, k % 2 * 2 + 1]
        found[:, k] = (((a << np.uint64(20)) | (b >> np.uint64(12))).astype(np.float64) + 0.5) * 2.0**-52
    return found


def uniform(seed: int, samples: int, stream: int, sample_offset: int = 0) -> np.ndarray:
    """The first of each sample: float64 [samples]."""
    return uniforms(seed, samples, 1, stream, sample_offset)[:, 0]


# ------------------------------------------------------------------------------------------- losses of the x0 estimate


def lpips(features_a, features_b, weights=None) -> np.ndarray:
    """Zhang et al. 2018 (1801.03924), equation 1, of features [B, C, ...] a layer: one a sample. The epsilon of the
    authors' code is added to the norm."""
    total = 0
    for layer, (a, b) in enumerate(zip(features_a, features_b)):
        a, b = ld(a), ld(b)
        a, b = (x / (np.sqrt((x**2).sum(1, keepdims=True)) + LD(1e-10)) for x in (a, b))
        w = np.ones(a.shape[1], LD) if weights is None else ld(weights[layer])
        at_places = np.einsum("bc...,c->b...", (a - b) ** 2, w)
        total = total + at_places.reshape(len(a), -1).mean(1)
    return total


def focal_frequency(a, b, alpha) -> np.ndarray:
    """Jiang et al. 2021 (2012.12821), equations 8 to 10, of [B, C, H, W], with an orthonormal transform."""
    height, width = a.shape[-2:]
    across = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width) / np.sqrt(width)
    down = np.exp(-2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height) / np.sqrt(height)
    spectra = [np.einsum("ux,bcxy,yv->bcuv", down, x.astype(complex), across) for x in (a, b)]
    distance = np.abs(spectra[0] - spectra[1]) ** 2
    weight = np.sqrt(distance) ** alpha
    weight = weight / weight.max((2, 3), keepdims=True)
    return (weight * distance).mean((1, 2, 3))


def amplitude_difference(a, b) -> np.ndarray:
    """Fuoli et al. 2021 (2106.00783), equation 3, of orthonormal transforms and all frequencies."""
    spectra = [np.abs(np.fft.fft2(x)) / np.sqrt(x.shape[-1] * x.shape[-2]) for x in (a, b)]
    return np.abs(spectra[0] - spectra[1]).mean((1, 2, 3))


def haar_bands(x, levels) -> list:
    """The sub-bands of Haar's transform, from sums and differences of the four pixels of each square of two by two."""
    bands = []
    for _ in range(levels):
        p, q, r, s = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        bands += [(p - q + r - s) / 2, (p + q - r - s) / 2, (p - q - r + s) / 2]
        x = (p + q + r + s) / 2
    return [*bands, x]
