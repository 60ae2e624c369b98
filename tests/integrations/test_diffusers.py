"""Against diffusers: schedules, add_noise, get_velocity, and whole DDPM and DDIM trajectories step by step.

Upstream builds alphas_cumprod in fp32, and 1 - alphas_cumprod at small t keeps few of its digits (2^-24/1e-4 = 6e-4
relative at t = 0). That is upstream's error and not ours, so the trajectories run upstream on float64 alphas_cumprod
(0-dimensional tensors, which do not promote the fp32 samples): what is compared is the step. One trajectory of each
sampler also runs against upstream as it comes, with the tolerance that its fp32 schedule asks for.

Trajectories are fp32 with a fixed nonlinear model: 1e-5 of the trajectory's largest value, about 170 fp32 roundings.
"""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
from known import nonlinear
from options import generator
from oracle import assert_close

import fastdiff

diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

F32 = 2.0**-24  # unit roundoff of fp32
SHAPE = (2, 3, 4, 4)
NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def process_of(name: str, **options) -> fastdiff.VariancePreserving:
    return fastdiff.VariancePreserving(name, **options)


def upstream_of(make, name: str, exact: fastdiff.VariancePreserving | None = None, **options):
    """The upstream scheduler of the same betas; `exact`: with this process's float64 alphas_cumprod in place."""
    start, end = ENDS[name]
    scheduler = make(beta_start=start, beta_end=end, beta_schedule=NAMES[name], **options)
    if exact is not None:
        scheduler.alphas_cumprod = exact.alpha_bar.clone()
        if hasattr(scheduler, "final_alpha_cumprod") and not options.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = exact.alpha_bar[0].clone()
    return scheduler


def noises(steps: int, seed: int = 7) -> list[torch.Tensor]:
    g = generator(seed)
    return [torch.randn(SHAPE, generator=g) for _ in range(steps)]


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", list(NAMES))
def test_alphas_cumprod(name):
    """Upstream's fp32 product: every factor is off by the rounding of beta, of 1 - beta and of the product itself."""
    process, upstream = process_of(name), upstream_of(diffusers.DDPMScheduler, name)
    betas = process.betas.numpy()
    factor = F32 * (2 * betas / (1 - betas) + 2)  # beta: linspace and square, 2 roundings, relative to 1 - beta
    bound = np.cumsum(factor)
    assert_close(process.alpha_bar, upstream.alphas_cumprod.double(), rel=bound)
    assert_close(process.betas, upstream.betas.double(), rel=4 * F32, absolute=F32 * 1e-3)


def test_a_schedulers_process_has_its_betas():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    betas = fastdiff.Objective.from_scheduler(scheduler).process.betas
    # 1 - (alpha_t / alpha_t-1)^2: 1 - beta and their product are rounded, and two roots, each of which counts twice.
    assert_close(betas, scheduler.betas.double(), absolute=6 * F32)


def test_trained_betas():
    betas = np.linspace(0.01, 0.3, 40).astype(np.float32)  # upstream keeps them in fp32
    process = fastdiff.VariancePreserving(torch.from_numpy(betas))
    upstream = diffusers.DDPMScheduler(num_train_timesteps=40, trained_betas=betas)
    assert_close(process.alpha_bar, upstream.alphas_cumprod.double(), rel=np.cumsum(2 * F32 / (1 - betas)))


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr(name):
    """Lin et al. algorithm 1. Roots carry half of 1000 factors' rounding (6e-5 at worst); squared, and multiplied out
    again from betas: four times that, absolute."""
    process = process_of(name, zero_terminal_snr=True)
    upstream = upstream_of(diffusers.DDPMScheduler, name, rescale_betas_zero_snr=True)
    assert float(process.alpha_bar[-1]) == float(upstream.alphas_cumprod[-1]) == 0.0
    assert_close(process.alpha_bar, upstream.alphas_cumprod.double(), rel=0, absolute=4 * 1000 * F32)


# ------------------------------------------------------------------------------------------------- noising and targets


@pytest.mark.parametrize("name", list(NAMES))
def test_q_sample_is_add_noise_in_float64(name):
    """float64 samples: both sides compute in float64, from the same alphas_cumprod: 1e-12 of the terms' size."""
    process = process_of(name)
    upstream = upstream_of(diffusers.DDPMScheduler, name, exact=process)
    t = torch.tensor([0, 1, 2, 10, 250, 500, 998, 999])
    x0 = torch.randn(8, 3, 5, generator=generator(1), dtype=torch.float64)
    n = torch.randn(8, 3, 5, generator=generator(2), dtype=torch.float64)
    ours = fastdiff.q_sample(x0, t, process, noise=n)
    assert ours.dtype == torch.float64
    # 1 - abar at t = 0 is 1e-4 or less (cosine 4e-5): a rounding of abar is 1e-12 of sigma there
    assert_close(ours, upstream.add_noise(x0, n, t), rel=0, absolute=1e-12 * (x0.abs() + n.abs()).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(NAMES))
def test_q_sample_in_every_dtype(name, dtype):
    """Coefficients rounded once to fp32, arithmetic in fp32, one rounding at the store: against float64 upstream."""
    process = process_of(name)
    upstream = upstream_of(diffusers.DDPMScheduler, name, exact=process)
    t = torch.tensor([0, 1, 2, 10, 250, 500, 998, 999])
    x0 = torch.randn(8, 3, 5, generator=generator(1)).to(dtype)
    n = torch.randn(8, 3, 5, generator=generator(2)).to(dtype)
    expected = upstream.add_noise(x0.double(), n.double(), t)
    ours = fastdiff.q_sample(x0, t, process, noise=n)
    assert ours.dtype == dtype
    alpha, sigma = (v.reshape(8, 1, 1) for v in process.alpha_sigma(t))
    size = (alpha * x0.double().abs() + sigma * n.double().abs()).numpy()
    store = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11 if dtype == torch.float16 else F32
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0  # half of fp16's smallest subnormal
    assert_close(ours.double(), expected, rel=store, absolute=4 * F32 * size + smallest)


def test_bfloat16_still_adds_noise_at_the_first_steps():
    """Upstream casts the schedule to bf16, where alphas_cumprod of the first steps is 1: no noise at all. Ours keeps
    it in fp32, so x0 = 0 gives sigma n to the rounding of bf16 (2^-8 relative)."""
    process = process_of("scaled_linear")
    upstream = upstream_of(diffusers.DDPMScheduler, "scaled_linear")
    t = torch.tensor([0, 1, 2])
    x0, n = torch.zeros(3, 64, dtype=torch.bfloat16), torch.ones(3, 64, dtype=torch.bfloat16)
    assert float(upstream.add_noise(x0, n, t)[:2].abs().max()) == 0.0
    sigma = process.alpha_sigma(t)[1].reshape(3, 1).expand(3, 64)
    assert_close(fastdiff.q_sample(x0, t, process, noise=n).double(), sigma.numpy(), rel=2.0**-8)


@pytest.mark.parametrize("zero", [False, True])
def test_velocity_is_get_velocity(zero):
    process = process_of("scaled_linear", zero_terminal_snr=zero)
    upstream = upstream_of(diffusers.DDPMScheduler, "scaled_linear", exact=process)
    t = torch.tensor([0, 1, 2, 10, 250, 500, 998, 999])
    x0 = torch.randn(8, 3, 5, generator=generator(1), dtype=torch.float64)
    n = torch.randn(8, 3, 5, generator=generator(2), dtype=torch.float64)
    objective = fastdiff.Objective(process, prediction="v_prediction")
    target = objective.noise(x0, t, n).target
    assert_close(target, upstream.get_velocity(x0, n, t), rel=0, absolute=1e-12 * (x0.abs() + n.abs()).numpy())
    target32 = objective.noise(x0.float(), t, n.float()).target
    size = (x0.float().abs() + n.float().abs()).numpy()
    expected = upstream.get_velocity(x0.float().double(), n.float().double(), t)
    assert_close(target32.double(), expected, rel=0, absolute=4 * F32 * size)


# -------------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacing_for_every_number_of_steps(spacing):
    """1 to 1000 steps. (Where upstream's float arange yields one too many, its last entry -1 is no timestep.)"""
    from fastdiff.samplers.spacing import discrete_timesteps

    upstream = diffusers.DDPMScheduler(timestep_spacing=spacing)
    for steps in range(1, 1001):
        upstream.set_timesteps(steps)
        expected = [t for t in upstream.timesteps.tolist() if t >= 0]
        if len(expected) == steps:
            assert list(discrete_timesteps(1000, steps, spacing)) == expected, steps


# ------------------------------------------------------------------------------------------------------- trajectories


def ours(process, sampler, steps, prediction, network, zs):
    """x after every step, the x0 estimates and the t visited."""
    xs, x0s, ts = [], [], []

    def keep(step, t, x, x0):
        assert step == len(xs)
        xs.append(x.clone())
        x0s.append(x0.clone())
        ts.append(int(torch.as_tensor(t).reshape(-1)[0]))

    last = fastdiff.sample(
        network,
        SHAPE,
        process,
        sampler=sampler,
        steps=steps,
        prediction=prediction,
        noise=lambda step, shape: zs[step],
        x=torch.randn(SHAPE, generator=generator(3)),
        progress=False,
        callback=keep,
    )
    assert torch.equal(last, xs[-1]) and last.dtype == torch.float32 and last.shape == SHAPE
    return xs, x0s, ts


def theirs(upstream, steps, network, step):
    """The same of upstream, `step(i, output, t, x)` being its call."""
    upstream.set_timesteps(steps)
    x, xs, x0s = torch.randn(SHAPE, generator=generator(3)), [], []
    for i, t in enumerate(upstream.timesteps):
        result = step(i, network(x, t), t, x)
        x = result.prev_sample
        assert x.dtype == torch.float32
        xs.append(x)
        x0s.append(result.pred_original_sample)
    return xs, x0s, upstream.timesteps.tolist()


def assert_same_trajectory(a, b, process, prediction, tolerance=1e-5):
    """Largest difference at any step, relative to the largest value on the way (of x, and of the x0 estimates).

    An x0 estimate from epsilon is (x - sigma m)/alpha with alpha down to 0.006, clamped afterwards: 8 roundings of its
    terms (m is below 1.3) are added.
    """
    assert a[2] == b[2], "timesteps"
    mine, truth = torch.stack(a[0]), torch.stack(b[0])
    assert bool(torch.isfinite(truth).all()) and bool(torch.isfinite(mine).all())
    scale = max(float(truth.abs().max()), 1.0)
    error = float((mine - truth).abs().max()) / scale
    assert error <= tolerance, f"x off by {error:.2e} of its scale"
    mine, truth = torch.stack(a[1]).flatten(1), torch.stack(b[1]).flatten(1)
    alpha = process.alpha_sigma(torch.tensor(a[2]))[0] if prediction == "epsilon" else torch.ones(len(a[2]))
    bound = tolerance * float(truth.abs().max()) + 8 * F32 * (scale + 1.3) / alpha
    error = (mine - truth).abs().amax(1)
    assert bool((error <= bound).all()), f"x0 off by {error.tolist()}, bound {bound.tolist()}"


def run_ddpm(
    monkeypatch,
    *,
    schedule="linear",
    steps=20,
    spacing="leading",
    offset=0,
    prediction="epsilon",
    variance="fixed_small",
    clip=None,
    final_noise=True,
    zero=False,
    exact=True,
    tolerance=1e-5,
):
    process = process_of(schedule, zero_terminal_snr=zero)
    upstream = upstream_of(
        diffusers.DDPMScheduler,
        schedule,
        exact=process if exact else None,
        timestep_spacing=spacing,
        steps_offset=offset,
        prediction_type=prediction,
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        rescale_betas_zero_snr=zero,
    )
    network = partial(nonlinear, variance=variance.startswith("learned"))
    zs, at = noises(steps), [0]

    def fed(shape, generator=None, device=None, dtype=None):
        # drawn once a step, except at t = 0; without final noise upstream gets zeros on its last step
        return zs[at[0]] if final_noise or at[0] < steps - 1 else torch.zeros(SHAPE)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", fed)

    def step(i, output, t, x):
        at[0] = i
        # upstream draws noise of the model output's shape: with learned variances that is the first half's
        return upstream.step(output, t, x)

    b = theirs(upstream, steps, network, step)
    sampler = fastdiff.samplers.DDPM(
        variance=variance, clip=clip, spacing=spacing, steps_offset=offset, final_noise=final_noise
    )
    assert_same_trajectory(ours(process, sampler, steps, prediction, network, zs), b, process, prediction, tolerance)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [5, 7, 20, 50])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
def test_ddpm(monkeypatch, spacing, offset, steps, prediction, variance, clip):
    run_ddpm(
        monkeypatch,
        spacing=spacing,
        offset=offset,
        steps=steps,
        prediction=prediction,
        variance=variance,
        clip=clip,
    )


@pytest.mark.parametrize(
    "prediction, variance, clip, schedule",
    [
        ("epsilon", "fixed_small", None, "linear"),
        ("epsilon", "fixed_large", 1.0, "cosine"),
        ("v_prediction", "fixed_small", 1.0, "scaled_linear"),
        ("sample", "fixed_large", None, "linear"),
    ],
)
def test_ddpm_all_thousand_steps(monkeypatch, prediction, variance, clip, schedule):
    run_ddpm(monkeypatch, steps=1000, prediction=prediction, variance=variance, clip=clip, schedule=schedule)


@pytest.mark.parametrize("spacing, offset", [("trailing", 0), ("leading", 1)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_without_final_noise(monkeypatch, spacing, offset, variance):
    """By default the last step adds none, whatever its t; upstream adds it there unless t is 0 (fed zeros here)."""
    run_ddpm(monkeypatch, spacing=spacing, offset=offset, variance=variance, final_noise=False, clip=1.0)


@pytest.mark.parametrize("steps", [5, 20, 1000])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_learned_range(monkeypatch, prediction, steps):
    """exp of the interpolated logarithms, twice the channels (leading: the last t is 0, where no noise is drawn)."""
    run_ddpm(monkeypatch, variance="learned_range", prediction=prediction, steps=steps, clip=1.0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_zero_terminal_snr(monkeypatch, spacing, prediction, variance):
    run_ddpm(
        monkeypatch, schedule="scaled_linear", zero=True, spacing=spacing, prediction=prediction, variance=variance
    )


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_ddpm_against_upstream_as_it_comes(monkeypatch, schedule):
    """With upstream's own fp32 schedule: its 1 - abar is off by up to 6e-4 relative (module docstring); sigma, by half
    of that, multiplies noise of size sigma, so 1e-3 of the trajectory's scale is far above what may remain."""
    run_ddpm(monkeypatch, schedule=schedule, clip=1.0, exact=False, tolerance=1e-3)


@pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_closed_form(variance, prediction):
    """Each step from the paper's formula in longdouble on the x that fastdiff had. "learned" is a log-variance here
    (IDDPM); upstream takes the network's output for the variance itself, and its fixed_large_log gives NaN."""
    process, steps, zs = process_of("linear"), 10, noises(10)
    times = list(range(900, -1, -100))

    def network(x, t):
        second = torch.sin(3 * x) - 3 if variance == "learned" else torch.sin(3 * x)
        return torch.cat([nonlinear(x, t), second], 1) if variance.startswith("learned") else nonlinear(x, t)

    sampler = fastdiff.samplers.DDPM(variance=variance, timesteps=times, clip=2.0)
    xs, _, ts = ours(process, sampler, steps, prediction, network, zs)
    assert ts == times
    abar = oracle.alpha_bar(oracle.betas_linear(1000))
    start = torch.randn(SHAPE, generator=generator(3))
    scale = float(torch.stack([start, *xs]).abs().max())
    for i, t in enumerate(times):
        x = start if i == 0 else xs[i - 1]
        output = network(x, torch.tensor([t])).double().numpy()
        mean, extra = (output[:, :3], output[:, 3:]) if variance.startswith("learned") else (output, None)
        alpha, sigma = oracle.vp_alpha_sigma(abar, t)
        x0 = np.clip(oracle.to_x0(prediction, x.numpy(), mean, alpha, sigma), -2, 2)
        if t == 0:
            expected = x0
        else:
            expected = oracle.ddpm_step(x.numpy(), x0, abar[t], abar[times[i + 1]], zs[i].numpy(), variance, extra)
        assert_close(xs[i], expected, rel=0, absolute=1e-5 * scale, label=f"t={t}")


# --------------------------------------------------------------------------------------------------------------- DDIM


def run_ddim(
    *,
    schedule="linear",
    steps=20,
    spacing="leading",
    offset=0,
    prediction="epsilon",
    eta=0.0,
    clip=None,
    rederive=False,
    to_one=True,
    zero=False,
    exact=True,
    tolerance=1e-5,
):
    process = process_of(schedule, zero_terminal_snr=zero)
    upstream = upstream_of(
        diffusers.DDIMScheduler,
        schedule,
        exact=process if exact else None,
        timestep_spacing=spacing,
        steps_offset=offset,
        prediction_type=prediction,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        set_alpha_to_one=to_one,
        rescale_betas_zero_snr=zero,
    )
    zs = noises(steps)

    def step(i, output, t, x):
        return upstream.step(output, t, x, eta=eta, use_clipped_model_output=rederive, variance_noise=zs[i])

    b = theirs(upstream, steps, nonlinear, step)
    sampler = fastdiff.samplers.DDIM(
        eta=eta,
        clip=clip,
        rederive_epsilon=rederive,
        spacing=spacing,
        steps_offset=offset,
        previous="stride",
        set_alpha_to_one=to_one,
    )
    assert_same_trajectory(ours(process, sampler, steps, prediction, nonlinear, zs), b, process, prediction, tolerance)


@pytest.mark.parametrize("clip, rederive", [(None, False), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [5, 7, 20, 50])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
def test_ddim(spacing, offset, steps, prediction, eta, clip, rederive):
    run_ddim(spacing=spacing, offset=offset, steps=steps, prediction=prediction, eta=eta, clip=clip, rederive=rederive)


@pytest.mark.parametrize("eta, prediction, schedule", [(0.0, "epsilon", "linear"), (1.0, "v_prediction", "cosine")])
def test_ddim_all_thousand_steps(eta, prediction, schedule):
    run_ddim(steps=1000, eta=eta, prediction=prediction, schedule=schedule, clip=1.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
def test_ddim_final_alpha(spacing, offset, eta):
    """set_alpha_to_one=False ends at the level of t = 0; with eta the last step then adds noise."""
    run_ddim(spacing=spacing, offset=offset, eta=eta, to_one=False, schedule="scaled_linear")


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_zero_terminal_snr(spacing, prediction, eta):
    run_ddim(schedule="scaled_linear", zero=True, spacing=spacing, prediction=prediction, eta=eta)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_ddim_against_upstream_as_it_comes(schedule):
    """As for DDPM: 1e-3 for upstream's fp32 schedule."""
    run_ddim(schedule=schedule, clip=1.0, exact=False, tolerance=1e-3)


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_to_the_next_time(prediction, eta, steps):
    """previous="next" (our default) where upstream's stride is not the list's: the paper's eq. 12 on our own list."""
    process, zs = process_of("cosine"), noises(steps)
    sampler = fastdiff.samplers.DDIM(eta=eta, spacing="linspace", clip=3.0)
    xs, _, ts = ours(process, sampler, steps, prediction, nonlinear, zs)
    abar = oracle.alpha_bar(oracle.betas_cosine(1000))
    start = torch.randn(SHAPE, generator=generator(3))
    scale = float(torch.stack([start, *xs]).abs().max())
    for i, t in enumerate(ts):
        x = start if i == 0 else xs[i - 1]
        output = nonlinear(x, torch.tensor([t])).double().numpy()
        alpha, sigma = oracle.vp_alpha_sigma(abar, t)
        raw = oracle.to_x0(prediction, x.numpy(), output, alpha, sigma)
        eps = (x.numpy() - alpha * raw) / sigma
        b = abar[ts[i + 1]] if i + 1 < steps else 1.0
        expected = oracle.ddim_step(x.numpy(), np.clip(raw, -3, 3), eps, abar[t], b, eta, zs[i].numpy())
        # eps above is rebuilt from x0 in longdouble, so it is the network's to 1e-16
        assert_close(xs[i], expected, rel=0, absolute=1e-5 * scale, label=f"t={t}")


def test_ddim_with_eta_one_is_ddpm():
    """DDIM section 4.1: eta = 1 has DDPM's posterior; the same noise gives the same trajectory."""
    process, zs = process_of("linear"), noises(20)
    a = ours(process, fastdiff.samplers.DDIM(eta=1.0), 20, "epsilon", nonlinear, zs)
    b = ours(process, fastdiff.samplers.DDPM(variance="fixed_small"), 20, "epsilon", nonlinear, zs)
    assert_same_trajectory(a, b, process, "epsilon")


# ------------------------------------------------------------------------------------- other processes, and the draws

OTHERS = {
    "flow": (fastdiff.RectifiedFlow(shift=2.0), "flow", [1.0, 0.8, 0.55, 0.3, 0.1], oracle.flow_alpha_sigma, [2.0]),
    "vpsde": (fastdiff.VPSDE(), "score", [0.95, 0.7, 0.4, 0.2, 0.05], oracle.vpsde_alpha_sigma, []),
    "edm": (fastdiff.EDM(), "epsilon", [10.0, 4.0, 1.5, 0.4, 0.05], oracle.edm_alpha_sigma, []),
    "edm F": (fastdiff.EDM(), "edm", [10.0, 4.0, 1.5, 0.4, 0.05], oracle.edm_alpha_sigma, []),
}


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("which", ["ddim", "ddpm"])
def test_other_processes(which, name):
    """DDIM is alpha' x0 + sigma' eps and DDPM the ancestral step of VDM, on every process, to clean data at the end.

    The network sees c_in x where the prediction is "edm" (c_in = 1/sqrt(sigma^2 + d^2)), and x elsewhere.
    """
    process, prediction, times, truth, options = OTHERS[name]
    zs, outputs = noises(len(times)), []
    make = fastdiff.samplers.DDIM if which == "ddim" else fastdiff.samplers.DDPM
    start = 3 * torch.randn(SHAPE, generator=generator(3))
    seen, xs, x0s = [], [], []

    def network(x, t):
        seen.append(x.clone())
        outputs.append(torch.tanh(0.7 * x) + 0.1)
        return outputs[-1]

    def keep(step, t, x, x0):
        xs.append(x.clone())
        x0s.append(x0.clone())

    fastdiff.sample(
        network,
        SHAPE,
        process,
        sampler=make(timesteps=times),
        prediction=prediction,
        noise=lambda step, shape: zs[step],
        x=start,
        progress=False,
        callback=keep,
    )
    assert len(xs) == len(times)
    alphas, sigmas = truth(np.array(times), *options)
    scale = float(torch.stack([start, *xs]).abs().max())
    for i in range(len(times)):
        x = (start if i == 0 else xs[i - 1]).double().numpy()
        alpha, sigma = alphas[i], sigmas[i]
        c_in = oracle.edm_preconditioning(sigma)["c_in"] if prediction == "edm" else 1
        assert_close(seen[i], c_in * x, rel=0, absolute=4 * F32 * scale)
        if name == "flow" and i == 0:  # alpha = 0: x0 = x - sigma m all the same
            x0 = x - sigma * outputs[i].double().numpy()
        else:
            x0 = oracle.to_x0(prediction, x, outputs[i].double().numpy(), alpha, sigma)
        # the x0 estimate divides by alpha, down to 0.1 at the SDE's first time: 1e-5 of its own scale
        assert_close(x0s[i], x0, rel=0, absolute=1e-5 * float(np.abs(x0).max()))
        if i + 1 == len(times):
            expected = x0
        elif which == "ddim":
            eps = (x - alpha * x0) / sigma
            expected = alphas[i + 1] * x0 + sigmas[i + 1] * eps
        else:
            expected = oracle.ancestral_step(x, x0, alpha, sigma, alphas[i + 1], sigmas[i + 1], zs[i].numpy())
        assert_close(xs[i], expected, rel=0, absolute=1e-5 * scale, label=f"step {i}")


def test_ddim_on_a_flow_is_euler():
    """With a constant velocity the flow's ODE is a straight line: x + (s' - s) v at every step, to s = 0."""
    times, xs = [1.0, 0.6, 0.3], []
    start, v = torch.randn(SHAPE, generator=generator(3)), torch.randn(SHAPE, generator=generator(4))
    fastdiff.sample(
        lambda x, t: v,
        SHAPE,
        fastdiff.RectifiedFlow(),
        sampler=fastdiff.samplers.DDIM(timesteps=times),
        prediction="flow",
        x=start,
        progress=False,
        callback=lambda step, t, x, x0: xs.append(x.clone()),
    )
    for x, s in zip(xs, [0.6, 0.3, 0.0], strict=True):
        assert_close(x, start.double().numpy() + (s - 1) * v.double().numpy(), rel=0, absolute=16 * F32 * 8)


@pytest.mark.parametrize(
    "sampler, draws",
    [
        (fastdiff.samplers.DDIM(), []),
        (fastdiff.samplers.DDIM(eta=0.5), [0, 1, 2, 3, 4]),
        (fastdiff.samplers.DDPM(), [0, 1, 2, 3]),
        (fastdiff.samplers.DDPM(final_noise=True), [0, 1, 2, 3, 4]),
        (fastdiff.samplers.DDPM(final_noise=True, spacing="leading"), [0, 1, 2, 3]),
    ],
    ids=["ddim", "ddim eta", "ddpm", "ddpm final", "ddpm final, t = 0"],
)
def test_which_steps_draw_noise(sampler, draws):
    """DDPM: not on the last step (upstream: not at t = 0). DDIM with eta: on every step, the last too."""
    asked = []

    def noise(step, shape):
        asked.append(step)
        return torch.zeros(shape)

    how = {"noise": noise, "seed": 0, "progress": False}
    fastdiff.sample(nonlinear, SHAPE, process_of("linear"), sampler=sampler, steps=5, prediction="epsilon", **how)
    assert asked == draws


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("options", [{"previous": "stride"}, {"set_alpha_to_one": False}], ids=lambda o: next(iter(o)))
def test_options_of_discrete_steps(options):
    with pytest.raises(ValueError, match="discrete|stride|set_alpha_to_one"):
        fastdiff.sample(
            nonlinear,
            SHAPE,
            fastdiff.RectifiedFlow(),
            sampler=fastdiff.samplers.DDIM(**options),
            steps=5,
            prediction="flow",
            seed=0,
            progress=False,
        )


@pytest.mark.parametrize("sampler", [fastdiff.samplers.DDPM(), fastdiff.samplers.DDIM()], ids=["ddpm", "ddim"])
def test_epsilon_at_zero_terminal_snr(sampler):
    """epsilon cannot recover x0 where alpha = 0 (upstream divides by 0): refused before the first model call."""
    process = process_of("scaled_linear", zero_terminal_snr=True)

    def never(x, t):
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match="SNR|v_prediction"):
        fastdiff.sample(never, SHAPE, process, sampler, 5, "epsilon", progress=False, seed=0)


def test_leading_with_offset_beyond_the_last_step():
    """1000 leading steps with offset 1 would visit t = 1000 (upstream: an index error in the middle of sampling)."""
    with pytest.raises(ValueError, match="1000|999|offset"):
        fastdiff.sample(
            nonlinear,
            SHAPE,
            process_of("linear"),
            sampler=fastdiff.samplers.DDPM(spacing="leading", steps_offset=1),
            steps=1000,
            prediction="epsilon",
            progress=False,
            seed=0,
        )


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match=rf"steps must lie in \[1, 1000\].*got {steps}"):
        fastdiff.sample(nonlinear, SHAPE, process_of("linear"), "ddpm", steps, "epsilon", progress=False, seed=0)
