"""Log-likelihoods by the probability-flow ODE against densities that are known, and Hutchinson's estimate of them."""

import importlib.util
import math
import sys
from types import ModuleType

import numpy as np
import oracle
import pytest
import torch
from scipy.integrate import solve_ivp

import fastdiff
from fastdiff import prediction as kinds

WEIGHTS, STDS = [0.3, 0.5, 0.2], [0.3, 0.4, 0.5]
# Their mean is 0: a process that does not quite end at noise is then nearest to its noise.
MEANS = [[-1.0, 0.5], [0.8, -0.2], [-0.5, -0.25]]
W, S, M = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, STDS, MEANS))


def points(count):
    """Of the mixture, [count, 2]."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(W, count, True, generator=generator)
    return M[chosen] + S[chosen][:, None] * torch.randn(count, 2, dtype=torch.float64, generator=generator)


def levels_of(process, t):
    """The levels that a network is told of as ``t``: sigma for two processes, and for EDM's "edm" ln(sigma) / 4."""
    if type(process).__name__ in ("VESDE", "RectifiedFlow"):
        return process.levels_at(t + process.sigma_min * (1 - t) if process.straight else t)
    if process.discrete:
        return process.levels_between(t.double())
    return process.levels(t.double().clamp(process.t_min, process.t_max))


def exact_network(process, prediction):
    """Says the posterior means of x0 and of the noise, given x_t, in any prediction kind."""

    def model(x, t):
        levels = levels_of(process, torch.exp(4 * t) if prediction == "edm" else t)
        a, s = levels.alpha[:, None], levels.sigma[:, None]
        x = x.double()
        if prediction == "edm":
            x = x * torch.hypot(s, process.sigma_data * a)
        variance = a**2 * S**2 + s**2  # [B, K]
        away = x[:, None] - a[..., None] * M  # [B, K, 2]
        part = torch.softmax(W.log() - (away**2).sum(-1) / (2 * variance) - variance.log(), 1)[..., None]
        x0 = (part * (M + (a * S**2 / variance)[..., None] * away)).sum(1)
        n = (part * (s / variance)[..., None] * away).sum(1)
        p, q = (row[:, None] for row in kinds.get(prediction).coefficients(levels))
        return p * x0 + q * n

    return model


CASES = {
    "vp": (fastdiff.VPSDE(t_min=1e-5), "score"),
    "sub-vp": (fastdiff.SubVPSDE(t_min=1e-4), "epsilon"),
    "ve": (fastdiff.VESDE(1e-3, 500.0), "score"),
    "cosine": (fastdiff.Cosine(), "v_prediction"),
    "trigflow": (fastdiff.TrigFlow(), "trigflow"),
    "flow": (fastdiff.RectifiedFlow(), "flow"),
    "shifted flow": (fastdiff.RectifiedFlow(3.0), "reversed_flow"),
    "flow with sigma_min": (fastdiff.RectifiedFlow(sigma_min=1e-3), "flow"),
    "edm": (fastdiff.EDM(), "edm"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_exact_log_likelihood_of_a_mixture(name):
    """Within 1e-3 nats of the density of the data, by the exact score and the exact trace in 50 steps. What is left is
    the level at which the ODE begins, and the noise that it is taken to end at, not its solution."""
    process, prediction = CASES[name]
    x = points(60)
    found = fastdiff.log_likelihood(exact_network(process, prediction), x, process, prediction, steps=50, trace="exact")
    assert found.dtype == torch.float64 and found.shape == (60,)
    expected = oracle.mixture_log_density(x.numpy(), WEIGHTS, MEANS, STDS)
    assert np.abs(found.numpy() - expected).max() < 1e-3


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_order_of_a_solver(solver, order):
    """The error falls by 2^order where the steps are halved; flows have the density of the data at t = 0 itself."""
    process, x = fastdiff.RectifiedFlow(), points(20)
    expected = oracle.mixture_log_density(x.numpy(), WEIGHTS, MEANS, STDS)
    errors = []
    for steps in (40, 80):
        found = fastdiff.log_likelihood(
            exact_network(process, "flow"), x, process, "flow", steps=steps, solver=solver, trace="exact"
        )
        errors.append(np.abs(found.numpy() - expected).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_discrete_steps(solver):
    """DDPM's network: the density of x_t at t = 0, whose sigma is 0.01; Heun calls it at whole timesteps alone."""
    process, x, seen = fastdiff.VariancePreserving(), points(20), set()
    model = exact_network(process, "epsilon")

    def watched(x, t):
        seen.add(float(t[0]))
        return model(x, t)

    steps = 1000 if solver == "heun" else 50
    found = fastdiff.log_likelihood(watched, x, process, "epsilon", steps=steps, solver=solver, trace="exact")
    alpha, sigma = (float(v) for v in oracle.vp_alpha_sigma(oracle.alpha_bar(oracle.betas_linear(1000)), 0))
    expected = oracle.mixture_log_density(x.numpy(), WEIGHTS, MEANS, STDS, alpha, sigma)
    assert np.abs(found.numpy() - expected).max() < 1e-3
    whole = all(t == int(t) for t in seen)
    assert whole == (solver == "heun") and min(seen) == 0 and max(seen) == 999


@pytest.mark.parametrize("trace", ["exact", "rademacher"])
def test_inference_mode_changes_nothing(trace):
    """The trace of the Jacobian would be 0 without gradients."""
    process = fastdiff.RectifiedFlow()
    model = exact_network(process, "flow")

    def found(x):
        return fastdiff.likelihood.log_likelihood(model, x, process, prediction="flow", steps=5, trace=trace, seed=1)

    expected = found(points(3))
    with torch.inference_mode():
        assert torch.equal(found(points(3)), expected)


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(trace):
    """The mean over 3,000 probes of one point is the exact trace's log-likelihood of the same steps, to five standard
    errors; a sample's probes depend on its index alone; four probes have a quarter of the variance."""
    process = fastdiff.RectifiedFlow()
    model, point = exact_network(process, "flow"), points(1)
    how = {"prediction": "flow", "steps": 8, "solver": "heun"}
    exact = fastdiff.log_likelihood(model, point, process, trace="exact", **how).item()
    x = point.expand(3000, 2).contiguous()
    found = fastdiff.log_likelihood(model, x, process, trace=trace, seed=11, **how)
    assert found.mean().item() == pytest.approx(exact, abs=5 * found.std().item() / 3000**0.5)
    assert found.std().item() > 0.01
    part = fastdiff.log_likelihood(model, x[:5], process, trace=trace, seed=11, sample_offset=100, **how)
    torch.testing.assert_close(part, found[100:105], rtol=1e-12, atol=0)
    four = fastdiff.log_likelihood(model, x, process, trace=trace, seed=11, probes=4, **how)
    assert four.mean().item() == pytest.approx(exact, abs=5 * four.std().item() / 3000**0.5)
    assert (four.var() / found.var()).item() == pytest.approx(0.25, rel=0.25)


def test_rademacher_probes_are_exact_for_a_diagonal_jacobian():
    """Gaussian data, by coordinate: each probe's squares are 1. In float32, of the shape [batch, 3, 2]."""
    process, mean, std = fastdiff.Cosine(), 0.3, 0.6

    def model(x, t):
        levels = process.levels(t)
        alpha, sigma = (row[:, None, None].to(x.dtype) for row in (levels.alpha, levels.sigma))
        variance = alpha**2 * std**2 + sigma**2
        x0 = mean + alpha * std**2 / variance * (x - alpha * mean)
        n = sigma / variance * (x - alpha * mean)
        return alpha * n - sigma * x0

    x = mean + std * torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(2))
    objective = fastdiff.Objective(process, "v_prediction")
    found = fastdiff.log_likelihood(model, x, objective, steps=40, seed=1)
    z = (x.double() - mean) / std
    expected = (-0.5 * z**2 - math.log(std * math.sqrt(2 * math.pi))).sum((1, 2))
    # 6 numbers, 160 calls whose outputs are rounded to float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "score", "edm", "trigflow"])
def test_every_kind_has_the_same_likelihood(kind):
    """Networks that say the same; "edm" is given a scaled x, and told ln(sigma / alpha) / 4."""
    process, x = fastdiff.VPSDE(t_min=0.1), points(5)

    def likelihood(model, prediction):
        how = {"timesteps": [0.9, 0.6, 0.3, 0.1], "trace": "exact", "solver": "heun"}
        return fastdiff.log_likelihood(model, x, process, prediction, **how)

    model = exact_network(process, kind)
    if kind == "edm":
        plain = exact_network(process, "epsilon")

        def model(seen, t):
            levels = process.levels_at(torch.exp(4 * t))
            x = seen * torch.hypot(levels.sigma, 0.5 * levels.alpha)[:, None]
            k_x, k_m = (k[:, None] for k in kinds.conversion("epsilon", "edm", levels))
            return k_x * x + k_m * plain(x, levels.t)

    expected = likelihood(exact_network(process, "v_prediction"), "v_prediction")
    torch.testing.assert_close(likelihood(model, kind), expected, rtol=1e-9, atol=1e-9)


def test_conditions_and_networks_without_a_slope():
    """A condition [1] goes with all samples. A network whose output does not depend on x has no divergence."""
    process, x = fastdiff.RectifiedFlow(), points(4)
    seen = []

    def model(x, t, cond):
        seen.append(cond)
        return torch.zeros_like(x) + cond[:, None]

    for trace in ("exact", "rademacher"):
        found = fastdiff.log_likelihood(
            model, x, process, "flow", steps=3, trace=trace, cond=torch.tensor([0.25], dtype=torch.float64)
        )
        assert seen[-1].shape == (4,)
        # x moves by 0.25 from t = 0 to 1, where it is standard normal.
        z = x + 0.25
        expected = (-0.5 * z**2).sum(1) - math.log(2 * math.pi)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # 3 steps
    assert fastdiff.log_likelihood(lambda x, t: x, torch.zeros(0, 2), process, "flow").shape == (0,)


def test_parameters_get_no_gradients():
    network = torch.nn.Linear(2, 2)
    model = lambda x, t: network(x)  # noqa: E731
    found = fastdiff.log_likelihood(model, points(3).float(), fastdiff.Cosine(), "v_prediction", steps=2)
    assert not found.requires_grad and network.weight.grad is None


# ------------------------------------------------------------------------------------------------- adaptive solvers


def stand_in():
    """torchdiffeq's ``odeint`` for a tuple, by SciPy: it goes to the last time and no further."""
    module = ModuleType("torchdiffeq")

    def odeint(function, state, times, *, rtol, atol, method, options):
        assert method == "dopri5" and torch.equal(options["step_t"], times[1:])
        shapes = [part.shape for part in state]
        sizes = [part.numel() for part in state]

        def tensors(flat):
            return tuple(p.view(s) for p, s in zip(torch.from_numpy(flat.copy()).split(sizes), shapes))

        def slope(t, flat):
            found = function(torch.tensor(t, dtype=torch.float64), tensors(flat))
            return torch.cat([part.flatten() for part in found]).numpy()

        start = torch.cat([part.flatten() for part in state]).numpy()
        done = solve_ivp(slope, times.tolist(), start, rtol=rtol, atol=atol)
        return tuple(torch.stack(pair) for pair in zip(state, tensors(done.y[:, -1])))

    module.odeint = odeint
    return module


@pytest.mark.parametrize("library", ["torchdiffeq", "a stand-in"])
@pytest.mark.parametrize("name", ["vp", "cosine", "flow", "ve"])
def test_an_adaptive_solver(name, library, monkeypatch):
    if library == "a stand-in":
        monkeypatch.setitem(sys.modules, "torchdiffeq", stand_in())
    elif importlib.util.find_spec("torchdiffeq") is None:
        pytest.skip("torchdiffeq is not installed")
    process, prediction = CASES[name]
    x = points(10)
    found = fastdiff.log_likelihood(
        exact_network(process, prediction), x, process, prediction, solver="dopri5", trace="exact", rtol=1e-6, atol=1e-6
    )
    expected = oracle.mixture_log_density(x.numpy(), WEIGHTS, MEANS, STDS)
    assert np.abs(found.numpy() - expected).max() < 1e-3


def test_an_adaptive_solver_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    words = r"solver='dopri8' needs torchdiffeq: install fastdiff\[ode\], or use solver='rk4' or 'heun'"
    with pytest.raises(ImportError, match=words):
        fastdiff.log_likelihood(lambda x, t: x, points(2), fastdiff.Cosine(), "v_prediction", solver="dopri8")


# ------------------------------------------------------------------------------------------------- units and errors


def test_bits_per_dimension():
    """8 bits for 256 levels over [-1, 1] that are all as likely; a nat is 1 / ln 2 bits."""
    uniform = torch.full((2,), -12 * math.log(2), dtype=torch.float64)  # a density of 1/2 in each of 12 dimensions
    assert fastdiff.to_bits_per_dim(uniform, 12, 2 / 256).tolist() == pytest.approx([8.0, 8.0])
    assert fastdiff.to_bits_per_dim(torch.tensor([-6.0]), 3).item() == pytest.approx(2 / math.log(2))
    for given in ((0, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="must be positive; got"):
            fastdiff.to_bits_per_dim(torch.tensor([-6.0]), *given)


@pytest.mark.parametrize(
    "how, error, words",
    [
        ({"trace": "hutchinson"}, ValueError, "trace must be one of exact, rademacher, gaussian; got 'hutchinson'"),
        ({"solver": "euler"}, ValueError, "solver must be one of rk4, heun, dopri5, dopri8, .*; got 'euler'"),
        ({"probes": 0}, ValueError, "probes must be at least 1; got 0"),
        ({"probes": 1.5}, TypeError, "probes must be a whole number; got 1.5"),
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        ({"steps": 3, "timesteps": [0.5]}, ValueError, "leave steps out"),
        ({"timesteps": [0.2, 0.5]}, ValueError, "noisiest first"),
        ({"prediction": None}, TypeError, "prediction is missing"),
        ({"prediction": "epsilon"}, ValueError, "'epsilon' does not determine the velocity at t = 1.0 of Cosine"),
        ({"x0": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "x0 must be floating point"),
        ({"model": lambda x, t: x[:, :1]}, ValueError, r"the model returned shape \(2, 1\) for an input of \(2, 2\)"),
        ({"model": lambda x, t, c: x}, TypeError, "cond"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_unfit(how, error, words):
    given = {"model": lambda x, t: x, "x0": points(2), "process": fastdiff.Cosine(), "prediction": "v_prediction"} | how
    with pytest.raises(error, match=words):
        fastdiff.log_likelihood(**given)
