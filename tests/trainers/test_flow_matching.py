"""docs/trainers/flow_matching.md against the arithmetic of flow_matching and torchcfm."""

import contextlib
import math

import numpy as np
import oracle
import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors
from libraries import COND_OT, COSINE, Matcher, Path

pytestmark = needs_pages
PAGE, HALF = "flow_matching.md", math.pi / 2
T = torch.tensor([0.02, 0.25, 0.5, 0.61, 0.9, 0.999])


def wide(t):
    return t.view(-1, 1, 1, 1)


def straight(t):
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def cosine(t):
    return (HALF * t).sin(), (HALF * t).cos(), HALF * (HALF * t).cos(), -HALF * (HALF * t).sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["CondOT", "cosine"])
def test_flow_matching(name, dtype):
    samples, noise, prediction = tensors(dtype)
    path, rows = (Path(COND_OT), straight) if name == "CondOT" else (Path(COSINE), cosine)

    def lines(m, single, samples, noise, t):
        a, s, da, ds = rows(wide(t))
        x_t = (a * samples + s * noise).to(samples.dtype)
        return {"x_t": x_t, "loss": torch.pow(m - (da * samples + ds * noise), 2).mean()}

    first, after = (code for heading, code in blocks(PAGE) if heading == "flow_matching")
    amp = options(autocast=contextlib.nullcontext)
    names = dict(path=path, samples=samples, noise=noise, t=T, conditioning={"label": 3})
    names["torch"] = options(cuda=options(amp=amp))

    def recipe(m):
        def model(x_t, t, extra):
            assert t is T and extra == {"label": 3}
            return m

        exec(first, names)
        found = dict(names, model=model)
        exec(after, found)
        return {"x_t": found["noised"].x_t, "loss": found["loss"]}

    compare(lines, recipe, prediction, samples=samples, noise=noise, t=T)


def of_matcher(kind, sigma):
    """(x_t, velocity) by data, noise, t and eps, written out."""

    def path(x1, x0, t, eps):
        if kind == "target":
            s = 1 - (1 - sigma) * t
            return t * x1 + s * eps, x1 - (1 - sigma) * eps
        if kind == "vp":
            a, b, da, db = cosine(t)
            return a * x1 + b * x0 + sigma * eps, da * x1 + db * x0
        if kind == "bridge":
            s = sigma * (t * (1 - t)).sqrt()
            return t * x1 + (1 - t) * x0 + s * eps, x1 - x0 + (1 - 2 * t) / (2 * t * (1 - t) + 1e-8) * s * eps
        return t * x1 + (1 - t) * x0 + sigma * eps, x1 - x0

    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "sigma"), [("plain", 0.0), ("plain", 0.1), ("target", 0.01), ("vp", 0.0), ("bridge", 0.5)]
)
def test_torchcfm(kind, sigma, dtype):
    x1, x0, prediction = tensors(dtype)
    torch.manual_seed(4)
    t = torch.rand(6).type_as(x1)
    eps, path = torch.randn_like(x0), of_matcher(kind, sigma)

    def lines(m, single, x1, x0, t, eps):
        x_t, velocity = path(x1, x0, wide(t), eps)
        return {"x_t": x_t, "loss": torch.mean((m - velocity) ** 2)}

    def recipe(m):
        def net_model(at, x_t):
            assert torch.equal(at, t)
            return m

        torch.manual_seed(4)
        found = run(PAGE, "torchcfm", dict(FM=Matcher(kind, sigma), x1=x1, x0=x0, net_model=net_model))
        return {"x_t": found["noised"].x_t, "loss": found["loss"]}

    compare(lines, recipe, prediction, x1=x1, x0=x0, t=t, eps=eps)


QUANTILES = {
    "CondOTProbPath, ConditionalFlowMatcher(0.0)": (of_matcher("plain", 0.0), lambda u: u),
    "TargetConditionalFlowMatcher(0.01)": (of_matcher("target", 0.01), lambda u: u),
    "CosineScheduler, VariancePreservingConditionalFlowMatcher(0.0)": (of_matcher("vp", 0.0), lambda u: u),
    # t = 1 / (1 + sigma), ln sigma ~ N(-1.2, 1.2^2), falls with the normal number that is drawn.
    "skewed_timesteps": (of_matcher("plain", 0.0), lambda u: 1 / (1 + oracle.quantile_log_normal(1 - u, -1.2, 1.2))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTILES)
def test_as_an_objective(name, dtype):
    made = run(PAGE, "The same as an objective", {})["OBJECTIVES"]
    assert set(made) == set(QUANTILES)
    objective, (path, quantile) = made[name], QUANTILES[name]
    u, (x1, x0, prediction) = np.linspace(0.02, 0.98, 6), tensors(dtype)
    t = objective.timesteps(torch.as_tensor(u), objective.process)
    oracle.assert_close(t, quantile(u), rel=1e-11)

    def lines(m, single, x1, x0, t):
        x_t, velocity = path(x1, x0, wide(t), x0)  # the noise of "target" is what it draws, here x0
        return {"x_t": x_t.to(x1.dtype), "loss": torch.mean((m - velocity) ** 2)}

    def recipe(m):
        noised = objective.noise(x1, t, x0)
        assert torch.equal(noised.model_time, t.float())
        return {"x_t": noised.x_t, "loss": objective.loss(m, noised)}

    compare(lines, recipe, prediction, x1=x1, x0=x0, t=t)
