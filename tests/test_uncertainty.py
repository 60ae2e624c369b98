"""Learned uncertainty, exp(-u) L + u: u, the loss and its gradients against NumPy float64, and what training finds."""

import math

import numpy as np
import oracle
import pytest
import torch
from oracle import assert_close

import fastdiff
from fastdiff import uncertainty

SHAPE = (4, 2, 3)
VP = fastdiff.VariancePreserving(zero_terminal_snr=True)
PROCESSES = {
    "edm": (fastdiff.EDM(), "edm", fastdiff.EDMWeighting(), [0.002, 0.5, 3.0, 80.0]),
    "vp": (VP, "v_prediction", fastdiff.MinSNR(), [0, 10, 500, 999]),
    "flow": (fastdiff.RectifiedFlow(shift=3.0), "flow", None, [0.0, 0.25, 0.7, 1.0]),
}


def made(name, dtype=torch.float64, times=None):
    process, kind, weighting, t = PROCESSES[name]
    g = torch.Generator().manual_seed(2)
    x0, n, m = (torch.randn(SHAPE, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    objective = fastdiff.Objective(process, kind, weighting)
    return objective, objective.noise(x0, torch.tensor(t if times is None else times), n), m


def fourier(features=7, dtype=torch.float64):
    module = uncertainty.Fourier(features, bandwidth=0.8).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-0.3, 0.4, features))
        module.bias.fill_(0.2)
    return module


def true_u(module, alpha, sigma):
    """EDM2: u = w . sqrt(2) cos(2 pi (f c + phase)) + b, c = ln(sigma / alpha) / 4, within [-5, 5]."""
    f, phase, w, b = (oracle.ld(v.detach().double().numpy()) for v in (*module.buffers(), *module.parameters()))
    with np.errstate(divide="ignore"):
        c = np.clip((np.log(oracle.ld(alpha)) * -1 + np.log(oracle.ld(sigma))) / 4, -5, 5)
    return (w * np.sqrt(oracle.LD(2)) * np.cos(2 * oracle.PI * (c[..., None] * f + phase))).sum(-1) + b


@pytest.mark.parametrize("name", list(PROCESSES))
def test_u_of_the_noise_level(name):
    objective, noised, _ = made(name)
    module = fourier()
    levels = objective.process.levels(noised.t)
    u = module(noised)
    assert u.shape == (4,) and u.dtype == torch.float64
    assert_close(u.detach(), true_u(module, levels.alpha.numpy(), levels.sigma.numpy()), absolute=1e-13)
    assert fourier(dtype=torch.float32)(noised).dtype == torch.float32


def test_its_argument_is_c_noise():
    """Of EDM, ln(sigma) / 4, which its network is told."""
    _, noised, _ = made("edm")
    module = fourier(1)
    with torch.no_grad():
        module.frequencies.fill_(0.5 / torch.pi)
        module.phases.zero_()
        module.weight.fill_(1.0)
        module.bias.zero_()
    assert_close(module(noised).detach(), np.sqrt(2) * np.cos(noised.model_time.double().numpy()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_loss_and_gradients(name, dtype, backend):
    objective, noised, m = made(name, dtype)
    module = fourier(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    m = m.requires_grad_()
    u = module(noised)
    loss = objective.loss(m, noised, weight=torch.exp(-u)) + u.mean()
    loss.backward()
    levels, error = objective.process.levels(noised.t), oracle.ld((m.detach() - noised.target).double().numpy())
    if dtype == torch.bfloat16:  # the target that is written out is rounded
        p, q = objective.prediction.coefficients(levels)
        target = p[:, None, None] * noised.x0.double() + q[:, None, None] * noised.noise.double()
        error = oracle.ld((m.detach().double() - target).numpy())
    w = oracle.ld(fastdiff.weighting.evaluate(objective.weighting, levels, objective.prediction).numpy())
    right = true_u(module, levels.alpha.numpy(), levels.sigma.numpy())
    rows = w * (error**2).mean((1, 2))
    rel = 1e-11 if dtype == torch.float64 else 2e-6
    assert_close(loss.detach().double(), (rows * np.exp(-right) + right).mean(), rel=rel)
    by_row = objective.loss(m, noised, weight=torch.exp(-u), reduction="none") + u
    assert_close(by_row.detach().double(), rows * np.exp(-right) + right, rel=rel, absolute=rel)
    slope = (w * np.exp(-right))[:, None, None] * 2 * error / error.size
    rounding = float(torch.finfo(dtype).eps)
    assert_close(m.grad.double(), slope, rel=rel + rounding, absolute=1e-7 if rel > 1e-10 else 1e-13)
    # d loss / d bias = mean(1 - exp(-u) L): each row's L is what moves its u
    assert_close(module.bias.grad.double(), (1 - rows * np.exp(-right)).mean(), rel=rel, absolute=rel * rows.max())


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_gradcheck(name, backend):
    objective, noised, m = made(name)
    module = fourier(3)

    def loss(m, weight, bias):
        u = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (noised,))
        return objective.loss(m, noised, weight=torch.exp(-u)) + u.mean()

    given = (m, module.weight.detach().clone(), module.bias.detach().clone())
    assert torch.autograd.gradcheck(loss, [v.requires_grad_() for v in given])


def test_rows_are_frames():
    objective = fastdiff.Objective(fastdiff.EDM(), "edm", fastdiff.EDMWeighting())
    noised = objective.noise(torch.randn(2, 3, 5), torch.tensor([[0.1, 1.0, 9.0], [1.0, 0.3, 0.1]]))
    u = fourier()(noised)
    assert u.shape == (2, 3) and u[0, 0] == u[1, 2] and u[0, 1] == u[1, 0]
    assert objective.loss(torch.randn(2, 3, 5), noised, weight=torch.exp(-u), reduction="none").shape == u.shape


def test_rows_are_frames_of_a_table():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(steps=4))
    table = uncertainty.Table(4)
    with torch.no_grad():
        table.values.copy_(torch.arange(4.0))
    t = torch.tensor([[0, 3, 1], [2, 2, 0]])
    assert torch.equal(table(objective.noise(torch.randn(2, 3, 5), t)), t.float())


@pytest.mark.parametrize("name", list(PROCESSES))
def test_it_starts_as_the_plain_loss(name):
    objective, noised, m = made(name)
    modules = [uncertainty.Fourier()] + ([] if name == "edm" else [uncertainty.Table(1000)])
    for module in modules:
        u = module(noised)
        assert torch.equal(u, torch.zeros(4))
        assert objective.loss(m, noised, weight=torch.exp(-u)) == objective.loss(m, noised)


def test_u_is_not_rounded_under_autocast():
    _, noised, _ = made("edm")
    module = fourier(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        u = module(noised)
    assert u.dtype == torch.float32 and torch.equal(u, module(noised))


def test_a_table_of_timesteps():
    objective, noised, m = made("vp")
    table = uncertainty.Table(1000).double()
    with torch.no_grad():
        table.values.copy_(torch.linspace(-1, 2, 1000) ** 2)
    u = table(noised)
    assert u.tolist() == table.values[[0, 10, 500, 999]].tolist()
    (objective.loss(m, noised, weight=torch.exp(-u)) + u.mean()).backward()
    rows = objective.loss(m, noised, reduction="none")
    slopes = torch.zeros(1000, dtype=torch.float64)
    slopes[[0, 10, 500, 999]] = (1 - torch.exp(-u.detach()) * rows) / 4
    assert_close(table.values.grad, slopes.numpy(), rel=1e-12)


@pytest.mark.parametrize("by", ["fraction", "sigma"])
def test_a_table_over_the_times(by):
    objective, noised, m = made("flow")
    table = uncertainty.Table(5, by).double()
    with torch.no_grad():
        table.values.copy_(torch.tensor([0.3, -1.0, 0.5, 2.0, 0.0]))
    place = noised.t.double().numpy() if by == "fraction" else objective.process.levels(noised.t).sigma.numpy()
    u = table(noised)
    assert_close(u.detach(), oracle.weight_interpolated(table.values.tolist(), place), absolute=1e-14)

    def loss(values):
        u = torch.func.functional_call(table, {"values": values}, (noised,))
        return objective.loss(m, noised, weight=torch.exp(-u)) + u.mean()

    assert torch.autograd.gradcheck(loss, table.values.detach().clone().requires_grad_())


@pytest.mark.parametrize("make", [lambda: uncertainty.Fourier(32), lambda: uncertainty.Table(1000)], ids=["f", "table"])
def test_what_training_finds(make):
    """u = ln L where every row has the error L of its noise level."""
    torch.manual_seed(0)
    objective, noised, m = made("vp", torch.float32, [100, 400, 700, 900])
    rows = objective.loss(m, noised, reduction="none")
    module = make()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    for _ in range(600):
        u = module(noised)
        loss = objective.loss(m, noised, weight=torch.exp(-u)) + u.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(module(noised).detach().double(), rows.log().double().numpy(), rel=0, absolute=1e-3)


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_nothing_waits_for_a_device(name):
    """On the meta device reading a value raises."""
    process, kind, *_ = PROCESSES[name]
    objective, x0 = fastdiff.Objective(process, kind), torch.empty(SHAPE, device="meta", requires_grad=True)
    noised = objective.noise(x0, torch.empty(4, device="meta", dtype=torch.int64 if name == "vp" else torch.float32))
    for module in (uncertainty.Fourier(), uncertainty.Table(1000)):
        u = module.to("meta")(noised)
        (objective.loss(x0, noised, weight=torch.exp(-u)) + u.mean()).backward()
        assert u.shape == (4,) and all(parameter.grad is not None for parameter in module.parameters())


def test_a_state_is_loaded():
    _, noised, _ = made("edm")
    first, second = fourier(), fourier()
    assert not torch.equal(first(noised), second(noised))  # other frequencies
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(noised), second(noised))
    assert "features=7" in repr(first) and "entries=5, by='sigma'" in repr(uncertainty.Table(5, "sigma"))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: uncertainty.Fourier(0), ValueError, "features must be a whole number of at least 1; got 0"),
        (lambda: uncertainty.Fourier(2.5), ValueError, "features must be a whole number"),
        (lambda: uncertainty.Fourier(bandwidth=0.0), ValueError, "bandwidth must be a positive number; got 0.0"),
        (lambda: uncertainty.Fourier(bandwidth=math.inf), ValueError, "bandwidth must be a positive number; got inf"),
        (lambda: uncertainty.Table(1), ValueError, "entries must be a whole number of at least 2; got 1"),
        (lambda: uncertainty.Table(5, "t"), ValueError, "by must be 'fraction' or 'sigma'"),
        (lambda: uncertainty.Table(5)(made("edm")[1]), ValueError, r"Table needs a time .*use Fourier\(\)"),
        (lambda: uncertainty.Table(5)(made("vp")[1]), ValueError, "Table has 5 entries, but .* has 1000 steps"),
        (lambda: uncertainty.Fourier()(torch.ones(3)), TypeError, "noised must be what objective.noise returned"),
    ],
)
def test_arguments_that_mean_nothing(call, error, words):
    with pytest.raises(error, match=words):
        call()
