"""The samplers restated from their papers as loops over x, in NumPy longdouble. No torch, no fastdiff.

Each takes x at the first level; ``levels``, a list of (alpha, sigma) visited with the end behind them; ``x0(x, i)``,
the estimate of the clean data at level i; and, where there is noise, ``z(i)``. Each returns x after every step. Where a
paper works in another space (x / alpha for Karras et al.), x is taken there and back.

- DPM++: Lu et al. 2022, "DPM-Solver++" (arXiv 2211.01095)
- UniPC: Zhao et al. 2023 (2302.04867)
- EDM: Karras et al. 2022 (2206.00364)
- LCM: Luo et al. 2023 (2310.04378)
- SDE: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations" (2011.13456)
"""

from __future__ import annotations

import math

import numpy as np
from oracle import LD, ld


def _space(levels):
    """(alpha, sigma / alpha) of each level."""
    return [(LD(a), LD(s) / LD(a)) for a, s in levels]


def euler(x, levels, x0, z=None, churn=None):
    """EDM algorithm 2 without its second half; churn: (s_churn, s_tmin, s_tmax, s_noise)."""
    return _edm(x, levels, x0, z, churn, second=False)


def heun(x, levels, x0, z=None, churn=None):
    """EDM algorithm 2."""
    return _edm(x, levels, x0, z, churn, second=True)


def _edm(x, levels, x0, z, churn, second):
    """``x0(x, i, t)`` is asked at x / alpha-space noise t, where churn leads to levels not in the list."""
    path, out = _space(levels), []
    u, steps = ld(x) / path[0][0], len(levels) - 1
    for i in range(steps):
        t, after = path[i][1], path[i + 1][1]
        if churn is not None:
            s_churn, low, high, s_noise = churn
            gamma = min(LD(s_churn) / steps, np.sqrt(LD(2)) - 1) if low <= t <= high else LD(0)
            hat = t * (1 + gamma)
            u = u + LD(s_noise) * np.sqrt(hat**2 - t**2) * ld(z(i))
        else:
            hat = t
        d = (u - x0(u, hat)) / hat
        v = u + (after - hat) * d
        if second and after != 0:
            v = u + (after - hat) * (d + (v - x0(v, after)) / after) / 2
        u = v
        out.append(u * path[i + 1][0])
    return out


def predictor_corrector(x, levels, x0, snr, corrector_steps, z):
    """SDE algorithms 2 and 3: x_i of ancestral sampling (eq. 47, DDPM's posterior where data is scaled), then
    x_i + e s + sqrt(2 e) z, e = 2 a (r |z| / |s|)^2 for each sample, a = 1 - beta_i (algorithm 5; 1 in algorithm 4).

    ``x0(x)`` does not look at the level. ``z(k)`` counts all draws. The last step goes to the end, uncorrected.
    """
    x, draw, out = ld(x), iter(range(10**9)), []
    for i in range(len(levels) - 1):
        (a, s), (b, r) = ((LD(v) for v in level) for level in levels[i : i + 2])
        mean = b * (1 - (a * r / (s * b)) ** 2) * ld(x0(x)) + a / b * (r / s) ** 2 * x
        if r == 0:
            out.append(ld(x0(x)) * b)
            break
        x = mean + np.sqrt(r**2 * (1 - (a * r / (s * b)) ** 2)) * ld(z(next(draw)))
        out.append(x)
        one_minus_beta = (b / LD(levels[i + 2][0])) ** 2
        for _ in range(corrector_steps):
            score, noise = (b * ld(x0(x)) - x) / r**2, ld(z(next(draw)))
            axes = tuple(range(1, x.ndim))
            lengths = [np.sqrt((v**2).sum(axis=axes, keepdims=True)) for v in (noise, score)]
            e = 2 * one_minus_beta * (LD(snr) * lengths[0] / lengths[1]) ** 2
            x = x + e * score + np.sqrt(2 * e) * noise
            out.append(x)
    return out


def euler_ancestral(x, levels, x0, z, eta=1.0):
    """Song et al. 2021's ancestral step as k-diffusion writes it: down to sigma_down, and noise of sigma_up."""
    path, out = _space(levels), []
    u = ld(x) / path[0][0]
    for i in range(len(levels) - 1):
        t, after = path[i][1], path[i + 1][1]
        up = min(after, LD(eta) * np.sqrt(after**2 * (t**2 - after**2) / t**2))
        down = np.sqrt(after**2 - up**2)
        u = u + (down - t) * (u - x0(u, t)) / t + up * ld(z(i))
        out.append(u * path[i + 1][0])
    return out


def flow_euler(x, sigmas, x0):
    """x + (s' - s) v with v = (x - x0) / s."""
    x, out = ld(x), []
    for s, after in zip(map(LD, sigmas), map(LD, sigmas[1:])):
        x = x + (after - s) * (x - x0(x, s)) / s
        out.append(x)
    return out


def flow_heun(x, sigmas, x0):
    """The same with the mean of the slopes at both ends."""
    x, out = ld(x), []
    for s, after in zip(map(LD, sigmas), map(LD, sigmas[1:])):
        d = (x - x0(x, s)) / s
        y = x + (after - s) * d
        if after != 0:
            y = x + (after - s) * (d + (y - x0(y, after)) / after) / 2
        x = y
        out.append(x)
    return out


def flow_stochastic(x, sigmas, x0, z):
    """(1 - s') x0 + s' z."""
    x, out = ld(x), []
    for i, (s, after) in enumerate(zip(map(LD, sigmas), map(LD, sigmas[1:]))):
        x = (1 - after) * x0(x, s) + after * ld(z(i))
        out.append(x)
    return out


def flow_ancestral(x, sigmas, x0, z, eta=1.0):
    """Down to sigma' (1 + (sigma' / sigma - 1) eta) along the flow, then scaled and noised up to sigma'."""
    x, out = ld(x), []
    for i, (s, after) in enumerate(zip(map(LD, sigmas), map(LD, sigmas[1:]))):
        down = after * (1 + (after / s - 1) * LD(eta))
        x = x + (down - s) * (x - x0(x, s)) / s
        scale = (1 - after) / (1 - down)
        x = scale * x + np.sqrt(after**2 - (scale * down) ** 2) * ld(z(i))
        out.append(x)
    return out


def _log(alpha, sigma):
    return np.log(LD(alpha)) - np.log(LD(sigma))


def dpmpp(x, levels, x0, order, orders, eta=0.0, solver_type="midpoint", z=None):
    """DPM++ algorithm 2 and equations (9), (15), and for eta > 0 the SDE solvers as k-diffusion has them; ``orders``:
    that of each step. x0 estimates at the levels s0 (now), s1, s2 (before) give the divided differences D."""
    x, past, out = ld(x), [], []
    for i in range(len(levels) - 1):
        (a0, b0), (a, b) = levels[i], levels[i + 1]
        past = [ld(x0(x, i)), *past[:2]]
        if b == 0:
            x = past[0]
            out.append(x)
            continue
        h = _log(a, b) - _log(a0, b0)
        big = (1 + LD(eta)) * h
        y = LD(b) / LD(b0) * np.exp(-LD(eta) * h) * x + LD(a) * (1 - np.exp(-big)) * past[0]
        if orders[i] >= 2:
            r0 = (_log(a0, b0) - _log(*levels[i - 1])) / h
            d10 = (past[0] - past[1]) / r0
        if orders[i] == 2:
            if solver_type == "midpoint":
                y = y + LD(a) * (1 - np.exp(-big)) / 2 * d10
            else:
                y = y + LD(a) * ((np.exp(-big) - 1) / big + 1) * d10
        if orders[i] == 3:
            r1 = (_log(*levels[i - 1]) - _log(*levels[i - 2])) / h
            d11 = (past[1] - past[2]) / r1
            d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
            d2 = (d10 - d11) / (r0 + r1)
            y = y + LD(a) * ((np.exp(-big) - 1) / big + 1) * d1
            y = y - LD(a) * ((np.exp(-big) - 1 + big) / big**2 - LD(1) / 2) * d2
        if eta:
            y = y + LD(b) * np.sqrt(1 - np.exp(-2 * LD(eta) * h)) * ld(z(i))
        x = y
        out.append(x)
    return out


def unipc(x, levels, x0, orders, variant="bh2", uncorrected=()):
    """UniPC algorithms 5 (UniC) and 6 (UniP), data prediction; the corrected x is what the next step starts from.
    ``uncorrected``: the steps, from 0, whose result stays UniP's."""
    x, out = ld(x), []
    corrected, past = None, []  # past: (lambda, x0), the latest first
    for i in range(len(levels) - 1):
        (a0, b0), (a, b) = levels[i], levels[i + 1]
        now = ld(x0(x, i))
        if corrected is not None and i - 1 not in uncorrected:
            x = _unipc_step(corrected, past, (*levels[i - 1], *levels[i]), orders[i - 1], variant, now)
        corrected, past = x, [(_log(a0, b0), now), *past[:2]]
        x = now if b == 0 else _unipc_step(x, past, (a0, b0, a, b), orders[i], variant, None)
        out.append(x)
    return out


def _unipc_step(x, past, ends, order, variant, end):
    """From the level of past[0] to the next; ``end``: the x0 estimate there, which makes it the corrector."""
    a0, b0, a, b = map(LD, ends)
    start, m0 = past[0]
    h = _log(a, b) - start
    # With data prediction the paper's h is -h: B(-h) and phi_k(-h).
    big = -h if variant == "bh1" else np.exp(-h) - 1
    y = b / b0 * x - a * (np.exp(-h) - 1) * m0
    places = [(past[k][0] - start) / h for k in range(1, order)]
    slopes = [(past[k][1] - m0) / places[k - 1] for k in range(1, order)]
    if end is not None:
        places, slopes = [*places, LD(1)], [*slopes, end - m0]
    if not places:
        return y
    if len(places) == 1:
        rho = np.array([0.5])
    else:
        # sum_m rho_m r_m^(n-1) = n! h phi_(n+1) / B, n = 1 .. p
        phi, right = (np.exp(-h) - 1) / -h - 1, []
        for n in range(1, len(places) + 1):
            right.append(phi * math.factorial(n) / big)
            phi = phi / -h - LD(1) / math.factorial(n + 1)
        matrix = np.array([[float(r) ** n for r in places] for n in range(len(places))])
        rho = np.linalg.solve(matrix, np.array([float(r) for r in right]))
    return y - a * big * sum(LD(w) * d for w, d in zip(rho, slopes))


def lcm(x, levels, times, x0, z):
    """LCM algorithm 3 with c_skip and c_out of its section 4.1, sigma_data = 0.5, timesteps scaled by 10."""
    x, out = ld(x), []
    for i, t in enumerate(times):
        scaled = 10 * LD(t)
        skip, scale = LD(0.25) / (scaled**2 + LD(0.25)), scaled / np.sqrt(scaled**2 + LD(0.25))
        x = skip * x + scale * ld(x0(x, i))
        if i + 1 < len(times):
            x = LD(levels[i + 1][0]) * x + LD(levels[i + 1][1]) * ld(z(i))
        out.append(x)
    return out


def multistep_orders(order, steps, lower, to_zero=True):
    """The order of each step: no more than there is history for; ``lower``: falling at the end; 1 to clean data."""
    orders = [min(order, i + 1, *([steps - i] if lower else [])) for i in range(steps)]
    if to_zero:
        orders[-1] = 1
    return orders


def karras(steps, low, high, rho=7.0):
    """EDM equation 5."""
    i = ld(np.arange(steps)) / LD(max(1, steps - 1))
    return (LD(high) ** (1 / LD(rho)) + i * (LD(low) ** (1 / LD(rho)) - LD(high) ** (1 / LD(rho)))) ** LD(rho)


def exponential(steps, low, high):
    return np.exp(linear(steps, np.log(LD(low)), np.log(LD(high))))


def linear(steps, low, high):
    return LD(high) + ld(np.arange(steps)) / LD(max(1, steps - 1)) * (LD(low) - LD(high))
