"""docs/trainers/dit_sit.md against the arithmetic of DiT, SiT, LightningDiT, REPA and RAE."""

import math

import numpy as np
import oracle
import pytest
import torch
from common import DTYPES, SHAPE, blocks, compare, needs_pages, options, run, tensors
from libraries import Diffusion, Transport

import fastdiff
from fastdiff.integrations import flow, guided_diffusion

pytestmark = needs_pages
PAGE, HALF = "dit_sit.md", math.pi / 2


def wide(t):
    return t.view(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------- DiT


class Tables:
    """The tables of DiT's diffusion for given betas, float64; read as it reads them, rounded to float32."""

    def __init__(self, betas, exact):
        self.exact, kept = exact, np.cumprod(1 - betas)
        before = np.append(1.0, kept[:-1])
        small = betas * (1 - before) / (1 - kept)
        self.tables = {
            "a": np.sqrt(kept), "s": np.sqrt(1 - kept), "back": np.sqrt(1 / kept), "minus": np.sqrt(1 / kept - 1),
            "c0": betas * np.sqrt(before) / (1 - kept), "ct": (1 - before) * np.sqrt(1 - betas) / (1 - kept),
            "small": np.log(np.append(small[1], small[1:])), "large": np.log(betas),
        }  # fmt: skip

    def __getitem__(self, key):
        name, t = key
        found = torch.from_numpy(self.tables[name])[t]
        return wide(found if self.exact else found.float())


def normal_cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dit_lines(betas, t, m, x0, noise):
    """The squared error of the noise, and the bound of the learned variance whose mean is held, in bits."""
    table = Tables(betas, m.dtype == torch.float64)
    x_t = (table["a", t] * x0 + table["s", t] * noise).to(x0.dtype)
    m, v = m.chunk(2, 1)
    held = m.detach()
    log = (v + 1) / 2 * table["large", t] + (1 - v) / 2 * table["small", t]
    x0_hat = table["back", t] * x_t - table["minus", t] * held
    mean = table["c0", t] * x0_hat + table["ct", t] * x_t
    true = table["c0", t] * x0 + table["ct", t] * x_t
    small = table["small", t].expand_as(log)
    kl = 0.5 * (-1 + log - small + torch.exp(small - log) + (true - mean) ** 2 * torch.exp(-log))
    off, inverse = x0 - mean, torch.exp(-0.5 * log)
    above, below = normal_cdf(inverse * (off + 1 / 255)), normal_cdf(inverse * (off - 1 / 255))
    inner = (above - below).clamp(min=1e-12).log()
    likelihood = torch.where(x0 < -0.999, above.clamp(min=1e-12).log(), inner)
    likelihood = torch.where(x0 > 0.999, (1 - below).clamp(min=1e-12).log(), likelihood)
    bits = torch.where(wide(t) == 0, -likelihood, kl).flatten(1).mean(1) / math.log(2.0)
    return {"x_t": x_t, "loss": ((noise - m) ** 2).flatten(1).mean(1).mean() + bits.mean()}


def dit_tensors(dtype):
    x0, noise, m = tensors(dtype)
    return x0, noise, torch.cat([m, (0.5 * torch.randn(SHAPE)).to(dtype)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dit_in_one_pass(dtype):
    x, noise, prediction = dit_tensors(dtype)
    t, betas = torch.tensor([0, 1, 300, 620, 998, 999]), np.linspace(1e-4, 0.02, 1000)
    first, after = (code for heading, code in blocks(PAGE) if heading == "DiT: the whole loss in one pass")
    drawing = options(randn_like=lambda like: noise)
    names = dict(x=x, t=t, torch=drawing, model_kwargs={"y": 3})
    exec(first, names)

    def recipe(m):
        def model(x_t, at, y):
            assert at is t and y == 3
            return m

        found = dict(names, model=model)
        exec(after, found)
        return {"x_t": found["noised"].x_t, "loss": found["loss"]}

    lines = lambda m, single, **given: dit_lines(betas, t, m, **given)  # noqa: E731
    compare(lines, recipe, prediction, x0=x, noise=noise)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dit_in_one_line(dtype):
    x, noise, prediction = dit_tensors(dtype)
    diffusion = Diffusion(var="LEARNED_RANGE")  # its bound at t = 0 is written in test_dit_in_one_pass
    t, seen = torch.tensor([1, 2, 30, 62, 98, 99]), []
    run(PAGE, "DiT: one line", dict(diffusion=diffusion))
    assert {"training_losses", "q_sample", "p_sample", "ddim_sample"} <= set(guided_diffusion.fused_methods(diffusion))

    def recipe(m):
        found = diffusion.training_losses(lambda x_t, t: (seen.append(x_t), m)[1], x, t, noise=noise)
        return {"x_t": seen[-1], "loss": found["loss"].mean()}

    lines = lambda m, single, **given: dit_lines(diffusion.betas, t, m, **given)  # noqa: E731
    theirs, ours = compare(lines, recipe, prediction, x0=x, noise=noise)
    if dtype == torch.float32:
        assert torch.equal(theirs["x_t"], ours["x_t"])


# ---------------------------------------------------------------------------------------------------------------- SiT


def linear(t):
    return (t, 1 - t), (torch.ones_like(t), -torch.ones_like(t))


def gvp(t):
    return ((HALF * t).sin(), (HALF * t).cos()), (HALF * (HALF * t).cos(), -HALF * (HALF * t).sin())


def vp(t):
    beta, log = 0.1 + (1 - t) * 19.9, -0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)
    a, s = log.exp(), (1 - (2 * log).exp()).sqrt()
    return (a, s), (a * beta / 2, -(a**2) * beta / 2 / s)


def diffusion_of(path, t):
    """Half of g(t)^2: sigma^2 a'/a - sigma sigma'."""
    (a, s), (da, ds) = path(t)
    return s**2 * da / a - s * ds


def sit_lines(path, kind, weight):
    def lines(m, single, x1, x0, t):
        (a, s), (da, ds) = path(wide(t))
        x_t = (a * x1 + s * x0).to(x1.dtype)
        if kind == "VELOCITY":
            error = (m - (da * x1 + ds * x0)) ** 2
        else:
            half = diffusion_of(path, wide(t))
            w = {"NONE": 1, "VELOCITY": (half / s) ** 2, "LIKELIHOOD": half / s**2}[weight]
            error = w * ((m - x0) ** 2 if kind == "NOISE" else (m * s + x0) ** 2)
        return {"x_t": x_t, "loss": error.flatten(1).mean(1).mean()}

    return lines


class Reversed(Transport):
    """RAE's: t is 0 at the data, and shifted after it was drawn."""

    def __init__(self, *kinds, shift):
        super().__init__(*kinds)
        self.shift, self.path_sampler = shift, self

    def compute_alpha_t(self, t):
        return 1 - t, -1

    def compute_sigma_t(self, t):
        return t, 1

    def sample(self, x1):
        x0 = torch.randn_like(x1)
        t = torch.randn(len(x1)).sigmoid().to(x1)
        return self.shift * t / (1 + (self.shift - 1) * t), x0, x1


TRANSPORTS = {
    "Linear": (lambda: Transport("VELOCITY", "NONE", True), sit_lines(linear, "VELOCITY", "NONE")),
    "GVP": (lambda: Transport("VELOCITY", "NONE", False), sit_lines(gvp, "VELOCITY", "NONE")),
    "noise": (lambda: Transport("NOISE", "LIKELIHOOD", True), sit_lines(linear, "NOISE", "LIKELIHOOD")),
    "score": (lambda: Transport("SCORE", "VELOCITY", False), sit_lines(gvp, "SCORE", "VELOCITY")),
    "RAE": (
        lambda: Reversed("VELOCITY", "NONE", True, shift=6.0),
        sit_lines(lambda t: tuple(tuple(pair) for pair in ((1 - t, t), (-torch.ones_like(t), torch.ones_like(t)))),
                  "VELOCITY", "NONE"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_sit_and_rae(name, dtype):
    x1, _, prediction = tensors(dtype)
    transport, lines = TRANSPORTS[name]
    transport, seen = transport(), []
    torch.manual_seed(5)
    t, x0, _ = transport.sample(x1)
    run(PAGE, "SiT and RAE: one line", dict(transport=transport))
    assert "training_losses" in flow.fused_methods(transport)

    def recipe(m):
        def model(x_t, at, y):
            assert torch.equal(at, t) and y == 3
            seen.append(x_t)
            return m

        torch.manual_seed(5)
        found = transport.training_losses(model, x1, {"y": 3})
        assert found["pred"] is m
        return {"x_t": seen[-1], "loss": found["loss"].mean()}

    compare(lines, recipe, prediction, x1=x1, x0=x0, t=t)


# ------------------------------------------------------------------------------------------------- LightningDiT, REPA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cosine", [False, True])
def test_lightningdit(cosine, dtype):
    x1, x0, prediction = tensors(dtype)
    t = torch.tensor([0.02, 0.25, 0.5, 0.61, 0.9, 0.999]).to(dtype)
    similarity = torch.nn.functional.cosine_similarity

    def lines(m, single, x1, x0, t):
        x_t, target = wide(t) * x1 + wide(1 - t) * x0, x1 - x0
        loss = ((m - target) ** 2).flatten(1).mean(1).mean()
        if cosine:
            loss = loss + (1 - similarity(m, target, dim=1)).flatten(1).mean(1).mean()
        return {"x_t": x_t, "loss": loss}

    names = dict(self=options(use_cosine_loss=cosine), x1=x1, x0=x0, t=t, th=torch, model_kwargs={})
    names["mean_flat"] = lambda x: x.flatten(1).mean(1)

    def recipe(m):
        def model(x_t, at):
            assert at is t
            return m

        found = run(PAGE, "LightningDiT", dict(names, model=model))
        loss = sum(found["terms"][name].mean() for name in ("loss", "cos_loss") if name in found["terms"])
        return {"x_t": found["noised"].x_t, "loss": loss}

    compare(lines, recipe, prediction, x1=x1, x0=x0, t=t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_repa(path, dtype):
    images, noises, prediction = tensors(dtype)
    t = torch.tensor([0.02, 0.25, 0.5, 0.61, 0.9, 0.999]).to(dtype).view(-1, 1, 1, 1)

    def lines(m, single, images, noises, t):
        a, s, da, ds = 1 - t, t, -1, 1
        if path == "cosine":
            a, s = torch.cos(t * HALF), torch.sin(t * HALF)
            da, ds = -HALF * s, HALF * a
        loss = ((m - (da * images + ds * noises)) ** 2).flatten(1).mean(1)
        return {"x_t": a * images + s * noises, "loss": loss.mean()}

    once, step = (code for heading, code in blocks(PAGE) if heading == "REPA")
    made = options(path_type=path)
    exec(once, dict(self=made, np=np))

    def recipe(m):
        names = dict(self=made, images=images, noises=noises, time_input=t, model_kwargs={})
        exec(step, names | {"model": lambda x_t, at: (m, None)}, found := {})
        return {"x_t": found["noised"].x_t, "loss": found["denoising_loss"].mean()}

    compare(lines, recipe, prediction, images=images, noises=noises, t=t)


# --------------------------------------------------------------------------------------------------------- objectives

OBJECTIVES = {
    "SiT Linear": (linear, "VELOCITY", "NONE", lambda u: u),
    "SiT GVP": (gvp, "VELOCITY", "NONE", lambda u: u),
    "SiT VP": (vp, "VELOCITY", "NONE", lambda u: u * (1 - 1e-5)),
    "SiT noise, weight velocity": (linear, "NOISE", "VELOCITY", lambda u: 0.001 + 0.998 * u),
    "SiT noise, weight likelihood": (linear, "NOISE", "LIKELIHOOD", lambda u: 0.001 + 0.998 * u),
    "SiT score": (linear, "SCORE", "NONE", lambda u: 0.001 + 0.998 * u),
    "LightningDiT": (linear, "VELOCITY", "NONE", lambda u: oracle.quantile_logit_normal(u, 0.0, 1.0)),
}
FROM_DATA = {
    "REPA linear, lognormal": (None, lambda u: oracle.quantile_logit_normal(u, 0.0, 1.0)),
    "REPA cosine, lognormal": (gvp, lambda u: np.arctan(oracle.quantile_log_normal(u, 0.0, 1.0)) / HALF),
    "RAE, time_dist_shift 6": (None, lambda u: oracle.flow_shift(oracle.quantile_logit_normal(u, 0.0, 1.0), 6.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def objectives():
    return run(PAGE, "The same as an objective", {})["OBJECTIVES"]


def test_every_objective_is_checked(objectives):
    assert set(objectives) == set(OBJECTIVES) | set(FROM_DATA)


def told(objective, u):
    """The times of uniforms, as the network is told them."""
    t = objective.timesteps(torch.as_tensor(u, dtype=torch.float64), objective.process)
    return t, objective.process.model_time(objective.process.levels(t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*OBJECTIVES, *FROM_DATA])
def test_as_an_objective(name, dtype, objectives):
    """The density of t, what the network is told, x_t, loss and gradient."""
    objective, u = objectives[name], np.linspace(0.02, 0.98, 6)
    x1, x0, prediction = tensors(dtype)
    if name in OBJECTIVES:
        path, kind, weight, quantile = OBJECTIVES[name]
        lines = sit_lines(path, kind, weight)
    else:
        turned, quantile = FROM_DATA[name]

        def path(t):
            if turned is None:
                return (1 - t, t), (-torch.ones_like(t), torch.ones_like(t))
            (a, s), (da, ds) = turned(1 - t)
            return (a, s), (-da, -ds)

        lines = sit_lines(path, "VELOCITY", "NONE")
    t, model_time = told(objective, u)
    oracle.assert_close(model_time, quantile(u), rel=1e-11, absolute=1e-12)
    model_time = model_time.float() if dtype == torch.float32 else model_time

    def recipe(m):
        noised = objective.noise(x1, t, x0)
        return {"x_t": noised.x_t, "loss": objective.loss(m, noised)}

    compare(lines, recipe, prediction, x1=x1, x0=x0, t=model_time)


def test_a_fork_that_shifts_towards_the_data():
    """t of SiT, shifted by the formula of RAE."""
    density = fastdiff.timesteps.Shifted(fastdiff.timesteps.LogitNormal(), 6.0)
    objective, u = fastdiff.Objective(fastdiff.RectifiedFlow(data_at=1), "reversed_flow", timesteps=density), 0.3
    expected = oracle.flow_shift(oracle.quantile_logit_normal(u, 0.0, 1.0), 6.0)
    t, model_time = told(objective, [u])
    oracle.assert_close(model_time, [expected], rel=1e-12)
    oracle.assert_close(objective.process.levels(t).alpha, [expected], rel=1e-12)
