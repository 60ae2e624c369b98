"""Runs of ``fastdiff.sample`` at their edges: what a callback writes, a second leg, strides of given timesteps, batches
of none, samples of one number; and settings that are whole numbers of another kind."""

import copy
import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff import timesteps as ts
from fastdiff.integrations import flow, training_scripts

VP, FLOW = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()
SHAPE = (2, 3, 4, 4)
START = torch.linspace(-2, 2, 96).view(SHAPE)


def net(x, t, cond=None):
    out = torch.sin(x + t.view(-1, *(1,) * (x.ndim - 1)) / 1000)
    return out if cond is None else out * cond.view(-1, *(1,) * (x.ndim - 1))


def run(sampler="ddim", steps=None, shape=SHAPE, process=VP, prediction="epsilon", model=net, **how):
    return fastdiff.sample(model, shape, process, sampler, steps, prediction, **({"progress": False} | how))


GUIDED = {"cond": torch.ones(2), "uncond": torch.full((2,), 0.5), "guidance": 2.0}


# ------------------------------------------------------------------------------------------ what a callback writes in x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "options",
    [{}, GUIDED, GUIDED | {"guidance_rescale": 0.5}, GUIDED | {"guidance_interval": (300, 700)},
     {"dynamic_thresholding": 0.9}, {"return_trajectory": True}, {"seed": 3}],
    ids=["plain", "guided", "rescaled", "in an interval", "thresholded", "trajectory", "noise"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("sampler", "process", "prediction"),
    [("ddim", VP, "epsilon"), ("ddpm", VP, "epsilon"), ("euler", VP, "epsilon"), ("euler", fastdiff.EDM(), "edm"),
     ("flow_euler", FLOW, "flow")],
)  # fmt: skip
def test_a_run_goes_on_from_what_a_callback_wrote(backend, sampler, process, prediction, options, mode):
    """The network is called with it next, in both halves of a guided batch; written into ``.data`` too, which leaves no
    trace."""
    edits = [lambda x: x.mul_(0.5), lambda x: x.data.add_(0.1), lambda x: x.clamp_(-1, 1)]
    left, seen = [], []

    def callback(step, t, x, x0):
        edits[step % 3](x)
        x0.fill_(math.nan)  # changes nothing
        left.append(x.clone())

    def model(x, t, cond=None):
        seen.append(x.clone())
        return net(x, t, cond)

    how = {"steps": 5, "x": START.clone(), "process": process, "prediction": prediction} | {"seed": 1} | options
    with mode():
        found = run(sampler, callback=callback, model=model, **how)
        untouched = run(sampler, **how)
    found, untouched = (x[0] if isinstance(x, tuple) else x for x in (found, untouched))
    assert torch.equal(found, left[-1]) and (untouched - found).abs().max() > 1e-2
    for x, inputs in zip(left, seen[1:]):
        for half in inputs.split(2):
            scale = (half * x).sum() / (x * x).sum()  # 1, or EDM's c_in
            assert prediction == "edm" or scale == pytest.approx(1, abs=1e-6)
            torch.testing.assert_close(half, scale * x, rtol=1e-5, atol=1e-6)


def ddim_by_hand(factor, guidance):
    ab, x = VP.alpha_bar, START.double()
    times = [999, 799, 599, 399, 199]
    for t, after in zip(times, [*times[1:], None]):
        p, q = ab[t], 1.0 if after is None else ab[after]
        now = torch.full((2,), t)
        m = net(x, now).double() * (0.5 + guidance * 0.5 if guidance else 1)
        x = (q**0.5 * (x - (1 - p) ** 0.5 * m) / p**0.5 + (1 - q) ** 0.5 * m) * factor
    return x


@pytest.mark.parametrize("factor", [0.5, 0.9])
@pytest.mark.parametrize("options", [{}, GUIDED])
def test_a_projection_by_hand(factor, options):
    sampler = samplers.DDIM(timesteps=[999, 799, 599, 399, 199])
    found = run(sampler, x=START.clone(), callback=lambda k, t, x, x0: x.mul_(factor), **options)
    right = ddim_by_hand(factor, options.get("guidance"))
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- a second leg


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "flow_stochastic"])
@pytest.mark.parametrize("cut", [2, 4])
def test_two_legs_are_one_run(backend, name, cut):
    """With the number of steps made, a second leg adds the noise of its own steps; without, that of the first."""
    flows = name.startswith("flow")
    names = {"ddpm": samplers.DDPM, "euler_ancestral": samplers.EulerAncestral}
    cls = names.get(name) or type(samplers.get("flow_lcm"))
    process, kind = (FLOW, "flow") if flows else (VP, "epsilon")
    times = [0.9, 0.7, 0.5, 0.35, 0.2, 0.1] if flows else [900, 700, 500, 350, 200, 100]

    def leg(times, x, **how):
        return run(cls(timesteps=times), x=x, process=process, prediction=kind, seed=5, **how)

    path = run(cls(timesteps=times), x=START, process=process, prediction=kind, seed=5, return_trajectory=True)[1]
    second = leg(times[cut:], path[cut], step_offset=cut)
    torch.testing.assert_close(second, path[-1], rtol=1e-5, atol=1e-5)
    again = leg(times[cut:], path[cut])
    assert (again - path[-1]).abs().max() > 1e-2


def test_the_noise_of_a_leg_is_asked_by_its_steps():
    asked = []

    def noise(step, shape):
        asked.append(step)
        return torch.zeros(shape)

    run(samplers.DDPM(timesteps=[500, 300, 100]), x=START, noise=noise, step_offset=7)
    assert asked == [7, 8]
    for value, error in ((-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="step_offset must be"):
            run(steps=3, step_offset=value)


# -------------------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [50, 30, 7])
def test_a_stride_of_given_timesteps(spacing, steps):
    """The whole list of a spacing has its stride; a part at equal distances has that distance."""
    full = samplers.DDIM(spacing=spacing, previous="stride")
    times = full.plan(VP, steps, "epsilon").times.tolist()
    given = samplers.DDIM(timesteps=times, previous="stride")
    assert torch.equal(given.plan(VP, None, "epsilon").table, full.plan(VP, steps, "epsilon").table)
    tail = samplers.DDIM(timesteps=times[3:], previous="stride")
    if len({a - b for a, b in zip(times, times[1:])}) == 1:
        assert torch.equal(tail.plan(VP, None, "epsilon").table, full.plan(VP, steps, "epsilon").table[3:])
    else:
        with pytest.raises(ValueError, match="previous='stride' cannot tell the stride of timesteps"):
            tail.plan(VP, None, "epsilon")


def test_strides_that_nobody_knows():
    for times in ([990, 800, 500, 100], [500], [999, 998, 1]):
        with pytest.raises(ValueError, match="use previous='next'"):
            run(samplers.DDIM(timesteps=times, previous="stride"))


# ------------------------------------------------------------------------------------------- no samples, samples of one


@pytest.mark.parametrize("name", samplers.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_none(backend, name, dtype):
    flows = name.startswith("flow")
    process, kind = (FLOW, "flow") if flows else (VP, "epsilon")
    found, path = run(name, 4, (0, 3, 8, 8), process, kind, dtype=dtype, seed=1, return_trajectory=True)
    steps = 4 + 3 * (name == "predictor_corrector")
    assert found.shape == (0, 3, 8, 8) and found.dtype == dtype and path.shape == (1 + steps, 0, 3, 8, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"cond": torch.empty(0), "uncond": torch.empty(0), "guidance": 3.0},
        {"cond": torch.empty(0), "uncond": torch.empty(0), "guidance": 3.0, "guidance_rescale": 0.7},
        {"dynamic_thresholding": 0.9},
        {"known": torch.empty(0, 3, 8, 8), "mask": torch.ones(1, 1, 8, 8), "seed": 2},
        {"generator": []},
        {"callback": lambda *a: None},
    ],
)
def test_options_of_a_batch_of_none(backend, options):
    assert run("ddpm", 4, (0, 3, 8, 8), **options).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_one_number(backend, dtype):
    """Thresholding clamps each to [-1, 1]; rescaled guidance, for which one number has no deviation, is guidance."""
    x0, cond = torch.linspace(-2, 2, 5, dtype=dtype), torch.ones(5)
    guided = {"cond": cond, "uncond": 0.5 * cond, "guidance": 2.0}
    how = {"steps": 4, "shape": (5,), "x": x0, "dtype": dtype}
    plain = run(**how, **guided)
    torch.testing.assert_close(run(**how, **guided, guidance_rescale=0.5), plain)
    clipped = run(samplers.DDIM(clip=1.0), **how)
    torch.testing.assert_close(run(**how, dynamic_thresholding=0.9), clipped, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- whole numbers, &c.


def test_whole_numbers_of_other_kinds(backend):
    x0, t = torch.randn(SHAPE), torch.tensor([3, 500])
    objective = fastdiff.Objective(VP)
    expected = objective.noise(x0, t, seed=3, sample_offset=4)
    for four in (np.int64(4), np.uint8(4), torch.tensor(4)):
        assert torch.equal(objective.noise(x0, t, seed=3, sample_offset=four).x_t, expected.x_t)
        kept = objective.noise(x0, t, seed=3, sample_offset=four, keep_noise=False)
        assert torch.equal(kept.noise, expected.noise)
        assert torch.equal(fastdiff.ops.materialize(fastdiff.ops.Philox(3, four), SHAPE, x0.device), expected.noise)
        assert torch.equal(run(steps=four, seed=1, sample_offset=four), run(steps=4, seed=1, sample_offset=4))
    for call in (
        lambda: objective.noise(x0, t, seed=3, sample_offset=1.5),
        lambda: fastdiff.ops.Philox(3, 1.5),
        lambda: run(steps=4, sample_offset=1.5),
        lambda: run(steps=2.5),
        lambda: run("euler", steps=4.0),
    ):
        with pytest.raises(TypeError, match="must be a whole number; got"):
            call()


def test_time_samplers_are_looked_at_when_they_are_set():
    objective = fastdiff.Objective(FLOW, "flow")
    objective.timesteps = "logit_normal"
    assert objective.timesteps == ts.LogitNormal()
    for value, error in ((ts.LogitNormal, TypeError), ("nonsense", ValueError), (3, TypeError)):
        with pytest.raises(error):
            objective.timesteps = value
    for cls in (samplers.Euler, samplers.DDPM, samplers.LCM):
        with pytest.raises(TypeError, match="timesteps must be numbers, the noisiest first; got <function"):
            cls(timesteps=lambda n: [999])


def test_what_a_noised_batch_says_of_itself():
    x0 = torch.randn(64, 3, 8, 8)
    kept = fastdiff.Objective(VP).noise(x0, seed=3)
    assert repr(kept).startswith("Noised(x_t=tensor float32 [64, 3, 8, 8], t=tensor int64 [64], VariancePreserving(")
    assert repr(copy.deepcopy(kept)) == repr(kept)
    t, one = torch.rand(2), torch.ones(2, 1)

    class Matcher:
        sigma = 0.0

        def compute_mu_t(self, x0, x1, t):
            return t.view(-1, *(1,) * (x0.ndim - 1)) * x1 + (1 - t.view(-1, *(1,) * (x0.ndim - 1))) * x0

        def compute_sigma_t(self, t):
            return 0.0

        def compute_conditional_flow(self, x0, x1, t, xt):
            return x1 - x0

    assert repr(flow.noise(Matcher(), one, one, t)) == "FlowNoised(x_t (2, 1) of torch.float32 on cpu, t (2,))"


def test_a_form_without_effect_is_said():
    for form in ("plus_one", "shifted"):
        with pytest.warns(UserWarning, match=f"form='{form}'.*has no effect with error_space='sample'"):
            fastdiff.Objective(VP, "v_prediction", fastdiff.MinSNR(5.0, form), error_space="sample")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.Objective(VP, "v_prediction", fastdiff.MinSNR(5.0, "plus_one"))
        fastdiff.Objective(VP, "epsilon", fastdiff.MinSNR(5.0, "plus_one"))  # the same in every form
        fastdiff.Objective(VP, "v_prediction", fastdiff.MinSNR(5.0), error_space="sample")


@pytest.mark.parametrize("frames", [(), (3,), (1, 3, 1, 1)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_prior_preservation_by_frames(frames, kind):
    diffusers = pytest.importorskip("diffusers")
    g = torch.Generator().manual_seed(1)
    x0, n, p = (torch.randn(4, 2, 3, 5, 5, generator=g) for _ in range(3))
    if frames == (3,):
        x0, n, p = (x.transpose(1, 2).contiguous() for x in (x0, n, p))
    t = torch.randint(50, 950, (4, *frames), generator=g)
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    a = scheduler.alphas_cumprod.double()[t]
    a = a.reshape(*a.shape, *(1,) * (5 - a.ndim))
    snr = a / (1 - a)
    target = n.double() if kind == "epsilon" else a.sqrt() * n - (1 - a).sqrt() * x0
    error = (p.double() - target) ** 2
    weight = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    for prior in (0.5, 1.0):
        script = training_scripts.dreambooth(scheduler, snr_gamma=5.0, prior_loss_weight=prior)
        found = script.loss(p, script.noise(x0, t, n))
        right = (weight * error)[:2].mean() + prior * error[2:].mean()
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0)


def test_a_plan_of_a_range_of_timesteps_is_kept(monkeypatch):
    """A range never changes, so neither does what was made from it."""
    made = []
    plan = fastdiff.samplers.DDIM.plan
    monkeypatch.setattr(fastdiff.samplers.DDIM, "plan", lambda *given: made.append(1) or plan(*given))
    process = fastdiff.VariancePreserving()
    for _ in range(3):
        sampler = fastdiff.samplers.DDIM(timesteps=range(999, 0, -250))
        fastdiff.sample(lambda x, t: x * 0.3, (2, 3), process, sampler, None, "epsilon", seed=1, progress=False)
    assert len(made) == 1
