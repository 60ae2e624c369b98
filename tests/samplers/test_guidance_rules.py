"""The rules of fastdiff.guidance against their papers' and pipelines' formulas, written again, in whole runs; and the
gradient of a classifier."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from test_guidance import NoSync
from tiny_run import LEVELS, SIGMAS, TIMES

import fastdiff
from fastdiff import guidance, samplers
from fastdiff.guidance import CFGPlusPlus, CFGZero, NormPreserving, Plain, Projected

pytestmark = pytest.mark.usefixtures("backend")

VP, FLOW = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()
SHAPE = (2, 3, 4)
COND, UNCOND = torch.tensor([1.0, -0.8]), torch.tensor([0.5, 0.6])
BOTH = {"cond": COND, "uncond": UNCOND}
SCALES = torch.tensor([1.5, 4.0], dtype=torch.float64)
SAMPLERS = [("ddim", VP, "epsilon"), ("euler", VP, "v_prediction"), ("dpmpp_2m", VP, "epsilon"),
            ("unipc", FLOW, "flow"), ("flow_euler", FLOW, "flow"), ("flow_heun", FLOW, "flow")]  # fmt: skip


def network(x, t, c):
    """Its outputs under two conditions are not parallel."""
    c = c.to(x.dtype).view(-1, 1, 1)
    return torch.tanh(x * c) + 0.3 * torch.sin(3 * x) + 0.1 * c


def run(model=network, sampler="ddim", process=VP, prediction="epsilon", steps=6, shape=SHAPE, **how):
    options = {"seed": 1, "progress": False, "dtype": torch.float64} | how
    return fastdiff.sample(model, shape, process, sampler, steps, prediction, **options)


def by_hand(change, *which, steps=6, **how):
    """The same run with a model that does the guidance itself: ``change(k, x, c, u)``, NumPy arrays, of call k."""
    calls = iter(range(100))

    def model(x, t):
        halves = (network(x, t, half).numpy() for half in (COND, UNCOND))
        return torch.from_numpy(np.asarray(change(next(calls), x.numpy(), *halves), dtype=np.float64))

    return run(model, *which, steps=steps, **how)


def same(got, expected):
    """Float64, six steps, of which the first multiplies by 1 / alpha = 157."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def numbers(scale):
    return scale if isinstance(scale, float) else scale.numpy().reshape(-1, 1, 1)


def zero_star(c, u, scale):
    """The authors' optimized_scale, and their line."""
    dot = (c * u).sum((1, 2), keepdims=True)
    fitted = u * (dot / (u**2).sum((1, 2), keepdims=True))
    return fitted + scale * (c - fitted)


@pytest.mark.parametrize("scale", [3.0, SCALES], ids=["one", "each"])
@pytest.mark.parametrize("which", SAMPLERS, ids=lambda which: which[0])
def test_cfg_zero(which, scale):
    rule = CFGZero(scale, zero_steps=0)
    same(
        run(network, *which, guidance=rule, **BOTH), by_hand(lambda k, x, c, u: zero_star(c, u, numbers(scale)), *which)
    )


def test_cfg_zero_agrees_with_the_oracle():
    c, u = torch.randn(2, *SHAPE, dtype=torch.float64)
    step = guidance.Step(c, 0.0, 1.0, 0)
    got = CFGZero(3.0, zero_steps=0).combine(c, u, step)
    np.testing.assert_allclose(got.numpy(), oracle.cfg_zero_star(c.numpy(), u.numpy(), 3.0).astype(float), rtol=1e-12)


@pytest.mark.parametrize("which", SAMPLERS[3:], ids=lambda which: which[0])
def test_the_first_steps_of_cfg_zero(which):
    """Of a step, not of a call: Heun calls the network twice in each."""
    calls = 2 if which[0] == "flow_heun" else 1

    def change(k, x, c, u):
        return 0 * c if k // calls < 2 else zero_star(c, u, 3.0)

    got, path = run(network, *which, guidance=CFGZero(3.0, zero_steps=2), return_trajectory=True, **BOTH)
    same(got, by_hand(change, *which))
    torch.testing.assert_close(path[2], path[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(path[3], path[2], atol=1e-3)


@pytest.mark.parametrize("how", [
    {"sampler": samplers.PredictorCorrector(predictor=samplers.DDIM())}, {"guidance_interval": (0.5, 1)},
    {"sampler": samplers.DPMSolverPP(order=3)}, {"sampler": samplers.EulerAncestral(eta=0.0)},
    {"sampler": "flow_lcm", "step_offset": 1}, {"guidance_rescale": 0.7},
], ids=str)  # fmt: skip
def test_other_runs_whose_first_step_leaves_x_as_it_is(how):
    """It is for the rows of the first steps alone to leave x as it is; the correctors come after the first step."""
    options = {"sampler": "flow_euler", "process": FLOW, "prediction": "flow", "guidance": CFGZero(3.0)} | how
    _, path = run(return_trajectory=True, **options, **BOTH)
    assert ("step_offset" in how) == (not torch.allclose(path[1], path[0], rtol=1e-12, atol=1e-12))
    assert not torch.allclose(path[2], path[1], atol=1e-3)


def test_the_index_is_that_of_a_callback():
    """The two calls of a step of Heun's method are one; a corrector is a step of its own."""

    class Told(Plain):
        def combine(self, cond, uncond, step):
            told.append(step.index)
            return super().combine(cond, uncond, step)

    for sampler, expected in (("flow_heun", [5, 5, 6, 6, 7]), ("predictor_corrector", [5, 6, 7, 8, 9])):
        told, shown = [], []
        run(
            network, sampler, FLOW, "flow", 3, guidance=Told(2.0), step_offset=5,
            callback=lambda k, t, x, x0: shown.append(k + 5), **BOTH,  # noqa: B023
        )  # fmt: skip
        assert told == expected and shown == sorted(set(told))


def test_steps_of_another_leg_are_not_the_first():
    which = ("flow_euler", FLOW, "flow")
    x = torch.randn(SHAPE, dtype=torch.float64)
    runs = [run(network, *which, x=x, step_offset=n, guidance=CFGZero(3.0, zero_steps=2), **BOTH) for n in (0, 1, 2, 5)]
    first, second = (
        by_hand(lambda k, x, c, u: 0 * c if k < zeros else zero_star(c, u, 3.0), *which, x=x)  # noqa: B023
        for zeros in (1, 0)
    )
    same(runs[1], first)
    same(runs[2], second)
    assert torch.equal(runs[2], runs[3]) and not torch.allclose(runs[0], runs[1])


def projected(state, c, u, scale, eta, momentum, threshold):
    """The authors' normalized_guidance on x0 estimates; ``state`` is their momentum buffer."""
    difference = c - u
    if momentum is not None:
        difference = difference + momentum * state.get("average", 0)
        state["average"] = difference
    if threshold is not None:
        norm = np.sqrt((difference**2).sum((1, 2), keepdims=True))
        difference = difference * np.minimum(1, threshold / norm)
    unit = c / np.sqrt((c**2).sum((1, 2), keepdims=True))
    parallel = (difference * unit).sum((1, 2), keepdims=True) * unit
    return c + (scale - 1) * (difference - parallel + eta * parallel)


PROJECTED = {
    "plain": (1.0, None, None),
    "projected": (0.0, None, None),
    "half": (0.4, None, None),
    "bounded": (0.0, None, 2.0),
    "momentum": (0.0, -0.5, None),
    "all": (0.3, -0.75, 1.5),
}


@pytest.mark.parametrize("case", list(PROJECTED))
@pytest.mark.parametrize("scale", [3.0, SCALES], ids=["one", "each"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "flow_euler"])
def test_projected(sampler, scale, case):
    """Of x0 estimates, which are x - sigma v for a flow, and (x - sigma e) / alpha."""
    eta, momentum, threshold = PROJECTED[case]
    which, state = ((FLOW, "flow") if sampler == "flow_euler" else (VP, "epsilon")), {}

    def change(k, x, c, u):
        alpha, sigma = (1.0, SIGMAS[k]) if sampler == "flow_euler" else map(float, LEVELS[k])
        c, u = ((x - sigma * m) / alpha for m in (c, u))
        return projected(state, c, u, numbers(scale), eta, momentum, threshold)

    rule = Projected(scale, eta, momentum or 0.0, threshold)
    got = run(network, sampler, *which, guidance=rule, **BOTH)
    expected = by_hand(change, sampler, which[0], "sample")
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)  # through x0 at alpha = 1 / 157, and back
    if case == "plain":
        torch.testing.assert_close(got, run(network, sampler, *which, guidance=scale, **BOTH), rtol=1e-8, atol=1e-8)


def test_the_momentum_of_a_run_ends_with_it():
    rule = Projected(3.0, 0.3, -0.5)
    first, second = (run(guidance=rule, **BOTH) for _ in range(2))
    assert torch.equal(first, second) and not torch.allclose(first, run(guidance=Projected(3.0, 0.3), **BOTH))


def preserved(c, u, scale, axes):
    """Qwen-Image's pipelines."""
    combined = u + scale * (c - u)
    norms = (np.sqrt((m**2).sum(axes, keepdims=True)) for m in (c, combined))
    return combined * (next(norms) / next(norms))


@pytest.mark.parametrize(
    ("dims", "axes"), [(None, (1, 2)), ((-1,), 2), ([2], 2), ((1,), 1), ((-2, -1), (1, 2))], ids=str
)
@pytest.mark.parametrize("scale", [3.0, SCALES], ids=["one", "each"])
@pytest.mark.parametrize("which", SAMPLERS[2:5], ids=lambda which: which[0])
def test_norm_preserving(which, scale, dims, axes):
    got = run(network, *which, guidance=NormPreserving(scale, dims), **BOTH)
    same(got, by_hand(lambda k, x, c, u: preserved(c, u, numbers(scale), axes), *which))


@pytest.mark.parametrize("scale", [0.6, SCALES / 5], ids=["one", "each"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_1m", "flow_euler", "ddim with noise", "ancestral", "ddpm"])
def test_cfg_plus_plus(sampler, scale):
    """Algorithm 2 of the paper: alpha' x0 from the guided output, and the noise from the unconditional one, in
    proportion to what the sampler leaves of it. The x0 estimate that is shown is the guided one."""
    flow = sampler == "flow_euler"
    levels = [(1 - s, s) for s in SIGMAS] if flow else [tuple(map(float, level)) for level in LEVELS]
    how, eta = {"ddim with noise": (samplers.DDIM(eta=0.7), 0.7), "ancestral": ("euler_ancestral", 1.0)}.get(
        sampler, (sampler, 1.0 if sampler == "ddpm" else 0.0)
    )
    z = torch.randn(6, *SHAPE, dtype=torch.float64).numpy()
    x = start = torch.randn(SHAPE, dtype=torch.float64).numpy()
    shown, lam = [], numbers(scale)
    for k in range(6):
        c, u = (network(torch.from_numpy(x), None, half).numpy() for half in (COND, UNCOND))
        (alpha, sigma), (alpha_next, sigma_next) = levels[k : k + 2]
        guided = u + lam * (c - u)
        if flow:  # the output is n - x0
            noise, x0 = x + (1 - sigma) * u, x - sigma * guided
        else:
            noise, x0 = u, (x - sigma * guided) / alpha
        drawn = eta * np.sqrt(sigma_next**2 / sigma**2 * (1 - (alpha / alpha_next) ** 2)) if eta else 0.0
        x = alpha_next * x0 + np.sqrt(max(sigma_next**2 - drawn**2, 0)) * noise + drawn * z[k]
        shown.append(x0)
    seen = []
    got = run(
        network, how, *((FLOW, "flow") if flow else (VP, "epsilon")), guidance=CFGPlusPlus(scale), **BOTH,
        x=torch.from_numpy(start), noise=lambda k, shape: torch.from_numpy(z[k]),
        callback=lambda k, t, x, x0: seen.append(x0),
    )  # fmt: skip
    torch.testing.assert_close(got, torch.from_numpy(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.stack(seen), torch.from_numpy(np.stack(shown)), rtol=1e-8, atol=1e-8)


ONE_STEP = {
    "ddpm": VP, "ddim": VP, "euler": VP, "euler_ancestral": VP, "dpmpp_1m": VP, "flow_euler": FLOW,
    "flow_lcm": FLOW, samplers.Euler(s_churn=3.0): VP, samplers.EulerAncestral(eta=0.5): FLOW,
    samplers.DPMSolverPP(order=1, eta=1.0): VP, samplers.DDIM(rederive_epsilon=True): VP,
    samplers.DDIM(): fastdiff.TrigFlow(),
}  # fmt: skip


@pytest.mark.parametrize("sampler", list(ONE_STEP), ids=str)
def test_the_factor_of_the_data_where_a_step_ends(sampler):
    """CFG++ takes alpha' from the column k_x0. With an exact network, which says x0 = 1, a step from alpha ends at
    alpha', churn included, but for the noise; it starts where the step before ended."""
    plan = samplers.get(sampler).plan(ONE_STEP[sampler], 5, "sample")
    column = dict(zip(fastdiff.ops.COLUMNS, plan.table.T))
    before, after = column["k_x0"][:-1], column["k_x0"][1:]
    ends = column["c_x"][1:] * before + column["c_m"][1:] + column["c_x0"][1:]
    torch.testing.assert_close(ends, after, rtol=1e-12, atol=1e-12)


def test_cfg_plus_plus_in_an_interval():
    """Outside it a step is plain: both estimates are the conditional ones."""
    inside = [300 <= t <= 700 for t in TIMES]
    got = run(guidance=CFGPlusPlus(0.5), guidance_interval=(300, 700), **BOTH)
    x = run(steps=6, cond=COND, return_trajectory=True)[1][0].numpy()
    for k in range(6):
        c, u = (network(torch.from_numpy(x), None, half).numpy() for half in (COND, UNCOND))
        (alpha, sigma), (alpha_next, sigma_next) = (tuple(map(float, level)) for level in LEVELS[k : k + 2])
        m, noise = (u + 0.5 * (c - u), u) if inside[k] else (c, c)
        x = alpha_next * (x - sigma * m) / alpha + sigma_next * noise
    torch.testing.assert_close(got, torch.from_numpy(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_a_rule_and_a_rescale(phi):
    """The deviation of what the rule gives is brought to that of the conditional output."""

    def change(k, x, c, u):
        guided = zero_star(c, u, 4.0)
        ratio = c.std((1, 2), keepdims=True) / guided.std((1, 2), keepdims=True)
        return phi * ratio * guided + (1 - phi) * guided

    same(run(guidance=CFGZero(4.0, 0), guidance_rescale=phi, **BOTH), by_hand(change))


def test_a_rule_a_classifier_and_thresholds():
    """The gradient is added once to what the rule gives; thresholds are of the x0 estimate after both."""
    step = iter(range(6))

    def change(x, t):
        alpha, sigma = map(float, LEVELS[next(step)])
        c, u = (network(x, t, half).numpy() for half in (COND, UNCOND))
        x0 = (x.numpy() - sigma * (preserved(c, u, 3.0, (1, 2)) - sigma * 0.1 * (0.5 - x.numpy()))) / alpha
        s = np.maximum(np.quantile(np.abs(x0).reshape(2, -1), 0.8, axis=1), 1).reshape(2, 1, 1)
        return torch.from_numpy(np.clip(x0, -s, s) / s)

    how = {"guidance": NormPreserving(3.0), "cond_fn": lambda x, t: 0.1 * (0.5 - x), "dynamic_thresholding": 0.8}
    same(run(sampler="dpmpp_2m", **how, **BOTH), run(change, "dpmpp_2m", prediction="sample"))


@pytest.mark.parametrize(
    "rule", [Plain(1.0), CFGZero(1.0, 0), Projected(1.0), Projected(1.0, -1.0, -0.5, 0.1), NormPreserving(1.0, (1,))],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_one_is_no_guidance(rule, dtype):
    """To the bit, also of an output in half precision: what is combined is not rounded before the step."""
    assert torch.equal(run(guidance=rule, dtype=dtype, **BOTH), run(dtype=dtype, cond=COND))


def test_other_identities():
    """A CFG++ of 0 is the unconditional run; CFG-Zero* of a difference that is orthogonal to u is plain guidance, as is
    a rule of the plain kind."""
    assert torch.equal(run(guidance=CFGPlusPlus(0.0), **BOTH), run(cond=UNCOND))
    u, c = torch.randn(2, *SHAPE, dtype=torch.float64)
    c = c - u * ((c * u).sum((1, 2)) / (u * u).sum((1, 2))).view(-1, 1, 1) + u
    step = guidance.Step(u, 0.0, 1.0, 0)
    same(CFGZero(3.0, 0).combine(c, u, step), u + 3 * (c - u))
    same(run(guidance=Plain(3.0), **BOTH), run(guidance=3.0, **BOTH))


RULES = [CFGZero(3.0, 0), Projected(3.0, 0.2, -0.5, 1.0), NormPreserving(3.0), NormPreserving(3.0, (1,)),
         CFGPlusPlus(0.6)]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_sample_does_not_depend_on_its_batch(rule):
    both = run(guidance=rule, dtype=torch.float32, **BOTH)
    for k in range(2):
        alone = run(
            guidance=rule, shape=(1, *SHAPE[1:]), sample_offset=k, dtype=torch.float32, cond=COND[k : k + 1],
            uncond=UNCOND[k : k + 1],
        )  # fmt: skip
        assert torch.equal(alone[0], both[k])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_outputs_that_are_nothing(rule):
    """No direction, no norm: the result is 0, not NaN. And an empty batch."""
    zeros = torch.zeros(SHAPE)
    step = guidance.Step(zeros, 0.0, 1.0, 0)
    assert not rule.combine(zeros, zeros, step).any()
    none = torch.empty(0)
    assert run(guidance=rule, shape=(0, 3, 4), cond=none, uncond=none).shape == (0, 3, 4)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_what_is_not_a_number_stays_so(rule):
    """In its sample alone."""
    c, u = torch.randn(2, *SHAPE)
    c[0, 0, 0] = float("nan")
    got = rule.combine(c, u, guidance.Step(torch.zeros(SHAPE), 0.0, 1.0, 0))
    assert got[0].isnan().any() and got[1].isfinite().all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_no_value_is_read_back(rule):
    """From the first call of the network to the last; with a scale a sample too."""
    mode, calls = NoSync(), []

    def watched(x, t, c):
        calls.append(1)
        if len(calls) == 1:
            mode.__enter__()
        m = torch.tanh(x * c.view(-1, 1, 1))
        if len(calls) == 4:
            mode.__exit__(None, None, None)
        return m

    run(watched, guidance=dataclasses.replace(rule, scale=SCALES), steps=4, dtype=torch.float32, **BOTH)
    assert len(calls) == 4


def test_a_rule_of_ones_own():
    class Sharp(guidance.Rule):
        """c with the sign of the guidance, whatever its size; and it counts."""

        def combine(self, cond, uncond, step):
            step.state["calls"] = step.state.get("calls", 0) + 1
            assert step.state["calls"] == step.index + 1 and cond.dtype == torch.float64
            return cond + self.scale * (cond - uncond).sign()

    same(run(guidance=Sharp(0.2), **BOTH), by_hand(lambda k, x, c, u: c + 0.2 * np.sign(c - u)))


def never(x, t, c=None):
    raise AssertionError("the model was called")


FLOWING = {"sampler": "flow_euler", "process": FLOW, "prediction": "flow"}
WRONG = {
    "no uncond": ({"guidance": CFGZero(3.0, 0), "uncond": None}, ValueError, "needs uncond"),
    "a class": ({"guidance": Projected}, TypeError, "guidance must be a number; got the class Projected"),
    "zero steps of noise": ({"guidance": CFGZero(3.0)}, ValueError, "'epsilon' .*: use CFGZero.*zero_steps=0"),
    "zero steps of another process": (
        {"guidance": CFGZero(3.0), "prediction": "flow"}, ValueError, "RectifiedFlow alone; got 'flow' of Variance",
    ),
    **{
        f"zero steps and {name}": ({"guidance": CFGZero(3.0), **FLOWING, **how}, ValueError, f"zero_steps=1 .*{words}")
        for name, how, words in [
            ("new noise", {"sampler": "flow_lcm"}, "FlowLCM"),
            ("DDPM", {"sampler": "ddpm"}, "DDPM"),
            ("ancestral noise", {"sampler": "euler_ancestral"}, "EulerAncestral"),
            ("noise of 2M", {"sampler": "dpmpp_2m_sde"}, "DPMSolverPP"),
            ("noise of 3M", {"sampler": "dpmpp_3m_sde"}, "DPMSolverPP"),
            ("a predictor that draws", {"sampler": "predictor_corrector"}, "PredictorCorrector"),
            ("thresholds", {"dynamic_thresholding": 0.9}, "dynamic_thresholding"),
            ("a clip", {"sampler": samplers.FlowEuler(clip=1.0)}, "clip"),
            ("a classifier", {"cond_fn": lambda x, t: x}, "cond_fn"),
            ("an interval", {"guidance_interval": (0, 0.8)}, "guidance_interval"),
        ]
    },
    "zero steps and a corrector": (
        {"guidance": CFGZero(3.0, 2), **FLOWING, "sampler": samplers.PredictorCorrector(predictor=samplers.DDIM())},
        ValueError, "zero_steps=2 .*PredictorCorrector",
    ),
    "the last zero step outside of an interval": (
        {"guidance": CFGZero(3.0, 2), **FLOWING, "guidance_interval": (0.9, 1)}, ValueError, "guidance_interval",
    ),
    "a dimension twice": ({"guidance": NormPreserving(3.0, (-1, 2))}, ValueError, r"dims must differ; got \(-1, 2\)"),
    "the batch": ({"guidance": NormPreserving(3.0, (0,))}, ValueError, r"dims .* of \(2, 3, 4\), but not the first"),
    "the batch from behind": ({"guidance": NormPreserving(3.0, (-3,))}, ValueError, "not the first; got"),
    "a dimension too many": ({"guidance": NormPreserving(3.0, (3,))}, ValueError, "not the first; got"),
    "a dimension too few": ({"guidance": NormPreserving(3.0, (-4,))}, ValueError, "not the first; got"),
    "three scales": (
        {"guidance": NormPreserving(torch.ones(3))}, ValueError, r"one a sample, \[2\]; got tensor float32 \[3\]",
    ),
    "scales of channels": (
        {"guidance": CFGZero(torch.ones(2, 3), 0)}, ValueError, r"one a sample, \[2\]; got tensor float32 \[2, 3\]",
    ),
    "CFG++ and history": ({"guidance": CFGPlusPlus(0.5), "sampler": "dpmpp_2m"}, ValueError, "keep nothing.*DPMSolver"),
    "CFG++ and Heun": ({"guidance": CFGPlusPlus(0.5), "sampler": "heun"}, ValueError, "keep nothing"),
    "CFG++ and Langevin": (
        {"guidance": CFGPlusPlus(0.5), "sampler": "predictor_corrector"}, ValueError, "keep nothing",
    ),
    "CFG++ and a clip": ({"guidance": CFGPlusPlus(0.5), "sampler": samplers.DDIM(clip=1.0)}, ValueError, "clip"),
    "CFG++ and thresholds": ({"guidance": CFGPlusPlus(0.5), "dynamic_thresholding": 0.9}, ValueError, "thresholding"),
    "CFG++ and a classifier": ({"guidance": CFGPlusPlus(0.5), "cond_fn": lambda x, t: x}, ValueError, "cond_fn"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_runs(case):
    """Refused before the network is called."""
    how, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        run(never, **(BOTH | how))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: CFGZero("3"), TypeError, "scale must be a number; got '3'"),
        (lambda: CFGZero(3.0, -1), ValueError, "zero_steps must be at least 0; got -1"),
        (lambda: CFGZero(3.0, 0.5), TypeError, "zero_steps must be a whole number; got 0.5"),
        (lambda: Projected(3.0, eta="0"), TypeError, "eta must be a number; got '0'"),
        (lambda: Projected(3.0, momentum=None), TypeError, "momentum must be a number; got None"),
        (lambda: Projected(3.0, threshold=0.0), ValueError, "threshold must be positive, or None for none; got 0.0"),
        (lambda: NormPreserving(3.0, -1), TypeError, r"dims must be dimensions such as \(-1,\), or None .*; got -1"),
        (lambda: NormPreserving(3.0, ()), TypeError, r"dims must be dimensions"),
        (lambda: NormPreserving(3.0, ("c",)), TypeError, "dims must be a whole number; got 'c'"),
    ],
)
def test_wrong_rules(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_rules_are_shown_and_do_not_change():
    assert repr(Projected(3.0, momentum=-0.5)) == "Projected(scale=3.0, momentum=-0.5)"
    assert repr(CFGZero(3.0, 0)) == "CFGZero(scale=3.0, zero_steps=0)" and repr(CFGZero(3.0)) == "CFGZero(scale=3.0)"
    assert repr(NormPreserving(3.0, [1])) == "NormPreserving(scale=3.0, dims=(1,))"
    assert repr(CFGPlusPlus(SCALES)) == "CFGPlusPlus(scale=tensor float64 [2])"
    for kind in (Plain, CFGZero, Projected, NormPreserving, CFGPlusPlus):
        rule, other = kind(SCALES), kind(SCALES)
        assert rule == rule and rule != other and len({rule, other}) == 2, "scales may be tensors: each is itself alone"
        with pytest.raises(AttributeError):
            rule.scale = 1.0
    with pytest.raises(AttributeError):
        Projected(3.0).eta = 1.0


# ---------------------------------------------------------------------------------------------------------- classifiers


class Classifier(torch.nn.Module):
    """Two classes, whose logits are w x summed and 0: d log p / dx = w (1 - p) for the first, -w p for the second."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))

    def forward(self, x, t):
        score = (x.double() * self.w).sum((1, 2)) + t
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_gradient_of_a_classifier(scale):
    classifier, x, t = Classifier(), torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0.3, -0.2])
    got = guidance.classifier_gradient(classifier, torch.tensor([0, 1]), scale)(x, t)
    w = classifier.w.detach().numpy()
    score = (x.numpy() * w).sum((1, 2)) + t.numpy()
    p = 1 / (1 + np.exp(-score))
    expected = scale * np.array([1 - p[0], -p[1]]).reshape(2, 1, 1) * w
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7)
    assert not got.requires_grad and classifier.w.grad is None and not x.requires_grad


def test_a_run_with_the_gradient_of_a_classifier():
    """The network's noise estimate moves by -sigma gradient, at the times that the network is told."""
    classifier, labels, times = Classifier(), torch.tensor([0, 1]), []
    cond_fn = guidance.classifier_gradient(lambda x, t: times.append(t.tolist()) or classifier(x, t), labels, 0.2)
    step = iter(range(6))

    def moved(x, t, c):
        sigma = float(LEVELS[next(step)][1])
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(1)[[0, 1], labels].sum()
            return network(x, t, c).detach() - sigma * 0.2 * torch.autograd.grad(log_p, x)[0]

    same(run(cond_fn=cond_fn, cond=COND), run(moved, cond=COND))
    assert times == [[t, t] for t in TIMES]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_gradient_of_a_classifier_in_inference_mode(sampler):
    """Everything but the weights is made in it. Gradients are enabled in a ``cond_fn`` of one's own, too."""
    classifier, t = Classifier(), torch.tensor([0.3, -0.2])

    def own(x, t):
        x = x.requires_grad_()
        return torch.autograd.grad(classifier(x, t)[:, 0].sum(), x)[0]

    def found():
        made = guidance.classifier_gradient(classifier, torch.tensor([0, 1]), 0.2)
        return *(run(sampler=sampler, cond_fn=f, cond=COND) for f in (made, own)), made(torch.ones(SHAPE), t * 1)

    expected = found()
    with torch.inference_mode():
        got = found()
    for one, other in zip(got, expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ((None, torch.tensor([1])), TypeError, r"callable as classifier\(x_t, t\); got None"),
        ((Classifier(), [1]), TypeError, "labels"),
        ((Classifier(), torch.ones(2)), TypeError, r"labels must be int64 \[batch\]; got tensor float32 \[2\]"),
        ((Classifier(), torch.ones(2, 1).long()), TypeError, r"labels must be int64 \[batch\]"),
        ((Classifier(), torch.tensor([0, 1]), "1"), TypeError, "scale must be a number"),
    ],
)
def test_wrong_classifiers(given, kind, words):
    with pytest.raises(kind, match=words):
        guidance.classifier_gradient(*given)


def test_logits_that_do_not_fit_the_labels():
    with pytest.raises(ValueError, match=r"logits \[3, classes\], one row a label; got \(2, 2\)"):
        run(cond=COND, cond_fn=guidance.classifier_gradient(Classifier(), torch.tensor([0, 1, 1])))
