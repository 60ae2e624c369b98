"""Training of scores in continuous time: one loss in every prediction kind, Tweedie's formula, likelihood weights."""

import numpy as np
import oracle
import pytest
import torch
from oracle import assert_close

import fastdiff
from fastdiff.timesteps import UniformLogSNR

PROCESSES = {
    "vp": fastdiff.VPSDE(t_min=1e-3),
    "sub-vp": fastdiff.SubVPSDE(t_min=1e-3),
    "ve": fastdiff.VESDE(),
    "cosine": fastdiff.Cosine(),
    "trigflow": fastdiff.TrigFlow(0.5),
}
G2 = {
    "vp": oracle.vpsde_diffusion_squared,
    "sub-vp": oracle.subvpsde_diffusion_squared,
    "ve": oracle.vesde_diffusion_squared,
    "cosine": oracle.cosine_diffusion_squared,
    "trigflow": oracle.trigflow_diffusion_squared,
}
KINDS = ("score", "epsilon", "sample", "v_prediction", "edm", "trigflow")
T = torch.tensor([0.02, 0.3, 0.6, 0.9], dtype=torch.float64)


def data():
    """x0, the noise, and an estimate of the score's network, [4, 3, 5] each, float64."""
    return torch.randn(3, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()


def rows(values):
    return oracle.ld(values).reshape(-1, 1, 1)


@pytest.mark.parametrize("weighting", ["sigma^2", "likelihood"])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_loss_is_one_in_every_kind(name, weighting):
    """lambda(t) |score - s|^2 with lambda = sigma^2 (the error of the noise) or g^2, computed from networks of every
    kind that say the same: equal values, and equal gradients by what they say.

    The values are NumPy's, in longdouble; 1e-11 is 10^5 roundings, and the conversion from x0 near t = 0 costs as many.
    """
    process = PROCESSES[name]
    x0, n, s = data()
    alpha, sigma = (rows(row) for row in process.alpha_sigma(T))
    x_t = alpha * x0.numpy() + sigma * n.numpy()
    score = -(x_t - alpha * x0.numpy()) / sigma**2
    weight = sigma**2 if weighting == "sigma^2" else rows(G2[name](T.numpy()))
    expected = (weight * (s.numpy() - score) ** 2).mean()
    gradient = 2 * weight * (s.numpy() - score) / s.numel()
    for kind in KINDS:
        how = {"error_space": "epsilon"} if weighting == "sigma^2" else {"weighting": "likelihood"}
        objective = fastdiff.Objective(process, kind, **how)
        noised = objective.noise(x0, T, n)
        says = s.clone().requires_grad_()
        # The network of this kind that says the score ``says``.
        output = fastdiff.Objective(process, "score").convert(says, noised, kind)
        loss = objective.loss(output, noised)
        loss.backward()
        assert_close(loss.item(), expected, rel=1e-11, label=f"{kind}")
        assert_close(says.grad.numpy(), gradient, rel=1e-9, absolute=1e-9 * float(np.abs(gradient).max()), label=kind)


@pytest.mark.parametrize("kind", ["score", "v_prediction", "trigflow"])
@pytest.mark.parametrize("weighting", [None, "likelihood"])
def test_gradients_of_the_loss(kind, weighting):
    objective = fastdiff.Objective(PROCESSES["trigflow"], kind, weighting)
    x0, n, m = (tensor[:, :1, :2].clone().requires_grad_() for tensor in data())

    def loss(m, x0, n):
        return objective.loss(m, objective.noise(x0, T, n))

    assert torch.autograd.gradcheck(loss, (m, x0, n))


@pytest.mark.parametrize("name", list(PROCESSES))
def test_tweedie(name):
    """The posterior mean of x0 for Gaussian data N(mean, d^2): (x_t + sigma^2 grad log p(x_t)) / alpha."""
    process, mean, d = PROCESSES[name], 0.4, 0.7
    x0, n, _ = data()
    noised = fastdiff.Objective(process, "score").noise(x0, T, n)
    alpha, sigma = (rows(row) for row in process.alpha_sigma(T))
    x = oracle.ld(noised.x_t.numpy())
    variance = alpha**2 * d**2 + sigma**2
    score = -(x - alpha * mean) / variance
    posterior_mean = (mean * sigma**2 + alpha * d**2 * x) / variance  # of two Gaussians
    found = noised.objective.predict_x0(torch.from_numpy(score.astype(np.float64)), noised)
    assert_close(found.numpy(), posterior_mean, rel=1e-10, absolute=1e-11)


def test_likelihood_weights_are_a_constant_at_the_times_drawn_for_them():
    """Z times the plain loss of the noise at the t of ``UniformLogSNR``, and the likelihood weighted loss at uniform t,
    have the same mean (to five standard errors); the former varies less. The network's error of the noise is 1."""
    process = fastdiff.VPSDE(t_min=1e-5)
    plain = fastdiff.Objective(process, "epsilon", timesteps=UniformLogSNR())
    weighted = fastdiff.Objective(process, "epsilon", "likelihood")
    x0 = torch.zeros(200_000, 1, dtype=torch.float64)
    rows = {}
    for objective, factor in ((plain, UniformLogSNR().normalizer(process)), (weighted, 1 - process.t_min)):
        noised = objective.noise(x0, seed=5)
        estimate = noised.target + torch.sin(7 * noised.t)[:, None] + 1
        rows[objective] = factor * objective.loss(estimate, noised, reduction="none")
    means = {objective: row.mean().item() for objective, row in rows.items()}
    errors = {objective: row.std().item() / len(row) ** 0.5 for objective, row in rows.items()}
    assert abs(means[plain] - means[weighted]) < 5 * (errors[plain] ** 2 + errors[weighted] ** 2) ** 0.5
    assert errors[plain] < errors[weighted] / 10


def test_a_step_of_trigflow():
    """TrigFlow section 3: DDIM is x_s = cos(t - s) x_t - sin(t - s) m, with m the kind "trigflow"."""
    x = torch.randn(2, 3, dtype=torch.float64)
    m = torch.randn(2, 3, dtype=torch.float64)
    seen = []
    fastdiff.sample(
        lambda x, t: m, (2, 3), fastdiff.TrigFlow(0.3), fastdiff.samplers.DDIM(timesteps=[1.5, 0.4]), None, "trigflow",
        x=x, dtype=torch.float64, progress=False, callback=lambda k, t, y, x0: seen.append(y),
    )  # fmt: skip
    assert_close(seen[0], np.cos(1.1) * x.numpy() - np.sin(1.1) * m.numpy(), rel=1e-12, absolute=1e-14)
    assert_close(seen[1], np.cos(0.4) * seen[0].numpy() - np.sin(0.4) * m.numpy(), rel=1e-12, absolute=1e-14)
