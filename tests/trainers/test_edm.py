"""docs/trainers/edm.md against the arithmetic of EDM and EDM2."""

import importlib
import math

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, tensors

from fastdiff.integrations import edm

pytestmark = needs_pages
PAGE, SHAPE, D = "edm.md", (6, 3, 8, 8), 0.5


def drawn(kind):
    """The sigmas that a loss draws first, and the noise after them."""
    torch.manual_seed(3)
    uniform = torch.rand((6, 1, 1, 1)) if kind in ("VPLoss", "VELoss") else torch.randn((6, 1, 1, 1))
    return uniform, torch.randn(SHAPE)


def sigma_of(kind, drawn):
    if kind == "VPLoss":
        t = 1 + drawn * (1e-5 - 1)
        return ((0.5 * 19.9 * t**2 + 0.1 * t).exp() - 1).sqrt()
    if kind == "VELoss":
        return 0.02 * (100 / 0.02) ** drawn
    mean, std = (-1.2, 1.2) if kind == "EDMLoss" else (-0.4, 1.0)
    return (drawn * std + mean).exp()


def weight_of(kind, sigma):
    return 1 / sigma**2 if kind in ("VPLoss", "VELoss") else (sigma**2 + D**2) / (sigma * D) ** 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["VPLoss", "VELoss", "EDMLoss", "EDM2Loss"])
def test_one_name(kind, dtype):
    images, _, _ = tensors(torch.float32, SHAPE)
    u, noise = drawn(kind)
    table, step = (code for heading, code in blocks(PAGE) if heading == "One name")
    exec(table, names := {})
    old = f"training.{'training_loop' if kind == 'EDM2Loss' else 'loss'}.{kind}"
    module, _, name = names["LOSSES"][old].rpartition(".")
    loss_fn, logvar = getattr(importlib.import_module(module), name)(), torch.linspace(-0.3, 0.4, 6).view(6, 1, 1, 1)
    assert type(loss_fn) is getattr(edm, kind)
    denoised = (images + 0.3 * torch.randn(SHAPE)).to(dtype)

    def lines(m, single, images, noise, u):
        sigma = sigma_of(kind, u)
        x, loss = images + noise * sigma, weight_of(kind, sigma) * (m - images) ** 2
        if kind == "EDM2Loss":
            loss = (weight_of(kind, sigma) / logvar.to(u.dtype).exp()) * (m - images) ** 2 + logvar.to(u.dtype)
        return {"x_t": x, "loss": loss.sum() * (2.0 / 6), "report": loss.mean().detach()}

    def recipe(m):
        reports, inputs = [], []

        def ddp(x, sigma, labels, augment_labels=None, return_logvar=False):
            assert sigma.shape == (6, 1, 1, 1) and labels == "labels"
            inputs.append(x)
            return (m, logvar) if return_logvar else m

        torch.manual_seed(3)
        stats = options(report=lambda name, value: reports.append(value.mean().detach()))
        names = dict(loss_fn=loss_fn, ddp=ddp, images=images, labels="labels", training_stats=stats)
        names |= dict(loss_scaling=2.0, batch_gpu_total=6)
        code = step.replace("loss.sum()", "scaled = loss.sum()").replace(").backward()", ")")  # compared here instead
        exec(code, names)
        assert names["loss"].shape == (6, 1, 1, 1)
        return {"x_t": inputs[0], "loss": names["scaled"], "report": reports[0]}

    compare(lines, recipe, denoised, images=images, noise=noise, u=u)


class Wrapper:
    """EDM's and EDM2's, by what the page takes of it."""

    sigma_data = D

    def __init__(self, F):
        self.F, self.told = F, []
        self.logvar_fourier = lambda t: torch.stack([t, t**2], -1)
        self.logvar_linear = lambda features: (features * torch.tensor([0.2, -0.1])).sum(-1, keepdim=True)

    def model(self, x, t, class_labels):
        self.told.append((x, t, class_labels))
        return self.F


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uncertain", [False, True], ids=["EDM", "EDM2"])
@pytest.mark.parametrize("coded", [False, True], ids=["latents", "uint8"])
def test_without_the_wrapper(coded, uncertain, dtype):
    images = torch.randint(0, 256, SHAPE, dtype=torch.uint8) if coded else torch.randn(SHAPE)
    once, step, more = (code for heading, code in blocks(PAGE) if heading == "Without the wrapper")
    net = Wrapper(None)
    names = dict(net=net, torch=torch, images=images, labels=7, loss_scaling=2.0, batch_gpu_total=6)
    exec(once, names)
    objective = names["objective"]
    noised = objective.noise(images, dtype=torch.float32, seed=5)
    noise, sigma, x0 = noised.noise, noised.t.float(), noised.x0
    x0 = x0.float() / 127.5 - 1 if coded else x0
    # As the network learns: near the target of F.
    target = (x0 - D**2 / (sigma**2 + D**2).view(-1, 1, 1, 1) * noised.x_t) / (
        sigma * D / (sigma**2 + D**2).sqrt()
    ).view(-1, 1, 1, 1)
    F = (target + 0.4 * torch.randn(SHAPE)).to(dtype)

    def lines(m, single, images, noise, sigma):
        s = sigma.view(-1, 1, 1, 1)
        x, norm = images + noise * s, (s**2 + D**2).sqrt()
        told = s.log().flatten() / 4
        D_x = D**2 / (s**2 + D**2) * x + s * D / norm * m.to(single)
        loss = (s**2 + D**2) / (s * D) ** 2 * (D_x - images) ** 2
        if uncertain:
            u = (net.logvar_fourier(told) * torch.tensor([0.2, -0.1], dtype=told.dtype)).sum(-1).view(-1, 1, 1, 1)
            loss = loss / u.exp() + u
        return {"input": x / norm, "told": told, "loss": loss.sum() * (1 if uncertain else 2.0 / 6)}

    def recipe(m):
        net.F, net.told[:] = m, []
        # The last line of the step is the trainer's backward pass, of a loss that others have used here.
        given = dict(names, objective=options(noise=lambda images, dtype: noised, loss=objective.loss))
        exec(step.replace("loss.backward()", ""), given)
        if uncertain:
            exec(more, given)
        ((x, t, labels),) = net.told
        assert labels == 7 and t.shape == (6,)
        return {"input": x, "told": t, "loss": given["loss"]}

    compare(lines, recipe, F, images=x0, noise=noise, sigma=sigma)


def test_the_density():
    """ln sigma is normal: the mean and the spread of many draws, of both trainers."""
    for numbers, (mean, std) in {"": (-1.2, 1.2), "EDM2": (-0.4, 1.0)}.items():
        once = next(code for heading, code in blocks(PAGE) if heading == "Without the wrapper")
        if numbers:
            once = once.replace("LogNormal(-1.2, 1.2)", "LogNormal(-0.4, 1.0)")
        names = dict(net=Wrapper(None))
        exec(once, names)
        log = names["objective"].noise(torch.zeros(20000, 1), seed=1).t.log()
        assert abs(log.mean() - mean) < 5 * std / math.sqrt(20000) and abs(log.std() - std) < 0.03
