"""Every option asked at two values, each with a number of its own: one that is taken and ignored, or taken for another,
gives the number of the wrong value. The numbers are the papers', or a generator's draws.

What is asked here had no such number elsewhere; the options of operations, weightings, processes, time densities and
schedulers have theirs beside the formulas (test_loss.py, test_weighting.py, test_process.py, test_timesteps.py,
test_samplers.py, test_diffusers.py), those of other libraries' calling conventions in test_options_of_integrations.py.
"""

import math

import numpy as np
import oracle
import oracle_samplers as truth
import pytest
import torch
from options import ALPHA, MASK, SIGMA, WEIGHT, X0, Asked, M, N, T, check, generator, m, n, rows, seed_of, t, x0
from oracle import LD, assert_close
from tiny_run import ABAR, LEVELS, SHAPE, SIGMAS, START, STEPS, TIMES, Z, at, clean, run, scaled

import fastdiff
from fastdiff import losses, samplers

VP, FLOW, EDM = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow(), fastdiff.EDM()


# ----------------------------------------------------------------------------------- the objective and the functions


def true_loss(
    prediction="epsilon", weighting=None, loss="mse", mask=None, reduction="mean", weight=1.0, normalization="none"
):
    """The mean over elements, samples or what the mask covers, written out."""
    error = oracle.ld(M) - oracle.target(prediction, X0, N, ALPHA, SIGMA)
    error = {"mse": oracle.loss_mse, "l1": oracle.loss_l1}[loss](error) * rows(weight)
    if weighting is not None:
        error = error * rows(oracle.weight_min_snr(prediction, ALPHA[:, 0, 0], SIGMA[:, 0, 0]))
    left = np.ones_like(error) if mask is None else mask
    error = error * left
    if reduction == "sum":
        return error.sum()
    count = {"none": 6, "row": left.sum((1, 2)), "global": left.sum() / 4}[normalization]
    means = error.sum((1, 2)) / count
    return means if reduction == "none" else means.mean()


def option_of_a_loss(name, first, second, **others):
    """The option as ``diffusion_loss`` takes it; tensors for arrays."""

    def arguments(value):
        given = others | {name: value}
        return {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in given.items()}

    short = {"mask_normalization": "normalization"}

    def expected(value):
        return true_loss(**{short.get(key, key): v for key, v in (others | {name: value}).items()})

    def function(value):
        return fastdiff.diffusion_loss(m, x0, n, t, VP, **arguments(value))

    def method(value):
        given = arguments(value)
        made = {key: given.pop(key) for key in ("weighting", "loss") if key in given}
        objective = fastdiff.Objective(VP, given.pop("prediction", "epsilon"), **made)
        return objective.loss(m, objective.noise(x0, t, n), **given)

    return Asked((first, second), function, expected), Asked((first, second), method, expected)


OF_A_LOSS = {
    "prediction": option_of_a_loss("prediction", "epsilon", "v_prediction"),
    "weighting": option_of_a_loss("weighting", None, "min_snr", prediction="v_prediction"),
    "loss": option_of_a_loss("loss", "mse", "l1"),
    "mask": option_of_a_loss("mask", MASK, 1 - MASK),
    "reduction": option_of_a_loss("reduction", "mean", "sum"),
    "reduction, none": option_of_a_loss("reduction", "none", "sum", weight=WEIGHT),
    "weight, a number": option_of_a_loss("weight", 1.0, 0.3),
    "weight, one a sample": option_of_a_loss("weight", WEIGHT, WEIGHT[::-1].copy()),
    "weight with a mask": option_of_a_loss("weight", 1.0, WEIGHT, mask=MASK, weighting="min_snr"),
    "mask_normalization": option_of_a_loss("mask_normalization", "none", "row", mask=MASK),
    "mask_normalization, global": option_of_a_loss("mask_normalization", "row", "global", mask=MASK, weight=WEIGHT),
    "mask_normalization, rows": option_of_a_loss(
        "mask_normalization", "none", "row", mask=MASK, reduction="none", weighting="min_snr"
    ),
}


@pytest.mark.parametrize("how", ["diffusion_loss", "Objective.loss"])
@pytest.mark.parametrize("name", list(OF_A_LOSS))
def test_option_of_a_loss(name, how):
    check(OF_A_LOSS[name][how == "Objective.loss"])


def uniforms(seed, offset=0):
    return oracle.uniform(seed, 4, stream=3, sample_offset=offset)


def vp_x_t(noise):
    return ALPHA * X0 + SIGMA * noise


def perturbed(strength, seed=7):
    return oracle.ld(oracle.normal(seed, X0.shape)) + LD(strength) * oracle.normal(seed, X0.shape, stream=2)


def offset_noise(strength, seed=7):
    """One normal more a sample and channel. The sum is a float32, as the noise is."""
    channels = oracle.normal(seed, (4, 2), stream=1)[:, :, None]
    return oracle.normal(seed, X0.shape) + np.float32(strength) * channels


def huber_of_x0(delta):
    return oracle.loss_huber((oracle.ld(M) - N) * SIGMA / ALPHA, delta).mean((1, 2))


# Sums of two or three float32 numbers of about 1, as far as the noise is made in float32.
FLOAT32 = 4e-7
OF_AN_OBJECTIVE = {
    "q_sample noise": Asked((N, M), lambda v: fastdiff.q_sample(x0, t, VP, torch.from_numpy(v)), vp_x_t),
    "q_sample t": Asked(
        (T, T[::-1]),
        lambda v: fastdiff.q_sample(x0, torch.tensor(v), VP, n),
        lambda v: vp_x_t(N) if v == T else ALPHA[::-1] * X0 + SIGMA[::-1] * N,
    ),
    "q_sample process": Asked(
        (0.0, 0.2),
        lambda v: fastdiff.q_sample(x0, 0.25, fastdiff.RectifiedFlow(sigma_min=v), n),
        lambda v: LD(0.75) * X0 + (LD(0.25) + LD(v) * LD(0.75)) * N,
    ),
    "q_sample generator": Asked(
        (5, 6),
        lambda v: fastdiff.q_sample(x0, t, VP, generator=generator(v)),
        lambda v: vp_x_t(oracle.normal(seed_of(generator(v)), X0.shape)),
    ),
    "generator": Asked(
        (5, 6),
        lambda v: fastdiff.Objective(VP).noise(x0, t, generator=generator(v)).noise,
        lambda v: oracle.normal(seed_of(generator(v)), X0.shape),
    ),
    "seed": Asked(
        (5, -(2**62) - 3), lambda v: fastdiff.Objective(VP).noise(x0, t, seed=v).noise,
        lambda v: oracle.normal(v, X0.shape),
    ),
    "sample_offset": Asked(
        (0, 9), lambda v: fastdiff.Objective(VP).noise(x0, t, seed=7, sample_offset=v).noise,
        lambda v: oracle.normal(7, X0.shape, sample_offset=v),
    ),
    "sample_offset of t": Asked(
        (0, 9), lambda v: fastdiff.Objective(FLOW, "flow").noise(x0, seed=7, sample_offset=v).t,
        lambda v: uniforms(7, v),
    ),
    "generator of t": Asked(
        (5, 6), lambda v: fastdiff.Objective(VP).noise(x0, generator=generator(v)).t,
        lambda v: np.floor(1000 * uniforms(seed_of(generator(v)))),
    ),
    "timesteps": Asked(
        ("uniform", "mode"), lambda v: fastdiff.Objective(FLOW, "flow", timesteps=v).noise(x0, seed=7).t,
        lambda v: getattr(oracle, f"quantile_{v}")(uniforms(7)),
    ),
    "noise_offset": Asked(
        (0.1, 0.5), lambda v: fastdiff.Objective(VP, noise_offset=v).noise(x0, t, seed=7).x_t,
        lambda v: vp_x_t(offset_noise(v)), FLOAT32,
    ),
    "noise_offset, sample_offset": Asked(
        (0, 2), lambda v: fastdiff.Objective(VP, noise_offset=0.5).noise(x0[v:], t[v:], seed=7, sample_offset=v).x_t,
        lambda v: vp_x_t(offset_noise(0.5))[v:], FLOAT32,
    ),
    "noise_offset of the target": Asked(
        (0.1, 0.5), lambda v: fastdiff.Objective(VP, noise_offset=v).noise(x0, t, seed=7, with_target=True).target,
        offset_noise, FLOAT32,
    ),
    "input_perturbation": Asked(
        (0.1, 0.5), lambda v: fastdiff.Objective(VP, input_perturbation=v).noise(x0, t, seed=7).x_t,
        lambda v: vp_x_t(perturbed(v)),
    ),
    "error_space": Asked(
        (None, "sample"),
        lambda v: fastdiff.diffusion_loss(m, x0, n, t, VP) if v is None else (
            lambda o: o.loss(m, o.noise(x0, t, n)))(fastdiff.Objective(VP, error_space=v)),
        lambda v: (((M - oracle.ld(N)) * (1 if v is None else SIGMA / ALPHA)) ** 2).mean(),
    ),
    "Huber delta": Asked(
        (1.0, 0.2),
        lambda v: (lambda o: o.loss(m, o.noise(x0, t, n), reduction="none"))(
            fastdiff.Objective(VP, loss=losses.Huber(v), error_space="sample")),
        huber_of_x0,
    ),
    "PseudoHuber c": Asked(
        (0.1, 0.7), lambda v: fastdiff.diffusion_loss(m, x0, n, t, VP, loss=losses.PseudoHuber(v)),
        lambda v: oracle.loss_pseudo_huber(oracle.ld(M) - N, v).mean(),
    ),
    "PseudoHuber c of a schedule": Asked(
        (0.1, 0.7),
        lambda v: fastdiff.diffusion_loss(m, x0, n, t, VP, loss=losses.PseudoHuber(v, "scaled", "exponential")),
        lambda v: oracle.loss_pseudo_huber(
            oracle.ld(M) - N, rows(oracle.pseudo_huber_c("exponential", v, t=np.array(T), steps=1000)), "scaled",
        ).mean(),
    ),
    "SmoothL1 beta": Asked(
        (1.0, 0.2), lambda v: fastdiff.diffusion_loss(m, x0, n, t, VP, loss=losses.SmoothL1(v)),
        lambda v: oracle.loss_smooth_l1(oracle.ld(M) - N, v).mean(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OF_AN_OBJECTIVE))
def test_option_of_an_objective(name):
    check(OF_AN_OBJECTIVE[name])


def test_a_time_of_zero_is_a_time():
    """t = 0 is used, and not taken for none; without a t one is drawn for each sample."""
    objective = fastdiff.Objective(VP)
    for zero in (0, torch.tensor(0), torch.zeros(4, dtype=torch.int64)):
        assert objective.noise(x0, zero, seed=7).t.tolist() == [0] * 4
    assert objective.noise(x0, seed=7).t.tolist() == np.floor(1000 * uniforms(7)).tolist()
    assert objective.noise(x0, noise=n, seed=7).t.tolist() == np.floor(1000 * uniforms(7)).tolist()


def test_a_seed_has_64_bits():
    """Of 200 seeds every bit is set in some and not in others: a fair one is not once in 2^199."""
    g = generator(3)
    drawn = [
        int(fastdiff.Objective(VP).noise(x0, t, generator=g, keep_noise=False).noise_source.seed) for _ in range(200)
    ]
    for bit in range(64):
        assert {seed >> bit & 1 for seed in drawn} == {0, 1}, bit


@pytest.mark.parametrize("kind, process", [("epsilon", VP), ("flow", FLOW)], ids=["table", "formula"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_conversion_has_the_dtype_of_the_output(narrow, wide, kind, process):
    """Shaped and typed as the network's output, whatever x_t is; half an ulp of it at the store."""
    times = [10, 100, 500, 700] if process is VP else [0.1, 0.3, 0.5, 0.7]
    levels = oracle.vp_alpha_sigma(ABAR, times) if process is VP else oracle.flow_alpha_sigma(times)
    alpha, sigma = (rows(row) for row in levels)
    times = torch.tensor(times, dtype=torch.int64 if process is VP else torch.float64)
    noised = fastdiff.Objective(process, kind).noise(x0.to(wide), times, n.to(wide))
    got = noised.objective.predict_x0(m.to(narrow), noised)
    x_t, output = (oracle.ld(v.double().numpy()) for v in (noised.x_t, m.to(narrow)))
    assert got.dtype == narrow
    expected = oracle.to_x0(kind, x_t, output, alpha, sigma)
    compute = torch.finfo(torch.float64 if torch.float64 in (narrow, wide) else torch.float32).eps
    size = np.abs(x_t / alpha) + np.abs(sigma / alpha * output)
    assert_close(got.double(), expected, rel=torch.finfo(narrow).eps / 2 * 1.01, absolute=4 * compute * size)


# ------------------------------------------------------------------------------------------------------------ samplers


def ancestral(v):
    return truth.euler_ancestral(START[0], LEVELS, scaled, lambda i: v * Z[i])[-1]


def sde(order):
    def loop(v):
        orders = truth.multistep_orders(order, STEPS, lower=True)
        return truth.dpmpp(START[0], LEVELS, at, order, orders, 1.0, "midpoint", lambda i: v * Z[i])[-1]

    return loop


def lcm(scaling=10.0, data=0.5, steps=50, times=None):
    """Luo et al. 2023, algorithm 3: ``steps`` timesteps of the distillation, of which STEPS are taken."""
    stride = 1000 // steps
    times = [1000 - stride * (k * steps // STEPS) - 1 for k in range(STEPS)] if times is None else times
    x = START[0]
    for i, time in enumerate(times):
        s = LD(scaling) * time
        x = LD(data) ** 2 / (s**2 + LD(data) ** 2) * x + s / np.sqrt(s**2 + LD(data) ** 2) * clean(x)
        if i + 1 < len(times):
            a = ABAR[times[i + 1]]
            x = np.sqrt(a) * x + np.sqrt(1 - a) * Z[i]
    return x


def to_sigma(end):
    """Euler in sigma from 3 over 1 to ``end``."""
    x, levels = oracle.ld(START[0]), [LD(3), LD(1), LD(end)]
    for s, after in zip(levels, levels[1:]):
        x = x + (after - s) / s * (x - clean(x))
    return x


def karras(low=0.1, high=10.0, rho=7.0):
    return truth.karras(STEPS, low, high, rho)


def sigmas(**options):
    """The sigmas that a sampler visits, on EDM, whose t is sigma."""
    given = {"sigmas": "karras", "sigma_min": 0.1, "sigma_max": 10.0} | options
    return samplers.Euler(**given).plan(EDM, STEPS, "sample").times


def ordered(lower, order=3):
    return truth.multistep_orders(order, STEPS, lower)


def dpm(v):
    return truth.dpmpp(START[0], LEVELS, at, 3, ordered(v))[-1]


def unipc(order=2, lower=True, variant="bh2", uncorrected=()):
    return truth.unipc(START[0], LEVELS, at, ordered(lower, order), variant, uncorrected)[-1]


def churn(v, s_churn=10.0, low=0.0, high=math.inf, noise=1.0):
    given = {"s_churn": s_churn, "low": low, "high": high, "noise": noise} | v
    return truth.euler(START[0], LEVELS, scaled, lambda i: Z[i], tuple(given.values()))[-1]


def churned(v):
    names = {"low": "s_tmin", "high": "s_tmax", "noise": "s_noise"}
    return run(samplers.Euler(**{"s_churn": 10.0} | {names.get(key, key): value for key, value in v.items()}), VP)


OF_A_SAMPLER = {
    "EulerAncestral s_noise": Asked((1.0, 0.8), lambda v: run(samplers.EulerAncestral(s_noise=v), VP), ancestral),
    "DPMSolverPP s_noise": Asked((1.0, 0.8), lambda v: run(samplers.DPMSolverPP(eta=1.0, s_noise=v), VP), sde(2)),
    "DPMSolverPP s_noise, order 3": Asked(
        (1.0, 0.8), lambda v: run(samplers.DPMSolverPP(order=3, eta=1.0, s_noise=v), VP), sde(3)),
    "DPMSolverPP lower_order_final": Asked(
        (True, False), lambda v: run(samplers.DPMSolverPP(order=3, lower_order_final=v), VP), dpm),
    "UniPC lower_order_final": Asked(
        (True, False), lambda v: run(samplers.UniPC(order=3, lower_order_final=v), VP), lambda v: unipc(3, v)),
    "UniPC order": Asked((2, 3), lambda v: run(samplers.UniPC(order=v), VP), unipc),
    "UniPC solver_type": Asked(
        ("bh1", "bh2"), lambda v: run(samplers.UniPC(solver_type=v), VP), lambda v: unipc(variant=v)),
    "UniPC disable_corrector": Asked(
        ((), (1, 3)), lambda v: run(samplers.UniPC(disable_corrector=v), VP), lambda v: unipc(uncorrected=v)),
    "UniPC disable_corrector, each": Asked(
        ((0,), (2,)), lambda v: run(samplers.UniPC(disable_corrector=v), VP), lambda v: unipc(uncorrected=v)),
    "s_churn": Asked(({"s_churn": 1.0}, {"s_churn": 2.0}), churned, churn),
    "s_tmin": Asked(({"low": 0.5}, {"low": 5.0}), churned, churn),
    "s_tmax": Asked(({"high": 0.5}, {"high": 5.0}), churned, churn),
    "s_noise": Asked(({"noise": 1.1}, {"noise": 0.7}), churned, churn),
    "LCM timestep_scaling": Asked(
        (10.0, 0.002), lambda v: run(samplers.LCM(timestep_scaling=v), VP), lambda v: lcm(scaling=v)),
    "LCM sigma_data": Asked(
        (0.5, 2.0), lambda v: run(samplers.LCM(timestep_scaling=0.002, sigma_data=v), VP),
        lambda v: lcm(0.002, data=v)),
    "LCM original_steps": Asked(
        (50, 20), lambda v: run(samplers.LCM(original_steps=v), VP), lambda v: lcm(steps=v)),
    "LCM timesteps": Asked(
        ([900, 500, 7], [900, 400, 7]), lambda v: run(samplers.LCM(timesteps=v), VP, None), lambda v: lcm(times=v)),
    "rho": Asked((7.0, 3.0), lambda v: sigmas(rho=v), lambda v: karras(rho=v)),
    "sigma_max": Asked((10.0, 20.0), lambda v: sigmas(sigma_max=v), lambda v: karras(high=v)),
    "sigma_min": Asked((0.1, 0.3), lambda v: sigmas(sigma_min=v), lambda v: karras(low=v)),
    "sigma_max of a linear schedule": Asked(
        (10.0, 20.0), lambda v: sigmas(sigmas="linear", sigma_max=v), lambda v: truth.linear(STEPS, 0.1, v)),
    "sigmas": Asked(
        ([3.0, 1.0], [3.0, 0.5]), lambda v: samplers.Euler(sigmas=v).plan(EDM, None, "sample").times, lambda v: v),
    "final_sigma": Asked(
        (0.0, 0.5), lambda v: run(samplers.Euler(sigmas=[3.0, 1.0], final_sigma=v), EDM, None), to_sigma),
    "RectifiedFlow shift": Asked(
        (1.0, 3.0), lambda v: run("flow_euler", fastdiff.RectifiedFlow(v)),
        lambda v: truth.flow_euler(START[0], oracle.flow_shift(SIGMAS, v), lambda x, s: clean(x))[-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OF_A_SAMPLER))
def test_option_of_a_sampler(name):
    check(OF_A_SAMPLER[name])


@pytest.mark.parametrize("make", [samplers.Heun, samplers.EDM])
def test_churn_of_two_calls(make):
    """Heun on the levels of Euler; EDM on the same, given as they are."""
    options = {"s_churn": 4.0, "s_tmin": 0.2, "s_tmax": 8.0, "s_noise": 1.1}
    expected = truth.heun(START[0], LEVELS, scaled, lambda i: Z[i], tuple(options.values()))[-1]
    assert_close(run(make(timesteps=TIMES, **options), VP, None), expected, absolute=1e-11)


# sampler -> the times of 4 steps: (spacing, steps_offset) -> timesteps, of Lin et al. 2024, table 2; the multistep
# methods leave out t = 0, as diffusers does.
ONE_STEP = {
    ("trailing", 0): [999, 749, 499, 249],
    ("leading", 0): [750, 500, 250, 0],
    ("leading", 1): [751, 501, 251, 1],
    ("linspace", 0): [999, 666, 333, 0],
}
MULTISTEP = ONE_STEP | {
    ("leading", 0): [800, 600, 400, 200],
    ("leading", 1): [801, 601, 401, 201],
    ("linspace", 0): [999, 749, 500, 250],
}
SPACED = {
    samplers.DDPM: ONE_STEP,
    samplers.DDIM: ONE_STEP,
    samplers.Euler: ONE_STEP,
    samplers.EulerAncestral: ONE_STEP,
    samplers.DPMSolverPP: MULTISTEP,
    samplers.UniPC: MULTISTEP,
}


@pytest.mark.parametrize("spacing, offset", list(ONE_STEP))
@pytest.mark.parametrize("make", list(SPACED))
def test_spacing(make, spacing, offset):
    plan = make(spacing=spacing, steps_offset=offset).plan(VP, 4, "epsilon")
    assert plan.times.tolist() == pytest.approx(SPACED[make][spacing, offset])
    given = make(timesteps=[900, 33, 2]).plan(VP, None, "epsilon")
    assert given.times.tolist() == [900, 33, 2]


# --------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("name", ["heun", "edm"])
def test_a_callback_is_told_the_t_of_its_step(name):
    """A step of two calls begins at the first: that t, once a step, with the x that the step ends on."""
    seen = []
    x = run(name, VP, callback=lambda k, t, x, x0: seen.append((k, float(t), x)))
    if name == "heun":
        times = TIMES
    else:
        low, high = (math.sqrt((1 - a) / a) for a in (float(ABAR[0]), float(ABAR[-1])))
        levels = np.log(np.sqrt((1 - ABAR) / ABAR)).astype(np.float64)
        times = np.interp(np.log(truth.karras(STEPS, low, high)).astype(np.float64), levels, np.arange(1000.0))
    assert [k for k, *_ in seen] == list(range(STEPS))
    assert_close([at for _, at, _ in seen], times, rel=1e-9)
    assert torch.equal(seen[-1][2], x)


@pytest.mark.parametrize("offset", [0, 5])
def test_noise_of_a_churned_run(offset):
    """The start is stream 4 of the seed, the churn of step k stream 16 + k, that before the first step too; the index
    of a sample counts from ``sample_offset``."""
    start = oracle.normal(11, SHAPE, stream=4, sample_offset=offset).astype(np.float64)
    got = fastdiff.sample(
        lambda x, t: torch.from_numpy(clean(x.numpy())), SHAPE, VP, samplers.Euler(s_churn=10.0), STEPS, "sample",
        seed=11, sample_offset=offset, dtype=torch.float64, progress=False,
    )  # fmt: skip

    def z(i):
        return oracle.normal(11, SHAPE, stream=16 + i, sample_offset=offset)

    expected = truth.euler(start, LEVELS, scaled, z, (10.0, 0.0, math.inf, 1.0))[-1]
    assert_close(got, expected, rel=0, absolute=1e-11)


def test_a_process_that_is_changed_has_another_plan():
    """Its numbers are not frozen. The plan that was kept for it is that of the numbers it had."""
    process = fastdiff.RectifiedFlow()
    for shift in (1.0, 3.0, 1.0):
        process.shift = shift
        expected = truth.flow_euler(START[0], oracle.flow_shift(SIGMAS, shift), lambda x, s: clean(x))[-1]
        assert_close(run("flow_euler", process), expected, rel=0, absolute=1e-11, label=f"shift {shift}")


GUIDED = {"cond": torch.tensor([1.0, 0.8]), "uncond": torch.tensor([0.5, 0.6])}
SCALES = torch.tensor([1.5, 4.0], dtype=torch.float64)


def conditioned(x, t, c):
    return torch.tanh(x) * c.to(x.dtype).view(-1, 1, 1)


def guided(change, prediction="epsilon", steps=3, sampler="ddim", **options):
    """A run of two samples with ``options``, and the same with a network that does ``change(k, x, m, u)`` itself."""
    how = {"seed": 1, "progress": False, "dtype": torch.float64}
    calls = iter(range(steps))

    def network(x, t):
        return change(next(calls), x, *(conditioned(x, t, GUIDED[name]) for name in ("cond", "uncond")))

    shape = (2, 3, 40)
    ours = fastdiff.sample(conditioned, shape, VP, sampler, steps, "epsilon", **GUIDED, **options, **how)
    return ours, fastdiff.sample(network, shape, VP, sampler, steps, prediction, **how)


def test_rescaled_guidance_of_each_sample():
    """Lin et al. 2024, equations 15 and 16, with a scale a sample."""

    def change(k, x, m, u):
        combined = u + SCALES.view(-1, 1, 1) * (m - u)
        ratio = m.std((1, 2), keepdim=True) / combined.std((1, 2), keepdim=True)
        return 0.7 * combined * ratio + 0.3 * combined

    torch.testing.assert_close(*guided(change, guidance=SCALES, guidance_rescale=0.7), rtol=1e-9, atol=1e-9)


def test_thresholds_of_guidance_of_each_sample():
    """Saharia et al. 2022: x0 from the guided output, with a scale a sample."""

    def change(k, x, m, u):
        a = torch.as_tensor(float(ABAR[[999, 666, 332][k]]), dtype=torch.float64)
        estimate = (x - (1 - a).sqrt() * (u + SCALES.view(-1, 1, 1) * (m - u))) / a.sqrt()
        s = torch.quantile(estimate.abs().flatten(1), 0.8, dim=1).clamp(min=1).view(-1, 1, 1)
        return torch.maximum(torch.minimum(estimate, s), -s) / s

    ours, theirs = guided(change, "sample", sampler="dpmpp_2m", guidance=SCALES, dynamic_thresholding=0.8)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [3.0, SCALES], ids=["one", "each"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_classifier_guidance_of_a_guided_batch(sampler, scale):
    """Both halves of the batch move, so the guided noise estimate moves by -sqrt(1 - abar) gradient, once."""
    times = [999, 666, 332]
    factor = scale if isinstance(scale, float) else scale.view(-1, 1, 1)

    def change(k, x, m, u):
        return u + factor * (m - u) - math.sqrt(1 - float(ABAR[times[k]])) * 0.05 * (0.5 - x)

    calls = []

    def gradient(x, t):
        calls.append((tuple(x.shape), t.tolist()))
        return 0.05 * (0.5 - x)

    ours, theirs = guided(change, sampler=sampler, guidance=scale, cond_fn=gradient)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert calls == [((2, 3, 40), [at, at]) for at in times], "the samples, once a step"
