"""Every name that a user can type, asked once by a number: what it stands for, with the settings it has alone.

A name that stands for another object, or for the same with other settings, gives another number. The numbers are the
papers' (oracle.py, oracle_samplers.py), at the papers' defaults, which are written out here.
"""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import oracle
import oracle_samplers as truth
import pytest
import torch
from oracle import assert_close
from tiny_run import ABAR, KARRAS, LEVELS, SIGMAS, START, STEPS, Z, at, clean, run, scaled

import fastdiff
from fastdiff import losses, prediction, samplers, timesteps, weighting
from fastdiff.tabulated import TabulatedFlow

VP, FLOW, EDM, VPSDE = (
    fastdiff.VariancePreserving(), fastdiff.RectifiedFlow(), fastdiff.EDM(), fastdiff.VPSDE(),
)  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs"


# ------------------------------------------------------------------------------------------------------------- samplers


def ddpm(x, levels):
    for i in range(STEPS):
        (a, _), (b, _) = levels[i], levels[i + 1]
        x = oracle.ddpm_step(x, clean(x), a**2, b**2, Z[i]) if b < 1 else clean(x)
    return x


def ddim(x, levels):
    for i in range(STEPS):
        (a, s), (b, _) = levels[i], levels[i + 1]
        x = oracle.ddim_step(x, clean(x), (x - a * clean(x)) / s, a**2, b**2)
    return x


def lcm(x, _):
    """Every 50 / 6th, rounded down, of the 50 timesteps of the distillation."""
    times = [1000 - 20 * (k * 50 // STEPS) - 1 for k in range(STEPS)]
    levels = [(np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])) for t in times]
    return truth.lcm(x, levels, times, at, lambda i: Z[i])[-1]


def dpm(order, eta=0.0):
    orders = truth.multistep_orders(order, STEPS, lower=True)  # fewer than 15 steps
    return lambda x, levels: truth.dpmpp(x, levels, at, order, orders, eta, "midpoint", lambda i: Z[i])[-1]


def predictor_corrector(x, levels):
    return truth.predictor_corrector(x, levels, clean, 0.16, 1, lambda k: Z[k % STEPS])[-1]


# name: (object, process, levels, the paper's loop); the object as docs/samplers.md says it
SAMPLERS = {
    "ddpm": (samplers.DDPM(variance="fixed_small", final_noise=False), VP, LEVELS, ddpm),
    "ddim": (samplers.DDIM(eta=0.0, set_alpha_to_one=True), VP, LEVELS, ddim),
    "euler": (samplers.Euler(s_churn=0.0), VP, LEVELS, lambda x, levels: truth.euler(x, levels, scaled)[-1]),
    "euler_ancestral": (
        samplers.EulerAncestral(eta=1.0), VP, LEVELS,
        lambda x, levels: truth.euler_ancestral(x, levels, scaled, lambda i: Z[i])[-1],
    ),
    "heun": (samplers.Heun(s_churn=0.0), VP, LEVELS, lambda x, levels: truth.heun(x, levels, scaled)[-1]),
    "edm": (samplers.EDM(sigmas="karras"), VP, KARRAS, lambda x, levels: truth.heun(x, levels, scaled)[-1]),
    "dpmpp_1m": (samplers.DPMSolverPP(order=1), VP, LEVELS, dpm(1)),
    "dpmpp_2m": (samplers.DPMSolverPP(order=2), VP, LEVELS, dpm(2)),
    "dpmpp_3m": (samplers.DPMSolverPP(order=3), VP, LEVELS, dpm(3)),
    "dpmpp_2m_sde": (samplers.DPMSolverPP(order=2, eta=1.0), VP, LEVELS, dpm(2, 1.0)),
    "dpmpp_3m_sde": (samplers.DPMSolverPP(order=3, eta=1.0), VP, LEVELS, dpm(3, 1.0)),
    "unipc": (
        samplers.UniPC(order=2, solver_type="bh2"), VP, LEVELS,
        lambda x, levels: truth.unipc(x, levels, at, truth.multistep_orders(2, STEPS, lower=True))[-1],
    ),
    "predictor_corrector": (
        samplers.PredictorCorrector(predictor=samplers.DDPM(), corrector_steps=1, snr=0.16), VP, LEVELS,
        predictor_corrector,
    ),
    "lcm": (samplers.LCM(original_steps=50, timestep_scaling=10.0), VP, LEVELS, lcm),
    "flow_euler": (
        samplers.FlowEuler(), FLOW, None, lambda x, _: truth.flow_euler(x, SIGMAS, lambda x, s: clean(x))[-1],
    ),
    "flow_heun": (
        samplers.FlowHeun(), FLOW, None, lambda x, _: truth.flow_heun(x, SIGMAS, lambda x, s: clean(x))[-1],
    ),
    "flow_lcm": (
        samplers.FlowLCM(), FLOW, None,
        lambda x, _: truth.flow_stochastic(x, SIGMAS, lambda x, s: clean(x), lambda i: Z[i])[-1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_sampler(name):
    """Float64, x of about 1 and 6 steps: 1e-11 is 10^4 roundings. The last levels are a thousandth of the first in
    sigma, by which they are divided."""
    made, process, levels, loop = SAMPLERS[name]
    expected = loop(START[0], levels)
    for sampler in (name, made):
        assert_close(run(sampler, process), expected, rel=0, absolute=1e-11, label=str(sampler))
    assert samplers.get(name) == made and type(samplers.get(name)) is type(made)


# ----------------------------------------------------------------------------------------------------------- weightings

# name: (class, process, t, kind, the paper's weights at alpha and sigma); t = 0 of VP has an SNR of 10^4
AT_VP = (VP, [0, 300, 900])
WEIGHTINGS = {
    "uniform": ("Uniform", *AT_VP, lambda k, a, s: 1 + 0 * a),
    "min_snr": ("MinSNR", *AT_VP, lambda k, a, s: oracle.weight_min_snr(k, a, s, gamma=5.0)),
    "soft_min_snr": ("SoftMinSNR", *AT_VP, lambda k, a, s: oracle.weight_soft_min_snr(k, a, s, gamma=5.0)),
    "truncated_snr": ("TruncatedSNR", *AT_VP, lambda k, a, s: oracle.weight_truncated_snr(k, a, s)),
    "snr": ("SNR", *AT_VP, lambda k, a, s: oracle.weight_snr(k, a, s, power=1.0)),
    "p2": ("P2", *AT_VP, lambda k, a, s: oracle.weight_p2(k, a, s, gamma=1.0)),
    "debiased": ("Debiased", *AT_VP, lambda k, a, s: oracle.weight_debiased(k, a, s, 1000.0, "reciprocal")),
    "inverse_alpha_bar": ("InverseAlphaBar", *AT_VP, lambda k, a, s: oracle.weight_inverse_alpha_bar(k, a, s)),
    "edm": ("EDMWeighting", *AT_VP, lambda k, a, s: oracle.weight_edm(k, a, s, sigma_data=0.5)),
    "sigma_sqrt": ("SigmaSqrt", *AT_VP, lambda k, a, s: oracle.weight_sigma_sqrt(k, a, s)),
    "sigma_linear": ("SigmaLinear", *AT_VP, lambda k, a, s: oracle.weight_sigma_linear(k, a, s, slope=3.0)),
    "cosmap": ("CosMap", *AT_VP, lambda k, a, s: oracle.weight_cosmap(k, a, s)),
    "bell": ("Bell", *AT_VP, lambda k, a, s: oracle.weight_bell(1000)[AT_VP[1]]),
    "likelihood": (
        "Likelihood", VPSDE, [0.1, 0.5, 0.9],
        lambda k, a, s: oracle.weight_likelihood(k, a, s, oracle.vpsde_diffusion_squared([0.1, 0.5, 0.9])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_weighting(name, kind):
    """The name, the class in ``fastdiff`` and the class in ``fastdiff.weighting``."""
    exported, process, t, formula = WEIGHTINGS[name]
    levels = process.levels(t)
    expected = formula(kind, levels.alpha.numpy(), levels.sigma.numpy())
    for made in (name, getattr(fastdiff, exported)(), getattr(weighting, exported)()):
        assert_close(weighting.evaluate(made, levels, kind), expected, absolute=8 * oracle.UNIT, label=name)
    assert np.ptp(np.asarray(expected, dtype=np.float64)) > 0.01 or name == "uniform"


def test_a_table_of_weights_by_its_name_in_the_package():
    given = fastdiff.PerTimestep([3.0, 1.0, 2.0])
    levels = fastdiff.VariancePreserving(steps=3).levels([2, 0])
    assert weighting.evaluate(given, levels, "epsilon").tolist() == [2.0, 3.0]


# ------------------------------------------------------------------------------------------------------- time densities

U = np.array([0.12, 0.37, 0.55, 0.9])
DENSITIES = {
    "uniform": (timesteps.Uniform, FLOW, oracle.quantile_uniform),
    "stratified": (timesteps.Stratified, FLOW, oracle.stratify),
    "logit_normal": (timesteps.LogitNormal, FLOW, lambda u: oracle.quantile_logit_normal(u, 0.0, 1.0)),
    "mode": (timesteps.Mode, FLOW, lambda u: oracle.quantile_mode(u, 1.29)),
    "cosmap": (timesteps.CosMap, FLOW, oracle.quantile_cosmap),
    "cubic": (timesteps.Cubic, FLOW, oracle.quantile_cubic),
    "sobol": (timesteps.Sobol, FLOW, oracle.rotated_van_der_corput),
    "lognormal": (timesteps.LogNormal, EDM, lambda u: oracle.quantile_log_normal(u, -1.2, 1.2)),
    "uniform_log_snr": (
        timesteps.UniformLogSNR, fastdiff.VPSDE(t_min=1e-3),
        lambda u: oracle.quantile_uniform_log_snr(u, oracle.vpsde_alpha_sigma, 1e-3, 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DENSITIES))
def test_time_density(name):
    make, process, quantile = DENSITIES[name]
    for density in (name, make()):
        t = timesteps.get(density, process)(torch.from_numpy(U), process)
        assert_close(t, quantile(U), absolute=1e-14, label=name)


@pytest.mark.parametrize(
    "process, name", [(VP, "uniform"), (FLOW, "uniform"), (VPSDE, "uniform"), (EDM, "lognormal")], ids=lambda v: str(v)
)
def test_time_density_of_a_process_where_none_is_said(process, name):
    assert timesteps.get(None, process) == timesteps.get(name, process)


# --------------------------------------------------------------------------------------------------------------- losses

E = np.array([-3.0, -0.9, -0.05, 0.0, 0.05, 0.4, 2.0])
LOSSES = {
    "mse": (losses.MSE, oracle.loss_mse),
    "l1": (losses.L1, oracle.loss_l1),
    "smooth_l1": (losses.SmoothL1, lambda e: oracle.loss_smooth_l1(e, beta=1.0)),
    "huber": (losses.Huber, lambda e: oracle.loss_huber(e, delta=1.0)),
    "pseudo_huber": (losses.PseudoHuber, lambda e: oracle.loss_pseudo_huber(e, c=0.1, form="plain")),
    "log_cosh": (losses.LogCosh, oracle.loss_log_cosh),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_loss(name):
    """On an error of E (x0 and noise are 0). "huber" and "smooth_l1" are one function at their defaults, so the class
    is asked too."""
    make, function = LOSSES[name]
    zeros, m = torch.zeros(len(E), 1, dtype=torch.float64), torch.from_numpy(E)[:, None]
    for loss in (name, make()):
        objective = fastdiff.Objective(VP, loss=loss)
        rows = objective.loss(m, objective.noise(zeros, 500, zeros), reduction="none")
        assert_close(rows, function(E), rel=1e-13, absolute=1e-15, label=name)
        assert type(objective.loss_function) is make


# ---------------------------------------------------------------------------------------------------------- predictions

DATA, NOISE = np.random.default_rng(3).standard_normal((2, 2, 3))
KINDS = {  # name: process and t at which the target is asked for
    "epsilon": (VP, [300, 700]),
    "sample": (VP, [300, 700]),
    "v_prediction": (VP, [300, 700]),
    "flow": (FLOW, [0.3, 0.7]),
    "reversed_flow": (FLOW, [0.3, 0.7]),
    "score": (VPSDE, [0.3, 0.7]),
    "previous_sample": (VP, [300, 700]),
    "edm": (EDM, [0.3, 7.0]),
    "trigflow": (fastdiff.TrigFlow(), [0.3, 1.4]),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_prediction(name):
    process, t = KINDS[name]
    x0, n = torch.from_numpy(DATA), torch.from_numpy(NOISE)
    noised = fastdiff.Objective(process, name).noise(x0, torch.tensor(t), n)
    alpha, sigma = (oracle.ld(row)[:, None] for row in process.alpha_sigma(torch.tensor(t)))
    how = {}
    if name == "previous_sample":  # DDPM eq. 7
        a, b = ABAR[t][:, None], ABAR[np.array(t) - 1][:, None]
        beta = 1 - a / b
        how["posterior_coefficients"] = np.sqrt(b) * beta / (1 - a), np.sqrt(a / b) * (1 - b) / (1 - a)
    expected = oracle.target(name, DATA, NOISE, alpha, sigma, **how)
    assert_close(noised.target, expected, absolute=1e-12, label=name)
    assert noised.objective.prediction.name == name


# ------------------------------------------------------------------------------------------------------------ processes

T = [0.2, 0.9]
PROCESSES = {
    "VariancePreserving": ({}, [200, 900], lambda t: oracle.vp_alpha_sigma(ABAR, t)),
    "VariancePreserving linear": ({"betas": "linear"}, [200, 900], lambda t: oracle.vp_alpha_sigma(ABAR, t)),
    "VariancePreserving scaled_linear": (
        {"betas": "scaled_linear"}, [200, 900],
        lambda t: oracle.vp_alpha_sigma(oracle.alpha_bar(oracle.betas_scaled_linear(1000, 0.00085, 0.012)), t),
    ),
    "VariancePreserving cosine": (
        {"betas": "cosine"}, [200, 900],
        lambda t: oracle.vp_alpha_sigma(oracle.alpha_bar(oracle.betas_cosine(1000, 0.008)), t),
    ),
    "RectifiedFlow": ({}, T, lambda t: oracle.flow_alpha_sigma(t, shift=1.0, sigma_min=0.0)),
    "EDM": ({}, T, oracle.edm_alpha_sigma),
    "VPSDE": ({}, T, lambda t: oracle.vpsde_alpha_sigma(t, 0.1, 20.0)),
    "SubVPSDE": ({}, T, lambda t: oracle.subvpsde_alpha_sigma(t, 0.1, 20.0)),
    "VESDE": ({}, T, lambda t: oracle.vesde_alpha_sigma(t, 0.01, 50.0)),
    "Cosine": ({}, T, oracle.cosine_alpha_sigma),
    "TrigFlow": ({}, T, lambda t: oracle.trigflow_alpha_sigma(t, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PROCESSES))
def test_process(name):
    options, t, formula = PROCESSES[name]
    process = getattr(fastdiff, name.split()[0])(**options)
    levels = process.levels(t)
    for got, expected in zip((levels.alpha, levels.sigma), formula(t)):
        assert_close(got, expected, label=name)


def test_sigma_data_of_edm_is_a_half():
    assert fastdiff.EDM().sigma_data == 0.5


# ------------------------------------------------------------------------------------------------- schedules of sigmas


def test_sigma_schedules_of_a_sampler():
    """From 10 to 0.1 in 5: the formulas, and for "beta" quantiles from SciPy."""
    stats = pytest.importorskip("scipy.stats")
    expected = {
        "karras": truth.karras(5, 0.1, 10.0, 7.0),
        "exponential": truth.exponential(5, 0.1, 10.0),
        "linear": truth.linear(5, 0.1, 10.0),
        "beta": 0.1 + 9.9 * stats.beta.ppf(1 - np.arange(5) / 4, 0.6, 0.6),
    }
    for name, sigmas in expected.items():
        plan = samplers.Euler(sigmas=name, sigma_min=0.1, sigma_max=10.0).plan(EDM, 5, "sample")
        assert_close(plan.times, sigmas, rel=1e-10, label=name)
    assert set(expected) == set(samplers.schedule.SCHEDULES)


# ---------------------------------------------------------------------------------------------------------- all of them


def test_every_name_is_asked():
    """A name that is added is added here, and in the page that lists it."""
    assert set(SAMPLERS) == set(samplers.NAMES)
    assert set(WEIGHTINGS) == set(weighting._NAMES)
    assert set(DENSITIES) == set(timesteps._NAMES)
    assert set(LOSSES) == set(losses.error_functions._NAMES)
    assert set(KINDS) == set(prediction._KINDS)
    asked = {name.split()[0] for name in PROCESSES} | {exported for exported, *_ in WEIGHTINGS.values()}
    rest = {
        "AutoencoderLoss",
        "BitsPerDim",
        "LossSecondMoment",
        "Interpolated",
        "Noised",
        "Objective",
        "PerTimestep",
        "Prediction",
        "Process",
        "Tokens",
        "VariationalBound",
        "autoencoder",
        "bits_per_dim",
        "diffusion_loss",
        "drop_condition",
        "debug",
        "distributed",
        "guidance",
        "log_likelihood",
        "pairing",
        "pyramid_noise",
        "q_sample",
        "release_memory",
        "sample",
        "to_bits_per_dim",
        "uncertainty",
    }
    modules = {"integrations", "losses", "ops", "samplers", "timesteps", "use_backend", "video", "weighting"}
    assert asked | rest | modules == set(fastdiff.__all__)
    if (DOCS / "samplers.md").exists():  # not in an installed package
        rows = [line.split("|")[1] for line in (DOCS / "samplers.md").read_text().splitlines() if line.startswith("|")]
        listed = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)}
        assert set(SAMPLERS) <= listed


@pytest.mark.parametrize(
    "module", [samplers, weighting, timesteps, losses.error_functions], ids=lambda module: module.__name__
)
def test_what_a_name_stands_for_cannot_be_changed(module):
    for name, made in (samplers.NAMES if module is samplers else module._NAMES).items():
        made = getattr(made, "func", made)
        kind = made if isinstance(made, type) else type(made)
        assert kind.__dataclass_params__.frozen, name


@pytest.mark.parametrize(
    ("process", "ends"),
    [(FLOW, (1, 0.2)), (EDM, (80, 0.002)), (VPSDE, (1, 1e-3)), (fastdiff.SubVPSDE(), (1, 1e-3)),
     (fastdiff.VESDE(), (1, 1e-5)), (fastdiff.VPSDE(t_min=1e-4), (1, 1e-4)), (fastdiff.VESDE(t_min=1e-4), (1, 1e-4)),
     (fastdiff.Cosine(), (1, 0.2)), (fastdiff.TrigFlow(), (np.pi / 2, np.pi / 10))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_times_that_a_process_is_sampled_at(process, ends):
    """docs/samplers.md."""
    times = process.grid(5)
    assert times.shape == (5,) and bool((times.diff() < 0).all())
    assert_close(times[[0, -1]], ends, rel=1e-12)


def test_timesteps_as_a_tensor_are_those_numbers():
    assert samplers.DDIM(timesteps=torch.tensor([900, 400])) == samplers.DDIM(timesteps=[900, 400])
    assert hash(samplers.Euler(sigmas=torch.tensor([3.0, 1.0]))) == hash(samplers.Euler(sigmas=(3.0, 1.0)))


def test_leading_timesteps_end_at_zero():
    plan = samplers.Euler(spacing="leading").plan(VP, 4, "epsilon")
    assert plan.times.tolist() == [750, 500, 250, 0]


def test_settings_of_samplers_are_named():
    kinds = [getattr(samplers, name) for name in samplers.__all__]
    few = samplers.Sampler, samplers.DDPM, samplers.DDIM
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, samplers.Sampler)]
    for kind in set(kinds) - set(few):
        assert {p.kind for p in inspect.signature(kind).parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}, kind
        with pytest.raises(TypeError, match="positional argument"):
            kind(1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: weighting.PerTimestep([1.0, 2.0]),
        lambda: weighting.Interpolated([1.0, 2.0]),
        lambda: VP.levels([3]),
        lambda: fastdiff.program.lookup(torch.ones(2, 1), ["alpha"]),
        lambda: losses.Term(abs),
        lambda: losses.features.Perceptual(abs),
        lambda: losses.features.Alignment(abs),
        lambda: losses.features.Classification(abs),
    ],
)
def test_what_holds_tensors_or_networks_is_itself_alone(make):
    one, other = make(), make()
    assert one == one and one != other and len({one, other}) == 2


def test_records_and_settings_do_not_change():
    """What is kept for an object is kept as long as it is the same. Of a batch, t and the noise are watched instead."""
    free, parts = {fastdiff.Noised}, ("backends", "integrations", "demo", "bench")
    names = [name for name in sys.modules if name.startswith("fastdiff.") and name.split(".")[1] not in parts]
    found = {kind for name in names for kind in vars(sys.modules[name]).values() if "__dataclass_params__" in dir(kind)}
    found = {kind for kind in found if isinstance(kind, type) and kind.__module__ in names}
    assert len(found) > 50 and {kind for kind in found if not kind.__dataclass_params__.frozen} == free


def test_the_times_of_a_table_of_sigmas():
    """0 of the way is its last, the cleanest; all of it the first."""
    flow = TabulatedFlow([1.0, 0.5, 0.25, 0.1], [1000.0, 500.0, 250.0, 100.0])
    assert flow.time(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)).tolist() == [3, 2, 0]


@pytest.mark.parametrize("ends", [{"sigma_max": -0.5}, {"sigma_max": 0.0}, {"sigma_min": 0.0}, {"sigma_min": -0.5}])
def test_ends_of_a_schedule_are_positive(ends):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max is needed"):
        samplers.Euler(sigmas="karras", **ends)


def test_a_step_offset_may_be_any_whole_number():
    runs = [
        fastdiff.sample(
            lambda x, t: 0.5 * x, (2, 3), VP, "ddpm", 3, "epsilon", seed=1, step_offset=offset, progress=False
        )
        for offset in (2, np.int64(2), torch.tensor(2), 0)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[3])
