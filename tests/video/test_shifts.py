"""video.shifts against the models' own schedules, rewritten here, and the schedulers of diffusers."""

import math

import numpy as np
import pytest
import torch
from oracle import assert_close

from fastdiff.video import shifts

T = np.linspace(0.05, 1, 7)


def time_shift(mu, t):
    """The exponential time shift of Flux's and LTX-Video's schedules: a logistic function of logit(t) + mu."""
    with np.errstate(divide="ignore"):
        return 1 / (1 + np.exp(-(np.log(t) - np.log1p(-t) + mu)))


def mu_of(tokens, few, low, many, high):
    """The line through two points, by how far the number lies between them."""
    part = (tokens - few) / (many - few)
    return (1 - part) * low + part * high


@pytest.mark.parametrize("tokens", [256, 1024, 1320, 4096, 32760])
@pytest.mark.parametrize("name, ends", [("flux", (256, 0.5, 4096, 1.15)), ("ltx", (1024, 0.95, 4096, 2.05))])
def test_exponential_shifts(name, ends, tokens):
    found = getattr(shifts, name)(tokens)
    assert isinstance(found, float)
    assert_close(shifts.shifted(T, found), time_shift(mu_of(tokens, *ends), T), rel=1e-12)
    many = torch.tensor([tokens, 256])
    assert_close(getattr(shifts, name)(many), [found, getattr(shifts, name)(256)], rel=1e-14)


def test_the_resolution_rule():
    """Esser et al. 2024, equation 23: t_m of m pixels has the noise of the mean over as many more of them as t_n."""
    n, m = 256, 4096
    s = shifts.shifted(T, shifts.resolution(m))
    deviation = [np.sqrt(1 / count) * t / (1 - t) for count, t in ((n, T[:-1]), (m, s[:-1].numpy()))]
    assert_close(*deviation, rel=1e-12)
    assert_close(shifts.resolution(torch.tensor([1000, 4096])), [math.sqrt(1000 / 256), 4.0], rel=1e-15)
    assert shifts.resolution(1024, base=4096) == 0.5


def test_fixed_shifts():
    assert shifts.sd3() == 3.0 and shifts.hunyuanvideo() == 7.0
    for size, right in (
        ((480, 832), 3.0),
        ((832, 480), 3.0),
        ((624, 624), 3.0),
        ((720, 1280), 5.0),
        ((1280, 704), 5.0),
    ):
        assert shifts.wan(*size) == right


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_schedules_of_diffusers(steps):
    """Of Wan (static), and of LTX-Video (dynamic, stretched to its terminal)."""
    diffusers = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    given = np.linspace(1.0, 1 / steps, steps)
    static = flow(shift=5.0)
    static.set_timesteps(sigmas=given)
    assert_close(shifts.sigmas(steps, 5.0), static.sigmas[:-1].double(), rel=1e-6)
    dynamic = flow(use_dynamic_shifting=True, shift_terminal=0.1 if steps > 1 else None)
    dynamic.set_timesteps(sigmas=given, mu=mu_of(1320, 1024, 0.95, 4096, 2.05))
    found = shifts.sigmas(steps, shifts.ltx(1320), terminal=0.1 if steps > 1 else None)
    assert_close(found, dynamic.sigmas[:-1].double(), rel=1e-6)
    if steps > 1:
        assert float(found[0]) == 1.0 and float(found[-1]) == pytest.approx(0.1, rel=1e-12)


def test_a_shift_that_broadcasts():
    t, s = torch.rand(2, 5, dtype=torch.float64), torch.tensor([[2.0], [5.0]], dtype=torch.float64)
    for b in range(2):
        assert torch.equal(shifts.shifted(t, s)[b], shifts.shifted(t[b], float(s[b])))
    assert shifts.shifted(0.5, 3.0).item() == 0.75 and shifts.shifted([0, 1], 3.0).tolist() == [0, 1]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: shifts.sigmas(0), ValueError, "steps must be at least 1; got 0"),
        (lambda: shifts.sigmas(4, -1.0), ValueError, "shift must be a positive number; got -1.0"),
        (lambda: shifts.sigmas(4, 3.0, 1.0), ValueError, r"terminal must lie in \(0, 1\); got 1.0"),
        (lambda: shifts.rule(torch.tensor([0.0, 1.0])), ValueError, "shifts must be positive numbers"),
        (lambda: shifts.rule(torch.tensor([1.0, torch.inf])), ValueError, "shifts must be positive numbers"),
        (lambda: shifts.rule(torch.tensor([1.0, torch.nan])), ValueError, "shifts must be positive numbers"),
        (lambda: shifts.stretched([1.0, 0.5], "0.1"), TypeError, "terminal must be a number"),
    ],
)
def test_wrong_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
