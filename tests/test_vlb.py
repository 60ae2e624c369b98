"""The variational bound against formulas in NumPy float64, and what is made of it."""

import math

import numpy as np
import pytest
import torch
from accuracy import to_numpy
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops
from fastdiff.losses.bits_per_dim import bits_per_dim
from fastdiff.losses.resampling import LossSecondMoment
from fastdiff.losses.vlb import VARIANCES, VariationalBound, columns

STEPS = 40
T = torch.tensor([0, 1, 7, STEPS - 1])
KINDS = ["epsilon", "sample", "v_prediction", "previous_sample"]


def column(rows):
    return np.asarray(rows, dtype=np.float64)[:, None, None, None]


def bound(variance="learned_range", kind="epsilon", bins=256, **how):
    process = fastdiff.VariancePreserving("linear", steps=STEPS, beta_end=0.3)
    return VariationalBound(fastdiff.Objective(process, kind, **how), variance, bins)


def batch(of, dtype=torch.float64, spread=0.3):
    """(noised at T, output): x0 has elements at both ends of [-1, 1], the output is near its target."""
    x0 = (torch.randn(4, 3, 5, 5, dtype=torch.float64) * 0.8).clamp(-1, 1).to(dtype)
    noised = of.objective.noise(x0, T, seed=3)
    output = (noised.target + spread * torch.randn_like(x0)).to(dtype)
    if of.learned:
        v = torch.rand_like(x0) * 2 - 1
        output = torch.cat([output, v * 0.5 - 3 if of.variance == "learned" else v], 1)
    return noised, output


def by_hand(of, noised, output):
    """(L_t of each element in nats, e^2): from the textbook's means and variances."""
    process, kind, t = of.objective.process, of.objective.prediction.name, T.numpy()
    betas = to_numpy(process.betas)
    abar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    small = np.log(np.concatenate([variance[1:2], variance[1:]]))
    large = np.log(np.concatenate([variance[1:2], betas[1:]]) if of.variance == "fixed_large" else betas)
    c_x0 = np.sqrt(before) * betas / (1 - abar)
    c_xt = np.sqrt(1 - betas) * (1 - before) / (1 - abar)
    x0, x_t, n = to_numpy(noised.x0), to_numpy(noised.x_t.double()), to_numpy(noised.noise)
    a, s = column(np.sqrt(abar)[t]), column(np.sqrt(1 - abar)[t])
    x_t = a * x0 + s * n
    m = to_numpy(output)[:, :3]
    estimate = {
        "epsilon": lambda: (x_t - s * m) / a,
        "sample": lambda: m,
        "v_prediction": lambda: a * x_t - s * m,
        "previous_sample": lambda: (m - column(c_xt[t]) * x_t) / column(c_x0[t]),
    }[kind]()
    true = column(c_x0[t]) * x0 + column(c_xt[t]) * x_t
    mean = column(c_x0[t]) * estimate + column(c_xt[t]) * x_t
    v = to_numpy(output)[:, 3:]
    log_variance = {
        "fixed_small": lambda: column(small[t]) + 0 * m,
        "fixed_large": lambda: column(large[t]) + 0 * m,
        "learned": lambda: v,
        "learned_range": lambda: (v + 1) / 2 * column(large[t]) + (1 - v) / 2 * column(small[t]),
    }[of.variance]()
    ratio = column(small[t]) - log_variance
    kl = 0.5 * (-1 - ratio + np.exp(ratio) + (mean - true) ** 2 * np.exp(-log_variance))
    if of.bins is None:
        decoder = 0.5 * (log_variance + math.log(2 * math.pi) + (x0 - mean) ** 2 * np.exp(-log_variance))
    else:
        h = 1 / (of.bins - 1)
        upper, lower = (
            0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            for z in ((x0 - mean + h) * np.exp(-0.5 * log_variance), (x0 - mean - h) * np.exp(-0.5 * log_variance))
        )
        probability = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
        decoder = -np.log(np.maximum(probability, 1e-12))
    target = to_numpy(noised.target)
    return np.where(column(t) == 0, decoder, kl), (m - target) ** 2


@pytest.mark.parametrize("bins", [256, 17, None])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_those_of_the_papers(kind, variance, bins, backend):
    of = bound(variance, kind, bins)
    noised, output = batch(of)
    nats, _ = by_hand(of, noised, output)
    bits = nats.mean((1, 2, 3)) / math.log(2)
    # The code of the papers takes the difference of two numbers near 1; ours does not.
    near = {"rtol": 1e-6 if bins else 1e-9, "atol": 1e-10}
    np.testing.assert_allclose(to_numpy(of.terms(output, noised)), bits, **near)
    np.testing.assert_allclose(to_numpy(of.loss(output, noised)), STEPS * bits.mean(), **near)
    np.testing.assert_allclose(to_numpy(of.loss(output, noised, reduction="none")), STEPS * bits, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_float32(dtype, backend):
    of = bound()
    noised, output = batch(of, dtype)
    nats, squares = by_hand(of, noised, output)
    terms = of.terms(output, noised)
    assert terms.dtype == torch.float32
    np.testing.assert_allclose(
        to_numpy(terms), nats.mean((1, 2, 3)) / math.log(2), rtol=2e-3 if dtype != torch.float32 else 1e-4
    )


@pytest.mark.parametrize("weighting", [None, fastdiff.MinSNR(5.0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_hybrid_loss_and_its_gradients(variance, kind, weighting, backend):
    """The mean learns from the squared error alone, the variance from the bound alone."""
    of = bound(variance, kind, weighting=weighting)
    noised, output = batch(of)
    nats, squares = by_hand(of, noised, output)
    w = column(to_numpy(noised.weight))
    simple, vlb = (w * squares).mean((1, 2, 3)), STEPS * nats.mean((1, 2, 3)) / math.log(2)
    output.requires_grad_()
    loss = of.hybrid(output, noised)
    np.testing.assert_allclose(to_numpy(loss), (simple + 0.001 * vlb).mean(), rtol=1e-6)
    rows = of.hybrid(output, noised, vlb_weight=0.1, reduction="none")
    np.testing.assert_allclose(to_numpy(rows), simple + 0.1 * vlb, rtol=1e-6)
    (got,) = torch.autograd.grad(loss, output)
    m, v = output.detach().chunk(2, 1)
    m.requires_grad_(), v.requires_grad_()
    (simple_gradient,) = torch.autograd.grad((torch.from_numpy(w) * (m - noised.target) ** 2).mean(), m)
    (vlb_gradient,) = torch.autograd.grad(0.001 * of.loss(torch.cat([m.detach(), v], 1), noised), v)
    torch.testing.assert_close(got[:, :3], simple_gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got[:, 3:], vlb_gradient, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_the_bound_is_that_of_the_unfused_formula(backend):
    of = bound("learned_range")
    noised, output = batch(of)
    output.requires_grad_()
    got = torch.autograd.grad(of.loss(output, noised), output)[0]
    process = of.objective.process
    c_x0, c_xt, _ = (row.view(4, 1, 1, 1) for row in process.posterior(T))
    small = process.posterior_log_variance(T, "reuse").view(4, 1, 1, 1)
    large = process.betas[T].log().view(4, 1, 1, 1)
    m, v = output.chunk(2, 1)
    mean = c_x0 * of.objective.predict_x0(m, noised) + c_xt * noised.x_t
    log_variance = (v + 1) / 2 * large + (1 - v) / 2 * small
    difference = mean - c_x0 * noised.x0 - c_xt * noised.x_t
    ratio = small - log_variance
    kl = 0.5 * (-1 - ratio + ratio.exp() + difference**2 * (-log_variance).exp())
    z = [(noised.x0 - mean + h) * (-0.5 * log_variance).exp() for h in (1 / 255, -1 / 255)]
    upper, lower = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) for a in z)
    inside = torch.where(noised.x0 > 0.999, 1 - lower, upper - lower)
    decoder = -torch.where(noised.x0 < -0.999, upper, inside).clamp(min=1e-12).log()
    unfused = torch.where((T == 0).view(4, 1, 1, 1), decoder, kl).mean() / math.log(2) * STEPS
    want = torch.autograd.grad(unfused, output)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8 * float(want.abs().max()))


def test_a_term_is_a_weighted_error_of_epsilon():
    """L_t = beta^2 / (2 posterior variance alpha (1 - alpha_bar)) |error|^2: Ho et al. 2020, equation 12."""
    of = bound("fixed_small")
    noised, output = batch(of)
    betas, abar = of.objective.process.betas, of.objective.process.alpha_bar
    variance = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    factor = betas[1:] ** 2 / (2 * variance * (1 - betas[1:]) * (1 - abar[1:]))
    squares = ((output - noised.noise) ** 2).mean((1, 2, 3))
    want = factor[T[1:] - 1] * squares[1:] / math.log(2)
    torch.testing.assert_close(of.terms(output, noised)[1:], want, rtol=1e-9, atol=0)


def test_clipped_estimates():
    of = bound("learned_range")
    noised, output = batch(of, spread=3.0)
    m, v = output.chunk(2, 1)
    clipped = VariationalBound(fastdiff.Objective(of.objective.process, "sample"), "learned_range")
    x0 = of.objective.predict_x0(m, noised)
    assert (x0.abs() > 1).any()
    again = clipped.objective.noise(noised.x0, T, noised.noise)
    want = clipped.terms(torch.cat([x0.clamp(-1, 1), v], 1), again)
    torch.testing.assert_close(of.terms(output, noised, clip=1.0), want, rtol=1e-12, atol=0)


def test_the_prior():
    of = bound()
    x0 = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    abar = float(of.objective.process.alpha_bar[-1])
    want = 0.5 * (-1 - math.log(1 - abar) + 1 - abar + abar * x0**2).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(of.prior(x0), want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", [None, fastdiff.MinSNR(5.0)])
def test_an_error_space_is_that_of_the_objective(weighting):
    of = bound(kind="v_prediction", error_space="epsilon", weighting=weighting)
    noised, output = batch(of)
    m, v = output.chunk(2, 1)
    simple = of.objective.loss(m.contiguous(), noised)
    want = simple + 0.001 * of.loss(output, noised)
    torch.testing.assert_close(of.hybrid(output, noised), want, rtol=1e-10, atol=0)


def test_under_compile():
    of = bound()
    noised, output = batch(of, torch.float32)
    x0 = noised.x0

    def step(x0, output, t):
        noised = of.objective.noise(x0, t, seed=3)
        return of.hybrid(output, noised)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        leaf = output.clone().requires_grad_()
        loss = call(x0, leaf, T)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_table_follows_the_process():
    of = bound()
    noised, output = batch(of)
    before = of.terms(output, noised)
    of.objective.process.sigma_data = 1.0  # a change, though of nothing that matters here
    noised = of.objective.noise(noised.x0, T, noised.noise)
    torch.testing.assert_close(of.terms(output, noised), before)


def test_the_table_follows_the_settings():
    of = bound("fixed_small")
    noised, output = batch(of)
    of.terms(output, noised)
    of.variance, of.bins = "fixed_large", 17
    assert torch.equal(of.terms(output, noised), bound("fixed_large", bins=17).terms(output, noised))


def test_unfit_arguments():
    process = fastdiff.VariancePreserving(steps=10)
    with pytest.raises(TypeError, match="Objective"):
        VariationalBound(process)
    with pytest.raises(ValueError, match="probability-flow"):
        VariationalBound(fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"))
    with pytest.raises(ValueError, match="variance must be one of"):
        VariationalBound(fastdiff.Objective(process), "fixed")
    with pytest.raises(ValueError, match="bins"):
        VariationalBound(fastdiff.Objective(process), bins=1)
    with pytest.raises(ValueError, match="'mse'"):
        VariationalBound(fastdiff.Objective(process, loss="huber"))
    with pytest.raises(ValueError, match="v_prediction"):
        VariationalBound(fastdiff.Objective(fastdiff.VariancePreserving(steps=10, zero_terminal_snr=True)))
    VariationalBound(fastdiff.Objective(fastdiff.VariancePreserving(steps=10, zero_terminal_snr=True), "v_prediction"))
    fixed = VariationalBound(fastdiff.Objective(process))
    noised = fixed.objective.noise(torch.zeros(2, 3, 4, 4), seed=1)
    with pytest.raises(ValueError, match="learned_range"):
        fixed.hybrid(torch.zeros(2, 3, 4, 4), noised)
    with pytest.raises(ValueError, match="shape"):
        fixed.terms(torch.zeros(2, 6, 4, 4), noised)
    with pytest.raises(TypeError, match="noised"):
        fixed.terms(torch.zeros(2, 3, 4, 4), torch.zeros(2))
    other = fastdiff.Objective(fastdiff.VariancePreserving("cosine", steps=10)).noise(torch.zeros(2, 3, 4, 4), seed=1)
    with pytest.raises(ValueError, match="process|of "):
        fixed.terms(torch.zeros(2, 3, 4, 4), other)


# ---- over a data set


SPREAD = 0.5  # of Gaussian data, whose network is known


def exact(process):
    """Of data N(0, SPREAD^2): (the factor of x_t in the exact network's epsilon, and the log-variance of x_(t-1) given
    x_t) at every t."""
    every = torch.arange(process.steps)
    alpha, sigma = process.alpha_sigma(every)
    c_x0, _, variance = process.posterior(every)
    total = alpha**2 * SPREAD**2 + sigma**2
    return sigma / total, (variance + c_x0**2 * SPREAD**2 * sigma**2 / total).log()


def test_the_expected_terms_of_the_exact_network_add_up_to_the_entropy():
    """With the right mean and variance the bound is the negative log-density itself: for N(0, s^2) in closed form."""
    process = fastdiff.VariancePreserving("cosine", steps=1000)
    of = VariationalBound(fastdiff.Objective(process), "learned", bins=None)
    _, log_variance = exact(process)
    found = columns(process, of.objective.prediction, "learned", 0.0)
    alpha, sigma = process.alpha_sigma(torch.arange(1000))
    squares = found["scale"] ** 2 * (alpha * SPREAD) ** 2 / (alpha**2 * SPREAD**2 + sigma**2)  # E d^2
    ratio = found["l_q"] - log_variance
    kl = (torch.expm1(ratio) - ratio + squares * (-log_variance).exp()) / 2
    density = (log_variance + math.log(2 * math.pi) + squares * (-log_variance).exp()) / 2
    last = alpha[-1] ** 2
    prior = (-(1 - last).log() + last * SPREAD**2 - last) / 2
    bits = float(density[0] + kl[1:].sum() + prior) / math.log(2)
    assert bits == pytest.approx(0.5 * math.log2(2 * math.pi * math.e * SPREAD**2), abs=1e-7)


def test_the_exact_network_has_the_entropy_of_the_data():
    process = fastdiff.VariancePreserving(steps=30, beta_end=0.5)
    x0 = SPREAD * torch.randn(1024, 4, 16, dtype=torch.float64)
    data, how = [x0[:100], x0[100:]], {"bins": None, "clip": None, "progress": False}
    factor, log_variance = exact(process)

    def network(x, t):
        return factor[t].view(-1, 1, 1) * x

    def learned(x, t):
        return torch.cat([network(x, t), log_variance[t].view(-1, 1, 1).expand_as(x)], 1)

    found = bits_per_dim(learned, data, process, variance="learned", **how)
    true = 0.5 * math.log2(2 * math.pi * math.e * SPREAD**2)
    assert 0 < found.error < 1e-2 and abs(found.total - true) < 3 * found.error
    assert found.samples == 1024 and found.terms.shape == (30,) and bool((found.counts == 1024).all())
    assert found.total == pytest.approx(found.prior + found.terms.sum().item(), rel=1e-12)
    wrong = bits_per_dim(network, data, process, **how)
    assert wrong.total > found.total + 0.05  # with the variance of the true Gaussian, which knows x0


def test_batches_seeds_draws_and_conditions(tmp_path):
    process = fastdiff.VariancePreserving(steps=8, beta_end=0.5)
    x0 = (SPREAD * torch.randn(12, 1, 4, 4, dtype=torch.float64)).clamp(-1, 1)
    label = torch.arange(12)
    seen = []

    def network(x, t, condition=None):
        seen.append((len(x), condition))
        return 0.3 * x

    whole = bits_per_dim(network, [x0], process, progress=False)
    parts = bits_per_dim(network, x0.split(5), process, progress=False)
    torch.testing.assert_close(whole.terms, parts.terms, rtol=1e-12, atol=0)
    assert whole.total == pytest.approx(parts.total, rel=1e-12) and whole.error == pytest.approx(parts.error, rel=1e-9)
    other = bits_per_dim(network, [x0], process, progress=False, seed=1)
    assert other.total != whole.total and abs(other.total - whole.total) < 4 * (other.error + whole.error)
    # A sample's own bits are what the sum grows by when it is added; the error is the standard error of their mean.
    first = [bits_per_dim(network, [x0[:n]], process, progress=False) for n in (1, 2, 3)]
    each = np.diff([0.0] + [n * found.total for n, found in enumerate(first, 1)])
    assert first[2].error == pytest.approx(each.std(ddof=1) / 3**0.5, rel=1e-9) and first[0].error == 0
    seen.clear()
    conditioned = bits_per_dim(network, list(zip(x0.split(5), label.split(5))), process, progress=False)
    assert conditioned.total == pytest.approx(parts.total, rel=1e-12)
    assert torch.equal(seen[8][1], label[5:10]) and len(seen) == 24
    # As many draws as there are timesteps cost the same; fewer are an unbiased estimate.
    drawn = [bits_per_dim(network, [x0], process, draws=4, seed=seed, progress=False) for seed in range(40)]
    mean = sum(found.total for found in drawn) / 40
    spread = (sum((found.total - mean) ** 2 for found in drawn) / 39 / 40) ** 0.5
    assert abs(mean - whole.total) < 4 * spread + 4 * whole.error / 40**0.5
    assert all(int(found.counts.sum()) == 48 for found in drawn)
    with pytest.raises(ValueError, match="no samples"):
        bits_per_dim(network, iter(()), process, progress=False)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    process = fastdiff.VariancePreserving(steps=5, beta_end=0.5)
    data = list((SPREAD * torch.randn(9, 1, 4, 4)).clamp(-1, 1).split(2))
    path = tmp_path / "deeper" / "bits.pt"
    calls = []

    def network(x, t):
        calls.append(t)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return 0.3 * x

    want = bits_per_dim(lambda x, t: 0.3 * x, data, process, progress=False)
    with pytest.raises(KeyboardInterrupt):
        bits_per_dim(network, data, process, checkpoint=path, save_every=1, progress=False)
    got = bits_per_dim(network, data, process, checkpoint=path, save_every=2, progress=False)
    assert len(calls) == 13 + 15  # the two batches that were done are not done again
    assert got.total == want.total and got.error == want.error and torch.equal(got.terms, want.terms)
    again = bits_per_dim(network, data, process, checkpoint=path, progress=False)
    assert len(calls) == 28 and again.total == want.total
    with pytest.raises(ValueError, match="seed=0"):
        bits_per_dim(network, data, process, checkpoint=path, progress=False, seed=1)
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        bits_per_dim(network, data, process, checkpoint=tmp_path / "other.pt", progress=False)


# ---- resampling


def naive(history, size, steps, uniform):
    """Improved diffusion's probabilities, from lists of losses."""
    if any(len(losses) < size for losses in history):
        return np.full(steps, 1 / steps)
    weights = np.array([np.sqrt(np.mean(np.square(losses[-size:]))) for losses in history])
    return weights / weights.sum() * (1 - uniform) + uniform / steps


def test_loss_second_moment_resampling():
    process = fastdiff.VariancePreserving(steps=6, beta_end=0.5)
    resampler = LossSecondMoment(process, history=3, uniform=0.01)
    generator, history = np.random.default_rng(0), [[] for _ in range(6)]
    for _ in range(30):
        t = torch.from_numpy(generator.integers(0, 6, 7))  # some of them twice, and more than fit
        losses = torch.from_numpy(generator.exponential(size=7) * (1 + t.numpy()))
        resampler.update(t, losses)
        for k, loss in zip(t.tolist(), losses.tolist()):
            history[k].append(loss)
        want = naive(history, 3, 6, 0.01)
        np.testing.assert_allclose(resampler.probabilities(), want, rtol=1e-12)
        np.testing.assert_allclose(resampler.weight(t), 1 / (6 * want[t]), rtol=1e-6)
    assert want.max() > 1.5 / 6  # it has warmed up
    again = LossSecondMoment(process, history=3, uniform=0.01)
    again.load_state_dict(resampler.state_dict())
    assert torch.equal(again.probabilities(), resampler.probabilities())
    with pytest.raises(ValueError, match="losses must have shape"):
        LossSecondMoment(process).load_state_dict(resampler.state_dict())


class NoSync(TorchDispatchMode):
    """Fails where a value is read back, or a mask chooses elements: on a GPU each of these waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        if func in (aten.index.Tensor, aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", ["draw", "weight", "update"])
def test_the_losses_go_to_the_device_of_the_times(call):
    process = fastdiff.VariancePreserving(steps=4, beta_end=0.5)
    resampler, t = LossSecondMoment(process, history=2), torch.tensor([0, 3], device="meta")
    if call == "draw":
        found = resampler(torch.empty(2, dtype=torch.float64, device="meta"), process)
    else:
        found = resampler.weight(t) if call == "weight" else resampler.update(t, torch.empty(2, device="meta"))
    kept = list(resampler.state_dict().values()) + ([] if found is None else [found])
    assert all(tensor.is_meta for tensor in kept)


def test_resampling_waits_for_nothing():
    process = fastdiff.VariancePreserving(steps=4, beta_end=0.5)
    resampler, t = LossSecondMoment(process, history=2), torch.tensor([0, 3, 0, 0])
    with NoSync():
        resampler.update(t, torch.rand(4))
        assert resampler.weight(t).shape == resampler(torch.rand(4, dtype=torch.float64), process).shape == (4,)


def test_more_losses_of_one_t_than_are_kept():
    process = fastdiff.VariancePreserving(steps=2, beta_end=0.5)
    resampler = LossSecondMoment(process, history=2)
    resampler.update(torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([9.0, 3.0, 9.0, 1.0, 4.0, 2.0]))
    assert sorted(resampler.state_dict()["losses"][0].tolist()) == [1.0, 2.0]
    assert sorted(resampler.state_dict()["losses"][1].tolist()) == [3.0, 4.0]
    resampler.update(torch.tensor([0]), torch.tensor([7.0]))
    assert sorted(resampler.state_dict()["losses"][0].tolist()) == [2.0, 7.0]


def test_an_objective_draws_by_the_losses_that_were_seen(backend):
    process = fastdiff.VariancePreserving(steps=4, beta_end=0.5)
    resampler = LossSecondMoment(process, history=1, uniform=0.1)
    objective = fastdiff.Objective(process, timesteps=resampler)
    x0 = torch.zeros(4000, 1)
    first = objective.noise(x0, seed=1).t.bincount(minlength=4) / 4000
    assert (first - 0.25).abs().max() < 0.03
    resampler.update(torch.arange(4), torch.tensor([1.0, 0.0, 0.0, 3.0]))
    want = torch.tensor([0.25, 0.025, 0.025, 0.7])
    want[0] = 0.9 * 0.25 + 0.025
    for seed in (1, 2):
        share = objective.noise(x0, seed=seed).t.bincount(minlength=4) / 4000
        assert (share - want).abs().max() < 0.03


def test_resampling_of_unfit_arguments():
    process = fastdiff.VariancePreserving(steps=4, beta_end=0.5)
    with pytest.raises(ValueError, match="discrete"):
        LossSecondMoment(fastdiff.RectifiedFlow())
    for how in ({"history": 0}, {"uniform": 0.0}, {"uniform": 1.5}):
        with pytest.raises(ValueError, match=next(iter(how))):
            LossSecondMoment(process, **how)
    resampler = LossSecondMoment(process)
    with pytest.raises(ValueError, match="one a sample"):
        resampler.update(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="4 timesteps"):
        fastdiff.Objective(fastdiff.VariancePreserving(steps=5), timesteps=resampler)


def test_ops_is_asked_once_a_loss(monkeypatch):
    of = bound()
    noised, output = batch(of)
    calls = []
    kept = ops.gaussian_kl
    monkeypatch.setattr(ops, "gaussian_kl", lambda *a, **k: calls.append(1) or kept(*a, **k))
    of.hybrid(output, noised)
    assert len(calls) == 1
