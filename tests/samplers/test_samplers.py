"""Every sampler's whole trajectory in float64 against its paper's loop (oracle_samplers.py), to 1e-6 and far below.

The order of convergence, and the final mean and covariance, on processes whose score is exact.
"""

import dataclasses
import math

import numpy as np
import oracle
import oracle_samplers as truth
import pytest
import torch
from oracle import assert_close

import fastdiff
from fastdiff import samplers
from fastdiff import sigma_schedules as schedules
from fastdiff.ops import COLUMNS
from fastdiff.samplers import spacing as spacings
from fastdiff.samplers.spacing import between_timesteps, checked_timesteps, discrete_timesteps, multistep_timesteps
from fastdiff.samplers.unipc import bend
from fastdiff.tabulated import TabulatedFlow

SHAPE = (2, 3, 4)
STEPS = [5, 20, 50]
ABAR = oracle.alpha_bar(oracle.betas_linear(1000))
VP_LEVEL = np.sqrt((1 - ABAR) / ABAR)
D64 = {"dtype": torch.float64, "progress": False}


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def z(i: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)


def network(x, t):
    time = t.reshape(-1)[0].double()
    return torch.tanh(x * (0.5 + 0.3 * torch.cos(time))) * (0.9 - 0.2 * torch.sin(time)) + 0.1


class Truth:
    """A process as the papers have it: levels, what the network is told, and the x0 estimate, none of it fastdiff's."""

    def __init__(self, process: str, prediction: str, clip: float | None):
        self.process, self.prediction, self.clip = process, prediction, clip

    def x0(self, x, alpha, sigma, t):
        x, alpha, sigma = np.asarray(x), oracle.LD(alpha), oracle.LD(sigma)
        seen, told = x, t
        if self.prediction == "edm":
            level = sigma / alpha
            c = oracle.edm_preconditioning(level)
            seen, told = c["c_in"] / alpha * x, c["c_noise"]
        m = network(torch.from_numpy(seen.astype(np.float64)), torch.tensor(float(told), dtype=torch.float64)).numpy()
        found = oracle.to_x0(self.prediction, x, m, alpha, sigma)
        return found if self.clip is None else np.clip(found, -self.clip, self.clip)

    def told(self, level):
        """t for sigma / alpha."""
        if self.process == "edm":
            return level
        return np.interp(float(np.log(level)), np.log(VP_LEVEL).astype(np.float64), np.arange(1000.0))

    def alpha_sigma(self, level):
        if self.process == "edm":
            return oracle.LD(1), level
        return 1 / np.sqrt(1 + level**2), level / np.sqrt(1 + level**2)

    def levels(self, steps, schedule):
        """(levels with the end, times) of a sigma schedule, or of the trailing timesteps."""
        if schedule == "trailing":
            times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
            at = VP_LEVEL[times]
        else:
            low, high = (0.002, 80.0) if self.process == "edm" else (VP_LEVEL[0], VP_LEVEL[-1])
            at = getattr(truth, schedule)(steps, low, high)
            times = [self.told(level) for level in at]
        return [*(self.alpha_sigma(level) for level in at), (1.0, 0.0)], times


PROCESSES = {"vp": fastdiff.VariancePreserving(), "edm": fastdiff.EDM()}
CASES = [
    ("vp", "epsilon", "trailing"),
    ("vp", "sample", "trailing"),
    ("vp", "v_prediction", "karras"),
    ("vp", "epsilon", "exponential"),
    ("vp", "edm", "linear"),
    ("edm", "edm", "karras"),
    ("edm", "sample", "exponential"),
    ("edm", "epsilon", "linear"),
]
each_case = pytest.mark.parametrize("process, prediction, schedule", CASES)
clipped = pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clip"])


def compare(sampler, process, prediction, schedule, steps, clip, loop):
    """``loop(x, levels, x0_by_index, x0_by_noise)`` against ``fastdiff.sample``, after every step. (With churn only at
    the end: between steps x has the churn of the next step in it here, and not yet in the papers' loop.)"""
    told = Truth(process, prediction, clip)
    levels, times = told.levels(steps, schedule)

    def by_index(x, i):
        return told.x0(x, *levels[i], times[i])

    def by_noise(u, level):
        """In the space of x / alpha."""
        alpha, sigma = told.alpha_sigma(level)
        exact = [t for (a, s), t in zip(levels, times) if s and s / a == level]
        return told.x0(u * alpha, alpha, sigma, exact[0] if exact else told.told(level))

    scale = 80.0 if process == "edm" else 1.0
    first, seen = scale * start(), []
    fastdiff.sample(
        network, SHAPE, PROCESSES[process], sampler, steps, prediction, x=first, noise=lambda i, shape: z(i),
        callback=lambda k, t, x, x0: seen.append(x.clone()), **D64,
    )  # fmt: skip
    expected = loop(first.numpy(), levels, by_index, by_noise)
    assert len(seen) == len(expected) == steps
    size = max(float(np.abs(x).max()) for x in expected)
    for k, (got, want) in enumerate(zip(seen, expected)):
        if not getattr(sampler, "s_churn", 0) or k == steps - 1:
            assert_close(got.numpy(), want, rel=0, absolute=1e-9 * size, label=f"step {k}")


def how(schedule):
    return {} if schedule == "trailing" else {"sigmas": schedule}


@clipped
@each_case
@pytest.mark.parametrize("steps", STEPS)
def test_euler_and_heun(steps, process, prediction, schedule, clip):
    for make, loop in ((samplers.Euler, truth.euler), (samplers.Heun, truth.heun)):
        sampler = make(clip=clip, **how(schedule))
        compare(sampler, process, prediction, schedule, steps, clip, lambda x, at, i, n: loop(x, at, n))  # noqa: B023


@each_case
@pytest.mark.parametrize("steps", STEPS)
def test_churn(steps, process, prediction, schedule):
    churn = (10.0, 0.05, 20.0, 1.003)
    options = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), churn)) | how(schedule)
    for make, loop in ((samplers.Euler, truth.euler), (samplers.Heun, truth.heun)):
        compare(
            make(**options), process, prediction, schedule, steps, None,
            lambda x, at, i, n: loop(x, at, n, z, churn),  # noqa: B023
        )  # fmt: skip
    if schedule == "karras":
        options.pop("sigmas")
        compare(
            samplers.EDM(**options), process, prediction, schedule, steps, None,
            lambda x, at, i, n: truth.heun(x, at, n, z, churn),
        )  # fmt: skip


@clipped
@each_case
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_ancestral(steps, eta, process, prediction, schedule, clip):
    sampler = samplers.EulerAncestral(eta=eta, clip=clip, **how(schedule))
    compare(
        sampler, process, prediction, schedule, steps, clip,
        lambda x, at, i, n: truth.euler_ancestral(x, at, n, z, eta),
    )  # fmt: skip


@clipped
@each_case
@pytest.mark.parametrize(
    "order, eta, solver_type",
    [(1, 0, "midpoint"), (2, 0, "midpoint"), (2, 0, "heun"), (3, 0, "heun"), (1, 1, "heun"), (2, 1, "midpoint"),
     (2, 1, "heun"), (2, 0.5, "midpoint"), (3, 1, "heun")],
)  # fmt: skip
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_pp(steps, order, eta, solver_type, process, prediction, schedule, clip):
    sampler = samplers.DPMSolverPP(order=order, eta=eta, solver_type=solver_type, clip=clip, **how(schedule))
    orders = truth.multistep_orders(order, steps, lower=steps < 15)
    compare(
        sampler, process, prediction, schedule, steps, clip,
        lambda x, at, i, n: truth.dpmpp(x, at, i, order, orders, eta, solver_type, z),
    )  # fmt: skip


@clipped
@each_case
@pytest.mark.parametrize("order, variant", [(1, "bh2"), (2, "bh2"), (2, "bh1"), (3, "bh2"), (3, "bh1")])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc(steps, order, variant, process, prediction, schedule, clip):
    """The folded corrector is the paper's, which keeps the corrected x."""
    sampler = samplers.UniPC(order=order, solver_type=variant, clip=clip, **how(schedule))
    orders = truth.multistep_orders(order, steps, lower=True)
    compare(
        sampler, process, prediction, schedule, steps, clip,
        lambda x, at, i, n: truth.unipc(x, at, i, orders, variant),
    )  # fmt: skip


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("order, variant", [(1, "bh2"), (2, "bh2"), (2, "bh1"), (3, "bh2"), (3, "bh1")])
def test_weights_of_unipc_are_those_of_each_step(order, variant, corrects):
    """Of steps in any shape: here [2, 3], and one after the other."""
    h = torch.tensor([[0.1, 0.4, 0.7], [1.0, 2.0, math.inf]], dtype=torch.float64)
    r = [torch.full_like(h, -1.5 - k) for k in range(order - 1)]
    found = bend(h, r, corrects, variant)
    assert found.shape == (2, 3, order + 1)
    for i in range(2):
        for j in range(3):
            one = bend(h[i, j], [each[i, j] for each in r], corrects, variant)
            torch.testing.assert_close(found[i, j], one, rtol=0, atol=0)
            # What is added to the first-order step weighs differences.
            torch.testing.assert_close(one.sum(), h.new_tensor(0.0), rtol=0, atol=1e-12)


@clipped
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", STEPS)
def test_lcm(steps, prediction, clip):
    times = [20 * k + 19 for k in range(50)][::-1]
    times = [times[int(np.floor(k * 50 / steps))] for k in range(steps)]
    at = [(np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])) for t in times]
    told = Truth("vp", prediction, clip)
    seen = []
    fastdiff.sample(
        network, SHAPE, PROCESSES["vp"], samplers.LCM(clip=clip), steps, prediction, x=start(),
        noise=lambda i, shape: z(i), callback=lambda k, t, x, x0: seen.append(x.clone()), **D64,
    )  # fmt: skip
    expected = truth.lcm(start().numpy(), at, times, lambda x, i: told.x0(x, *at[i], times[i]), z)
    for got, want in zip(seen, expected, strict=True):
        assert_close(got.numpy(), want, rel=0, absolute=1e-9 * float(np.abs(want).max()))


@clipped
@pytest.mark.parametrize("prediction", ["flow", "epsilon", "sample", "edm"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["euler", "ancestral", "heun", "stochastic", "dpmpp", "unipc"])
def test_flows(kind, steps, shift, prediction, clip):
    """Levels (1 - s, s), s = shift t / (1 + (shift - 1) t), t from 1 (0.99 where s = 1 would be divided by) to 0."""
    first = 1.0 if prediction in ("flow", "sample") and kind not in ("dpmpp", "unipc") else 0.99
    times = np.linspace(first, 0, steps + 1)[:-1]
    s = [float(v) for v in oracle.flow_shift(times, shift)] + [0.0]
    told = Truth("flow", prediction, clip)

    def by_noise(x, sigma):
        return told.x0(x, 1 - sigma, sigma, sigma)

    def by_index(x, i):
        return by_noise(x, oracle.LD(s[i]))

    how = {"timesteps": times.tolist(), "clip": clip}
    at = [(1 - v, v) for v in map(oracle.LD, s)]
    orders = truth.multistep_orders(2, steps, lower=True)
    sampler, expected = {
        "euler": lambda: (samplers.FlowEuler(**how), truth.flow_euler(start().numpy(), s, by_noise)),
        "ancestral": lambda: (
            samplers.EulerAncestral(eta=0.7, **how), truth.flow_ancestral(start().numpy(), s, by_noise, z, 0.7),
        ),
        "heun": lambda: (samplers.FlowHeun(**how), truth.flow_heun(start().numpy(), s, by_noise)),
        "stochastic": lambda: (samplers.FlowLCM(**how), truth.flow_stochastic(start().numpy(), s, by_noise, z)),
        "dpmpp": lambda: (
            samplers.DPMSolverPP(lower_order_final=True, **how), truth.dpmpp(start().numpy(), at, by_index, 2, orders),
        ),
        "unipc": lambda: (samplers.UniPC(**how), truth.unipc(start().numpy(), at, by_index, orders)),
    }[kind]()  # fmt: skip
    seen: list[torch.Tensor] = []
    fastdiff.sample(
        network, SHAPE, fastdiff.RectifiedFlow(shift=shift), sampler, None, prediction, x=start(),
        noise=lambda i, shape: z(i), callback=lambda k, t, x, x0: seen.append(x.clone()), **D64,
    )  # fmt: skip
    size = max(float(np.abs(x).max()) for x in expected)
    for k, (got, want) in enumerate(zip(seen, expected, strict=True)):
        assert_close(got.numpy(), want, rel=0, absolute=1e-9 * size, label=f"step {k}")


def test_flow_ends_of_unequal_noise_floor():
    """With sigma_min the flow's straight line is still straight: Euler and Heun are exact on data that is one point."""
    process = fastdiff.RectifiedFlow(sigma_min=0.1)
    point, n = torch.full(SHAPE, 0.3, dtype=torch.float64), start()
    for sampler in (samplers.FlowEuler(), samplers.FlowHeun(), samplers.EulerAncestral(eta=0.0)):
        how = {"x": n, "return_trajectory": True} | D64
        _, path = fastdiff.sample(lambda x, t: point, SHAPE, process, sampler, 4, "sample", **how)
        for x, t in zip(path[1:-1], (0.75, 0.5, 0.25), strict=True):
            levels = process.levels(t)
            torch.testing.assert_close(x, levels.alpha * point + levels.sigma * n, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(path[-1], point)


# ----------------------------------------------------------------------------------------------- schedules and spacings


def test_sigma_schedules():
    for name in ("karras", "exponential", "linear"):
        for steps in (1, 2, 20):
            got = getattr(schedules, name)(steps, 0.03, 15.0)
            assert_close(got.numpy(), getattr(truth, name)(steps, 0.03, 15.0), rel=1e-13)


def test_beta_quantiles_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for a, b in ((0.6, 0.6), (0.3, 2.0), (5.0, 1.5)):
        for u in np.linspace(0, 1, 23):
            assert schedules.beta_quantile(float(u), a, b) == pytest.approx(float(stats.beta.ppf(u, a, b)), rel=1e-11)
    sigmas = schedules.beta(20, 0.03, 15.0)
    assert float(sigmas[0]) == 15.0 and float(sigmas[-1]) == pytest.approx(0.03)
    uneven = schedules.beta(20, 0.03, 15.0, 0.3, 2.0)
    assert_close(uneven.numpy(), 0.03 + 14.97 * stats.beta.ppf(np.linspace(1, 0, 20), 0.3, 2.0), rel=1e-10)


def test_multistep_spacings():
    assert multistep_timesteps(1000, 4, "linspace") == [999, 749, 500, 250]
    assert multistep_timesteps(1000, 4, "leading") == [800, 600, 400, 200]
    assert multistep_timesteps(1000, 4, "leading", 1) == [801, 601, 401, 201]
    assert multistep_timesteps(1000, 4, "trailing") == discrete_timesteps(1000, 4)
    with pytest.raises(ValueError, match=r"\[1, 999\]"):
        multistep_timesteps(1000, 1000, "leading")


def test_spacings_at_their_ends():
    assert discrete_timesteps(1000, 2, "linspace") == [999, 0]
    assert discrete_timesteps(1000, 1) == [999] and discrete_timesteps(1000, 1, "linspace") == [0]
    assert discrete_timesteps(1000, 1, "leading") == [0] and discrete_timesteps(1000, 1, "leading", 999) == [999]
    for spacing in ("trailing", "leading", "linspace"):
        assert discrete_timesteps(7, 7, spacing) == [6, 5, 4, 3, 2, 1, 0]
    assert discrete_timesteps(1000, 3, "leading", 1) == [667, 334, 1]
    assert discrete_timesteps(1000, 3, "linspace", 1) == [999, 500, 0], "an offset is of leading alone"
    assert discrete_timesteps(1000, 3, "trailing", 1) == [999, 666, 332]
    assert between_timesteps(1000, 3, "linspace", 0) == [999, 499.5, 0] and between_timesteps(9, 2, "linspace", 0) == [
        8,
        0,
    ]
    assert (
        between_timesteps(1000, 1, "linspace", 0) == [0] and len(between_timesteps(1000, 1000, "linspace", 0)) == 1000
    )
    assert between_timesteps(1000, 3, "leading", 1) == [667, 334, 1]
    assert multistep_timesteps(1000, 4, "linspace", 1) == [999, 749, 500, 250]
    assert multistep_timesteps(1000, 4, "trailing", 1) == discrete_timesteps(1000, 4)
    assert multistep_timesteps(1000, 1, "leading") == [500] and multistep_timesteps(5, 4, "leading") == [4, 3, 2, 1]
    for spaced in (
        discrete_timesteps,
        multistep_timesteps,
        lambda total, steps, how: between_timesteps(total, steps, how, 0),
    ):
        for steps in (0, 1001):
            with pytest.raises(ValueError, match=rf"steps must lie in \[1, (1000|999)\].*; got {steps}"):
                spaced(1000, steps, "linspace")
    assert checked_timesteps([999, 0], 1000) == checked_timesteps(torch.tensor([999.0, 0.0]), 1000) == [999, 0]
    for times, shown in (
        ([], "none"), ([1000, 5], "1000, 5"), ([5, -1], "5, -1"), ([5, 5], "5, 5"), ([3.5, 1], "3.5, 1"),
        ([9, 8, 7, 6, 5, 5], "9, 8, 7, 6, 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"from at most 999 to at least 0; got {shown}\.$"):
            checked_timesteps(times, 1000)


def test_how_many_times_are_visited_if_nobody_says():
    assert spacings.times(PROCESSES["vp"], None).tolist() == list(range(999, -1, -1))
    assert len(spacings.times(PROCESSES["edm"], None)) == 50
    assert spacings.times(TabulatedFlow(np.linspace(1, 0.1, 7), np.arange(7)), None).tolist() == list(range(7))
    assert len(spacings.times(PROCESSES["edm"], 1)) == 1
    assert len(samplers.Euler().path(PROCESSES["vp"], None).levels.t) == 1000
    assert len(samplers.Euler(sigmas="karras").path(PROCESSES["vp"], None).levels.t) == 50


def orders_of(sampler, steps, process=None):
    return sampler.orders(sampler.path(process or PROCESSES["vp"], steps))


def test_the_order_of_each_step():
    """The last ones are lower in fewer than 15 steps; so is a step to clean data, and what would be extrapolated from
    pure noise."""
    third = samplers.DPMSolverPP(order=3)
    assert orders_of(third, 14) == [1, 2, *[3] * 10, 2, 1]
    assert orders_of(third, 15) == [1, 2, *[3] * 12, 1]
    assert orders_of(samplers.DPMSolverPP(order=3, final_sigma=0.01), 15) == [1, 2, *[3] * 13]
    assert orders_of(samplers.DPMSolverPP(order=3, lower_order_final=True, final_sigma=0.01), 20)[-3:] == [3, 2, 1]
    assert orders_of(samplers.UniPC(order=3), 20)[-3:] == [3, 2, 1]
    assert orders_of(samplers.UniPC(order=3, lower_order_final=False), 20)[-3:] == [3, 3, 1]
    assert orders_of(samplers.UniPC(order=3, lower_order_final=False), 1) == [1]
    silent = fastdiff.VariancePreserving(zero_terminal_snr=True)
    assert orders_of(third, 15, silent) == [1, 1, 2, *[3] * 11, 1]


@pytest.mark.parametrize(
    ("how", "factors"),
    [
        ({}, [4 / 3] * 3),
        ({"s_tmin": 1.0, "s_tmax": 3.0}, [1, 4 / 3, 4 / 3]),
        ({"s_tmin": 1.001, "s_tmax": 2.999}, [1, 1, 1]),
        ({"s_tmin": 1.001}, [4 / 3, 4 / 3, 1]),
        ({"s_churn": 1.2}, [1.4] * 3),
        ({"s_churn": 100.0}, [math.sqrt(2)] * 3),
    ],
)
def test_which_steps_are_churned(how, factors):
    """Karras et al. 2022, algorithm 2: gamma = min(s_churn / N, sqrt(2) - 1), the ends of [s_tmin, s_tmax] among them;
    what is added has the variance that was missing, times s_noise^2."""
    sampler = samplers.Euler(sigmas=[5.0, 3.0, 1.0], s_noise=1.5, **({"s_churn": 1.0} | how))
    path, start, factor, added = sampler.churned(PROCESSES["edm"], None)
    plain, factors = np.array([5.0, 3.0, 1.0]), np.array(factors)
    assert_close(path.levels.sigma, plain * factors, rel=1e-14)
    assert_close(path.levels.t, plain * factors, rel=1e-14)
    noise = 1.5 * plain * np.sqrt(factors**2 - 1)
    assert_close([start[1], *added.tolist()], [*noise, 0.0], rel=1e-7, absolute=1e-14)
    assert start[0] == 1 and factor.tolist() == [1.0] * 3 and path.sigma.tolist() == [5.0, 3.0, 1.0, 0.0]


def test_where_a_path_ends():
    """At clean data, whose time is said to be -1, or at final_sigma."""
    path = samplers.Euler(sigmas=[5.0, 3.0]).path(PROCESSES["edm"], None)
    assert [float(row[-1]) for row in (path.times, path.alpha, path.sigma)] == [-1.0, 1.0, 0.0]
    path = samplers.Euler(sigmas=[5.0, 3.0], final_sigma=0.5).path(PROCESSES["edm"], None)
    assert [float(row[-1]) for row in (path.times, path.alpha, path.sigma)] == [0.5, 1.0, 0.5]
    for sigmas, final in (([5.0, 5.0], 0.0), ([5.0, 5.0 * (1 - 1e-10)], 0.0), ([5.0, 0.5], 0.5), ([5.0, 0.5], 0.6)):
        with pytest.raises(ValueError, match="the noise must fall from each level to the next"):
            samplers.Euler(sigmas=sigmas, final_sigma=final).path(PROCESSES["edm"], None)
    samplers.Euler(sigmas=[5.0, 5.0 * (1 - 1e-8)]).path(PROCESSES["edm"], None)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (0.0, None), (-1.0, None), (None, 0.0), (None, -1.0)])
def test_ends_of_a_named_schedule(low, high):
    with pytest.raises(ValueError, match=f"got sigma_min={low}, sigma_max={high}"):
        samplers.Euler(sigmas="karras", sigma_min=low, sigma_max=high)


PLACES = [
    (fastdiff.VariancePreserving(), [0, 5, 500, 999]),
    (fastdiff.RectifiedFlow(shift=3.0), [0.1, 0.5, 1.0]),
    (fastdiff.RectifiedFlow(shift=2.0, sigma_min=1e-3), [0.1, 0.5, 1.0]),
    (fastdiff.EDM(), [0.1, 5.0]),
    (fastdiff.VPSDE(), [0.01, 0.5, 1.0]),
    (fastdiff.SubVPSDE(), [0.01, 0.5, 1.0]),
    (fastdiff.VESDE(), [0.01, 0.5, 1.0]),
]


@pytest.mark.parametrize("process, times", PLACES, ids=lambda value: type(value).__name__)
def test_levels_at_a_sigma_are_those_of_its_time(process, times):
    there = process.levels(times)
    sigma = there.sigma if isinstance(process, fastdiff.RectifiedFlow) else there.sigma / there.alpha
    back = process.levels_at(sigma)
    for a, b in ((back.t, there.t), (back.alpha, there.alpha), (back.sigma, there.sigma)):
        torch.testing.assert_close(a, b.double(), rtol=1e-13, atol=1e-14)
    with pytest.raises(ValueError, match="sigma"):
        process.levels_at([-1.0])


def test_times_between_timesteps():
    process = fastdiff.VariancePreserving()
    levels = process.levels_between([3.0, 3.25, 999.0])
    exact = process.levels([3, 4, 999])
    ratio = exact.sigma / exact.alpha
    expected = torch.stack([ratio[0], 0.75 * ratio[0] + 0.25 * ratio[1], ratio[2]])
    torch.testing.assert_close(levels.sigma / levels.alpha, expected)
    for row in ("alpha", "sigma"):  # at a timestep they are its own, to the bit
        assert getattr(levels, row)[[0, 2]].tolist() == getattr(exact, row)[[0, 2]].tolist()
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(3, dtype=torch.float64))
    for t in (999.5, -0.5, math.nan):
        with pytest.raises(ValueError, match=rf"t must lie in \[0, 999\] .*; got {t}\.$"):
            process.levels_between([3.0, t])


# ------------------------------------------------------------------------------------------------------------ accuracy


class Mixture:
    """Data 0.3 N(-1, 0.3^2) + 0.7 N(0.8, 0.5^2), one dimension: its denoiser is in closed form."""

    weights, means, stds = (0.3, 0.7), (-1.0, 0.8), (0.3, 0.5)

    def x0(self, x, alpha, sigma):
        logs, estimates = [], []
        for w, mean, std in zip(self.weights, self.means, self.stds):
            variance = alpha**2 * std**2 + sigma**2
            logs.append(math.log(w) - 0.5 * variance.log() - (x - alpha * mean) ** 2 / (2 * variance))
            estimates.append(mean + alpha * std**2 / variance * (x - alpha * mean))
        share = torch.softmax(torch.stack(logs), 0)
        return (share * torch.stack(estimates)).sum(0)


def exact_denoiser(process, data=None):
    """prediction "sample"; t is found again from what the network is told (EDM: sigma, flow: sigma, VPSDE: t)."""
    data = Mixture() if data is None else data

    def model(x, t):
        levels = process.levels(t[0])
        return data.x0(x, levels.alpha, levels.sigma)

    return model


ORDERS = {  # sampler, process, order
    "ddim": (samplers.DDIM, "vpsde", 1),
    "euler": (samplers.Euler, "edm", 1),
    "heun": (samplers.Heun, "edm", 2),
    "edm": (samplers.EDM, "edm", 2),
    "dpmpp 1m": (lambda **how: samplers.DPMSolverPP(order=1, **how), "vpsde", 1),
    "dpmpp 2m": (lambda **how: samplers.DPMSolverPP(order=2, **how), "vpsde", 2),
    "dpmpp 2m edm": (lambda **how: samplers.DPMSolverPP(order=2, solver_type="heun", **how), "edm", 2),
    # Third in name: as published, and as diffusers and k-diffusion have it, its second difference has half the weight
    # that a second derivative has, which leaves an error of second order.
    "dpmpp 3m": (lambda **how: samplers.DPMSolverPP(order=3, **how), "edm", 2),
    # The corrector adds one order (UniPC, theorem 3.1); the predictor's own is measured without it.
    "unipc 2": (lambda **how: samplers.UniPC(order=2, lower_order_final=False, **how), "edm", 3),
    "unip 2": (
        lambda **how: samplers.UniPC(order=2, lower_order_final=False, disable_corrector=range(1000), **how),
        "edm",
        2,
    ),
    "flow euler": (samplers.FlowEuler, "flow", 1),
    "flow heun": (samplers.FlowHeun, "flow", 2),
}


def slope(make, name):
    """Of log error against log steps, from one noise level to another, above the singular end. The upper one of EDM is
    so high that the first steps, which have no history and a lower order, do not matter."""
    process = {"edm": fastdiff.EDM(), "vpsde": fastdiff.VPSDE(), "flow": fastdiff.RectifiedFlow()}[name]
    high, low = {"edm": (500.0, 0.05), "vpsde": (5.0, 0.05), "flow": (0.9, 0.05)}[name]
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None] * (high if name == "edm" else 1.0)
    model = exact_denoiser(process)

    def grid(steps):
        if name == "flow":
            return np.linspace(high, low, steps + 1)
        return np.exp(np.linspace(math.log(high), math.log(low), steps + 1))

    def ending(sampler_of, steps):
        """The last level, visited by a step of which only the noise that is left matters: read x before it."""
        seen = []
        levels = grid(steps)
        at = levels.tolist() if name != "vpsde" else process.levels_at(levels).t.tolist()
        fastdiff.sample(
            model, x.shape, process, sampler_of(timesteps=at), None, "sample", x=x,
            callback=lambda k, t, y, x0: seen.append(y.clone()), **D64,
        )  # fmt: skip
        return seen[steps - 1]

    exact = ending(samplers.FlowHeun if name == "flow" else samplers.Heun, 1500)
    counts = [24, 48, 96]
    errors = [float((ending(make, n) - exact).abs().mean()) for n in counts]
    return [math.log(a / b) / math.log(2) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize("name", list(ORDERS))
def test_order_of_convergence(name):
    """Halving the step divides the error by 2^order. Within 0.35: the next power of the step is still there."""
    make, process, order = ORDERS[name]
    found = slope(make, process)
    assert order - 0.35 <= found[-1] <= order + 0.75, found


class Gaussian:
    """Data N(mean, covariance), correlated."""

    def __init__(self):
        self.mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
        self.covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

    def gain(self, alpha, sigma):
        """E[x0 | x] = mean + gain (x - alpha mean)."""
        total = alpha**2 * self.covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return alpha * torch.linalg.solve(total, self.covariance)

    def x0(self, x, alpha, sigma):
        return self.mean + (x - alpha * self.mean) @ self.gain(alpha, sigma)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "ddim eta", "euler_ancestral", "dpmpp_2m_sde", "flow_lcm"])
def test_final_mean_and_covariance_match_the_closed_form(kind):
    """With Gaussian data the whole run is linear, so x at the end is Gaussian and its moments follow from the papers'
    loops; here 40000 samples have these moments."""
    data = Gaussian()
    process = fastdiff.RectifiedFlow() if kind == "flow_lcm" else fastdiff.VariancePreserving()
    sampler = samplers.DDIM(eta=0.5) if kind == "ddim eta" else samplers.get(kind)
    mean, covariance = moments_of_a_loop(kind, data)
    n = 40000
    x = fastdiff.sample(exact_gaussian(process, data), (n, 2), process, sampler, 25, "sample", seed=3, **D64)
    # Six standard errors of a mean and of a covariance of n samples.
    spread = covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - mean).abs() < 6 * spread / math.sqrt(n)).all())
    bound = 6 * math.sqrt(2 / n) * spread[:, None] * spread[None]
    assert bool(((torch.cov(x.T) - covariance).abs() < bound).all())
    if kind in ("ddim", "ddpm"):  # all 1000 steps: the data's own, but for the discretisation, first order in 1 / 1000
        mean, covariance = linear_run(sampler.plan(process, 1000, "sample"), process, data)
        assert bool(((covariance - data.covariance).abs() < 0.01).all())
        assert bool(((mean - data.mean).abs() < 0.01).all())


def moments_of_a_loop(kind, data, steps=25):
    """(mean, covariance) at the end of the paper's loop from a standard normal. It is affine in where it starts and in
    the noise of each step: run from 0, and once from each unit of the one and of the other."""
    runs = 3 + 2 * steps
    first, zs = np.zeros((runs, 2)), np.zeros((steps, runs, 2))
    first[1:3] = np.eye(2)
    for i in range(steps):
        zs[i, 3 + 2 * i : 5 + 2 * i] = np.eye(2)
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    levels = [*((np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])) for t in times), (1.0, 0.0)]
    mean, covariance = data.mean.numpy(), data.covariance.numpy()

    def x0(x, alpha, sigma):
        total = float(alpha) ** 2 * covariance + float(sigma) ** 2 * np.eye(2)
        return mean + (x - alpha * mean) @ (float(alpha) * np.linalg.solve(total, covariance))

    def scaled(u, level):
        alpha = 1 / np.sqrt(1 + level**2)
        return x0(u * alpha, alpha, level * alpha)

    def stepped(step):
        x = first
        for i, ((a, s), (b, _)) in enumerate(zip(levels, levels[1:])):
            x = step(x, x0(x, a, s), (x - a * x0(x, a, s)) / s, a**2, b**2, zs[i])
        return x

    ends = {
        "ddpm": lambda: stepped(lambda x, x0, _, a, b, z: oracle.ddpm_step(x, x0, a, b, z) if b < 1 else x0),
        "ddim": lambda: stepped(lambda x, x0, n, a, b, z: oracle.ddim_step(x, x0, n, a, b)),
        "ddim eta": lambda: stepped(lambda x, x0, n, a, b, z: oracle.ddim_step(x, x0, n, a, b, 0.5, z)),
        "euler_ancestral": lambda: truth.euler_ancestral(first, levels, scaled, lambda i: zs[i])[-1],
        "dpmpp_2m_sde": lambda: truth.dpmpp(
            first, levels, lambda x, i: x0(x, *levels[i]), 2, truth.multistep_orders(2, steps, lower=False), 1.0,
            "midpoint", lambda i: zs[i],
        )[-1],
        "flow_lcm": lambda: truth.flow_stochastic(
            first, np.linspace(1, 0, steps + 1), lambda x, s: x0(x, 1 - s, s), lambda i: zs[i]
        )[-1],
    }[kind]()  # fmt: skip
    slopes = (ends[1:] - ends[0]).astype(np.float64)
    return torch.from_numpy(ends[0].astype(np.float64)), torch.from_numpy(slopes.T @ slopes)


def linear_run(plan, process, data):
    """(mean, covariance) at the end, from the rows: the state is x and the last two x0 estimates, stacked."""
    levels = process.levels(plan.times)
    eye = torch.eye(2, dtype=torch.float64)
    mean, covariance = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    covariance[:2, :2] = eye
    for k, row in enumerate(plan.table):
        c = dict(zip(COLUMNS, row.tolist()))
        gain = data.gain(levels.alpha[k], levels.sigma[k]).T
        offset = data.mean - gain @ (levels.alpha[k] * data.mean)
        step = torch.zeros(6, 6, dtype=torch.float64)
        step[:2, :2] = c["c_x"] * eye + (c["c_x0"] + c["c_m"]) * gain
        step[:2, 2:4], step[:2, 4:6] = c["c_h1"] * eye, c["c_h2"] * eye
        step[2:4, :2], step[4:6, 2:4] = gain, eye
        mean = step @ mean + torch.cat([(c["c_x0"] + c["c_m"]) * offset, offset, torch.zeros(2, dtype=torch.float64)])
        covariance = step @ covariance @ step.T
        covariance[:2, :2] += c["c_noise"] ** 2 * eye
    return mean[:2], covariance[:2, :2]


def exact_gaussian(process, data):
    def model(x, t):
        levels = process.levels(t[0] if process.discrete else t[0].item())
        return data.x0(x, levels.alpha, levels.sigma)

    return model


MAKERS = {
    "vp": fastdiff.VariancePreserving, "flow": fastdiff.RectifiedFlow, "edm": fastdiff.EDM, "vpsde": fastdiff.VPSDE,
}  # fmt: skip
PLANS = [
    *((name, {}, "flow" if name.startswith("flow") else "vp") for name in samplers.NAMES if name != "edm"),
    ("edm", {}, "edm"),
    *(("euler", {"sigmas": sigmas}, "vp") for sigmas in ("karras", "exponential", "linear", "beta")),
    ("euler", {"sigmas": [5.0, 1.0], "timesteps": [900, 100], "final_sigma": 0.01}, "vp"),
    ("ddim", {"previous": "stride", "set_alpha_to_one": False, "eta": 0.5, "spacing": "leading"}, "vp"),
    ("ddim", {"timesteps": [900, 500, 20, 10, 0]}, "vp"),
    ("ddim", {"set_alpha_to_one": False}, "vp"),
    ("ddim", {}, "flow"),
    ("ddim", {}, "vpsde"),
    ("ddim", {"timesteps": [0.9, 0.5, 0.2, 0.1]}, "flow"),
    ("ddpm", {"spacing": "linspace", "variance": "fixed_large", "final_noise": True}, "vp"),
    ("heun", {"s_churn": 3.0}, "vp"),
    ("unipc", {"order": 3, "disable_corrector": (1,)}, "vp"),
    ("lcm", {"timesteps": [900, 500, 20]}, "vp"),
]


@pytest.mark.parametrize(("name", "options", "process"), PLANS, ids=lambda value: str(value)[:40])
def test_default_dtype_and_device_do_not_matter_to_a_plan(name, options, process):
    """A plan is made on the CPU in float64, whatever new tensors are by default."""
    kind = process if process in ("flow", "edm") else "epsilon"
    steps = None if "timesteps" in options or isinstance(options.get("sigmas"), list) else 5
    expected = samplers.NAMES[name](**options).plan(MAKERS[process](), steps, kind)
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")  # whatever is made there has no values
    try:
        plan = samplers.NAMES[name](**options).plan(MAKERS[process](), steps, kind)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert plan.table.dtype == torch.float64
    for field in dataclasses.fields(plan):
        got, want = getattr(plan, field.name), getattr(expected, field.name)
        if isinstance(want, torch.Tensor):
            assert got.dtype == want.dtype and torch.equal(got, want), field.name
        else:
            assert got == want, field.name


@pytest.mark.parametrize("name", [name for name in samplers.NAMES if name not in ("ddpm", "ddim", "lcm")])
def test_an_option_without_its_name_is_refused(name):
    """Of so many numbers, the place of one says nothing."""
    with pytest.raises(TypeError, match="positional"):
        samplers.NAMES[name](*[0.5] * 3)
