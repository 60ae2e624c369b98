"""Every process against the oracle: schedules, alpha and sigma, posterior, diffusion, edges and errors.

Tolerances. 1e-12 relative is the floor everywhere. What is added to it is an error bound of float64 arithmetic itself,
u = 2^-53 being its unit roundoff, never a fudge:

- 1 - abar_t inherits abar_t's absolute error, at most 2u for each of the t + 1 factors (one rounding of 1 - beta, one
  of the product). Relative to 1 - abar_t, which starts at beta_0 (1e-4), that is 2u(t+1)/(1-abar_t), about 2e-12. So
  the SNR carries that much and sigma, its root, half.
- 1 - s near s = 1 (and a beta as one minus a ratio) has an absolute error of a few u, whatever its size.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import float64
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import UNIT, assert_close

import fastdiff
from fastdiff.tabulated import TabulatedEDM, TabulatedFlow, TabulatedVP

PROFILE = settings(max_examples=60, deadline=None, derandomize=True)

SCHEDULES = {
    "linear": oracle.betas_linear,
    "scaled_linear": oracle.betas_scaled_linear,
    "cosine": oracle.betas_cosine,
}
CONTINUOUS = {
    "flow": (fastdiff.RectifiedFlow, oracle.flow_alpha_sigma, {}),
    "flow shift 3": (fastdiff.RectifiedFlow, oracle.flow_alpha_sigma, {"shift": 3.0}),
    "flow sigma_min": (fastdiff.RectifiedFlow, oracle.flow_alpha_sigma, {"sigma_min": 1e-3}),
    "flow both": (fastdiff.RectifiedFlow, oracle.flow_alpha_sigma, {"shift": 0.4, "sigma_min": 0.02}),
    "vpsde": (fastdiff.VPSDE, oracle.vpsde_alpha_sigma, {}),
    "vpsde other": (fastdiff.VPSDE, oracle.vpsde_alpha_sigma, {"beta_min": 0.5, "beta_max": 7.0}),
    "subvpsde": (fastdiff.SubVPSDE, oracle.subvpsde_alpha_sigma, {}),
    "cosine": (fastdiff.Cosine, oracle.cosine_alpha_sigma, {}),
    "vesde": (fastdiff.VESDE, oracle.vesde_alpha_sigma, {}),
    "vesde other": (fastdiff.VESDE, oracle.vesde_alpha_sigma, {"sigma_min": 0.02, "sigma_max": 1348.0}),
}
EDGES = np.array([0.0, 1e-300, 1e-12, 1e-5, 1e-3, 0.25, 0.5, 0.75, 0.999, 1 - 1e-9, 1 - 2.0**-53, 1.0])


def schedule_bounds(abar: np.ndarray, relative_abar: np.ndarray | float = 0.0) -> dict[str, np.ndarray]:
    """Relative error bounds of what a float64 program can make of a cumulative product (module docstring)."""
    t = np.arange(len(abar))
    abar = np.asarray(abar, dtype=np.float64)
    product = 2 * UNIT * (t + 1) + relative_abar
    complement = product * abar / (1 - abar) + 2 * UNIT
    return {"abar": 1e-12 + product, "alpha": 1e-12 + product, "sigma": 1e-12 + complement / 2, "one": complement}


def cosine_error(steps: int) -> np.ndarray:
    """Relative error of cos^2(x) for x within 4u of its true value: 2 tan(x) dx, which grows towards pi/2."""
    x = (np.arange(1, steps + 1) / steps + 0.008) / 1.008 * math.pi / 2
    error = 2 * np.tan(x) * 4 * UNIT * x
    error[-1] = error[-2] if steps > 1 else 0.0  # the last beta is the cap 0.999 and does not see the cosine
    return np.abs(error) + 4 * UNIT


# ------------------------------------------------------------------------------------------------------ VP schedules


@pytest.mark.parametrize("steps", [1, 2, 10, 1000, 4000])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedule_betas_and_alpha_bar(name, steps):
    """DDPM, LDM and IDDPM schedules at their default ends; no rescaling of the ends with the number of steps."""
    process = fastdiff.VariancePreserving(name, steps=steps)
    betas = SCHEDULES[name](steps)
    assert process.steps == steps and process.discrete
    for value in (process.betas, process.alpha_bar):
        assert value.dtype == torch.float64 and value.shape == (steps,) and value.device.type == "cpu"
    extra = cosine_error(steps) if name == "cosine" else 0.0
    # a cosine beta is 1 - ratio: absolute error (ratio's relative error), not relative
    assert_close(process.betas, betas, rel=1e-12, absolute=8 * UNIT + 2 * np.asarray(extra), label="betas")
    abar = oracle.alpha_bar(betas)
    assert_close(process.alpha_bar, abar, rel=schedule_bounds(abar, extra)["abar"], label="alpha_bar")


@pytest.mark.parametrize(
    "name, start, end", [("linear", 1e-5, 0.5), ("scaled_linear", 1e-6, 0.9), ("linear", 0.1, 0.1)]
)
def test_schedule_ends_are_taken(name, start, end):
    """beta_start and beta_end are the first and the last beta."""
    process = fastdiff.VariancePreserving(name, steps=37, beta_start=start, beta_end=end)
    assert_close(process.betas, SCHEDULES[name](37, start, end), rel=1e-12)
    assert_close(process.betas[[0, -1]], [start, end], rel=4 * UNIT)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_vp_alpha_sigma_snr(name, zero):
    """alpha, sigma and SNR of every timestep; the ends of the schedule are in it."""
    process = fastdiff.VariancePreserving(name, zero_terminal_snr=zero)
    t = torch.arange(1000)
    betas = SCHEDULES[name](1000)
    plain = oracle.alpha_bar(betas)
    abar = oracle.zero_terminal_snr_alpha_bar(betas) if zero else plain
    extra = cosine_error(1000) if name == "cosine" else np.zeros(1000)
    if zero:
        # algorithm 1 subtracts the last root from every root: the error of a root (half of abar's relative error,
        # plus that of the last) is divided by what is left of it
        root, last = np.sqrt(plain.astype(np.float64)), float(np.sqrt(plain[-1]))
        own = (UNIT * np.arange(1, 1001) + extra / 2) * root + (1000 * UNIT + extra[-1] / 2) * last
        extra = 2 * own / np.maximum(root - last, 1e-300) + 4 * UNIT
        extra[-1] = 0.0
    bounds = schedule_bounds(abar, extra)
    alpha, sigma = process.alpha_sigma(t)
    expected_alpha, expected_sigma = oracle.vp_alpha_sigma(abar, t.numpy())
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == sigma.shape == (1000,)
    assert_close(alpha, expected_alpha, rel=bounds["alpha"], label="alpha")
    assert_close(sigma, expected_sigma, rel=bounds["sigma"], label="sigma")
    levels = process.levels(t)
    expected_snr = oracle.snr(expected_alpha, expected_sigma)
    assert_close(levels.snr, expected_snr, rel=1e-12 + bounds["abar"] + bounds["one"], label="snr")
    assert bool((levels.snr[1:] < levels.snr[:-1]).all()), "the SNR falls strictly with t"


@given(
    logs=st.lists(st.floats(-8.0, -0.05), min_size=1, max_size=60),
    as_tensor=st.sampled_from([None, torch.float32, torch.float64]),
)
@PROFILE
def test_vp_any_betas(logs, as_tensor):
    """A list or a tensor of betas, of any size and magnitude, gives the product of 1 - beta of exactly those betas."""
    betas = [10.0**v for v in logs]
    if as_tensor is not None:
        betas = torch.tensor(betas, dtype=as_tensor)
    process = fastdiff.VariancePreserving(betas)
    exact = np.asarray(betas, dtype=np.float64)
    assert process.steps == len(logs)
    assert_close(process.betas, exact, rel=1e-15)
    abar = oracle.alpha_bar(exact)
    bounds = schedule_bounds(abar)
    t = torch.arange(len(logs))
    alpha, sigma = process.alpha_sigma(t)
    expected_alpha, expected_sigma = oracle.vp_alpha_sigma(abar, t.numpy())
    assert_close(alpha, expected_alpha, rel=bounds["alpha"], label="alpha")
    assert_close(sigma, expected_sigma, rel=bounds["sigma"], label="sigma")


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_zero_terminal_snr_is_exact(name, steps):
    """Lin et al. algorithm 1: the last alpha_bar is 0 to the bit, the first is unchanged, every number is finite."""
    plain = fastdiff.VariancePreserving(name, steps=steps)
    process = fastdiff.VariancePreserving(name, steps=steps, zero_terminal_snr=True)
    assert float(process.alpha_bar[-1]) == 0.0
    assert_close(process.alpha_bar[0], float(plain.alpha_bar[0]), rel=8 * UNIT)
    last = torch.tensor([steps - 1])
    alpha, sigma = process.alpha_sigma(last)
    assert float(alpha) == 0.0 and float(sigma) == 1.0 and float(process.levels(last).snr) == 0.0
    assert float(process.betas[-1]) == 1.0
    t = torch.arange(steps)
    for value in (process.betas, process.alpha_bar, *process.alpha_sigma(t), *process.posterior(t)):
        assert bool(torch.isfinite(value).all())
    betas = oracle.zero_terminal_snr_betas(SCHEDULES[name](steps))
    # a beta is 1 - ratio of two rescaled abar: the ratio's error as in test_vp_alpha_sigma_snr, at worst (cosine,
    # 1000 steps) (1000 + tan terms) u over the remaining fraction of the root, below 1e-10 except at the last two steps
    assert_close(process.betas[: max(steps - 2, 1)], betas[: max(steps - 2, 1)], rel=1e-12, absolute=1e-11)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_posterior(name):
    """DDPM eq. 7 in betas. At t = 0: all of x0, nothing of x_t, no variance."""
    process = fastdiff.VariancePreserving(name)
    t = torch.arange(1000)
    betas = SCHEDULES[name](1000)
    abar = oracle.alpha_bar(betas)
    bounds = schedule_bounds(abar, cosine_error(1000) if name == "cosine" else 0.0)
    before = np.concatenate([[0.0], bounds["one"][:-1]])  # of 1 - abar_{t-1}
    beta_error = (8 * UNIT + (2 * cosine_error(1000) if name == "cosine" else 0.0)) / np.asarray(betas, np.float64)
    rel = 1e-12 + bounds["abar"] + bounds["one"] + before + beta_error
    for value, expected, label in zip(
        process.posterior(t), oracle.posterior(betas), ("c_x0", "c_xt", "variance"), strict=True
    ):
        assert value.dtype == torch.float64 and value.shape == (1000,)
        assert_close(value, expected, rel=rel, label=label)
    c_x0, c_xt, variance = process.posterior(torch.tensor([0]))
    assert (float(c_x0), float(c_xt), float(variance)) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_posterior_keeps_the_marginal(name):
    """q(x_{t-1}|x0) is recovered: c_x0 + c_xt alpha_t = alpha_{t-1}, c_xt^2 sigma_t^2 + variance = sigma_{t-1}^2."""
    process = fastdiff.VariancePreserving(name)
    t = torch.arange(1, 1000)
    c_x0, c_xt, variance = process.posterior(t)
    alpha, sigma = process.alpha_sigma(t)
    alpha_prev, sigma_prev = process.alpha_sigma(t - 1)
    # sums of terms below 1, each within the bounds of test_posterior (largest 1e-11 relative, at t = 1)
    assert_close(c_x0 + c_xt * alpha, alpha_prev, rel=1e-11)
    assert_close(c_xt**2 * sigma**2 + variance, sigma_prev**2, rel=1e-11)


def test_posterior_zero_terminal_snr():
    """At the last step beta = 1: x_t holds nothing of x0, so the mean is alpha_{t-1} x0 and the variance 1 - abar."""
    process = fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True)
    c_x0, c_xt, variance = process.posterior(torch.tensor([999]))
    abar = oracle.zero_terminal_snr_alpha_bar(oracle.betas_scaled_linear(1000))[-2]
    # sqrt(abar_998) is 4e-4 left after subtracting 0.068: 1000u 0.068/4e-4, 2e-11
    assert_close(c_x0, [np.sqrt(abar)], rel=2e-11)
    assert float(c_xt) == 0.0
    assert_close(variance, [1 - abar], rel=1e-12)


@pytest.mark.parametrize("first", ["clamp", "reuse"])
def test_posterior_log_variance(first):
    """Both conventions at t = 0, by name; elsewhere log of the variance."""
    process = fastdiff.VariancePreserving("linear")
    expected = oracle.posterior_log_variance(oracle.betas_linear(1000), first)
    # the log turns the variance's relative error (below 1e-11, test_posterior) into an absolute one
    assert_close(process.posterior_log_variance(torch.arange(1000), first), expected, absolute=1e-11)
    assert_close(process.posterior_log_variance(torch.tensor(0), first), expected[0], absolute=1e-11)


def test_posterior_log_variance_of_a_single_step():
    """There is no entry 1 to reuse."""
    process = fastdiff.VariancePreserving(steps=1)
    for first in ("clamp", "reuse"):
        assert_close(process.posterior_log_variance(torch.tensor([0]), first), [np.log(1e-20)])


def test_posterior_log_variance_unknown_convention():
    with pytest.raises(ValueError, match="clamp"):
        fastdiff.VariancePreserving().posterior_log_variance(torch.tensor([0]), first="zero")


# -------------------------------------------------------------------------------------------------- continuous ones


def check_continuous(process, expected, t: np.ndarray):
    alpha, sigma = process.alpha_sigma(float64(t))
    assert not process.discrete
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == sigma.shape == t.shape
    # alpha: exp of an integral below 30 known to 3u, or 1 - s: an absolute error of 4u where alpha is small
    assert_close(alpha, expected[0], rel=1e-12, absolute=4 * UNIT, label="alpha")
    # sigma never cancels (expm1 for the SDEs): relative 1e-12 down to t = 1e-300
    assert_close(sigma, expected[1], rel=1e-12, label="sigma")


@pytest.mark.parametrize("name", list(CONTINUOUS))
def test_continuous_edges(name):
    """t of 0 and 1, the smallest numbers, the neighbours of 1, and 1e-5, where 1 - exp in fp32 is off by 0.6%."""
    make, truth, parameters = CONTINUOUS[name]
    check_continuous(make(**parameters), truth(EDGES, **parameters), EDGES)
    grid = np.linspace(0.0, 1.0, 1001)
    check_continuous(make(**parameters), truth(grid, **parameters), grid)


@given(shift=st.floats(0.05, 20.0), sigma_min=st.sampled_from([0.0, 1e-5, 0.1]), t=st.floats(0.0, 1.0))
@PROFILE
def test_flow(shift, sigma_min, t):
    process = fastdiff.RectifiedFlow(shift=shift, sigma_min=sigma_min)
    t = np.array([t])
    check_continuous(process, oracle.flow_alpha_sigma(t, shift, sigma_min), t)


@given(shift=st.one_of(st.floats(0.05, 20.0), st.sampled_from([0.1, 0.3, 1.15, 3.0, 7.0])), smin=st.floats(0.0, 0.1))
@PROFILE
def test_flow_ends_are_exact(shift, smin):
    """t = 1 is pure noise and t = 0 pure data for every shift, although shift/(1 + (shift - 1)) need not round to 1.

    alpha is 0 to the bit, because what an SNR of 0 means hangs on it. sigma = shift/(1 + (shift - 1)): the subtraction
    is off by up to u/2, the sum by another, of a result that is only `shift`, so 4u(1 + 1/shift) at most.
    """
    alpha, sigma = fastdiff.RectifiedFlow(shift=shift, sigma_min=smin).alpha_sigma(float64([0.0, 1.0]))
    assert alpha.tolist() == [1.0, 0.0]
    assert_close(sigma, [smin, 1.0], rel=4 * UNIT * (1 + 1 / shift))


@given(
    b0=st.floats(0.001, 2.0), width=st.floats(0.1, 40.0), t=st.one_of(st.floats(1e-12, 1.0), st.floats(1e-150, 1e-6))
)
@PROFILE
def test_vp_and_subvp_sde(b0, width, t):
    t = np.array([t])
    b = {"beta_min": b0, "beta_max": b0 + width}
    check_continuous(fastdiff.VPSDE(**b), oracle.vpsde_alpha_sigma(t, **b), t)
    check_continuous(fastdiff.SubVPSDE(**b), oracle.subvpsde_alpha_sigma(t, **b), t)
    assert_close(
        fastdiff.VPSDE(**b).diffusion_squared(float64(t)), oracle.vpsde_diffusion_squared(t, **b), label="vp g^2"
    )
    assert_close(
        fastdiff.SubVPSDE(**b).diffusion_squared(float64(t)),
        oracle.subvpsde_diffusion_squared(t, **b),
        label="sub-vp g^2",
    )


@given(low=st.floats(1e-3, 0.5), ratio=st.floats(2.0, 1e6), t=st.floats(0.0, 1.0))
@PROFILE
def test_ve_sde(low, ratio, t):
    t = np.array([t])
    s = {"sigma_min": low, "sigma_max": low * ratio}
    check_continuous(fastdiff.VESDE(**s), oracle.vesde_alpha_sigma(t, **s), t)
    assert_close(fastdiff.VESDE(**s).diffusion_squared(float64(t)), oracle.vesde_diffusion_squared(t, **s))


@given(t=st.one_of(st.floats(0.0, math.pi / 2), st.floats(0.0, 1e-6)), d=st.floats(0.01, 10.0))
@PROFILE
def test_trigflow(t, d):
    t = np.array([t])
    process = fastdiff.TrigFlow(sigma_data=d)
    check_continuous(process, oracle.trigflow_alpha_sigma(t, d), t)
    # tan: the angle that is left up to the last t is exact, and the quotient of two sines
    where = t < 1.57
    g = process.diffusion_squared(float64(t)).numpy()
    assert_close(g[where], oracle.trigflow_diffusion_squared(t, d)[where], absolute=1e-300, label="g^2")
    assert_close(
        fastdiff.Cosine().diffusion_squared(float64([0.0, 0.3, 0.99])),
        oracle.cosine_diffusion_squared([0.0, 0.3, 0.99]),
    )


@pytest.mark.parametrize("process", [fastdiff.TrigFlow(), fastdiff.TrigFlow(2.0), fastdiff.Cosine()], ids=repr)
def test_trigflow_ends_are_exact(process):
    """An SNR of 0 and one of infinity; also of times in float32, whose pi / 2 is larger than float64's."""
    for dtype in (torch.float64, torch.float32):
        levels = process.levels(torch.tensor([0.0, process.t_max], dtype=dtype))
        assert levels.alpha.tolist() == [1.0, 0.0]
        assert_close(levels.sigma, [0.0, process.sigma_data])
    assert process.levels_at([0.0, 1e6]).alpha.tolist() == pytest.approx([1.0, process.sigma_data / 1e6], rel=1e-10)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1"):
        process.levels(torch.tensor([1.5708], dtype=torch.float32))


@given(t=st.floats(1e-9, 1.0), d=st.floats(0.01, 10.0))
@PROFILE
def test_the_time_of_a_ratio(t, d):
    """``time_of`` inverts sigma / alpha; small times keep their digits, where 1 / sqrt(1 + sigma^2) has lost them.

    d ln(ratio) / d ln t lies between 1/2 and 22 there (22: VPSDE at t = 1), so a few u of the ratio are 1e-13 of t.
    """
    for process in (fastdiff.VPSDE(), fastdiff.SubVPSDE(), fastdiff.Cosine(), fastdiff.TrigFlow(d)):
        time = float64([t if process.t_max == 1 else 1.5 * t])
        if process.t_max == 1 and float(process.alpha_sigma(time)[0]) < 1e-4:
            continue  # near the end of Cosine alpha has an absolute error of a few u
        alpha, sigma = process.alpha_sigma(time)
        assert_close(process.time_of(process.sigma_of_ratio(sigma / alpha)), time, label=repr(process))


@pytest.mark.parametrize("kind", [fastdiff.VPSDE, fastdiff.SubVPSDE, fastdiff.VESDE])
def test_time_begins_at_t_min(kind):
    """No smaller t is drawn, accepted or sampled from; the levels at a t are what they were."""
    process = kind(t_min=0.01)
    assert repr(process).endswith("t_min=0.01)") and "t_min" not in repr(kind())
    assert_close(process.time(float64([0.0, 0.5, 1.0])), [0.01, 0.505, 1.0])
    assert_close(process.fraction(float64([0.01, 0.505, 1.0])), [0.0, 0.5, 1.0], absolute=UNIT)
    assert_close(process.grid(4)[[0, -1]], [1.0, 0.01])
    objective = fastdiff.Objective(process, "score")
    t = objective.noise(torch.zeros(5000, 1), seed=3).t
    assert 0.01 <= float(t.min()) < 0.012 and float(t.max()) > 0.998
    for dtype in (torch.float32, torch.float64):
        process.check_t(torch.tensor([0.01, 1.0], dtype=dtype))
    with pytest.raises(ValueError, match=r"t must lie in \[0.01, 1\].*got 0.009"):
        process.levels([0.009])
    with pytest.raises(ValueError, match="t must lie in"):
        objective.noise(torch.zeros(2, 1), torch.tensor([0.5, 0.009]))
    time = float64([0.01, 0.3])
    for got, expected in zip(process.alpha_sigma(time), kind().alpha_sigma(time)):
        assert torch.equal(got, expected)
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"t_min must lie in \[0, 1\); got"):
            kind(t_min=bad)


@given(sigma=st.floats(0.0, 1e6), d=st.floats(0.01, 10.0))
@PROFILE
def test_edm(sigma, d):
    """t is sigma itself, to the bit, and alpha is 1."""
    process = fastdiff.EDM(sigma_data=d)
    alpha, out = process.alpha_sigma(float64([sigma]))
    assert (float(alpha), float(out), process.sigma_data, process.discrete) == (1.0, sigma, d, False)


@pytest.mark.parametrize("name", [*CONTINUOUS, "edm"])
@given(pair=st.tuples(st.floats(1e-4, 0.9999), st.floats(1e-4, 0.9999)))
@PROFILE
def test_snr_falls_with_t(name, pair):
    """More t, less signal: strictly, once the two t differ by more than rounding can blur."""
    low, high = sorted(pair)
    if high - low < 1e-9:
        high = low + 1e-9
    make, _, parameters = CONTINUOUS.get(name, (fastdiff.EDM, None, {}))
    snr = make(**parameters).levels(float64([low, high])).snr
    assert float(snr[1]) < float(snr[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_t_is_widened_first(dtype):
    """A t in a narrow dtype is taken at its exact value: the arithmetic is float64 all the same."""
    t = torch.tensor([0.001, 0.3, 0.9], dtype=dtype)
    for name, (make, truth, parameters) in CONTINUOUS.items():
        alpha, sigma = make(**parameters).alpha_sigma(t)
        expected = truth(t.double().numpy(), **parameters)
        assert_close(alpha, expected[0], absolute=4 * UNIT, label=name)
        assert_close(sigma, expected[1], label=name)


# ----------------------------------------------------------------------------------------- shapes, levels and errors


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 0), (0,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["vp", "table of a flow", "table of edm", "edm", *CONTINUOUS])
def test_any_shape_of_t(name, shape):
    """t of a scalar, a batch, rows by frame or by token, or nothing at all: the result has t's shape."""
    count = math.prod(shape)
    if name == "vp":
        process, t = fastdiff.VariancePreserving(), (torch.arange(count) * 37 % 1000).reshape(shape)
    elif name.startswith("table"):
        sigmas = np.linspace(1, 0.1, 10)
        process = TabulatedFlow(sigmas, sigmas) if name.endswith("flow") else TabulatedEDM(sigmas, sigmas, 0.5)
        t = (torch.arange(count) * 7 % 10).reshape(shape)
        assert torch.equal(process.model_time(process.levels(t)), torch.from_numpy(sigmas)[t])
    else:
        make, _, parameters = CONTINUOUS.get(name, (fastdiff.EDM, None, {}))
        process, t = make(**parameters), (torch.arange(count, dtype=torch.float64) / 100).reshape(shape)
    levels = process.levels(t)
    assert levels.process is process and torch.equal(levels.t, t)
    for value in (levels.alpha, levels.sigma, levels.snr):
        assert value.shape == shape and value.dtype == torch.float64
    flat = process.levels(t.reshape(-1))
    assert torch.equal(levels.sigma.reshape(-1), flat.sigma) and torch.equal(levels.alpha.reshape(-1), flat.alpha)
    if count:
        assert_close(levels.snr, oracle.snr(levels.alpha.numpy(), levels.sigma.numpy()), rel=8 * UNIT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_indexes(dtype):
    """uint8 must be an index, not a mask."""
    process = fastdiff.VariancePreserving(steps=20)
    t = torch.tensor([19, 0, 1, 7], dtype=dtype)
    assert torch.equal(process.levels(t).sigma, process.levels(t.long()).sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bool, torch.complex64])
def test_discrete_wants_integers(dtype):
    process = fastdiff.VariancePreserving()
    with pytest.raises((TypeError, ValueError), match=str(dtype).removeprefix("torch.")):
        process.check_t(torch.ones(3, dtype=dtype))
    with pytest.raises((TypeError, ValueError)):
        process.levels(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("steps", [20, 1000])
@pytest.mark.parametrize("offset", ["-1", "steps", "steps+5"])
def test_discrete_out_of_range(steps, offset):
    """-1 must not wrap around; the message names the range."""
    process = fastdiff.VariancePreserving(steps=steps)
    bad = {"-1": -1, "steps": steps, "steps+5": steps + 5}[offset]
    for call in (process.check_t, process.levels):
        with pytest.raises(ValueError, match=f"{steps - 1}|{steps}"):
            call(torch.tensor([0, bad, 1]))
    process.check_t(torch.tensor([0, steps - 1]))


@pytest.mark.parametrize("bad", [-1e-9, -1.0, 1.0 + 1e-9, 999.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", list(CONTINUOUS))
def test_continuous_out_of_range(name, bad):
    """Outside [0, 1] is an error: 999.0 is a discrete index sent to a continuous process."""
    make, _, parameters = CONTINUOUS[name]
    process = make(**parameters)
    for call in (process.check_t, process.levels):
        with pytest.raises(ValueError, match=r"\b1(\.0)?\b|nan|NaN"):
            call(float64([0.5, bad]))
    process.check_t(float64([0.0, 1.0]))


@pytest.mark.parametrize("bad", [-1e-9, math.nan, -math.inf, math.inf])
def test_edm_out_of_range(bad):
    process = fastdiff.EDM()
    with pytest.raises(ValueError, match="(?i)sigma|nan|t "):
        process.check_t(float64([0.5, bad]))
    process.check_t(float64([0.0, 1e5]))


@pytest.mark.parametrize("name", ["edm", *CONTINUOUS])
def test_continuous_rejects_masks_and_complex(name):
    make, _, parameters = CONTINUOUS.get(name, (fastdiff.EDM, None, {}))
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises((TypeError, ValueError)):
            make(**parameters).check_t(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize(
    "betas, words",
    [
        ("quadratic", "unknown beta schedule 'quadratic': use one of linear, scaled_linear, cosine, or the betas"),
        ("linaer", r"unknown beta schedule 'linaer' \(did you mean 'linear'\?\)"),
        ([], r"at least one value; got shape \(0,\)"),
        ([0.1, -0.1], r"in \(0, 1\]; got -0.1"),
        ([0.1, 1.5], r"in \(0, 1\]; got 1.5"),
        ([0.1, math.nan], r"in \(0, 1\]; got nan"),
        ([0.1, math.inf], r"in \(0, 1\]; got inf"),
        (torch.zeros(2, 2) + 0.1, r"1-D sequence of at least one value; got shape \(2, 2\)"),
    ],
    ids=["name", "nearly a name", "empty", "negative", "above 1", "nan", "inf", "2-d"],
)
def test_bad_betas(betas, words):
    with pytest.raises(ValueError, match=words):
        fastdiff.VariancePreserving(betas)


@pytest.mark.parametrize(
    "process, parameters, words",
    [
        ("VariancePreserving", {"steps": 0}, "steps must be a positive integer; got 0"),
        ("VariancePreserving", {"steps": -5}, "steps must be a positive integer; got -5"),
        ("RectifiedFlow", {"shift": 0.0}, "shift must be a positive number; got 0.0"),
        ("RectifiedFlow", {"shift": -1.0}, "shift must be a positive number; got -1.0"),
        ("RectifiedFlow", {"shift": math.nan}, "shift must be a positive number; got nan"),
        ("RectifiedFlow", {"sigma_min": -0.1}, r"sigma_min must lie in \[0, 1\); got -0.1"),
        ("RectifiedFlow", {"sigma_min": 1.0}, r"sigma_min must lie in \[0, 1\); got 1.0"),
        ("EDM", {"sigma_data": 0.0}, "sigma_data must be positive; got 0.0"),
        ("EDM", {"sigma_data": -1.0}, "sigma_data must be positive; got -1.0"),
        ("TrigFlow", {"sigma_data": 0.0}, "sigma_data must be positive; got 0.0"),
        ("VESDE", {"sigma_min": 0.0}, "0 < sigma_min < sigma_max is needed; got 0.0 and 50.0"),
        ("VESDE", {"sigma_min": 2.0, "sigma_max": 1.0}, "got 2.0 and 1.0"),
        ("VPSDE", {"beta_min": -1.0}, "0 < beta_min <= beta_max is needed; got -1.0 and 20.0"),
        ("SubVPSDE", {"beta_min": 5.0, "beta_max": 1.0}, "got 5.0 and 1.0"),
    ],
)
def test_bad_parameters(process, parameters, words):
    """A parameter that would give NaN, a negative SNR or an SNR that does not fall with t is refused with a reason."""
    with pytest.raises(ValueError, match=words):
        getattr(fastdiff, process)(**parameters)


def test_the_time_of_a_given_sigma_of_vesde():
    """sigma grows geometrically with t: in the middle it is the geometric mean of the ends."""
    process = fastdiff.VESDE(sigma_min=0.02, sigma_max=50.0)
    t = process.levels_at(torch.tensor([0.02, 1.0, 50.0], dtype=torch.float64)).t
    torch.testing.assert_close(t, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("wrong", "shown"), [(3, r"1000, 1001, 1002(?! and)"), (4, r"1000, 1001, 1002 and 1 more")])
def test_three_of_the_times_out_of_range_are_named(wrong, shown):
    with pytest.raises(ValueError, match=shown):
        fastdiff.VariancePreserving().levels(torch.arange(1000, 1000 + wrong))


# A process, a sigma as ``levels_at`` takes it, and the time there.
TIMES = [
    (fastdiff.VariancePreserving(), 1e5, 999.0),  # never beyond the timesteps
    (fastdiff.VariancePreserving(), 1e-6, 0.0),
    (fastdiff.VariancePreserving(), 0.0, 0.0),
    (fastdiff.VariancePreserving(steps=2), 1e5, 1.0),
    (fastdiff.VariancePreserving(steps=1), 0.5, 0.0),
    (fastdiff.VariancePreserving(steps=1), 1e-6, 0.0),
    (fastdiff.VPSDE(2.0, 2.0), math.sqrt(math.e - 1), 0.5),  # alpha = exp(-t)
    (fastdiff.SubVPSDE(2.0, 2.0), math.exp(0.5) - math.exp(-0.5), 0.5),
    (fastdiff.RectifiedFlow(3.0, 0.1), 0.1 + 0.9 * 0.75, 0.5),
    (fastdiff.EDM(), 0.0, 0.0),
]


@pytest.mark.parametrize(("process", "sigma", "t"), TIMES)
def test_the_time_of_a_sigma(process, sigma, t):
    assert_close(process.levels_at([sigma, sigma]).t, [t, t], rel=1e-12)


def test_a_sigma_may_be_off_by_a_rounding():
    """It has the time of the end, where it is as near as 1e-9."""
    flow, sde = fastdiff.RectifiedFlow(), fastdiff.VESDE()
    assert flow.time_of([1 + 5e-10, 1.0, 0.0, 0.3]).tolist() == [1.0, 1.0, 0.0, 0.3]
    assert sde.time_of([0.01 * (1 - 1e-9), 50 * (1 + 1e-9)]).tolist() == [0.0, 1.0]
    assert flow.time_of([]).shape == (0,)


NO_SIGMA = [
    (fastdiff.RectifiedFlow(), 1 + 1e-8),
    (fastdiff.RectifiedFlow(sigma_min=0.1), 0.05),
    (fastdiff.VESDE(), 0.01 * (1 - 1e-7)),
    (fastdiff.VPSDE(), -0.5),  # whose levels go by its square
    (fastdiff.VPSDE(), 1e4),
    (fastdiff.SubVPSDE(), 1e4),
    (fastdiff.EDM(), -1e-12),
    (fastdiff.EDM(), math.inf),
    (fastdiff.EDM(), math.nan),
]


@pytest.mark.parametrize(("process", "sigma"), NO_SIGMA)
def test_a_sigma_that_a_process_has_not(process, sigma):
    with pytest.raises(ValueError, match=rf"has no noise level sigma = {sigma:g}\.$"):
        process.time_of([0.3, sigma])


@pytest.mark.parametrize("sigma", [-1.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("process", [fastdiff.VariancePreserving(), fastdiff.EDM(), fastdiff.RectifiedFlow()], ids=repr)
def test_a_level_of_no_sigma(process, sigma):
    with pytest.raises(ValueError, match=rf"sigma must be finite and at least 0; got {sigma:g}\.$"):
        process.levels_at([0.3, sigma])


def test_a_level_beyond_a_flow():
    with pytest.raises(ValueError, match=r"sigma must lie in \[0, 1\] .*; got 1.5\.$"):
        fastdiff.RectifiedFlow().levels_at([0.3, 1.5])


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (fastdiff.RectifiedFlow(3.0), [1, 0.75, 0.5, 0.25]),
        (fastdiff.VPSDE(), [1, 0.667, 0.334, 1e-3]),
        (fastdiff.SubVPSDE(), [1, 0.667, 0.334, 1e-3]),
        (fastdiff.VESDE(), [1, 2 / 3 + 1e-5 / 3, 1 / 3 + 2e-5 / 3, 1e-5]),
        (fastdiff.EDM(), [80, (80 ** (1 / 7) * 2 / 3 + 0.002 ** (1 / 7) / 3) ** 7,
                          (80 ** (1 / 7) / 3 + 0.002 ** (1 / 7) * 2 / 3) ** 7, 0.002]),
        (TabulatedFlow(np.linspace(1, 0.1, 10), np.arange(10)), [0, 2, 5, 7]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_times_that_a_sampler_visits(process, times):
    """Song et al.'s code ends at 1e-3 and at 1e-5; Karras et al. 2022, equation 5."""
    assert_close(process.grid(4), times, rel=1e-13)


def test_a_table_has_no_more_times_than_steps():
    process = TabulatedFlow(np.linspace(1, 0.1, 10), np.arange(10))
    assert process.grid(10).tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 10\] .*; got 11"):
        process.grid(11)
    t = torch.tensor([0, 4, 9])
    assert process.fraction(t).tolist() == [1.0, 0.6, 1 - 0.9]
    assert process.time(float64([1.0, 0.95, 0.61, 0.59, 0.1, 0.0])).tolist() == [0, 0, 3, 4, 9, 9]


# At the edge of what is accepted, and of what is not.
ACCEPTED = [
    lambda: fastdiff.VPSDE(5.0, 5.0),
    lambda: fastdiff.VariancePreserving([0.1, 1.0]),
    lambda: fastdiff.VariancePreserving([0.5]),
    lambda: fastdiff.VariancePreserving(steps=2, zero_terminal_snr=True),
    lambda: fastdiff.RectifiedFlow(1e-3, 0.999),
    lambda: TabulatedVP([1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 1.0]),
]
REFUSED = [
    (lambda: fastdiff.VESDE(1.0, 1.0), "got 1.0 and 1.0"),
    (lambda: fastdiff.VPSDE(0.0), "got 0.0 and 20.0"),
    (lambda: fastdiff.RectifiedFlow(math.inf), "got inf"),
    (lambda: fastdiff.VariancePreserving([0.0, 0.1]), r"must lie in \(0, 1\]; got 0\."),
    (lambda: fastdiff.VariancePreserving(steps=10.0), "positive integer; got 10.0"),
    (
        lambda: fastdiff.VariancePreserving("cosine", beta_start=0.1),
        "takes no beta_start or beta_end; got 0.1 and None",
    ),
    (lambda: fastdiff.VariancePreserving([0.1], beta_end=0.1), "got None and 0.1"),
    (lambda: TabulatedVP([1.0, 0.5], [0.0, -0.1]), "alpha and sigma must lie in"),
    (lambda: TabulatedVP([1.0, 0.5], [0.0, 1.1]), "alpha and sigma must lie in"),
    (lambda: TabulatedVP([1.0, -0.1], [0.0, 0.1]), "alpha and sigma must lie in"),
    (lambda: TabulatedVP([1.1, 0.1], [0.0, 0.1]), "alpha and sigma must lie in"),
    (lambda: fastdiff.EDM().levels([-1.0]), r"t must lie in \[0, inf\) for EDM.*; got -1\.$"),
    (lambda: fastdiff.VESDE().levels([0.5, 1.5]), r"t must lie in \[0, 1\] for VESDE.*; got 1.5\.$"),
    (lambda: fastdiff.VariancePreserving().levels([5, -1]), r"\[0, 999\] .*; got -1\.$"),
]


@pytest.mark.parametrize("make", ACCEPTED)
def test_what_is_just_accepted(make):
    process = make()
    t = torch.tensor([0, process.steps - 1]) if process.discrete else float64([0.0, 1.0])
    levels = process.levels(t)
    assert bool((levels.alpha.isfinite() & levels.sigma.isfinite()).all())


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_is_just_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_are_taken_as_float64():
    """Whatever new tensors are by default."""
    for t in (0.1, [0.1, 0.1]):
        levels = fastdiff.RectifiedFlow().levels(t)
        assert levels.t.dtype == torch.float64 and bool((levels.t == 0.1).all()) and bool((levels.sigma == 0.1).all())
    assert fastdiff.VariancePreserving().levels([3, 4]).t.tolist() == [3, 4]


def test_a_process_that_is_changed_counts_it():
    process = fastdiff.RectifiedFlow()
    before = process._changes
    process.shift = 3.0
    assert process._changes == before + 1
