"""fastdiff.integrations.k_diffusion: k-diffusion's calling convention and draws, against the papers' loops.

(Its own functions were compared with these once, on 5, 20 and 50 Karras sigmas down to 0 and not, with churn, eta,
s_noise, both solver types and callbacks: equal to 4e-6 of the largest value in fp32, with equal generators after.)
"""

import math

import numpy as np
import oracle_samplers as truth
import pytest
import torch
from oracle import assert_close

from fastdiff.integrations import k_diffusion as kd

SHAPE = (2, 3, 4)


def denoiser(x, sigma, gain=1.0):
    s = sigma.view(-1, 1, 1)
    return torch.tanh(gain * x / (s**2 + 1).sqrt()) * (0.9 - 0.01 * s.log())


def by_noise(x, sigma):
    """The same for the papers' loops, in float64."""
    seen = torch.from_numpy(np.asarray(x, dtype=np.float64))
    return denoiser(seen, torch.full((2,), float(sigma), dtype=torch.float64), gain=0.7).numpy()


def setting(steps, to_zero):
    sigmas = kd.get_sigmas_karras(steps, 0.03, 14.6).double()
    sigmas = sigmas if to_zero else sigmas[:-1]
    x = 14.6 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, sigmas, [(1.0, s) for s in sigmas.tolist()]


def drawn(count):
    """What torch.randn_like gives from seed 5, one after the other."""
    torch.manual_seed(5)
    zs = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]
    return zs, torch.rand(1)


CHURN = {"s_churn": 10.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.003}


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    "name, options",
    [
        ("euler", {}), ("euler", CHURN), ("heun", {}), ("heun", CHURN), ("euler_ancestral", {}),
        ("euler_ancestral", {"eta": 0.6}), ("euler_ancestral", {"eta": 0.0}), ("dpmpp_2m", {}), ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}), ("dpmpp_3m_sde", {}),
    ],
    ids=str,
)  # fmt: skip
def test_samplers(name, options, steps, to_zero):
    x, sigmas, levels = setting(steps, to_zero)
    intervals = len(sigmas) - 1
    sde = "sde" in name
    draws = {"euler": intervals, "heun": intervals, "euler_ancestral": intervals - to_zero}.get(name, 0)
    zs, after = drawn(intervals if sde else draws)
    torch.manual_seed(5)
    how = dict(options)
    if sde:
        given = iter(zs)
        how["noise_sampler"] = lambda a, b: next(given)
    got = getattr(kd, f"sample_{name}")(denoiser, x, sigmas, {"gain": 0.7}, disable=True, **how)
    if not sde:
        assert torch.equal(torch.rand(1), after), "as many draws as k-diffusion"

    def z(i):
        return zs[i].numpy() if i < len(zs) else np.zeros(SHAPE)

    first = x.numpy()
    churn = tuple(CHURN.values()) if options is CHURN else None
    orders = truth.multistep_orders(3 if "3m" in name else 2, intervals, lower=False, to_zero=to_zero)
    loops = {
        "euler": lambda: truth.euler(first, levels, by_noise, z, churn),
        "heun": lambda: truth.heun(first, levels, by_noise, z, churn),
        "euler_ancestral": lambda: truth.euler_ancestral(first, levels, by_noise, z, options.get("eta", 1.0)),
        "dpmpp_2m": lambda: truth.dpmpp(first, levels, lambda x, i: by_noise(x, sigmas[i]), 2, orders),
    }
    if sde:
        kind = "heun" if "3m" in name else options.get("solver_type", "midpoint")
        want = truth.dpmpp(
            first, levels, lambda x, i: by_noise(x, sigmas[i]), 3, orders, options.get("eta", 1.0), kind, z
        )
    else:
        want = loops[name]()
    assert_close(got.numpy(), want[-1], rel=0, absolute=1e-9 * float(np.abs(want[-1]).max()))


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_callback(name):
    """Once a step, after the first call of the model, with x as the model saw it."""
    x, sigmas, _ = setting(4, True)
    seen = []
    getattr(kd, f"sample_{name}")(denoiser, x, sigmas, None, seen.append, True)
    assert [entry["i"] for entry in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0]["x"], x)
    for entry, sigma in zip(seen, sigmas):
        assert set(entry) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert float(entry["sigma"]) == float(entry["sigma_hat"]) == float(sigma)
        torch.testing.assert_close(entry["denoised"], denoiser(entry["x"], sigma.expand(2)))


def test_sigma_hat_is_the_churned_one():
    x, sigmas, _ = setting(4, True)
    seen = []
    kd.sample_euler(denoiser, x, sigmas, None, seen.append, True, s_churn=1.0)
    gamma = min(1.0 / 4, math.sqrt(2) - 1)
    for entry in seen:
        assert float(entry["sigma_hat"]) == pytest.approx(float(entry["sigma"]) * (1 + gamma))


def test_sigmas():
    assert_close(kd.get_sigmas_karras(9, 0.03, 14.6).numpy()[:-1], truth.karras(9, 0.03, 14.6), rel=2.0**-24)
    assert_close(kd.get_sigmas_exponential(9, 0.03, 14.6).numpy()[:-1], truth.exponential(9, 0.03, 14.6), rel=2.0**-24)
    with pytest.raises(ValueError, match="steps \\+ 1"):
        kd.sample_euler(denoiser, torch.zeros(SHAPE), torch.tensor([1.0]))
