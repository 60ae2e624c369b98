"""Whole trajectories against diffusers' schedulers, fp32, step by step.

Upstream keeps its sigmas in fp32; where a comparison would measure that, they are replaced by float64 ones (tensors
without dimensions, which do not promote the fp32 samples) after they have been compared themselves, to fp32's rounding.
What is compared then is the step: 1e-5 of the trajectory's largest value, about 170 fp32 roundings.

Euler, Euler ancestral and Heun keep x_t / alpha upstream and x_t here, so theirs is multiplied by alpha.
"""

import numpy as np
import pytest
import torch
from known import nonlinear

import fastdiff
from fastdiff import samplers
from fastdiff.samplers.dpm import multistep_weights

diffusers = pytest.importorskip("diffusers")

F32 = 2.0**-24
SHAPE = (2, 3, 4, 4)
VP = fastdiff.VariancePreserving("scaled_linear")
STEPS = [5, 20, 50]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SPACINGS = [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]
SCHEDULES = ["karras", "exponential", "beta"]


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def noises(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=g) for _ in range(count)]


def timeless(x, t):
    """The same whatever t: upstream rounds or cuts off the times of some sigma schedules."""
    return nonlinear(x, 300)


def ours(sampler, process, steps, prediction, model=nonlinear, zs=None, first=None):
    """(x after every step, x0 estimates, t)."""
    seen, first = [], start() if first is None else first
    how = {"noise": lambda k, shape: zs[k], "progress": False, "x": first}
    how["callback"] = lambda k, t, x, x0: seen.append((x.clone(), x0.clone(), float(t)))
    fastdiff.sample(model, SHAPE, process, sampler, steps, prediction, **how)
    return seen


def upstream_of(make, **options):
    scheduler = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    scheduler.alphas_cumprod = VP.alpha_bar.clone()
    return scheduler


def exact_sigmas(upstream, path):
    """Compare upstream's sigmas with ours, and give it ours in float64 (repeated as Heun has them)."""
    flow = isinstance(path.levels.process, fastdiff.RectifiedFlow)
    mine = path.sigma if flow else path.sigma / path.alpha
    theirs = upstream.sigmas.double()
    heun = len(theirs) == 2 * len(mine) - 2
    if heun:
        mine = torch.cat([mine[:1], mine[1:-1].repeat_interleave(2), mine[-1:]])
    assert len(theirs) == len(mine)
    # Some are made in fp32 arithmetic upstream, Karras's as a seventh power: 7 roundings, 4 times over at most.
    torch.testing.assert_close(theirs, mine, rtol=28 * F32, atol=1e-7)
    upstream.sigmas = mine
    return mine


def assert_trajectory(mine, theirs, tolerance=1e-5):
    scale = max(1.0, *(float(x.abs().max()) for x in theirs))
    assert len(mine) == len(theirs)
    for k, (a, b) in enumerate(zip(mine, theirs)):
        assert bool(b.isfinite().all())
        off = float((a - b).abs().max())
        assert off <= tolerance * scale, f"step {k}: {off:.2e} of {scale:.2e}"


def compare(make, sampler, steps, prediction, *, model=nonlinear, zs=None, heun=False, sigma_space=True, **options):
    """Run both and compare x (and the times) at every step."""
    upstream = upstream_of(make, prediction_type=prediction, **options)
    upstream.set_timesteps(steps)
    path = sampler.path(VP, steps)
    exact_sigmas(upstream, path)
    x = start() / path.alpha[0].float() if sigma_space else start()
    theirs, times = [], []
    with torch.no_grad():
        for k, t in enumerate(upstream.timesteps):
            told = upstream.scale_model_input(x, t)
            extra = {"variance_noise": zs[k]} if zs is not None and not sigma_space else {}
            x = upstream.step(model(told, t), t, x, **extra).prev_sample
            assert x.dtype == torch.float32
            if not heun or k % 2 == 1 or k == len(upstream.timesteps) - 1:
                theirs.append(x)
                times.append(float(t))
    if sigma_space:
        theirs = [x * alpha for x, alpha in zip(theirs, path.alpha[1:].float())]
    mine = ours(sampler, VP, steps, prediction, model, zs)
    assert_trajectory([x for x, _, _ in mine], theirs)
    return [t for *_, t in mine], upstream.timesteps.tolist()


def given_noise(monkeypatch, module, zs):
    remaining = iter(zs)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **how: next(remaining))


# --------------------------------------------------------------------------------------------- Euler and its ancestral


@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_euler(steps, prediction, spacing, offset):
    sampler = samplers.Euler(spacing=spacing, steps_offset=offset)
    told = compare(
        diffusers.EulerDiscreteScheduler, sampler, steps, prediction, timestep_spacing=spacing, steps_offset=offset
    )
    assert np.allclose(*told, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_euler_sigmas(steps, prediction, schedule):
    """Upstream takes the ends from the spacing (its default "linspace" has both); ours from the process."""
    options = {f"use_{schedule}_sigmas": True, "timestep_spacing": "linspace"}
    sampler = samplers.Euler(sigmas=schedule)
    mine, theirs = compare(diffusers.EulerDiscreteScheduler, sampler, steps, prediction, **options)
    assert np.allclose(mine, theirs, atol=0.01)


@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])  # upstream has no "sample"
@pytest.mark.parametrize("steps", STEPS)
def test_euler_ancestral(steps, prediction, spacing, offset, monkeypatch):
    zs = noises(steps)
    given_noise(monkeypatch, diffusers.schedulers.scheduling_euler_ancestral_discrete, zs)
    sampler = samplers.EulerAncestral(spacing=spacing, steps_offset=offset)
    make = diffusers.EulerAncestralDiscreteScheduler
    compare(make, sampler, steps, prediction, zs=zs, timestep_spacing=spacing, steps_offset=offset)


def test_euler_to_sigma_min():
    sigma_min = float(((1 - VP.alpha_bar[0]) / VP.alpha_bar[0]).sqrt())
    sampler = samplers.Euler(final_sigma=sigma_min)
    options = {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}
    compare(diffusers.EulerDiscreteScheduler, sampler, 20, "epsilon", **options)


# ---------------------------------------------------------------------------------------------------------------- Heun


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_heun(steps, prediction, spacing, offset, clip):
    sampler = samplers.Heun(spacing=spacing, steps_offset=offset, clip=clip)
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    compare(
        diffusers.HeunDiscreteScheduler, sampler, steps, prediction, heun=True, clip_sample=clip is not None, **options
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_heun_sigmas(steps, schedule):
    options = {f"use_{schedule}_sigmas": True, "timestep_spacing": "linspace"}
    compare(diffusers.HeunDiscreteScheduler, samplers.Heun(sigmas=schedule), steps, "epsilon", heun=True, **options)


# -------------------------------------------------------------------------------------------------------- DPM-Solver++


@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order, solver_type", [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_pp(steps, order, solver_type, prediction, spacing, offset):
    sampler = samplers.DPMSolverPP(order=order, solver_type=solver_type, spacing=spacing, steps_offset=offset)
    options = {"timestep_spacing": spacing, "steps_offset": offset, "solver_order": order, "solver_type": solver_type}
    make = diffusers.DPMSolverMultistepScheduler
    mine, theirs = compare(make, sampler, steps, prediction, sigma_space=False, **options)
    assert mine == theirs


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_pp_sde(steps, order, prediction, solver_type):
    sampler = samplers.DPMSolverPP(order=order, eta=1.0, solver_type=solver_type)
    options = {
        "timestep_spacing": "trailing",
        "solver_order": order,
        "solver_type": solver_type,
        "algorithm_type": "sde-dpmsolver++",
    }
    make = diffusers.DPMSolverMultistepScheduler
    compare(make, sampler, steps, prediction, zs=noises(steps), sigma_space=False, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["dpm", "unipc"])
@pytest.mark.parametrize("steps", STEPS)
def test_multistep_sigmas(steps, name, schedule):
    """(Upstream rounds or cuts off the times that it tells the network here.)"""
    make = {"dpm": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[name]
    sampler = {"dpm": samplers.DPMSolverPP, "unipc": samplers.UniPC}[name](sigmas=schedule)
    options = {f"use_{schedule}_sigmas": True, "final_sigmas_type": "zero"}
    mine, theirs = compare(make, sampler, steps, "epsilon", model=timeless, sigma_space=False, **options)
    assert np.allclose(mine, theirs, atol=1.0)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [5, 20])
def test_multistep_to_sigma_min(steps, order, lower):
    """Ending above 0, where nothing forces the last step to first order."""
    sigma_min = float(((1 - VP.alpha_bar[0]) / VP.alpha_bar[0]).sqrt())
    options = {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "solver_order": order}
    for make, sampler in (
        (diffusers.DPMSolverMultistepScheduler, samplers.DPMSolverPP),
        (diffusers.UniPCMultistepScheduler, samplers.UniPC),
    ):
        lowers = None if lower and sampler is samplers.DPMSolverPP else lower
        mine = sampler(order=order, lower_order_final=lowers, final_sigma=sigma_min)
        compare(make, mine, steps, "v_prediction", sigma_space=False, lower_order_final=lower, **options)


# --------------------------------------------------------------------------------------------------------------- UniPC


@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order, solver_type", [(1, "bh2"), (2, "bh2"), (3, "bh2")])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc(steps, order, solver_type, prediction, spacing, offset):
    sampler = samplers.UniPC(order=order, solver_type=solver_type, spacing=spacing, steps_offset=offset)
    options = {"timestep_spacing": spacing, "steps_offset": offset, "solver_order": order, "solver_type": solver_type}
    mine, theirs = compare(diffusers.UniPCMultistepScheduler, sampler, steps, prediction, sigma_space=False, **options)
    assert mine == theirs


def test_unipc_without_its_corrector():
    sampler = samplers.UniPC(disable_corrector=[0, 3, 4], order=3)
    options = {"timestep_spacing": "trailing", "disable_corrector": [0, 3, 4], "solver_order": 3}
    compare(diffusers.UniPCMultistepScheduler, sampler, 20, "epsilon", sigma_space=False, **options)


# ----------------------------------------------------------------------------------------------------------------- LCM


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 5, 7, 20, 50])
def test_lcm(steps, prediction, clip, monkeypatch):
    zs = noises(steps)
    given_noise(monkeypatch, diffusers.schedulers.scheduling_lcm, zs)
    upstream = upstream_of(diffusers.LCMScheduler, prediction_type=prediction, clip_sample=clip is not None)
    upstream.set_timesteps(steps)
    x, theirs = start(), []
    for t in upstream.timesteps:
        x = upstream.step(nonlinear(x, t), t, x).prev_sample
        theirs.append(x)
    mine = ours(samplers.LCM(clip=clip), VP, steps, prediction, zs=zs)
    assert [t for *_, t in mine] == upstream.timesteps.tolist()
    assert_trajectory([x for x, _, _ in mine], theirs)


# --------------------------------------------------------------------------------------------------------------- flows


def flow_network(x, t):
    return nonlinear(x, float(t.reshape(-1)[0]) * 1000)


def flow_times(shift, steps):
    """Upstream's default grid: the ends of its shifted sigmas, evenly spaced, and shifted once more (twice, in all)."""
    low = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    return np.linspace(1, low, steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["euler", "heun", "stochastic", "lcm"])
def test_flows(kind, steps, shift, monkeypatch):
    process, zs = fastdiff.RectifiedFlow(shift=shift), noises(steps)
    make = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler,
        "stochastic": diffusers.FlowMatchEulerDiscreteScheduler,
        "lcm": diffusers.FlowMatchLCMScheduler,
    }[kind]
    upstream = make(shift=shift, **({"stochastic_sampling": True} if kind == "stochastic" else {}))
    if kind == "lcm":
        times = np.linspace(1, 1 / steps, steps)
        upstream.set_timesteps(steps, sigmas=times)
    else:
        times = flow_times(shift, steps)
        upstream.set_timesteps(steps)
    make_ours = {"euler": samplers.FlowEuler, "heun": samplers.FlowHeun}.get(kind, samplers.FlowLCM)
    sampler = make_ours(timesteps=times.tolist())
    exact_sigmas(upstream, sampler.path(process, None))
    name = "lcm" if kind == "lcm" else "euler_discrete"
    given_noise(monkeypatch, getattr(diffusers.schedulers, f"scheduling_flow_match_{name}"), zs)
    x, theirs = start(), []
    for k, t in enumerate(upstream.timesteps):
        x = upstream.step(flow_network(x, t / 1000), t, x).prev_sample
        if kind != "heun" or k % 2 == 1 or k == len(upstream.timesteps) - 1:
            theirs.append(x)
    mine = [x for x, _, _ in ours(sampler, process, None, "flow", flow_network, zs)]
    assert_trajectory(mine, theirs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_flow_sigmas(steps, schedule):
    """A sigma schedule between the ends of the shifted sigmas; it is not shifted again."""
    upstream = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{f"use_{schedule}_sigmas": True})
    upstream.set_timesteps(steps)
    process = fastdiff.RectifiedFlow(shift=3.0)
    low = float(process.levels(flow_times(3.0, 2)[-1:]).sigma)
    sampler = samplers.FlowEuler(sigmas=schedule, sigma_min=low)
    exact_sigmas(upstream, sampler.path(process, steps))
    x, theirs = start(), []
    for t in upstream.timesteps:
        x = upstream.step(flow_network(x, t / 1000), t, x).prev_sample
        theirs.append(x)
    assert_trajectory([x for x, _, _ in ours(sampler, process, steps, "flow", flow_network)], theirs)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["dpm", "unipc"])
@pytest.mark.parametrize("steps", STEPS)
def test_multistep_on_flows(steps, name, shift, order):
    make = {"dpm": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[name]
    how = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction", "solver_order": order}
    upstream = make(final_sigmas_type="zero", **how)
    upstream.set_timesteps(steps)
    process = fastdiff.RectifiedFlow(shift=shift)
    times = upstream.timesteps / 1000  # cut off upstream, and so far told
    sampler = {"dpm": samplers.DPMSolverPP, "unipc": samplers.UniPC}[name](
        sigmas=upstream.sigmas[:-1].double().tolist(), order=order
    )
    exact_sigmas(upstream, sampler.path(process, None))
    x, theirs = start(), []
    for t in upstream.timesteps:
        x = upstream.step(timeless(x, t), t, x).prev_sample
        theirs.append(x)
    mine = ours(sampler, process, None, "flow", timeless)
    told = process.levels([t for *_, t in mine]).sigma
    assert np.allclose(told, times, atol=1.1e-3)
    assert_trajectory([x for x, _, _ in mine], theirs)


# ----------------------------------------------------------------------------------------------------------------- EDM


def edm_network(x, t):
    return nonlinear(x, float(t.reshape(-1)[0]) * 100 + 400)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["euler", "dpm 1", "dpm 2", "dpm 3", "dpm 2 sde"])
def test_edm(kind, steps, schedule):
    """diffusers' EDM schedulers: process EDM, prediction "edm" (its "epsilon"), c_in and ln(sigma) / 4 included."""
    process, zs = fastdiff.EDM(), noises(steps)
    how = {"sigma_schedule": schedule}
    if kind == "euler":
        upstream, sampler = diffusers.EDMEulerScheduler(**how), samplers.Euler(sigmas=schedule)
    else:
        order = int(kind.split()[1])
        algorithm = "sde-dpmsolver++" if "sde" in kind else "dpmsolver++"
        upstream = diffusers.EDMDPMSolverMultistepScheduler(solver_order=order, algorithm_type=algorithm, **how)
        sampler = samplers.DPMSolverPP(order=order, eta=float("sde" in kind), sigmas=schedule)
    upstream.set_timesteps(steps)
    exact_sigmas(upstream, sampler.path(process, steps))
    remaining = iter(zs)
    name = f"scheduling_edm_{'euler' if kind == 'euler' else 'dpmsolver_multistep'}"
    x, theirs = 80 * start(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(diffusers.schedulers, name), "randn_tensor", lambda *args, **how: next(remaining))
        for t in upstream.timesteps:
            x = upstream.step(edm_network(upstream.scale_model_input(x, t), t), t, x).prev_sample
            theirs.append(x)
    mine = ours(sampler, process, steps, "edm", edm_network, zs, first=80 * start())
    assert_trajectory([x for x, _, _ in mine], theirs)


# ------------------------------------------------------------------- upstream's settings that are wrong, and right here


@pytest.mark.parametrize("options", [{"solver_type": "bh1"}, {"lower_order_final": False}], ids=["bh1", "full order"])
def test_upstream_unipc_is_nan_at_clean_data_and_right_here(options):
    """The last step to sigma = 0 is infinitely long in log-SNR: upstream has inf - inf there with B(h) = h, and with
    full order to the end. Here that step is of first order, which is x0 itself."""
    upstream = upstream_of(diffusers.UniPCMultistepScheduler, timestep_spacing="trailing", **options)
    upstream.set_timesteps(20)
    sampler = samplers.UniPC(**options)
    exact_sigmas(upstream, sampler.path(VP, 20))
    x, theirs = start(), []
    for t in upstream.timesteps:
        x = upstream.step(nonlinear(x, t), t, x).prev_sample
        theirs.append(x)
    assert not bool(theirs[-1].isfinite().all())
    mine = ours(sampler, VP, 20, "epsilon")
    assert_trajectory([x for x, _, _ in mine[:-1]], theirs[:-1])
    assert torch.equal(mine[-1][0], mine[-1][1])


@pytest.mark.parametrize("make", [samplers.DPMSolverPP, samplers.UniPC, samplers.Euler])
def test_a_step_that_goes_nowhere_is_refused(make):
    """Upstream's UniPC and DPM-Solver++ on Karras sigmas with final_sigmas_type="sigma_min" end with two equal sigmas:
    a wasted call of the network, and h = 0 to divide by."""
    with pytest.raises(ValueError, match="the noise must fall"):
        make(sigmas="karras", sigma_min=0.03, final_sigma=0.03).path(VP, 20)


def test_upstream_third_order_sde_has_a_wrong_sign():
    """The weight of the second difference there is (1 - e^-2h - 2h) / (2h)^2 - 1/2; the exponential integrator's is
    that plus 1/2. Left out, the two agree; ours is k-diffusion's."""
    h = torch.tensor(0.5, dtype=torch.float64)
    z = 2 * h
    weights = multistep_weights(z, [1.0, 1.0])
    phi_2 = 1 - (-torch.expm1(-z)) / z
    curve = -float(phi_2) / 2 + float(phi_2 / z - 0.5) / 2
    assert float(weights[2]) == pytest.approx(-curve)
    # integral of e^(tau - z) tau^2 / 2 over [0, z], over z^2: what a third-order step weighs a second derivative with
    tau = torch.linspace(0, float(z), 20001, dtype=torch.float64)
    exact = torch.trapezoid(torch.exp(tau - z) * tau**2 / 2, tau) / z**2
    assert float(-(phi_2 / z - 0.5)) == pytest.approx(float(exact), rel=1e-6)
    wrong = (1 - torch.exp(-z) - z) / z**2 - 0.5
    assert float(wrong) != pytest.approx(float(exact), rel=0.5)
