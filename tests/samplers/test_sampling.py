"""fastdiff.sample: closed forms, the pitfalls of samplers, guidance, seeds, callbacks."""

import collections
import math
import sys
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_rounded, to_numpy
from devices import on_every_device

import fastdiff
from fastdiff import prediction as kinds
from fastdiff import samplers
from fastdiff.ops import COLUMNS
from fastdiff.samplers.spacing import discrete_timesteps

VP = fastdiff.VariancePreserving()


def constant(x, t):
    return 0.1 * x


def run(model=constant, shape=(2, 3, 4), process=VP, sampler="ddpm", steps=5, prediction="epsilon", **how):
    how = {"seed": 1, "progress": False} | how
    return fastdiff.sample(model, shape, process, sampler, steps, prediction, **how)


def gaussian_model(process, prediction, mean, std):
    """The exact network for data N(mean, std^2): E[x0 | x_t], as the prediction kind."""

    def model(x, t):
        levels = {
            "EDM": lambda: process.levels(torch.exp(4 * t) if prediction == "edm" else t),
            "VESDE": lambda: process.levels((t / 0.01).log() / math.log(5000)),
            "RectifiedFlow": lambda: process.levels(t / (process.shift - (process.shift - 1) * t)),
        }.get(type(process).__name__, lambda: process.levels(t))()
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha, sigma = levels.alpha.view(shape), levels.sigma.view(shape)
        if prediction == "edm":
            x = x * torch.hypot(sigma, 0.5 * alpha)  # undo the input scaling
        variance = alpha**2 * std**2 + sigma**2
        x0 = mean + alpha * std**2 / variance * (x - alpha * mean)
        k_x, k_m = (k.view(shape) for k in kinds.conversion("sample", prediction, levels))
        return (k_x * x + k_m * x0).to(x.dtype)

    return model


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        (fastdiff.VariancePreserving(), "epsilon"),
        (fastdiff.VariancePreserving("cosine"), "v_prediction"),
        (fastdiff.VariancePreserving(zero_terminal_snr=True), "sample"),
        (fastdiff.RectifiedFlow(), "flow"),
        (fastdiff.RectifiedFlow(shift=3.0), "flow"),
        (fastdiff.VPSDE(), "score"),
        (fastdiff.SubVPSDE(), "epsilon"),
        (fastdiff.VESDE(), "epsilon"),
        (fastdiff.VPSDE(t_min=1e-2), "score"),
        (fastdiff.Cosine(), "v_prediction"),
        (fastdiff.TrigFlow(0.2), "trigflow"),
        (fastdiff.EDM(), "edm"),
        (fastdiff.EDM(), "sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_gaussian_data_comes_out_with_its_mean_and_deviation(process, prediction, sampler):
    """Data N(0.5, 0.2^2), the exact network, every process; many steps: little but sampling error is left."""
    model = gaussian_model(process, prediction, 0.5, 0.2)
    x = run(model, (1000, 8), process, sampler, 500 if sampler == "ddpm" else 200, prediction, dtype=torch.float64)
    # 8000 samples: the mean deviates by 0.2 / 89 = 0.0022, the deviation by 0.0016; five of these, and 2% of the
    # deviation for the discretisation.
    assert x.mean().item() == pytest.approx(0.5, abs=0.011)
    assert x.std().item() == pytest.approx(0.2, abs=0.012)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_variances_against_the_paper(variance):
    """One step in float64 by the papers' formulas. A learned variance is a log-variance (not, as in a popular
    scheduler, a variance), and a learned range interpolates logarithms."""
    x, m, v, z = torch.randn(4, 2, 3, 4, dtype=torch.float64)
    v = v.clamp(-1, 1)

    def model(x, t):
        return torch.cat([m, v], 1) if variance.startswith("learned") else m

    seen = []
    how = {"timesteps": [600, 300, 0], "variance": variance}
    run(
        model, (2, 3, 4), VP, samplers.DDPM(**how), None, x=x, dtype=torch.float64,
        noise=lambda k, shape: z, callback=lambda k, t, y, x0: seen.append(y),
    )  # fmt: skip
    abar = VP.alpha_bar.numpy()
    x0 = (x.numpy() - (1 - abar[600]) ** 0.5 * m.numpy()) / abar[600] ** 0.5
    beta = 1 - abar[600] / abar[300]
    small = (1 - abar[300]) / (1 - abar[600]) * beta
    log_variance = {
        "fixed_small": math.log(small),
        "fixed_large": math.log(beta),
        "learned": v.numpy(),
        "learned_range": (v.numpy() + 1) / 2 * math.log(beta) + (1 - v.numpy()) / 2 * math.log(small),
    }[variance]
    mean = oracle.ddpm_step(x.numpy(), x0, abar[600], abar[300], 0 * z.numpy())
    expected = mean + np.exp(np.asarray(log_variance) / 2) * z.numpy()
    torch.testing.assert_close(seen[0], torch.as_tensor(expected.astype("float64")), rtol=1e-11, atol=1e-11)


def test_previous_sample_prediction_is_its_own_mean():
    """A network that predicts the posterior mean, all steps: the mean is the output itself."""
    process = fastdiff.VariancePreserving(steps=10, beta_end=0.3)
    outputs, seen = [], []

    def model(x, t):
        outputs.append(torch.tanh(x) * (1 + t[0].item()))
        return outputs[-1]

    run(
        model, (2, 3), process, "ddpm", None, "previous_sample", dtype=torch.float64,
        noise=lambda k, shape: torch.zeros(shape), callback=lambda k, t, x, x0: seen.append(x),
    )  # fmt: skip
    for x, mean in zip(seen, outputs):
        torch.testing.assert_close(x, mean, rtol=1e-9, atol=1e-9)


def test_clamped_x0_keeps_or_rederives_epsilon():
    """Both customs, by a flag: the difference was 1.4 relative on one step."""
    x, m = 3 * torch.randn(2, 2, 50, dtype=torch.float64)
    seen = {}
    for rederive in (False, True):
        sampler = samplers.DDIM(clip=1.0, rederive_epsilon=rederive, timesteps=[900, 400])
        how = {"x": x, "dtype": torch.float64}
        how["callback"] = lambda k, t, y, x0, rederive=rederive: seen.setdefault(rederive, (y, x0))
        run(lambda x, t: m, (2, 50), VP, sampler, None, **how)
    a, b = VP.alpha_bar[900], VP.alpha_bar[400]
    x0 = ((x - (1 - a).sqrt() * m) / a.sqrt()).clamp(-1, 1)
    for rederive, epsilon in ((False, m), (True, (x - a.sqrt() * x0) / (1 - a).sqrt())):
        y, estimate = seen[rederive]
        torch.testing.assert_close(estimate, x0)
        torch.testing.assert_close(y, b.sqrt() * x0 + (1 - b).sqrt() * epsilon)


@pytest.mark.parametrize(
    ("sampler", "steps", "drawn"),
    [
        (samplers.DDPM(), 5, 4),  # none on the last step
        (samplers.DDPM(spacing="leading"), 5, 4),  # its last t is 0
        (samplers.DDPM(final_noise=True), 5, 5),  # its last t is 199, and diffusers draws there
        (samplers.DDPM(spacing="leading", final_noise=True), 5, 4),
        (samplers.DDIM(), 5, 0),
        (samplers.DDIM(eta=0.5), 5, 5),  # DDIM draws on the last step too
    ],
)
def test_number_of_noise_draws(sampler, steps, drawn):
    calls = []

    def noise(k, shape):
        calls.append(k)
        return torch.zeros(shape)

    run(sampler=sampler, steps=steps, noise=noise)
    assert calls == list(range(drawn))


def test_timestep_spacings():
    assert discrete_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert discrete_timesteps(1000, 4, "leading") == [750, 500, 250, 0]
    assert discrete_timesteps(1000, 4, "leading", 1) == [751, 501, 251, 1]
    assert discrete_timesteps(1000, 4, "linspace") == [999, 666, 333, 0]
    assert discrete_timesteps(1000, 1, "linspace") == [0]
    for steps in range(1, 1001):
        for spacing in ("trailing", "leading", "linspace"):
            assert len(discrete_timesteps(1000, steps, spacing)) == steps


def test_zero_terminal_snr_needs_a_prediction_that_knows_x0_there():
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="does not determine x0 at t = 999"):
        run(process=process)
    assert bool(run(process=process, prediction="v_prediction").isfinite().all())
    late = samplers.DDPM(timesteps=[998, 500, 1])
    assert bool(run(process=process, sampler=late, steps=None).isfinite().all())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(("process", "prediction"), [(VP, "epsilon"), (fastdiff.RectifiedFlow(), "flow")])
def test_tables_are_finite_and_end_on_x0(sampler, process, prediction):
    """The last level is clean: its log-SNR is infinite, and the step must come out as x0 itself."""
    for steps in (1, 2, 7, 50):
        table = samplers.get(sampler).plan(process, steps, prediction).table
        assert table.dtype == torch.float64 and bool(table.isfinite().all())
        last = dict(zip(COLUMNS, table[-1].tolist()))
        assert last["c_x0"] == 1 and last["c_x"] == last["c_m"] == last["c_noise"] == 0


def test_flow_ddim_is_eulers_method():
    process = fastdiff.RectifiedFlow(shift=3.0)

    def model(x, t):
        return torch.sin(3 * x) + t.view(-1, 1)

    x = torch.randn(4, 5, dtype=torch.float64)
    got = run(model, (4, 5), process, "ddim", 10, "flow", x=x, dtype=torch.float64)
    sigmas = process.levels(torch.linspace(1, 0, 11, dtype=torch.float64)).sigma
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        x = x + (following - sigma) * model(x, sigma.expand(4))
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_network_is_told_in_sampling_what_it_was_told_in_training():
    for process, prediction in (
        (VP, "epsilon"),
        (fastdiff.RectifiedFlow(shift=3.0), "flow"),
        (fastdiff.EDM(), "edm"),
        (fastdiff.EDM(), "sample"),
        (fastdiff.VPSDE(), "score"),
    ):
        objective = fastdiff.Objective(process, prediction)
        told = []

        def model(x, t, told=told):
            told.append((x, t))
            return x

        visited = []
        run(model, (2, 3), process, "ddim", 4, prediction, callback=lambda k, t, x, x0: visited.append((t, x)))  # noqa: B023
        for k, t in enumerate(t for t, _ in visited):
            noised = objective.noise(torch.zeros(2, 3), t, torch.zeros(2, 3))
            torch.testing.assert_close(told[k][1], noised.model_time, check_dtype=True)
        for k in range(1, 4):
            before = visited[k - 1][1]
            scale = (
                objective.noise(before, visited[k][0], torch.zeros(2, 3)).model_input
                / objective.noise(before, visited[k][0], torch.zeros(2, 3)).x_t
            )
            torch.testing.assert_close(told[k][0], scale * before)


def test_guidance():
    def model(x, t, c):
        assert x.shape[0] == t.shape[0] == c.shape[0]
        return c.view(-1, 1) * x

    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    combined = uncond + 3 * (cond - uncond)
    x = torch.randn(2, 5)
    guided = run(model, (2, 5), cond=cond, uncond=uncond, guidance=3.0, x=x)
    torch.testing.assert_close(guided, run(model, (2, 5), cond=combined, x=x))
    assert torch.equal(run(model, (2, 5), cond=cond, uncond=uncond, x=x), run(model, (2, 5), cond=cond, x=x))

    def nested(x, t, c):
        return model(x, t, c["label"][0])

    nest = {"label": (cond,)}, {"label": (uncond,)}
    assert torch.equal(run(nested, (2, 5), cond=nest[0], uncond=nest[1], guidance=3.0, x=x), guided)


def test_a_guided_condition_keeps_its_types():
    """Named tuples and dicts of another class come to the network as what they were."""
    Pair = collections.namedtuple("Pair", "text pooled")

    def model(x, t, c):
        assert type(c) is Pair and type(c.pooled) is collections.OrderedDict
        return c.pooled["a"].view(-1, 1) * x

    cond, uncond = (Pair(torch.ones(2), collections.OrderedDict(a=torch.tensor(a))) for a in ([1.0, 2.0], [0.5, 0.25]))
    got = run(model, (2, 5), cond=cond, uncond=uncond, guidance=3.0)
    plain = run(lambda x, t, c: c.view(-1, 1) * x, (2, 5), cond=cond[1]["a"], uncond=uncond[1]["a"], guidance=3.0)
    assert torch.equal(got, plain)


def test_guidance_of_float64_samples_is_not_rounded():
    """One step of flow matching from noise x: x minus the guided velocity, which is 1 + g (2 - 1)."""
    guidance = torch.tensor([1 / 3, 2 / 7], dtype=torch.float64)
    x = torch.zeros(2, 3, dtype=torch.float64)
    cond = torch.full((2, 1), 2.0, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    out = run(
        lambda x, t, c: c.expand(x.shape), (2, 3), fastdiff.RectifiedFlow(), "flow_euler", 1, "flow",
        x=x, guidance=guidance, cond=cond[0], uncond=cond[1], dtype=torch.float64,
    )  # fmt: skip
    np.testing.assert_allclose(out.numpy(), np.repeat([[-4 / 3], [-9 / 7]], 3, 1), rtol=1e-15)


@pytest.mark.parametrize("how", [{}, {"callback": lambda *_: None}, {"return_trajectory": True}])
def test_x_is_written_over_where_nobody_sees_it(how, monkeypatch):
    asked, real = [], fastdiff.ops.trajectory
    monkeypatch.setattr(fastdiff.ops, "trajectory", lambda *a, **k: asked.append(k["reuse"]) or real(*a, **k))
    run(**how)
    assert asked == [not how]


@pytest.mark.parametrize("sampler", [samplers.Euler, samplers.Heun])
def test_churn_before_the_first_step(sampler):
    """Algorithm 2 of Karras et al.: sigma_hat = (1 + s_churn / n) sigma, x + s_noise sqrt(sigma_hat^2 - sigma^2) z"""
    seen = []
    run(
        lambda x, t: seen.append(x.clone()) or 0 * x, process=fastdiff.EDM(), prediction="sample", steps=None,
        sampler=sampler(sigmas=[10.0, 5.0, 1.0], s_churn=0.9, s_noise=1.003), x=torch.full((2, 3, 4), 7.0),
        noise=lambda k, shape: torch.full(shape, 0.5), seed=None,
    )  # fmt: skip
    expected = 7 + 1.003 * math.sqrt(13**2 - 10**2) * 0.5
    torch.testing.assert_close(seen[0], torch.full((2, 3, 4), expected), rtol=1e-6, atol=0)


def test_guidance_with_a_learned_variance():
    """Guidance combines the predictions; the variance is the conditional one."""
    variance = torch.randn(2, 3, 4)

    def model(x, t, c):
        c = c.view(-1, 1, 1)
        return torch.cat([c * x, variance.repeat(len(x) // 2, 1, 1) * (c > 1)], 1)

    cond, uncond = torch.tensor([1.5, 2.0]), torch.tensor([0.5, 0.25])
    sampler = samplers.DDPM("learned_range")
    guided = run(model, (2, 3, 4), sampler=sampler, cond=cond, uncond=uncond, guidance=2.0)
    combined = uncond + 2 * (cond - uncond)
    torch.testing.assert_close(guided, run(model, (2, 3, 4), sampler=sampler, cond=combined))


def test_samples_do_not_depend_on_the_batch_split():
    for sampler in ("ddpm", samplers.DDIM(eta=1.0)):
        whole = run(shape=(6, 3), sampler=sampler, seed=7)
        parts = [run(shape=(2, 3), sampler=sampler, seed=7, sample_offset=k) for k in (0, 2, 4)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, run(shape=(6, 3), sampler=sampler, seed=8))


@pytest.mark.parametrize("offset", [0, 3])
def test_every_step_and_the_start_have_noise_of_their_own(offset):
    """The start is stream 4 of the seed, step k stream 16 + k, at the index of the sample."""
    shape, x = (2, 400), oracle.normal(1, (2, 400), stream=4, sample_offset=offset)
    got = run(
        lambda x, t: 0 * x, shape, sampler=samplers.DDIM(eta=1.0), steps=8, dtype=torch.float64, sample_offset=offset
    )  # fmt: skip
    times = [999, 874, 749, 624, 499, 374, 249, 124]
    abar = [*oracle.alpha_bar(oracle.betas_linear(1000))[times], 1.0]
    for k in range(8):
        z = oracle.normal(1, shape, stream=16 + k, sample_offset=offset)
        x = oracle.ddim_step(x, x / np.sqrt(abar[k]), 0, abar[k], abar[k + 1], eta=1.0, z=z)
    oracle.assert_close(got, x, rel=1e-10, absolute=1e-10)


def test_generator_and_default_seed():
    a, b = (run(seed=None, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(4)
    a, b = run(seed=None), run(seed=None)
    assert not torch.equal(a, b)
    torch.manual_seed(4)
    assert torch.equal(run(seed=None), a)


def test_callback_sees_every_step():
    seen = []
    x = run(steps=7, callback=lambda k, t, x, x0: seen.append((k, int(t), x, x0)))
    assert [k for k, *_ in seen] == list(range(7))
    assert [t for _, t, *_ in seen] == discrete_timesteps(1000, 7)
    assert torch.equal(seen[-1][2], x) and torch.equal(seen[-1][3], x), "the last step ends on its x0 estimate"


def test_all_steps_by_default_and_a_bar_on_request(capfd):
    times = []
    process = fastdiff.VariancePreserving(steps=20)
    run(process=process, steps=None, callback=lambda k, t, x, x0: times.append(int(t)), progress=True)
    assert times == list(range(19, -1, -1))
    assert "/20 [" in capfd.readouterr().err


def test_bfloat16_samples_round_only_at_the_stores():
    """Three steps of DDPM, each from the bfloat16 sample before it: half an ulp of the result, and a few roundings of
    float32 of what is added up."""
    outputs = []

    def model(x, t):
        outputs.append((x.clone(), 0.1 * x))
        return outputs[-1][1]

    x, path = run(model, steps=3, dtype=torch.bfloat16, return_trajectory=True)
    assert x.dtype == torch.bfloat16 and torch.equal(path[-1], x)
    assert torch.equal(path[0], torch.from_numpy(oracle.normal(1, (2, 3, 4), stream=4)).bfloat16())
    abar = [*oracle.alpha_bar(oracle.betas_linear(1000))[[999, 666, 332]], oracle.LD(1)]
    for k, (before, output) in enumerate(outputs):
        assert torch.equal(before, path[k])
        x, m, (a, b) = to_numpy(before), to_numpy(output), abar[k : k + 2]
        x0 = oracle.to_x0("epsilon", x, m, np.sqrt(a), np.sqrt(1 - a))
        size = abs(x / np.sqrt(a)) + abs(np.sqrt((1 - a) / a) * m)
        if b == 1:  # the last step ends on x0
            assert_rounded(path[k + 1], x0, size)
            continue
        z = oracle.normal(1, x.shape, stream=16 + k)
        truth = oracle.ddpm_step(x, x0, a, b, z)
        assert_rounded(path[k + 1], truth, np.sqrt(b) * size + abs(x) + abs(z), operations=8)


def test_no_gradients_are_kept():
    layer = torch.nn.Linear(4, 4)
    assert not run(lambda x, t: layer(x), (2, 4)).requires_grad


@pytest.mark.gpu
def test_samples_are_the_same_on_a_gpu():
    for sampler in ("ddpm", samplers.DDIM(eta=1.0)):
        torch.testing.assert_close(run(sampler=sampler, device="cuda").cpu(), run(sampler=sampler))


@pytest.mark.parametrize(("sampler", "each"), [("ddim", [True]), ("heun", [False, True])])
def test_the_estimate_is_computed_where_it_is_shown(sampler, each, monkeypatch):
    """The x0 that a callback has, at the end of a step: Heun's method has two rows a step, and one for the last."""
    asked, calls = [], []
    made = fastdiff.ops.trajectory

    class Watched:
        """A run of steps that notes what it is asked."""

        def __init__(self, run):
            self.run = run

        def __getattr__(self, name):
            return getattr(self.run, name)

        def step(self, k, m, guided, z, copies, wanted=False, *rest, **more):
            asked.append(wanted)
            return self.run.step(k, m, guided, z, copies, wanted, *rest, **more)

    monkeypatch.setattr(fastdiff.ops, "trajectory", lambda *given, **how: Watched(made(*given, **how)))
    run(sampler=sampler, steps=4, callback=lambda *given: calls.append(given))
    assert asked == (each * 4)[: len(asked) - 1] + [True] and len(calls) == 4
    asked.clear()
    run(sampler=sampler, steps=4, return_trajectory=True)
    assert asked and not any(asked)


def test_the_last_plans_are_kept():
    """Sixteen of a process; of a changed one, others."""
    process, plan = fastdiff.VariancePreserving(steps=60), fastdiff.sampling.plans.planned
    made = [plan(samplers.DDIM(), process, steps, "epsilon") for steps in range(1, 18)]
    assert plan(samplers.DDIM(), process, 17, "epsilon") is made[-1]
    assert plan(samplers.DDIM(), process, 1, "epsilon") is not made[0]
    assert len(fastdiff.sampling.plans._kept[process]) == 2
    assert plan(samplers.DDIM(eta=0.5), process, 17, "epsilon") is not made[-1]
    assert plan(samplers.DDIM(), process, 17, "v_prediction") is not made[-1]


def test_the_bar_leaves_nothing_behind(monkeypatch):
    made = []
    monkeypatch.setitem(
        sys.modules, "tqdm.auto", SimpleNamespace(tqdm=lambda steps, **how: (made.append((steps, how)), steps)[1])
    )
    run(steps=5, progress=True)
    assert made == [(range(5), {"desc": "sampling", "leave": False})]
    run(steps=5, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    run(steps=5, progress=True)
    assert len(made) == 1


@on_every_device
def test_a_callback_has_t_where_x_is(backend, device):
    seen = []
    x = torch.zeros(2, 3, device=device)
    run(shape=(2, 3), x=x, steps=3, callback=lambda k, t, x, x0: seen.append((t.device, x.device, x0.device)))
    assert seen == [(x.device,) * 3] * 3
