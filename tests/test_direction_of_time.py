"""Processes whose t runs from noise, 0, to data, 1 (``data_at=1``): against formulas written in that t, and against the
same process in the other t, of which every number is the same but t and the sign of a velocity."""

import numpy as np
import oracle
import pytest
import torch
from accuracy import float64
from oracle import assert_close

import fastdiff
from fastdiff import losses, samplers, timesteps, video, weighting
from fastdiff.integrations.losses_per_timestep import TimestepLosses

T = np.array([0.0, 1e-9, 0.1, 0.25, 0.6, 0.999, 1.0])
X0, N, M = torch.randn(3, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def linear(t, shift=1.0, sigma_min=0.0):
    s = shift * (1 - t) / (1 + (shift - 1) * (1 - t))
    return 1 - s, s + sigma_min * (1 - s)


def variance_preserving(t, low=0.1, high=20.0):
    """SiT's path "VP": Song et al. 2021, equation 33, with 1 - t for t."""
    log = -0.25 * (1 - t) ** 2 * (high - low) - 0.5 * (1 - t) * low
    return np.exp(log), np.sqrt(-np.expm1(2 * log))


FLOW, COSINE, VPSDE = fastdiff.RectifiedFlow, fastdiff.Cosine, fastdiff.VPSDE
# process -> (class, its arguments, alpha and sigma by t)
PROCESSES = {
    "flow": (FLOW, {}, linear),
    "flow, shift": (FLOW, {"shift": 3.0}, lambda t: linear(t, 3.0)),
    "flow, sigma_min": (FLOW, {"sigma_min": 0.01}, lambda t: linear(t, sigma_min=0.01)),
    "cosine": (COSINE, {}, lambda t: (np.sin(np.pi / 2 * t), np.cos(np.pi / 2 * t))),  # SiT's "GVP"
    "VP": (VPSDE, {}, variance_preserving),
    "VP, other": (VPSDE, {"beta_min": 0.5, "beta_max": 7.0}, lambda t: variance_preserving(t, 0.5, 7.0)),
}


def both(name):
    """The process by t from noise to data, and by t from data to noise."""
    cls, arguments, _ = PROCESSES[name]
    return cls(**arguments, data_at=1), cls(**arguments)


@pytest.mark.parametrize("name", PROCESSES)
def test_levels(name):
    process, turned = both(name)
    levels = process.levels(float64(T))
    assert_close(levels.alpha, PROCESSES[name][2](oracle.ld(T))[0], absolute=1e-15)
    assert_close(levels.sigma, PROCESSES[name][2](oracle.ld(T))[1], absolute=1e-15)
    assert_close(levels.fraction, 1 - T)  # 0 clean, 1 noise, whichever way t runs
    assert_close(process.time(float64([0.0, 0.25, 1.0])), [1.0, 0.75, 0.0])
    inside = T[2:-1]
    sigma = process.levels(float64(inside)).sigma
    ratio = process.sigma_of_ratio(sigma / process.levels(float64(inside)).alpha)
    assert_close(process.time_of(ratio), inside, rel=1e-10)
    if hasattr(process, "diffusion_squared"):
        assert_close(process.diffusion_squared(float64(inside)), turned.diffusion_squared(float64(1 - inside)))
    assert not process.has_levels_of(turned) and process.has_levels_of(both(name)[0])
    assert repr(process).endswith("data_at=1)") and "data_at" not in repr(turned)


def test_what_a_network_is_told():
    """t itself; of a shifted flow what t would be without the shift."""
    t = float64([0.1, 0.5, 0.9])
    for process in (FLOW(data_at=1), COSINE(data_at=1), VPSDE(data_at=1)):
        assert torch.equal(process.model_time(process.levels(t)), t)
    assert_close(FLOW(3.0, data_at=1).model_time(FLOW(3.0, data_at=1).levels(t)), linear(t.numpy(), 3.0)[0])


@pytest.mark.parametrize("density", [timesteps.LogitNormal(1.0, 0.5), timesteps.Within(timesteps.Cubic(), 0.2, 0.8),
                                     timesteps.Shifted(timesteps.Uniform(), 4.0), timesteps.Table([1.0, 0.0, 5.0]),
                                     timesteps.Beta(1.5, 1.0), timesteps.Stratified("mode"),
                                     timesteps.Mixture([(0.3, "cosmap"), (0.7, "uniform")])], ids=repr)  # fmt: skip
def test_a_density_is_one_of_the_users_t(density):
    u = torch.rand(32, dtype=torch.float64)
    own, other = density(u, FLOW(data_at=1)), density(u, FLOW())
    assert torch.equal(own, other) and own.std() > 0.05
    noised = fastdiff.Objective(FLOW(data_at=1), "reversed_flow", timesteps=density).noise(X0, seed=3)
    drawn = fastdiff.Objective(FLOW(), "flow", timesteps=density).noise(X0, seed=3)
    assert_close(noised.t, drawn.t, absolute=1e-12)
    assert_close(noised.alpha, drawn.t, absolute=1e-7)


def test_densities_of_noise_levels_stay():
    u = torch.rand(32, dtype=torch.float64)
    for density, process, turned in (
        (timesteps.Uniform(0.2, 0.7, by="sigma"), *both("flow, shift")),
        (timesteps.LogNormal(-0.5, 1.0), *both("cosine")),
    ):
        assert_close(process.levels(density(u, process)).sigma, turned.levels(density(u, turned)).sigma, rel=1e-11)
    cosine, half = COSINE(data_at=1), timesteps.UniformLogSNR(0.1, 0.4)
    t = half(u, cosine)
    assert bool(((t >= 0.1) & (t <= 0.4)).all())
    ends = np.log(np.tan(np.pi / 2 * np.array([0.1, 0.4])) ** 2)
    assert_close(half.normalizer(cosine), ends[1] - ends[0])
    assert_close(half.density(t, cosine), half.normalizer(cosine) ** -1 * np.pi * 2 / np.sin(np.pi * t.numpy()))


WEIGHTINGS = [weighting.Bell(), weighting.Bell("sigma"), weighting.SigmaLinear(),
              weighting.Interpolated([1.0, 3.0, 2.0]), weighting.CosMap()]  # fmt: skip
ERRORS = [losses.PseudoHuber(0.2, schedule="exponential"), losses.PseudoHuber(0.2, schedule="snr", scale=2.0)]


CASES = [(name, weighting.MinSNR(3.0)) for name in PROCESSES] + [("flow, shift", weights) for weights in WEIGHTINGS]


@pytest.mark.parametrize(("name", "weights"), CASES, ids=repr)
def test_an_objective_is_the_other_ones(name, weights):
    """x_t, target, weight, loss and gradient: the same, but for the sign of the velocity."""
    process, turned = both(name)
    t = float64([0.05, 0.3, 0.5, 0.8, 0.97])
    own, other = ("reversed_flow", "flow") if name.startswith("flow") else ("v_prediction", "v_prediction")
    sign = -1 if own != other else 1
    for error in ("mse", *ERRORS):
        ours = fastdiff.Objective(process, own, weights, error)
        theirs = fastdiff.Objective(turned, other, weights, error)
        noised, reference = ours.noise(X0, t, N), theirs.noise(X0, 1 - t, N)
        assert_close(noised.x_t, reference.x_t, absolute=1e-12)
        assert_close(noised.target, sign * reference.target, absolute=1e-12)
        assert_close(noised.weight, reference.weight, rel=1e-6)
        m = M.clone().requires_grad_()
        assert_close(ours.loss(m, noised).item(), theirs.loss(sign * M, reference).item(), rel=1e-11)
        ours.loss(m, noised).backward()
        k = M.clone().requires_grad_()
        theirs.loss(sign * k, reference).backward()
        assert_close(m.grad, k.grad, rel=1e-9, absolute=1e-14)
        assert_close(ours.predict_x0(M, noised), theirs.predict_x0(sign * M, reference), rel=1e-9, absolute=1e-9)
        level = process.sigma_of_ratio(noised.sigma / noised.alpha)
        assert_close(ours.noise(X0, sigma=level, noise=N).t, t, rel=1e-5)
        single = fastdiff.diffusion_loss(M, X0, N, t, process, own, weights, error)
        assert_close(single.item(), ours.loss(M, noised).item(), rel=1e-11)


@pytest.mark.parametrize("name", ["flow", "flow, sigma_min", "cosine"])
def test_the_velocity_by_t(name):
    """The difference quotient of x_t is the "reversed_flow" of a flow, and minus pi / 2 times v of the cosine."""
    process = both(name)[0]
    t = float64([0.1, 0.3, 0.5, 0.8, 0.9])
    x = [fastdiff.q_sample(X0, t + h, process, N) for h in (-1e-6, 1e-6)]
    slope = (x[1] - x[0]) / 2e-6
    if name in ("flow", "flow, sigma_min"):
        velocity = fastdiff.Objective(process, "reversed_flow").noise(X0, t, N).target
        assert_close(velocity, slope, rel=1e-7, absolute=1e-8)
    else:
        v = fastdiff.Objective(process, "v_prediction").noise(X0, t, N).target
        assert_close(-np.pi / 2 * v, slope, rel=1e-7, absolute=1e-8)


CURVED = ["ddim", "ddpm", "euler", "dpmpp_2m", "unipc"]
RUNS = [(sampler, name) for sampler in CURVED for name in ("flow", "cosine", "VP")]
RUNS += [("euler_ancestral", "flow, shift"), ("flow_euler", "flow, shift"), ("flow_heun", "flow"), ("heun", "VP")]


@pytest.mark.parametrize(("sampler", "name"), RUNS)
def test_samples_are_the_same(sampler, name):
    process, turned = both(name)
    flow, told = name.startswith("flow"), []

    def network(x, t):
        told.append(t)
        return torch.tanh(x + 2 * t.view(-1, 1).to(x.dtype))

    def other(x, t):
        return -network(x, 1 - t) if flow else network(x, 1 - t)

    how = {"seed": 3, "progress": False, "dtype": torch.float64}
    ours = fastdiff.Objective(process, "reversed_flow" if flow else "v_prediction").sample(
        network, (2, 5), sampler, 6, **how
    )
    times, told = [float(t[0]) for t in told], []
    assert times[0] <= 0.01 and all(a <= b for a, b in zip(times, times[1:])) and times[-1] > 0.5
    theirs = fastdiff.Objective(turned, "flow" if flow else "v_prediction").sample(other, (2, 5), sampler, 6, **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_times_of_a_sampler_rise():
    given = samplers.Euler(timesteps=[0.1, 0.5, 0.9]).plan(FLOW(data_at=1), None, "reversed_flow")
    assert given.times.tolist() == [0.1, 0.5, 0.9] and given.model_time.tolist() == pytest.approx([0.1, 0.5, 0.9])
    for sampler in (samplers.Euler(timesteps=[0.9, 0.5]), samplers.DDIM(timesteps=[0.9, 0.5])):
        with pytest.raises(ValueError, match="timesteps must rise strictly, the noisiest first; got 0.9, 0.5"):
            sampler.plan(FLOW(data_at=1), None, "reversed_flow")
        with pytest.raises(ValueError, match="timesteps must fall strictly, the noisiest first; got 0.5, 0.9"):
            samplers.DDIM(timesteps=[0.5, 0.9]).plan(FLOW(), None, "flow")
    named = samplers.Euler(sigmas="karras", sigma_min=0.01, sigma_max=0.99)
    plans = [named.plan(process, 5, "flow") for process in both("flow, shift")]
    assert_close(plans[0].times, 1 - plans[1].times, rel=1e-11)


def test_likelihood_is_the_same():
    x0 = torch.randn(2, 6, dtype=torch.float64)
    found = [
        fastdiff.likelihood.log_likelihood(model, x0, process, "v_prediction", steps=4, seed=1)
        for process, model in (
            (COSINE(data_at=1), lambda x, t: torch.tanh(x) * t[:, None]),
            (COSINE(), lambda x, t: torch.tanh(x) * (1 - t[:, None])),
        )
    ]
    assert_close(found[0], found[1], rel=1e-10)


def test_buckets_go_from_data_to_noise():
    noised = fastdiff.Objective(FLOW(data_at=1), "reversed_flow").noise(X0, float64([1.0, 0.95, 0.4, 0.1, 0.01]), N)
    buckets = TimestepLosses(buckets=2)
    buckets.update(noised, torch.tensor([1.0, 1.0, 5.0, 4.0, 3.0]))
    assert buckets.compute() == {"loss/t_0.00-0.50": 1.0, "loss/t_0.50-1.00": 4.0}


def test_frames_that_are_denoised_in_turn():
    """A schedule of fractions, 1 noise and 0 clean, gives the same video."""
    schedule, videos = video.frame_schedule("pyramid", 4, 3), []
    for process, kind, sign in ((FLOW(data_at=1), "reversed_flow", 1), (FLOW(), "flow", -1)):

        def model(x, t, sign=sign):
            t = t if sign == 1 else 1 - t
            return sign * torch.tanh(x + t.view(2, 1, 3, 1, 1))

        objective = fastdiff.Objective(process, kind)
        videos.append(video.sample(model, (2, 2, 3, 2, 2), objective, schedule, seed=1, dtype=torch.float64))
    assert_close(videos[0], videos[1], absolute=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FLOW(data_at=2), "data_at is the t of clean data, 0 or 1; got 2"),
        (lambda: COSINE(data_at="noise"), "data_at is the t of clean data, 0 or 1; got 'noise'"),
        (lambda: VPSDE(data_at=True), "got True"),
        (lambda: VPSDE(t_min=1e-3, data_at=1), "t_min is the least t of a process whose data is at 0"),
        (lambda: FLOW(data_at=1).levels([1.5]), r"t must lie in \[0, 1\] for RectifiedFlow.*data_at=1.*got 1.5"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_process_that_is_turned_later():
    process = FLOW()
    objective, t = fastdiff.Objective(process, "reversed_flow"), torch.full((5,), 0.25)
    assert objective.noise(X0, t, N).alpha.tolist() == [0.75] * 5
    process.data_at = 1
    assert objective.noise(X0, t, N).alpha.tolist() == [0.25] * 5
