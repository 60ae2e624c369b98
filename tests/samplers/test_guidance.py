"""Options of fastdiff.sample that look at the network's output: interval and rescaled guidance, dynamic thresholding,
classifier guidance, inpainting; and those of the loop: trajectories, compile, CUDA graphs, launches and syncs."""

import numpy as np
import oracle
import pytest
import torch
from tiny_run import ABAR, LEVELS, SIGMAS, TIMES
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops, samplers
from fastdiff.backends import registry
from fastdiff.sampling.guidance import quantile

pytestmark = pytest.mark.usefixtures("backend")

VP = fastdiff.VariancePreserving()
FLOW = fastdiff.RectifiedFlow()
SHAPE = (2, 3, 4)


def network(x, t, c):
    return torch.tanh(x) * c.view(-1, 1, 1)


COND, UNCOND = torch.tensor([1.0, 0.8]), torch.tensor([0.5, 0.6])


def run(model=network, sampler="ddim", process=VP, steps=6, prediction="epsilon", shape=SHAPE, **how):
    return fastdiff.sample(model, shape, process, sampler, steps, prediction, **({"seed": 1, "progress": False} | how))


def by_hand(change, sampler="ddim", steps=6, prediction="epsilon", process=VP, **how):
    """The same run with a model that does the guidance itself: ``change(k, x, m_cond, m_uncond)``."""
    count = iter(range(10**6))

    def model(x, t):
        return change(next(count), x, network(x, t, COND), network(x, t, UNCOND))

    return run(model, sampler, process, steps, prediction, **how)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "unipc", "edm"])
def test_guidance_inside_an_interval(sampler):
    """Outside it the unconditional half is not even computed."""
    batches = []

    def counted(x, t, c):
        batches.append(len(x))
        return network(x, t, c)

    how = {"cond": COND, "uncond": UNCOND, "guidance": 3.0, "guidance_interval": (300, 700)}
    guided = run(counted, sampler, **how)
    times = samplers.get(sampler).plan(VP, 6, "epsilon").times.tolist()
    inside = [300 <= t <= 700 for t in times]
    assert batches == [4 if i else 2 for i in inside] and any(inside) and not all(inside)
    expected = by_hand(lambda k, x, c, u: u + 3.0 * (c - u) if inside[k] else c, sampler)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_guidance_of_each_sample():
    scale = torch.tensor([1.5, 4.0])
    guided = run(cond=COND, uncond=UNCOND, guidance=scale)
    expected = by_hand(lambda k, x, c, u: u + scale.view(-1, 1, 1) * (c - u))
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phi", [0.7, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "unipc", "heun"])
def test_rescaled_guidance(sampler, phi):
    """Lin et al. 2024, equations 15 and 16; diffusers' rescale_noise_cfg."""

    def rescaled(k, x, c, u):
        guided = u + 5.0 * (c - u)
        dims = tuple(range(1, c.ndim))
        ratio = c.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        return phi * guided * ratio + (1 - phi) * guided

    got = run(sampler=sampler, cond=COND, uncond=UNCOND, guidance=5.0, guidance_rescale=phi)
    torch.testing.assert_close(got, by_hand(rescaled, sampler), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 3001)])
def test_rescaled_guidance_of_constant_outputs(value, shape):
    """They have no deviation, whatever their mean is rounded to: what remains is guidance. A thousandth of the mean is
    a deviation."""

    def output(x, t, c, slope=0.0):
        ramp = torch.linspace(-slope, slope, x[0].numel()).view(x.shape[1:])
        return (value + value * ramp).expand_as(x) * c.view(-1, 1, 1)

    how = {"cond": COND, "uncond": UNCOND, "guidance": 3.0, "shape": shape, "steps": 1}
    assert torch.equal(run(output, guidance_rescale=0.7, **how), run(output, **how))
    if value:  # the deviations are to each other as the conditions
        factor = 0.3 + 0.7 * COND / (UNCOND + 3 * (COND - UNCOND))
        sloped = lambda x, t, c: output(x, t, c, 1e-3)  # noqa: E731
        rescaled = lambda x, t: factor.view(-1, 1, 1) * sloped(x, t, UNCOND + 3 * (COND - UNCOND))  # noqa: E731
        expected = run(rescaled, shape=shape, steps=1)
        torch.testing.assert_close(run(sloped, guidance_rescale=0.7, **how), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("most", [None, 1.3])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "unipc", "euler"])
def test_dynamic_thresholding(sampler, most, guided):
    """Saharia et al. 2022, section 2.3: s is the quantile of |x0| of each sample, at least 1."""
    how = {"cond": COND, "uncond": UNCOND, "guidance": 2.0} if guided else {"cond": COND}
    seen = []
    got = run(
        sampler=sampler, dynamic_thresholding=0.8, sample_max_value=most,
        callback=lambda k, t, x, x0: seen.append(x0), **how,
    )  # fmt: skip
    step = iter(range(100))
    times = samplers.get(sampler).plan(VP, 6, "epsilon").times.tolist()

    def thresholded(x, t):
        m = network(x, t, COND)
        if guided:
            u = network(x, t, UNCOND)
            m = u + 2.0 * (m - u)
        a = VP.alpha_bar[times[next(step)]]
        x0 = (x - (1 - a).sqrt() * m) / a.sqrt()
        s = torch.quantile(x0.abs().flatten(1), 0.8, dim=1).clamp(1, most).view(-1, 1, 1)
        return torch.maximum(torch.minimum(x0, s), -s) / s

    expected = run(thresholded, sampler, prediction="sample")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(float(x0.abs().max()) <= 1 + 1e-6 for x0 in seen)


def test_quantiles_are_torchs():
    rows = torch.randn(3, 101)
    for q in (0.001, 0.5, 0.9, 0.995, 1.0):
        torch.testing.assert_close(quantile(rows, q), torch.quantile(rows, q, dim=1))


def gradient(x, t):
    """Of log p = -|x - 0.5|^2 / 2, by autograd: gradients are enabled in a cond_fn."""
    x = x.requires_grad_()
    return torch.autograd.grad(-0.5 * ((x - 0.5) ** 2).sum(), x)[0]


@pytest.mark.parametrize("process, prediction", [(VP, "epsilon"), (VP, "v_prediction"), (VP, "sample"), (FLOW, "flow")])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "euler"])
def test_classifier_guidance_of_the_noise_estimate(sampler, process, prediction):
    """Algorithm 2: epsilon - sqrt(1 - abar) gradient, whatever the network predicts."""
    if process is VP:
        alphas, sigmas = (row.astype(np.float64) for row in oracle.vp_alpha_sigma(ABAR, TIMES))
    else:
        alphas, sigmas = 1 - np.array(SIGMAS[:-1]), np.array(SIGMAS[:-1])
    step = iter(range(6))
    scale = 0.1  # x0 at the noisiest level is sigma / alpha = 157 times as sensitive

    def changed(x, t, c):
        """The output moves by its own derivative along the noise, x held; where alpha is 0 the noise says nothing."""
        k = next(step)
        alpha, sigma = alphas[k], sigmas[k]
        slope = 1.0 if prediction == "epsilon" else -sigma / alpha if prediction == "sample" else 0.0
        if prediction in ("v_prediction", "flow") and alpha:
            slope = 1 / alpha
        return network(x, t, c) - slope * sigma * scale * (0.5 - x)

    how = {"dtype": torch.float64, "cond": COND.double()}
    got = run(network, sampler, process, 6, prediction, cond_fn=lambda x, t: scale * gradient(x, t), **how)
    torch.testing.assert_close(got, run(changed, sampler, process, 6, prediction, **how), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_classifier_guidance_of_ddpms_mean(variance):
    """Algorithm 1: mean + variance gradient."""
    spread = torch.rand(SHAPE, dtype=torch.float64) * 2 - 1

    def model(x, t):
        m = torch.tanh(x)
        return torch.cat([m, spread], 1) if variance == "learned_range" else m

    sampler, seen = samplers.DDPM(variance), {}
    how = {"dtype": torch.float64, "steps": 4, "noise": lambda k, shape: torch.zeros(shape), "x": torch.randn(SHAPE)}
    for name, cond_fn in (("with", gradient), ("without", None)):
        path = run(model, sampler, cond_fn=cond_fn, return_trajectory=True, **how)[1]
        seen[name] = path[1]
    a, b = VP.alpha_bar[999], VP.alpha_bar[749]
    large, small = 1 - a / b, (1 - b) / (1 - a) * (1 - a / b)
    part = (spread + 1) / 2
    between = torch.exp(part * large.log() + (1 - part) * small.log())
    expected = {"fixed_small": small, "fixed_large": large, "learned_range": between}[variance]
    shift = expected * (0.5 - how["x"].double())
    torch.testing.assert_close(seen["with"] - seen["without"], shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "unipc", "heun", "euler_ancestral"])
def test_inpainting(sampler):
    """Where the mask is 1 every x is the known data at its level, with one noise; elsewhere the run knows it."""
    known = torch.rand(SHAPE) * 2 - 1
    mask = torch.zeros(1, 1, 4)
    mask[..., :2] = 1
    x, path = run(sampler=sampler, cond=COND, known=known, mask=mask, return_trajectory=True)
    kept = mask.bool().expand(SHAPE)
    assert torch.equal(x[kept], known[kept])
    # This network takes each element for itself: those without a mask are as if there was none.
    torch.testing.assert_close(x[~kept], run(sampler=sampler, cond=COND)[~kept], rtol=1e-6, atol=1e-6)
    n = path[0]  # of the seed's initial noise, whose deviation is 1
    np.testing.assert_array_equal(n.numpy(), oracle.normal(1, SHAPE, stream=4))
    for y, (alpha, sigma) in zip(path[1:], LEVELS[1:], strict=True):
        expected = float(alpha) * known.double() + float(sigma) * n.double()
        torch.testing.assert_close(y.double()[kept], expected[kept], rtol=1e-6, atol=1e-6)
    as_bool = run(sampler=sampler, cond=COND, known=known, mask=mask.bool())
    assert torch.equal(as_bool, x)


def test_a_soft_mask_blends():
    x, m, known, n = torch.randn(4, 2, 3, 4)
    mask = torch.rand(2, 1, 4)
    row = torch.zeros(len(ops.COLUMNS), dtype=torch.float64)
    for name, value in {"c_x": 0.5, "c_m": -0.2, "k_x0": 0.8, "k_n": 0.6}.items():
        row[ops.COLUMNS.index(name)] = value
    y, _, _ = ops.step(x, m, row, mask=mask, known=known, known_noise=n)
    torch.testing.assert_close(y, mask * (0.8 * known + 0.6 * n) + (1 - mask) * (0.5 * x - 0.2 * m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_next_model_input_is_written_too(copies, dtype):
    x, m = (torch.randn(5, 33).to(dtype) for _ in range(2))
    row = torch.zeros(len(ops.COLUMNS), dtype=torch.float64)
    for name, value in {"c_x": 0.5, "c_m": -0.2, "c_in": 0.25}.items():
        row[ops.COLUMNS.index(name)] = value
    seen = torch.empty(5 * copies, 33, dtype=dtype)
    y, _, _ = ops.step(x, m, row, model_input=seen)
    torch.testing.assert_close(seen, torch.cat([0.25 * y] * copies), rtol=2 * torch.finfo(dtype).eps, atol=0)
    with pytest.raises(ValueError, match="model_input"):
        ops.step(x, m, row, model_input=torch.empty(5, 32, dtype=dtype))


def test_a_threshold_clamps_and_divides():
    x, m = torch.randn(2, 4, 50, dtype=torch.float64)
    row = torch.zeros(len(ops.COLUMNS), dtype=torch.float64)
    row[ops.COLUMNS.index("p_m")] = row[ops.COLUMNS.index("c_x0")] = 1.0
    s = torch.tensor([0.5, 1.0, 1.5, 9.0], dtype=torch.float64)
    y, x0, _ = ops.step(x, m, row, threshold=s)
    expected = m.clamp(-s[:, None], s[:, None]) / s[:, None]
    torch.testing.assert_close(x0, expected)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "edm", "dpmpp_3m"])
def test_return_trajectory_is_what_the_callback_sees(sampler):
    seen = []
    x, path = run(sampler=sampler, cond=COND, return_trajectory=True, callback=lambda k, t, x, x0: seen.append((k, x)))
    assert path.shape == (7, *SHAPE) and torch.equal(path[-1], x)
    assert [k for k, _ in seen] == list(range(6))
    assert all(torch.equal(a, b) for a, (_, b) in zip(path[1:], seen))
    assert torch.equal(x, run(sampler=sampler, cond=COND)), "buffers are used again without a callback: same result"


def test_a_model_that_returns_its_input_or_keeps_one_output():
    """The network's output may be x itself, or one tensor that it writes again and again."""
    table = samplers.get("dpmpp_3m")
    expected = run(lambda x, t: x.clone(), table)
    assert torch.equal(run(lambda x, t: x, table), expected)
    out = torch.empty(SHAPE)
    assert torch.equal(run(lambda x, t: out.copy_(x), table), expected)


@pytest.mark.parametrize("name", list(samplers.NAMES))
def test_one_launch_a_step(name, backend, monkeypatch):
    """Each call of the network is followed by one call of the backend's step, with guidance and noise and all."""
    calls = []
    if backend == "native":
        from fastdiff.backends.native import trajectory

        original = trajectory._C

        class Counting:
            def __getattr__(self, attribute):
                if attribute == "step":
                    raise AssertionError("a step of its own")
                return getattr(original, attribute)

            def trajectory(self, *arguments):
                launch, aim = original.trajectory(*arguments)

                def counted(*arguments):
                    done = launch(*arguments)
                    calls.extend([1] * done)
                    return done

                return counted, aim

        monkeypatch.setattr(trajectory, "_C", Counting())
    else:
        chosen = registry._BACKENDS["reference"]
        real = chosen.run
        monkeypatch.setattr(chosen, "run", lambda call: calls.extend([1] * (call.operation == "step")) or real(call))
    process, prediction = (FLOW, "flow") if name.startswith("flow") else (VP, "epsilon")
    rows = len(samplers.get(name).plan(process, 5, prediction).times)
    run(sampler=name, process=process, steps=5, prediction=prediction, cond=COND, uncond=UNCOND, guidance=2.0)
    assert len(calls) == rows


class NoSync(TorchDispatchMode):
    """Fails where a value is read back: on a GPU each of these waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(samplers.NAMES))
def test_no_value_is_read_back_in_the_loop(name, backend):
    """From the first call of the network to the last, with everything switched on."""
    process, prediction = (FLOW, "flow") if name.startswith("flow") else (VP, "epsilon")
    mode, calls = NoSync(), []
    rows = len(samplers.get(name).plan(process, 5, prediction).times)

    def watched(x, t, c):
        calls.append(1)
        if len(calls) == 1:
            mode.__enter__()
        m = torch.tanh(x) * c.view(-1, 1, 1)
        if len(calls) == rows:
            mode.__exit__(None, None, None)
        return m

    run(
        watched, name, process, 5, prediction, cond=COND, uncond=UNCOND, guidance=2.0, guidance_rescale=0.5,
        dynamic_thresholding=0.9, known=torch.zeros(SHAPE), mask=torch.ones(SHAPE),
        callback=lambda k, t, x, x0: None,
    )  # fmt: skip
    assert len(calls) == rows


def test_compile_runs_the_model_through_torch_compile(monkeypatch):
    compiled = []

    def compile(model):
        compiled.append(model)
        return lambda *args: model(*args)

    monkeypatch.setattr(torch, "compile", compile)
    x = run(cond=COND, compile=True)
    assert compiled == [network]
    assert torch.equal(x, run(cond=COND))


WRONG = {
    "interval without uncond": ({"guidance_interval": (0, 10)}, "guidance_interval"),
    "interval from high to low": (
        {"cond": COND, "uncond": UNCOND, "guidance": 2.0, "guidance_interval": (700, 300)}, "low <= high",
    ),
    "rescale without uncond": ({"guidance_rescale": 0.5}, "guidance_rescale"),
    "rescale out of range": ({"guidance_rescale": 1.5}, r"\[0, 1\]"),
    "a rescale below 0": ({"guidance_rescale": -0.1}, r"\[0, 1\]"),
    "quantile out of range": ({"dynamic_thresholding": 1.5}, r"quantile in \(0, 1\]; got 1.5"),
    "quantile of 0": ({"dynamic_thresholding": 0.0}, r"quantile in \(0, 1\]; got 0.0"),
    "a quantile below 0": ({"dynamic_thresholding": -0.5}, r"quantile in \(0, 1\]; got -0.5"),
    "max below 1": ({"dynamic_thresholding": 0.9, "sample_max_value": 0.9}, "at least 1; got 0.9"),
    "thresholds and a clip": ({"dynamic_thresholding": 0.9, "sampler": samplers.DDIM(clip=1.0)}, "exclude"),
    "max alone": ({"sample_max_value": 2.0}, "dynamic_thresholding"),
    "mask alone": ({"mask": torch.ones(SHAPE)}, "both mask and known"),
    "known of another shape": ({"mask": torch.ones(SHAPE), "known": torch.ones(2, 3, 5)}, "known"),
    "mask of another shape": ({"mask": torch.ones(5), "known": torch.ones(SHAPE)}, "broadcast"),
    "cuda graph on a CPU": ({"cuda_graph": True}, "CUDA device"),
    "lcm beyond its steps": ({"sampler": "lcm", "steps": 51}, r"\[1, 50\]"),
    "lcm on a flow": ({"sampler": "lcm", "process": FLOW, "prediction": "flow"}, "discrete"),
    "flow sampler elsewhere": ({"sampler": "flow_heun"}, "RectifiedFlow"),
    "churn on a flow": (
        {"sampler": samplers.FlowHeun(s_churn=1.0), "process": FLOW, "prediction": "flow"}, "churn",
    ),
    "steps and sigmas": ({"sampler": samplers.Euler(sigmas=[3.0, 1.0])}, "leave steps out"),
    "rising sigmas": ({"sampler": samplers.Euler(sigmas=[1.0, 3.0]), "steps": None}, "must fall"),
    "sigma out of a flow": (
        {"sampler": samplers.Euler(sigmas=[3.0, 1.0]), "steps": None, "process": FLOW, "prediction": "flow"},
        r"\[0, 1\]",
    ),
    "infinite end": (
        {"sampler": samplers.Euler(sigmas="karras"), "process": fastdiff.VariancePreserving(zero_terminal_snr=True),
         "prediction": "sample"}, "sigma_max",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_options(case):
    """Refused before the network is called, with a reason."""

    def never(x, t, c=None):
        raise AssertionError("the model was called")

    how, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        run(never, **how)


@pytest.mark.parametrize(
    "make, options, words",
    [
        ("Euler", {"sigmas": "cosine"}, "one of karras, exponential, beta, linear, or numbers; got 'cosine'"),
        ("Euler", {"spacing": "even"}, "spacing must be one of trailing, leading, linspace; got 'even'"),
        ("Euler", {"clip": -1.0}, "clip must be positive, or None for no clamping; got -1.0"),
        ("Euler", {"sigma_min": 1.0}, "sigma_min and sigma_max go with a named schedule"),
        ("Euler", {"sigmas": "karras", "sigma_min": 2.0, "sigma_max": 1.0}, "got sigma_min=2.0, sigma_max=1.0"),
        ("Euler", {"sigmas": "karras", "sigma_min": 0.0}, "0 < sigma_min < sigma_max is needed; got sigma_min=0.0"),
        ("Euler", {"sigmas": "karras", "timesteps": [5, 1]}, "sigmas='karras' both say .*: leave one out"),
        ("Euler", {"sigmas": "karras", "rho": 0.0}, "rho must be positive; got 0.0"),
        ("Euler", {"s_churn": -1.0}, "s_churn must be at least 0; got -1.0"),
        ("EulerAncestral", {"eta": 2.0}, r"eta must lie in \[0, 1\]; got 2.0"),
        ("DPMSolverPP", {"order": 4}, "order must be 1, 2 or 3; got 4"),
        ("DPMSolverPP", {"solver_type": "bh1"}, "solver_type must be 'midpoint' or 'heun'; got 'bh1'"),
        ("DPMSolverPP", {"eta": -1.0}, r"eta must lie in \[0, 1\]; got -1.0"),
        ("UniPC", {"solver_type": "midpoint"}, "solver_type must be 'bh1' or 'bh2'; got 'midpoint'"),
        ("LCM", {"original_steps": 0}, "original_steps must be at least 1; got 0"),
        ("DDPM", {"variance": "fixed"}, "one of fixed_small, fixed_large, learned, learned_range; got 'fixed'"),
        ("DDPM", {"clip": -1.0}, "clip must be positive, or None for no clamping; got -1.0"),
        ("DDIM", {"eta": -0.1}, r"eta must lie in \[0, 1\]; got -0.1"),
        ("DDIM", {"eta": 1.1}, r"eta must lie in \[0, 1\]; got 1.1"),
        ("DDIM", {"previous": "last"}, "previous must be 'next' or 'stride'; got 'last'"),
    ],
)
def test_wrong_samplers(make, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(samplers, make)(**options)


def test_both_ends_of_the_interval_are_guided():
    batches = []

    def counted(x, t, c):
        batches.append(len(x))
        return network(x, t, c)

    how = {"cond": COND, "uncond": UNCOND, "guidance": 3.0, "guidance_interval": (300, 700)}
    run(counted, samplers.DDIM(timesteps=[701, 700, 300, 299]), steps=None, **how)
    assert batches == [2, 4, 4, 2]


def test_a_step_waits_for_no_copy(monkeypatch):
    """What a step of guidance that looks at the network's output copies to the device, the host does not wait for."""
    copies, real = [], torch.Tensor.to

    def to(tensor, *given, **how):
        found = real(tensor, *given, **how)
        if given and isinstance(given[0], torch.device) and found is not tensor:
            copies.append(how.get("non_blocking", False))
        return found

    def watched(x, t, c):
        copies.clear()  # what comes before the first step is made once
        monkeypatch.setattr(torch.Tensor, "to", to)
        return network(x, t, c)

    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    run(watched, cond=COND, uncond=UNCOND, guidance=scale, guidance_rescale=0.7, steps=1)
    assert copies and all(copies)


@pytest.mark.parametrize("how", [{}, {"dynamic_thresholding": 0.9}])
def test_a_network_that_returns_another_shape(how):
    with pytest.raises(ValueError, match=r"the model returned shape \(2, 4, 8\) for an input of \(2, 3, 8\)"):
        fastdiff.sample(
            lambda x, t: torch.zeros(2, 4, 8), (2, 3, 8), VP, "ddim", 2, prediction="epsilon", progress=False, **how
        )
