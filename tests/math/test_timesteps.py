"""Timestep samplers: their quantile functions against the oracle, their distributions against scipy, their edges.

A sampler is a pure function of uniforms, so a distribution is checked without chance: at u = (i + 1/2)/N the sorted
timesteps must have CDF values (i + 1/2)/N. This is the Kolmogorov-Smirnov statistic on a quantile grid, with the
rounding of float64 (and of scipy's quadrature, 1e-9) as the only tolerance.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import float64
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from scipy import integrate, optimize, stats

import fastdiff
from fastdiff import timesteps

PROFILE = settings(max_examples=60, deadline=None, derandomize=True)

N = 2000
GRID = (np.arange(N) + 0.5) / N
CONTINUOUS = {"flow": fastdiff.RectifiedFlow(), "vpsde": fastdiff.VPSDE(), "vesde": fastdiff.VESDE()}
DISCRETE = {1000: fastdiff.VariancePreserving(), 7: fastdiff.VariancePreserving(steps=7)}

# id -> (sampler, oracle's quantile function)
SAMPLERS = {
    "uniform": (lambda: timesteps.Uniform(), oracle.quantile_uniform),
    "uniform part": (lambda: timesteps.Uniform(0.2, 0.7), lambda u: oracle.quantile_uniform(u, 0.2, 0.7)),
    "logit normal": (lambda: timesteps.LogitNormal(), oracle.quantile_logit_normal),
    "logit normal -0.5 0.7": (
        lambda: timesteps.LogitNormal(-0.5, 0.7),
        lambda u: oracle.quantile_logit_normal(u, -0.5, 0.7),
    ),
    "mode": (lambda: timesteps.Mode(), oracle.quantile_mode),
    "mode -0.5": (lambda: timesteps.Mode(scale=-0.5), lambda u: oracle.quantile_mode(u, -0.5)),
    "cosmap": (lambda: timesteps.CosMap(), oracle.quantile_cosmap),
    "cubic": (lambda: timesteps.Cubic(), oracle.quantile_cubic),
    "beta 1.5 1": (lambda: timesteps.Beta(1.5, 1.0), lambda u: oracle.ld(u) ** (oracle.LD(1) / oracle.LD(1.5))),
    "beta 1 3": (lambda: timesteps.Beta(1, 3), lambda u: 1 - (1 - oracle.ld(u)) ** (oracle.LD(1) / 3)),
    "table": (lambda: timesteps.Table([1, 3]), lambda u: oracle.ld(np.where(u < 0.25, 2 * u, 0.5 + (u - 0.25) / 1.5))),
    "within": (
        lambda: timesteps.Within(timesteps.CosMap(), 0.25, 0.75),
        lambda u: oracle.LD(0.25) + oracle.quantile_cosmap(u) / 2,
    ),
    "a function": (lambda: timesteps.get(lambda u: u * u, fastdiff.VPSDE()), lambda u: oracle.ld(u) ** 2),
    "shifted": (
        lambda: timesteps.Shifted(timesteps.Uniform(), 3.0),
        lambda u: oracle.flow_shift(oracle.quantile_uniform(u), 3.0),
    ),
    "shifted logit": (
        lambda: timesteps.Shifted(timesteps.LogitNormal(), 0.5),
        lambda u: oracle.flow_shift(oracle.quantile_logit_normal(u), 0.5),
    ),
}


@pytest.mark.parametrize("process", list(CONTINUOUS))
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_quantiles_continuous(name, process):
    """Absolute 1e-13 beside 1e-12 relative: 1 - x in fractions near 0, and ndtri near 0, cancel to a few u."""
    make, truth = SAMPLERS[name]
    t = make()(float64(GRID), CONTINUOUS[process])
    assert t.dtype == torch.float64 and t.shape == (N,)
    assert_close(t, truth(GRID), absolute=1e-13, label=name)


@pytest.mark.parametrize("steps", list(DISCRETE))
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_quantiles_discrete(name, steps):
    """floor(t steps); where t steps is an integer to 1e-9, rounding decides and either neighbour is right."""
    make, truth = SAMPLERS[name]
    t = make()(float64(GRID), DISCRETE[steps])
    assert t.dtype == torch.int64 and t.shape == (N,)
    expected, place = oracle.to_index(truth(GRID), steps), np.asarray(truth(GRID) * steps, dtype=np.float64)
    sure = np.abs(place - np.round(place)) > 1e-9
    assert sure.mean() > 0.9
    assert np.array_equal(t.numpy()[sure], expected[sure])


@given(low=st.floats(0.0, 0.6), width=st.floats(0.05, 0.4), u=st.floats(1e-9, 1 - 1e-9))
@PROFILE
def test_uniform_range(low, width, u):
    high = min(low + width, 1.0)
    t = float(timesteps.Uniform(low, high)(float64([u]), fastdiff.RectifiedFlow()))
    assert low <= t <= high
    assert_close(t, oracle.quantile_uniform(u, low, high), absolute=4 * oracle.UNIT)
    index = int(timesteps.Uniform(low, high)(float64([u]), fastdiff.VariancePreserving()))
    assert math.floor(low * 1000) <= index <= min(math.ceil(high * 1000), 999)


@given(mean=st.floats(-3.0, 3.0), std=st.floats(0.05, 3.0), u=st.floats(1e-9, 1 - 1e-9))
@PROFILE
def test_logit_and_log_normal_parameters(mean, std, u):
    """ndtri to 1e-15 relative enters through an exponential: 1e-12 relative with |std ndtri| below 18."""
    t = timesteps.LogitNormal(mean, std)(float64([u]), fastdiff.RectifiedFlow())
    assert_close(t, [oracle.quantile_logit_normal(u, mean, std)], absolute=1e-15)
    sigma = timesteps.LogNormal(mean, std)(float64([u]), fastdiff.EDM())
    assert_close(sigma, [oracle.quantile_log_normal(u, mean, std)])


@given(scale=st.floats(-1.0, 1.75), shift=st.floats(0.1, 10.0), u=st.floats(0.0, 1 - 2.0**-53))
@PROFILE
def test_mode_and_shift_parameters(scale, shift, u):
    """SD3 allows scales from -1 to 2/(pi - 2) = 1.7519, where the map is monotone and stays in [0, 1]."""
    process = fastdiff.RectifiedFlow()
    t = timesteps.Mode(scale)(float64([u]), process)
    assert_close(t, [np.clip(oracle.quantile_mode(u, scale), 0, 1)], absolute=8 * oracle.UNIT)
    t = timesteps.Shifted(timesteps.Uniform(), shift)(float64([u]), process)
    assert_close(t, [oracle.flow_shift(u, shift)])


def test_log_normal_is_sigma():
    """EDM's training noise levels: ln sigma ~ N(-1.2, 1.2^2)."""
    t = timesteps.LogNormal()(float64(GRID), fastdiff.EDM())
    assert t.dtype == torch.float64
    assert_close(t, oracle.quantile_log_normal(GRID))


def test_a_stratum_never_reaches_the_end():
    """(u_0 + i / B) mod 1 may round to 1, where the quantile of a normal is infinite."""
    u = float64([1 - 2.0**-53] + [0.5] * 9)
    assert bool(timesteps.Stratified(timesteps.LogitNormal())(u, fastdiff.RectifiedFlow()).lt(1).all())
    assert bool(timesteps.Stratified(timesteps.LogNormal())(u, fastdiff.EDM()).isfinite().all())


@pytest.mark.parametrize("count", [1, 2, 8, 1000])
@pytest.mark.parametrize("inner", ["uniform", "logit normal", "cosmap"])
def test_stratified(inner, count):
    """VDM: (u_0 + i/B) mod 1 with one shared u_0, so each of the B strata holds exactly one."""
    make, truth = SAMPLERS[inner]
    u = np.random.default_rng(3).uniform(size=count)
    t = timesteps.Stratified(make())(float64(u), fastdiff.RectifiedFlow())
    assert t.shape == (count,) and t.dtype == torch.float64
    shared = oracle.stratify(u)
    assert_close(t, truth(np.asarray(shared, dtype=np.float64)), absolute=1e-13)
    if inner == "uniform":
        assert np.array_equal(np.sort(np.floor(t.numpy() * count)), np.arange(count))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_sobol(count):
    """As Stratified, and so are its first half, first quarter, ...; against scipy's engine too."""
    u = np.random.default_rng(3).uniform(size=count)
    t = timesteps.Sobol()(float64(u), fastdiff.RectifiedFlow()).numpy()
    assert_close(float64(t), oracle.rotated_van_der_corput(u), absolute=1e-15)
    engine = stats.qmc.Sobol(1, scramble=False)
    points = np.sort(engine.random(64).ravel())
    if count == 64:
        assert_close(float64(np.sort((t - u[0]) % 1)), points, absolute=1e-15)
    for part in (1 << k for k in range(count.bit_length())):
        assert np.array_equal(np.sort(np.floor(((t[:part] - u[0] + 1e-12) % 1) * part)), np.arange(part))
    logit = timesteps.Sobol("logit_normal")(float64(u), fastdiff.RectifiedFlow())
    assert_close(logit, oracle.quantile_logit_normal(np.asarray(oracle.rotated_van_der_corput(u), float), 0.0, 1.0))
    assert timesteps.Sobol()(float64([]), fastdiff.RectifiedFlow()).shape == (0,)


@pytest.mark.parametrize(
    ("make", "truth"),
    [(timesteps.Stratified, oracle.stratify), (timesteps.Sobol, oracle.rotated_van_der_corput)],
    ids=["stratified", "sobol"],
)
def test_spread_over_the_batch_for_each_frame(make, truth):
    """[B, F]: each frame has the points to itself, from a uniform of its own."""
    u = np.random.default_rng(3).uniform(size=(8, 5))
    t = make()(float64(u), fastdiff.RectifiedFlow())
    for k in range(5):
        assert_close(t[:, k], np.asarray(truth(u[:, k]), dtype=np.float64), absolute=1e-15)


def test_stratified_defaults_to_uniform_and_indexes():
    """A thousand strata on a thousand steps: every index once."""
    u = float64(np.full(1000, 0.4321 / 1000))
    t = timesteps.Stratified()(u, fastdiff.VariancePreserving())
    assert t.dtype == torch.int64
    assert np.array_equal(np.sort(t.numpy()), np.arange(1000))


def test_stratified_stays_in_the_open_interval():
    """A stratum that begins at 0 (or rounds to 1) must not ask the normal's quantile for an infinity."""
    for u in ([0.0, 0.3], [0.5, 0.1], [1 - 2.0**-53, 0.2]):
        sigma = timesteps.Stratified(timesteps.LogNormal())(float64(u), fastdiff.EDM())
        assert bool((sigma > 0).all()) and bool(torch.isfinite(sigma).all())


# ----------------------------------------------------------------------------------------------------- distributions


def grid_statistic(t: np.ndarray, cdf) -> float:
    """sup |F(t_(i)) - (i + 1/2)/N| over the quantile grid."""
    return float(np.max(np.abs(cdf(np.sort(np.asarray(t, dtype=np.float64))) - GRID)))


def mode_cdf(scale: float):
    """By inverting SD3's f (decreasing): P(t <= x) = 1 - f^-1(x)."""

    def one(x):
        return 1 - optimize.brentq(
            lambda u: 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) - x, 0.0, 1.0, xtol=1e-14
        )

    return np.vectorize(one)


def cosmap_cdf(x: np.ndarray) -> np.ndarray:
    """By integrating SD3's density 2/(pi - 2 pi t + 2 pi t^2)."""
    return np.array(
        [integrate.quad(lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t * t)), 0, v, epsabs=1e-12)[0] for v in x]
    )


@pytest.mark.parametrize(
    "sampler, cdf",
    [
        (timesteps.Uniform(), stats.uniform.cdf),
        (timesteps.Uniform(0.25, 0.75), stats.uniform(0.25, 0.5).cdf),
        (timesteps.LogitNormal(0.4, 1.3), lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.4) / 1.3)),
        (timesteps.Mode(1.29), mode_cdf(1.29)),
        (timesteps.Mode(-0.7), mode_cdf(-0.7)),
        (timesteps.CosMap(), cosmap_cdf),
        (timesteps.Shifted(timesteps.Uniform(), 3.0), lambda t: t / (3.0 - 2.0 * t)),
        (timesteps.Stratified(), stats.uniform.cdf),
        (timesteps.Cubic(), lambda t: 1 - np.cbrt(1 - t)),
        *((timesteps.Beta(a, b), stats.beta(a, b).cdf) for a, b in ((1.5, 1), (1, 4), (0.5, 0.5), (2, 2), (0.3, 8))),
        *((timesteps.Beta(a, b), stats.beta(a, b).cdf) for a, b in ((0.05, 1.5), (300, 20), (1000, 1000))),
        (timesteps.Table([2.0, 0.0, 1.0, 1.0]), lambda t: np.interp(t, [0, 0.25, 0.5, 1], [0, 0.5, 0.5, 1])),
        (timesteps.Within("logit_normal", 0.2, 0.6), lambda t: stats.norm.cdf(np.log((t - 0.2) / (0.6 - t)))),
    ],
    ids=lambda value: repr(value) if isinstance(value, timesteps.Timesteps) else "",
)
def test_distribution(sampler, cdf):
    t = sampler(float64(GRID), fastdiff.RectifiedFlow()).numpy()
    assert grid_statistic(t, cdf) < 1e-9


def test_distribution_of_log_normal():
    t = timesteps.LogNormal(-0.4, 1.6)(float64(GRID), fastdiff.EDM()).numpy()
    assert grid_statistic(t, stats.lognorm(s=1.6, scale=math.exp(-0.4)).cdf) < 1e-9


@pytest.mark.parametrize(("below", "above"), [(1.2, 1.2), (0.5, 2.0), (3.0, 0.25)])
def test_distribution_of_a_split_log_normal(below, above):
    """Two halves of normals, of densities that meet at the mode."""
    t = timesteps.LogNormal(-0.4, below, std_above=above)(float64(GRID), fastdiff.EDM()).numpy()

    def cdf(t):
        z, share = np.log(t) + 0.4, below / (below + above)
        left, right = 2 * share * stats.norm.cdf(z / below), 2 * (1 - share) * stats.norm.sf(z / above)
        return np.where(z < 0, left, 1 - right)

    assert grid_statistic(t, cdf) < 1e-9
    if below == above:
        assert_close(float64(t), oracle.quantile_log_normal(GRID, -0.4, below))


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.5, 0.5), (0.05, 7.0), (100.0, 200.0), (0.3, 1.0001)])
def test_quantiles_of_beta(a, b):
    """scipy's, on both tails too: the probabilities are right to 1e-9 of the smaller side."""
    u = np.concatenate([GRID, 10.0 ** -np.arange(1, 15)])
    t = timesteps.Beta(a, b).fraction(float64(u)).numpy()
    assert np.abs(stats.beta.cdf(t, a, b) / u - 1).max() < 1e-8
    if a >= 0.5:  # of smaller exponents at the end a fraction near 1 cannot tell the probabilities apart
        mirrored = timesteps.Beta(b, a).fraction(float64(u)).numpy()
        assert np.abs(stats.beta.cdf(mirrored, b, a) / u - 1).max() < 1e-8


def test_a_table_of_a_discrete_process_has_the_probabilities_of_its_steps():
    weights = torch.tensor([0.0, 1.0, 5.0, 0.0, 2.0, 0.0])
    t = timesteps.Table(weights)(float64((np.arange(80_000) + 0.5) / 80_000), fastdiff.VariancePreserving(steps=6))
    assert np.bincount(t.numpy(), minlength=6).tolist() == [0, 10_000, 50_000, 0, 20_000, 0]
    edges = timesteps.Table(weights)(float64([0.0, 0.125, 0.75, 1 - 2.0**-53]), fastdiff.VariancePreserving(steps=6))
    assert edges.tolist() == [1, 2, 4, 4]
    assert timesteps.Table([1, 2]) == timesteps.Table(torch.tensor([1.0, 2.0])) != timesteps.Table([2, 1])


def test_a_mixture_asks_the_part_that_u_falls_into():
    mixture = timesteps.Mixture([(3, timesteps.Beta(2, 5)), (1, "uniform")])
    t = mixture(float64(GRID), fastdiff.RectifiedFlow())
    want = np.where(GRID < 0.75, stats.beta.ppf(np.minimum(GRID / 0.75, 1), 2, 5), (GRID - 0.75) / 0.25)
    assert_close(t, want, rel=1e-9, absolute=1e-12)


REFUSED = {
    "beta": (lambda: timesteps.Beta(0.0, 1.0), ValueError, "a must be a positive number; got 0.0"),
    "beta far": (lambda: timesteps.Beta(2.0, 2000.0), ValueError, r"b must lie in \[0.05, 1000\]; got 2000.0"),
    "no table": (lambda: timesteps.Table([]), TypeError, "weights must be a sequence of numbers"),
    "zeros": (lambda: timesteps.Table([0, 0]), ValueError, "all 2 weights are 0"),
    "negative": (lambda: timesteps.Table([1, -2]), ValueError, r"weights\[1\] is -2"),
    "nan": (lambda: timesteps.Table([math.nan]), ValueError, r"weights\[0\]"),
    "a word": (lambda: timesteps.Table("ab"), TypeError, "weights must be a sequence of numbers"),
    "within": (lambda: timesteps.Within("uniform", 0.5, 0.5), ValueError, "0 <= low < high <= 1"),
    "within a batch": (lambda: timesteps.Within("stratified"), ValueError, "of a whole batch: put it outside"),
    "within sigmas": (lambda: timesteps.Within("lognormal"), ValueError, "makes noise levels"),
    "within uniform sigmas": (
        lambda: timesteps.Within(timesteps.Uniform(by="sigma")), ValueError, "makes noise levels"),
    "no parts": (lambda: timesteps.Mixture([]), ValueError, "needs a part"),
    "no pairs": (lambda: timesteps.Mixture(["uniform"]), TypeError, "pairs of a number and a timestep sampler"),
    "probability": (lambda: timesteps.Mixture([(0, "uniform")]), ValueError, "probability of a part must be"),
    "mixed sobol": (lambda: timesteps.Mixture([(1, "sobol")]), ValueError, "put it outside"),
    "shifted sobol": (
        lambda: timesteps.Shifted("sobol", 2.0)(float64([0.5]), fastdiff.RectifiedFlow()), ValueError,
        r"put Sobol outside: Sobol\(Shifted\(inner, shift\)\)"),
    "std above": (lambda: timesteps.LogNormal(std_above=0.0), ValueError, "std_above must be a positive"),
    "no function": (lambda: timesteps.Function(3), TypeError, "function must be callable; got 3"),
    "shape": (
        lambda: timesteps.Function(lambda u: u[:1])(float64([0.5, 0.6]), fastdiff.RectifiedFlow()), ValueError,
        r"must give fractions in \[0, 1\], a floating-point tensor \(2,\) like the uniforms"),
    "too large": (
        lambda: fastdiff.Objective(fastdiff.VariancePreserving(), timesteps=lambda u: u * 1000).noise(torch.ones(3, 2)),
        ValueError, r"must give fractions in \[0, 1\]; it gave"),
    "not a number": (
        lambda: fastdiff.Objective(fastdiff.VariancePreserving(), timesteps=lambda u: u * math.nan).noise(
            torch.ones(3, 2)), ValueError, r"must give fractions in \[0, 1\]"),
    "integers": (
        lambda: timesteps.Function(lambda u: (u > 0.5).long())(float64([0.5]), fastdiff.RectifiedFlow()), ValueError,
        "must give fractions"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()


def test_a_function_given_to_an_objective():
    """It is traced where it can be, and its t are those of the seed, as for every sampler."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps=lambda u: u**3)
    plain = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0 = torch.zeros(5, 2)
    assert_close(objective.noise(x0, seed=4).t, plain.noise(x0, seed=4).t.numpy() ** 3)
    assert objective._times().program() is not None
    half = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps=lambda u: u.float())
    assert half.noise(x0, seed=4).t.dtype == torch.float64
    beta = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps=timesteps.Beta(2.0, 3.0))
    want = stats.beta.ppf(plain.noise(x0, seed=4).t.numpy(), 2, 3)
    assert_close(beta.noise(x0, seed=4).t, want, rel=1e-8)


@pytest.mark.parametrize("process", [fastdiff.TrigFlow(0.7), fastdiff.Cosine()], ids=repr)
def test_distribution_of_log_normal_for_trigflow(process):
    """TrigFlow section 3: tan(t) = exp(tau) / sigma_d with a normal tau."""
    t = timesteps.LogNormal(-1.0, 1.4)(float64(GRID), process).numpy()
    tangent = np.tan(t * (math.pi / 2 if process.t_max == 1 else 1)) * process.sigma_data
    assert grid_statistic(tangent, stats.lognorm(s=1.4, scale=math.exp(-1.0)).cdf) < 1e-9


# name: (process, low and high fraction, first and last t, the oracle's alpha and sigma and g^2)
IMPORTANCE = {
    "vpsde": (
        fastdiff.VPSDE(t_min=1e-5), (0.0, 1.0), (1e-5, 1.0), oracle.vpsde_alpha_sigma, oracle.vpsde_diffusion_squared
    ),
    "subvpsde": (
        fastdiff.SubVPSDE(t_min=1e-3), (0.0, 1.0), (1e-3, 1.0),
        oracle.subvpsde_alpha_sigma, oracle.subvpsde_diffusion_squared,
    ),
    "vesde": (fastdiff.VESDE(), (0.0, 1.0), (0.0, 1.0), oracle.vesde_alpha_sigma, oracle.vesde_diffusion_squared),
    "cosine": (
        fastdiff.Cosine(), (0.05, 0.9), (0.05, 0.9), oracle.cosine_alpha_sigma, oracle.cosine_diffusion_squared
    ),
    "trigflow": (
        fastdiff.TrigFlow(0.3), (0.1, 0.9), (0.05 * math.pi, 0.45 * math.pi),
        lambda t: oracle.trigflow_alpha_sigma(t, 0.3), lambda t: oracle.trigflow_diffusion_squared(t, 0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(IMPORTANCE))
def test_importance_sampling_of_the_likelihood(name):
    """MLSGM: t has the density g^2/(sigma^2 Z), so that g^2 on the score's error is Z on that of the noise.

    By quadrature of the oracle's g^2/sigma^2, to 1e-9: Z, the distribution function, and the mean of a function of t.
    """
    process, (low, high), (first, last), alpha_sigma, g2 = IMPORTANCE[name]
    sampler = timesteps.UniformLogSNR(low, high)

    def ratio(t):
        return float(g2(t) / alpha_sigma(t)[1] ** 2)

    def integral(function, to=last):  # in log t, as the density of VPSDE is 1 / t near 0
        begin = max(first, 1e-12)
        return integrate.quad(
            lambda y: function(math.exp(y)) * math.exp(y), math.log(begin), math.log(to), epsabs=1e-11, epsrel=1e-11,
            limit=500,
        )[0]  # fmt: skip

    z = sampler.normalizer(process)
    assert z == pytest.approx(integral(ratio), rel=1e-9)
    u = np.array([1e-6, 0.01, 0.3, 0.7, 0.99])
    t = sampler(float64(u), process)
    assert_close(t, oracle.quantile_uniform_log_snr(u, alpha_sigma, first, last), absolute=1e-13, label=name)
    assert [integral(ratio, float(to)) / z for to in t] == pytest.approx(u.tolist(), abs=1e-9)
    assert_close(sampler.density(t, process), [ratio(float(to)) / z for to in t], rel=1e-11)
    # The loss with the likelihood weighting at uniform t, and Z times the plain loss at the t drawn here: 20,000
    # midpoints of a smooth function of u.
    drawn = sampler(float64((np.arange(20_000) + 0.5) / 20_000), process).numpy()
    expected = integral(lambda t: ratio(t) * math.exp(-3 * t))
    assert z * np.exp(-3 * drawn).mean() == pytest.approx(expected, rel=1e-7)


def test_importance_sampling_needs_finite_ends():
    for process, where in ((fastdiff.VPSDE(), "0.0"), (fastdiff.RectifiedFlow(), "0.0"), (fastdiff.Cosine(), "0.0")):
        with pytest.raises(ValueError, match=rf"is infinite at the fraction {where}: use a process with a t_min"):
            timesteps.UniformLogSNR()(float64([0.5]), process)
    with pytest.raises(ValueError, match="at the fraction 1.0"):
        timesteps.UniformLogSNR(0.1)(float64([0.5]), fastdiff.Cosine())
    with pytest.raises(ValueError, match="needs a continuous process"):
        timesteps.UniformLogSNR()(float64([0.5]), fastdiff.VariancePreserving())
    with pytest.raises(ValueError, match="EDM's t is sigma"):
        timesteps.UniformLogSNR()(float64([0.5]), fastdiff.EDM())


def test_objective_draws_uniform_steps():
    """The t an objective draws itself from a seed: 200,000 on 100 bins of 10 steps; chi^2 as a z-score below 4.5."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    t = objective.noise(torch.zeros(200_000, 1), seed=1234).t
    assert t.dtype == torch.int64 and int(t.min()) == 0 and int(t.max()) == 999
    counts = np.bincount(t.numpy() // 10, minlength=100)
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    assert abs(chi2 - 99) / math.sqrt(2 * 99) < 4.5


@pytest.mark.parametrize(
    "process, sampler, cdf",
    [
        (fastdiff.RectifiedFlow(), timesteps.LogitNormal(), lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
        (fastdiff.EDM(), timesteps.LogNormal(), stats.lognorm(s=1.2, scale=math.exp(-1.2)).cdf),
        (fastdiff.VPSDE(), timesteps.Uniform(), stats.uniform.cdf),
    ],
    ids=["flow", "edm", "vpsde"],
)
def test_objective_uses_its_sampler(process, sampler, cdf):
    """By chance this time (Philox uniforms, fixed seed): Kolmogorov's p-value above 1e-5."""
    prediction = {"RectifiedFlow": "flow", "EDM": "edm"}.get(type(process).__name__, "epsilon")
    objective = fastdiff.Objective(process, prediction=prediction, timesteps=sampler)
    t = objective.noise(torch.zeros(20_000, 1), seed=99).t
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 1e-5
    again = objective.noise(torch.zeros(20_000, 1), seed=99).t
    assert torch.equal(t, again)


def test_noise_and_t_are_independent():
    """t and the noise come from one seed: their correlation, and that of t with |noise|, as z-scores below 4.5."""
    noised = fastdiff.Objective(fastdiff.VariancePreserving()).noise(torch.zeros(100_000, 1), seed=5)
    t = (noised.t.double() - 499.5) / math.sqrt((1000**2 - 1) / 12)
    n = noised.noise.double().flatten()
    size = (n.abs() - math.sqrt(2 / math.pi)) / math.sqrt(1 - 2 / math.pi)
    for other in (n, size):
        assert abs(float((t * other).mean())) * math.sqrt(100_000) < 4.5


# ------------------------------------------------------------------------------------------------------------- edges

EDGE_U = [0.0, 2.0**-53, 2.0**-24, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-24, 1 - 2.0**-53]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_edges_stay_in_range(name):
    """u of 0 and of 1 - 2^-53: `mode` maps u = 0 to t = 1, which is index 999 of 1000, not 1000."""
    sampler = SAMPLERS[name][0]()
    for process in (*DISCRETE.values(), *CONTINUOUS.values()):
        t = sampler(float64(EDGE_U), process)
        process.check_t(t)
        assert bool(torch.isfinite(process.levels(t).sigma).all())
    for steps, process in DISCRETE.items():
        t = sampler(float64(EDGE_U), process)
        assert 0 <= int(t.min()) and int(t.max()) <= steps - 1


def test_mode_at_zero_is_the_last_step():
    assert int(timesteps.Mode()(float64([0.0]), fastdiff.VariancePreserving())) == 999
    assert float(timesteps.Mode()(float64([0.0]), fastdiff.RectifiedFlow())) == 1.0


def test_sigmoid_does_not_saturate():
    """In fp32 sigmoid(17) is 1; in float64 it is 1 - 4.1e-8. At mean 40 float64 saturates too, and 1 is in range."""
    u = float64([0.25, 0.5, 0.75])
    t = timesteps.LogitNormal(17.0, 0.5)(u, fastdiff.RectifiedFlow())
    assert bool((t < 1).all()) and bool((t[1:] > t[:-1]).all())
    assert_close(t, oracle.quantile_logit_normal([0.25, 0.5, 0.75], 17.0, 0.5), rel=4 * oracle.UNIT)
    t = timesteps.LogitNormal(40.0, 1.0)(u, fastdiff.RectifiedFlow())
    assert bool((t <= 1).all())
    assert timesteps.LogitNormal(40.0, 1.0)(u, fastdiff.VariancePreserving()).tolist() == [999, 999, 999]
    assert timesteps.LogitNormal(-40.0, 1.0)(u, fastdiff.VariancePreserving()).tolist() == [0, 0, 0]


def test_low_precision_uniforms():
    """u in fp32 is widened before the arithmetic: the largest fp32 below 1 is still below the last step's end."""
    u = torch.tensor([1 - 2.0**-24, 0.1], dtype=torch.float32)
    assert timesteps.Uniform()(u, fastdiff.VariancePreserving()).tolist() == [999, 100]
    t = timesteps.LogitNormal()(u, fastdiff.RectifiedFlow())
    assert t.dtype == torch.float64
    assert_close(t, oracle.quantile_logit_normal(u.double().numpy()), absolute=1e-15)


def test_empty_batch():
    for make, _ in SAMPLERS.values():
        assert make()(float64([]), fastdiff.VariancePreserving()).shape == (0,)
    assert timesteps.Stratified()(float64([]), fastdiff.VariancePreserving()).shape == (0,)


@pytest.mark.parametrize(
    "make, parameters, words",
    [
        (timesteps.Uniform, (0.7, 0.2), "0 <= low < high <= 1 is needed; got low=0.7, high=0.2"),
        (timesteps.Uniform, (0.3, 0.3), "0 <= low < high <= 1 is needed; got low=0.3, high=0.3"),
        (timesteps.Uniform, (0.0, 1.0, "t"), "by must be 'fraction' or 'sigma'; got 't'"),
        (timesteps.Uniform, (-0.1, 1.0), "got low=-0.1"),
        (timesteps.Uniform, (0.0, 1.5), "high=1.5"),
        (timesteps.UniformLogSNR, (0.7, 0.2), "0 <= low < high <= 1 is needed; got low=0.7, high=0.2"),
        (timesteps.LogitNormal, (0.0, -1.0), "std must be a positive number; got -1.0"),
        (timesteps.LogNormal, (0.0, -1.0), "std must be a positive number; got -1.0"),
        (timesteps.Mode, (1.76,), r"\[-1, 1.7519\].*got 1.76"),
        (timesteps.Mode, (-1.001,), r"\[-1, 1.7519\].*got -1.001"),
        (timesteps.Mode, (2.0,), r"scale must lie in \[-1, 1.7519\] \(monotone there\); got 2.0"),
        (timesteps.Mode, (-1.5,), r"\[-1, 1.7519\].*got -1.5"),
        (timesteps.Shifted, (timesteps.Uniform(), 0.0), "shift must be a positive number; got 0.0"),
        (timesteps.Shifted, (timesteps.Uniform(), -3.0), "shift must be a positive number; got -3.0"),
    ],
)
def test_bad_parameters(make, parameters, words):
    """What would give a t out of range, or one value for all rows, is refused with a reason."""
    with pytest.raises(ValueError, match=words):
        make(*parameters)


@pytest.mark.parametrize("make", [timesteps.Uniform, timesteps.Mode, timesteps.CosMap, timesteps.LogitNormal])
def test_fractions_mean_nothing_on_edm(make):
    """EDM's t is sigma, from 0 to infinity: a fraction of that range is not a noise level."""
    with pytest.raises(ValueError, match="EDM|LogNormal|sigma"):
        make()(float64([0.5]), fastdiff.EDM())


@pytest.mark.parametrize("process", [fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()], ids=["vp", "flow"])
def test_log_normal_wants_edm(process):
    """A sigma of 80 is neither a fraction nor an index."""
    with pytest.raises(ValueError, match="LogNormal|EDM|sigma"):
        timesteps.LogNormal()(float64([0.5]), process)


def test_what_is_just_accepted():
    u = float64([0.0, 0.5, 1 - 2.0**-53])
    for scale in (-1.0, 2 / (math.pi - 2)):
        assert_close(
            timesteps.Mode(scale).fraction(u), np.clip(oracle.quantile_mode(u.numpy(), scale), 0, 1), absolute=1e-15
        )
    assert timesteps.Uniform(0.0, 1.0).fraction(u) is u
    assert timesteps.Uniform(0.0, 0.5).fraction(u).tolist() == [0.0, 0.25, 0.5 - 2.0**-54]
    assert timesteps.Uniform(0.5, 1.0).fraction(float64([0.0, 0.5])).tolist() == [0.5, 0.75]


def test_uniform_in_the_sigma_of_a_flow():
    """After the shift, and from the least noise on that the flow has."""
    process = fastdiff.RectifiedFlow(3.0, sigma_min=0.1)
    u = float64([0.0, 0.25, 0.5, 1.0])
    sigma = process.levels(timesteps.Uniform(by="sigma")(u, process)).sigma
    assert_close(sigma, [0.1, 0.25, 0.5, 1.0], rel=1e-12)
    sigma = process.levels(timesteps.Uniform(0.2, 0.6, by="sigma")(u, process)).sigma
    assert_close(sigma, [0.2, 0.3, 0.4, 0.6], rel=1e-12)
