"""The pitfalls of samplers, one named test each. Those of DDPM and DDIM alone are in test_sampling.py: the variances
(fixed_large_log, learned), epsilon kept or rederived after a clamp, zero terminal SNR; the posterior's log-variance at
t = 0, with both its names, is in test_process.py."""

import math

import numpy as np
import oracle
import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.ops import COLUMNS
from fastdiff.samplers.spacing import discrete_timesteps

VP = fastdiff.VariancePreserving()
FLOW = fastdiff.RectifiedFlow()
SHAPE = (2, 3, 4)


def model(x, t):
    return torch.tanh(x) * 0.7


def home(name):
    """A process and prediction that a sampler works with."""
    return (FLOW, "flow") if name.startswith("flow") else (VP, "epsilon")


def run(sampler, process=VP, steps=5, prediction="epsilon", network=model, shape=SHAPE, **how):
    how = {"seed": 1, "progress": False} | how
    return fastdiff.sample(network, shape, process, sampler, steps, prediction, **how)


every_sampler = pytest.mark.parametrize("name", list(samplers.NAMES))


def test_1_fixed_large_log_is_nan_upstream_and_a_logarithm_here():
    """diffusers takes the square root of a logarithm: NaN. "fixed_large" here is exp(log / 2) of the same."""
    diffusers = pytest.importorskip("diffusers")
    upstream = diffusers.DDPMScheduler(variance_type="fixed_large_log", timestep_spacing="trailing", clip_sample=False)
    upstream.set_timesteps(5)
    x = torch.randn(SHAPE)
    assert bool(upstream.step(model(x, 0), upstream.timesteps[0], x).prev_sample.isnan().all())
    assert bool(run(samplers.DDPM("fixed_large")).isfinite().all())
    row = samplers.DDPM("fixed_large").plan(VP, 5, "epsilon").table[0]
    a, b = VP.alpha_bar[999], VP.alpha_bar[799]
    assert float(row[COLUMNS.index("c_noise")]) == pytest.approx(math.exp(0.5 * math.log(1 - a / b)))


@every_sampler
def test_2_a_clamp_acts_on_x0_alone(name):
    """With a clamp at 0.25 the x0 estimates stay within it, and the last x is one of them."""
    process, prediction = home(name)
    sampler, estimates = samplers.NAMES[name](clip=0.25), []
    x = run(sampler, process, 6, prediction, callback=lambda k, t, x, x0: estimates.append(x0))
    assert max(float(x0.abs().max()) for x0 in estimates) <= 0.25
    assert float(x.abs().max()) <= 0.25 * 1.001, "the last step ends on its x0 estimate (LCM: all but 4e-5 of it)"


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        (samplers.LCM(), [0, 1, 2, 3]),  # none on the last step
        (samplers.EulerAncestral(), [0, 1, 2, 3, 4]),  # on the last too
        (samplers.EulerAncestral(eta=0.0), []),
        (samplers.DDIM(eta=0.3), [0, 1, 2, 3, 4]),
        (samplers.DDPM(), [0, 1, 2, 3]),
        (samplers.DPMSolverPP(eta=1.0), [0, 1, 2, 3]),
        (samplers.DPMSolverPP(), []),
        (samplers.UniPC(), []),
        (samplers.Euler(s_churn=2.0), [0, 1, 2, 3, 4]),  # before each step, the first too
        (samplers.Heun(s_churn=2.0), [0, 1, 2, 3, 4]),
        (samplers.Heun(s_churn=2.0, s_tmax=5.0), [3, 4]),  # above sigma = 5 none
        (samplers.Heun(), []),
    ],
    ids=repr,
)
def test_3_number_of_noise_draws(sampler, drawn):
    asked = []

    def noise(step, shape):
        asked.append(step)
        return torch.zeros(shape)

    run(sampler, noise=noise, x=torch.randn(SHAPE))
    assert asked == drawn


def test_4_trailing_with_7_steps_is_not_one_thing():
    """DDIM upstream goes from t to t - 1000 // 7, not the next of its list; DDPM to the next. Both are here."""
    times = discrete_timesteps(1000, 7, "trailing")
    assert times == [999, 856, 713, 570, 428, 285, 142]
    nexts = samplers.DDIM(timesteps=times).plan(VP, None, "epsilon").table[0, COLUMNS.index("c_x0")]
    stride = samplers.DDIM(timesteps=times, previous="stride").plan(VP, None, "epsilon").table[0, COLUMNS.index("c_x0")]
    assert float(nexts) == pytest.approx(math.sqrt(VP.alpha_bar[856]))
    assert float(stride) == pytest.approx(math.sqrt(VP.alpha_bar[857]))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_5_zero_terminal_snr(name):
    """alpha = 0 at the first level. x stays of the data's size, where Euler upstream starts from sigma = 4096."""
    process = fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="does not determine x0"):
        run(name, process)
    seen = []
    run(
        name,
        process,
        20,
        "v_prediction",
        dtype=torch.float16,
        network=lambda x, t: seen.append(x.clone()) or model(x, t),
    )
    assert all(bool(x.isfinite().all()) and float(x.abs().max()) < 10 for x in seen)


def test_5_heun_says_that_it_cannot_start_at_zero_snr():
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="alpha is 0 at the first level"):
        run("heun", process, 5, "v_prediction")


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_6_a_final_sigma_of_zero_ends_on_x0(name, steps):
    process, prediction = home(name)
    plan = samplers.get(name).plan(process, steps, prediction)
    assert plan.table.dtype == torch.float64 and bool(plan.table.isfinite().all())
    last = dict(zip(COLUMNS, plan.table[-1].tolist()))
    if name == "lcm":
        # c_skip x + c_out x0, t >= 19: x has less than 0.25 / 190^2.
        assert 0 < last["c_x"] < 7e-6 and 1 - last["c_x0"] < 4e-6
    else:
        assert last["c_x0"] == 1 and last["c_x"] == last["c_m"] == last["c_noise"] == 0
        assert not any(last[f"c_h{j}"] for j in range(1, 5))
    assert not any(last[h] for h in ("h_x", "h_m", "h_x0")), "nothing is kept that nobody reads"


@pytest.mark.parametrize("name, order", [("dpmpp_2m", 2), ("dpmpp_3m", 3), ("unipc", 2)])
def test_7_multistep_warms_up_and_ends_low(name, order):
    """How much history each row reads: none at first, and less at the end of a short run."""

    def reads(**how):
        table = samplers.NAMES[name](**how).plan(VP, 6, "epsilon").table
        first = COLUMNS.index("c_h1")
        return [max((j + 1 for j in range(4) if row[first + j]), default=0) for row in table]

    corrects = 1 if name == "unipc" else 0  # the corrector of the step before reads one more
    usual = [min(k, order - 1) for k in range(5)]
    expected = [max(a, min(k, order - 1 + corrects)) if corrects and k else a for k, a in enumerate(usual)]
    assert reads(lower_order_final=False)[:5] == expected
    short = reads(lower_order_final=True)
    assert short[-1] == 0 and short[-2] <= max(1 + corrects, order - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "dpmpp_2m", "unipc"])
def test_8_half_precision_is_rounded_once_a_step(name, dtype):
    """Against the same step in fp32 from the same x: half a unit of the stored result, where upstream's lack of upcasts
    costs up to 1.4e-3 (float16) and 6e-3 (bfloat16)."""
    path = []

    def network(x, t):
        path.append(x.clone())
        return model(x.float(), t).to(dtype)

    z = torch.randn(SHAPE)
    last = run(name, network=network, steps=6, dtype=dtype, noise=lambda k, shape: z)
    plan = samplers.get(name).plan(VP, 6, "epsilon")
    history: list[np.ndarray] = []
    unit = torch.finfo(dtype).eps / 2
    for k, row in enumerate(plan.table):
        c = dict(zip(COLUMNS, row.tolist()))
        x = path[k].double().numpy()
        m = model(path[k].float(), None).to(dtype).double().numpy()
        x0 = c["p_x"] * x + c["p_m"] * m
        terms = [c["c_x"] * x, c["c_m"] * m, c["c_x0"] * x0, *(c[f"c_h{j + 1}"] * h for j, h in enumerate(history[:4]))]
        if plan.draws[k]:
            terms.append(c["c_noise"] * z.double().numpy())
        got = (path[k + 1] if k < 5 else last).double().numpy()
        size = sum(np.abs(term) for term in terms) + np.abs(c["c_x0"] * c["p_m"] * m) + np.abs(c["c_x0"] * c["p_x"] * x)
        oracle.assert_close(got, sum(terms), rel=unit * 1.001, absolute=16 * 2.0**-24 * size, label=f"{name} step {k}")
        history.insert(0, x0)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "lcm", "dpmpp_2m_sde", "unipc"])
def test_9_samples_do_not_depend_on_the_batch(name):
    """A list of generators, or a seed with sample_offset: the same samples whatever the batch."""

    def generators(first, count):
        return [torch.Generator().manual_seed(50 + k) for k in range(first, first + count)]

    whole = run(name, shape=(4, 3), seed=None, generator=generators(0, 4))
    parts = [run(name, shape=(2, 3), seed=None, generator=generators(k, 2)) for k in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))
    whole = run(name, shape=(4, 3), seed=9)
    assert torch.equal(whole, torch.cat([run(name, shape=(1, 3), seed=9, sample_offset=k) for k in range(4)]))


def test_9_a_list_of_generators_is_drawn_from_as_diffusers_does():
    """x first, then step by step, each sample from its own: randn_tensor of a list of generators."""
    diffusers = pytest.importorskip("diffusers")
    ours, generators = ([torch.Generator().manual_seed(k) for k in (4, 5)] for _ in range(2))
    ours = run(samplers.DDPM(), seed=None, generator=ours)
    x = torch.stack([torch.randn(3, 4, generator=g) for g in generators])
    upstream = diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False)
    upstream.alphas_cumprod = VP.alpha_bar.clone()
    upstream.set_timesteps(5)
    for t in upstream.timesteps[:-1]:
        x = upstream.step(model(x, t), t, x, generator=generators).prev_sample
    last = upstream.step(model(x, 0), upstream.timesteps[-1], x, generator=generators).pred_original_sample
    torch.testing.assert_close(ours, last, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        run(shape=(2, 3), sampler="ddpm", seed=None, generator=[torch.Generator()])


@pytest.mark.parametrize("name", ["karras", "exponential", "beta", "linear"])
@pytest.mark.parametrize("process", [VP, fastdiff.EDM(), fastdiff.VPSDE(), fastdiff.RectifiedFlow(shift=3.0)])
def test_10_sigma_schedules_have_the_ends_of_their_process(process, name):
    path = samplers.Euler(sigmas=name).path(process, 10)
    grid = samplers.Euler().path(process, 10)
    flow = isinstance(process, fastdiff.RectifiedFlow)
    level, expected = (p.sigma if flow else p.sigma / p.alpha for p in (path, grid))
    assert float(level[0]) == pytest.approx(float(expected[0]), rel=1e-9)
    if process is VP:
        expected = torch.stack([(1 / VP.alpha_bar[0] - 1).sqrt(), torch.zeros(())])
    assert float(level[-2]) == pytest.approx(float(expected[-2]), rel=1e-9)
    assert bool((level.diff() < 0).all()) and float(level[-1]) == 0


def test_10_flow_shift_is_applied_once():
    """By the process to t; never to a sigma that is given, and never to one schedule's result."""
    process = fastdiff.RectifiedFlow(shift=3.0)
    t = torch.linspace(1, 0, 9, dtype=torch.float64)
    torch.testing.assert_close(samplers.FlowEuler().path(process, 8).sigma, 3 * t / (1 + 2 * t))
    given = [0.9, 0.5, 0.1]
    path = samplers.FlowEuler(sigmas=given).path(process, None)
    torch.testing.assert_close(path.sigma, torch.tensor([*given, 0.0], dtype=torch.float64))
    told = []
    run(samplers.FlowEuler(sigmas=given), process, None, "flow", lambda x, t: told.append(float(t[0])) or model(x, t))
    assert told == pytest.approx(given)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc", "heun"])
def test_11_no_history_is_left_from_a_run_before(name):
    sampler = samplers.get(name)
    first = run(sampler)
    run(sampler, steps=7, seed=5)
    assert torch.equal(run(sampler), first)
