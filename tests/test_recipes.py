"""The blocks of docs/recipes.md, as they stand there, against the formulas of their papers in float64."""

import copy

import numpy as np
import oracle
import pytest
import torch
from test_documents import ROOT, blocks
from torch import nn

import fastdiff

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not beside the tests")
BATCH, SHAPE = 8, (2, 4, 4)
# Of the results: sums of a few hundred elements, and a few operations each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    """What tensors are made of where no dtype is given, as in a trainer."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def rows(x):
    return x.view(-1, 1, 1, 1)


def mean(x):
    return x.mean((1, 2, 3))


def abs2(x):
    return x.square().sum((1, 2, 3))


def data():
    return torch.randn(BATCH, *SHAPE)


class Network(nn.Module):
    """tanh(weight x + what it is told, each number times a factor), of which the derivative is known."""

    def __init__(self):
        super().__init__()
        self.weight, self.factors = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(3))

    def forward(self, x, *told):
        return torch.tanh(self.weight * x + sum(rows(f * number) for f, number in zip(self.factors, told)))

    def derivative(self, x, told, dx, dtold):
        inner = self.weight * dx + sum(rows(f * number) for f, number in zip(self.factors, dtold))
        return (1 - self(x, *told) ** 2) * inner


def run(headings, **given):
    """What the names stand for after the blocks below the headings were run, ``given`` being the trainer's."""
    chosen = [code for heading, code in blocks("docs/recipes.md") if heading in ("Recipes", *headings)]
    assert len(chosen) > len(headings)
    names = {}
    exec(chosen[0], names)
    names |= given
    for code in chosen[1:]:
        exec(compile(code, f"docs/recipes.md: {headings[-1]}", "exec"), names)
        yield names


def wide(*values):
    """In float64, networks copied."""
    found = [copy.deepcopy(value).double() if isinstance(value, nn.Module) else value.double() for value in values]
    return found[0] if len(found) == 1 else found


def check(loss, expected, *networks, dtype):
    """Equal, and so are the gradients of (network, its copy in float64)."""
    assert loss.dtype == dtype and loss.ndim == 0
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=TOLERANCE[dtype])
    for used, copied in networks:
        found = torch.autograd.grad(loss, list(used.parameters()), retain_graph=True, allow_unused=True)
        truth = torch.autograd.grad(expected, list(copied.parameters()), retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in truth)
        for one, other in zip(found, truth, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                size = other.abs().max().item()
                torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


def flow(noised, x0):
    """(x_t, v, t) of a rectified flow in float64, from the noise and the times that were drawn."""
    x0, n, t = wide(x0, noised.noise, noised.t)
    return (1 - rows(t)) * x0 + rows(t) * n, n - x0, t


# ---------------------------------------------------------------------------------------------------- steps of any size


def test_meanflow(dtype):
    x0, network, c, p = data(), Network(), 1e-3, 0.75
    (names,) = run(["MeanFlow"], x0=x0, network=network, c=c, p=p)
    r, net = wide(names["r"], network)
    x, v, t = flow(names["noised"], x0)
    assert (r <= t).all() and (r < t).any() and (r == t).any()
    u, du_dt = net(x, r, t), net.derivative(x, (r, t), v, (0 * r, 1 + 0 * t))
    error = abs2(u - (v - rows(t - r) * du_dt).detach())
    expected = (error / (error.detach() + c) ** p).mean()
    check(names["loss"], expected, (network, net), dtype=dtype)


def test_improved_meanflow(dtype):
    x0, network = data(), Network()
    names, _ = run(["MeanFlow", "Improved MeanFlow"], x0=x0, network=network, c=1e-3, p=1.0)
    r, net = wide(names["r"], network)
    x, v, t = flow(names["noised"], x0)
    du_dt = net.derivative(x, (r, t), net(x, t, t), (0 * r, 1 + 0 * t)).detach()
    expected = (net(x, r, t) + rows(t - r) * du_dt - v).square().mean()
    check(names["loss"], expected, (network, net), dtype=dtype)


def test_shortcut_models(dtype):
    """In the paper's terms: time and velocity go from noise to data."""
    x0, network, averaged = data(), Network(), Network()
    draws = []
    averaged.register_forward_hook(lambda module, given, result: draws.append(given))
    (names,) = run(["Shortcut models"], x0=x0, network=network, averaged=averaged)
    (x, t, d), (_, later, _) = draws
    few = BATCH // 4
    assert len(x) == few and ((t / (2 * d)) % 1 == 0).all() and (later >= d).all() and (t <= 1).all()
    net, slow = wide(network, averaged)

    def s(module, x, time, step):
        return -module(x, 1 - time, step)

    x, t, d = wide(x, 1 - t, d)
    first = s(slow, x, t, d)
    second = s(slow, x + rows(d) * first, t + d, d)
    steps = (s(net, x, t, 2 * d) - (first + second).detach() / 2).square().mean()
    x, v, t = flow(names["noised"], x0[few:])
    instant = (s(net, x, 1 - t, 0 * t) + v).square().mean()
    check(names["loss"], steps / 4 + 3 * instant / 4, (network, net), dtype=dtype)


# ------------------------------------------------------------------------------------------------ a third of the target


def test_guidance_in_the_target(dtype):
    x0, network, averaged, w, g = data(), Network(), Network(), 0.45, 3.5
    label, no_label = torch.randn(BATCH), torch.zeros(BATCH)
    given = dict(x0=x0, network=network, averaged=averaged, label=label, no_label=no_label, w=w, g=g)
    net, slow, told = wide(network, averaged, label)
    for number, names in enumerate(run(["Guidance in the target"], **given)):
        x, v, t = flow(names["noised"], x0)
        cond, uncond = slow(x, t, told).detach(), slow(x, t, 0 * told).detach()
        fit = rows((v * uncond).sum((1, 2, 3)) / abs2(uncond)) * uncond
        target = [v + w * (cond - uncond), uncond + g * (v - uncond), fit + g * (v - fit)][number]
        check(names["loss"], (net(x, t, told) - target).square().mean(), (network, net), dtype=dtype)
    assert number == 2


def test_contrastive_flow_matching(dtype):
    x0, network, l = data(), Network(), 0.05  # noqa: E741
    (names,) = run(["Contrastive flow matching"], x0=x0, network=network, l=l)
    net = wide(network)
    x, v, t = flow(names["noised"], x0)
    other = v[[BATCH - 1, *range(BATCH - 1)]]
    expected = ((net(x, t) - v) ** 2).mean() - l * ((net(x, t) - other) ** 2).mean()
    expected = expected + l / (1 - l) * ((v - other) ** 2).mean()
    check(names["loss"], expected, (network, net), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------- consistency


class Denoiser(Network):
    """With EDM's preconditioning, for data with a deviation of 0.5."""

    def forward(self, x, sigma):
        norm = rows((sigma**2 + 0.25).sqrt())
        return 0.25 / norm**2 * x + 0.5 * rows(sigma) / norm * super().forward(x / norm, sigma)


def consistency(dtype, *headings):
    x0, f, averaged, teacher, q, c = data(), Denoiser(), Denoiser(), Denoiser(), 4.5, 0.03
    *_, names = run(headings, x0=x0, f=f, averaged=averaged, teacher=teacher, q=q, stage=1, c=c)
    sigma = names["far"].t.double()
    near = (sigma * (1 - (1 + 8 / (1 + sigma.exp())) / q)).clamp(min=0)
    assert (near == 0).any() and (near > 0).any()
    return names, wide(x0), wide(names["far"].noise), sigma, near, c


def test_consistency_training(dtype):
    names, x0, n, sigma, near, c = consistency(dtype, "Consistency training")
    f = wide(names["f"])
    difference = f(x0 + rows(sigma) * n, sigma) - f(x0 + rows(near) * n, near).detach()
    expected = (((abs2(difference) + c**2).sqrt() - c) / (sigma - near)).mean()
    check(names["loss"], expected, (names["f"], f), dtype=dtype)


def test_consistency_distillation(dtype):
    names, x0, n, sigma, near, _ = consistency(dtype, "Consistency training", "Consistency distillation")
    f, averaged, teacher = wide(names["f"], names["averaged"], names["teacher"])
    x = x0 + rows(sigma) * n
    stepped = x + rows(near - sigma) * (x - teacher(x, sigma)) / rows(sigma)
    expected = (f(x, sigma) - averaged(stepped, near).detach()).square().mean()
    check(names["loss"], expected, (names["f"], f), dtype=dtype)


class Uncertainty(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.randn(1))

    def forward(self, t):
        return self.slope * t


def test_scm(dtype):
    x0, network, uncertainty, s, c, warmup = data(), Network(), Uncertainty(), 0.6, 0.1, 0.3
    (names,) = run(["sCM"], x0=x0, network=network, uncertainty=uncertainty, s=s, c=c, warmup=warmup)
    x0, z, t, net, other = wide(x0, s * names["noised"].noise, names["noised"].t, network, uncertainty)
    cos, sin = rows(t.cos()), rows(t.sin())
    x, dx_dt = cos * x0 + sin * z, cos * z - sin * x0
    F = net(x / s, t)
    df_dt = net.derivative(x / s, (t,), dx_dt / s, (1 + 0 * t,))
    g = -(cos**2) * (s * F - dx_dt) - warmup * cos * sin * (x + s * df_dt)
    g = (g / rows(abs2(g).sqrt() + c)).detach()
    u = other(t)
    expected = ((-u).exp() * mean((F - F.detach() - g) ** 2) + u).mean()
    check(names["loss"], expected, (network, net), (uncertainty, other), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_the_tangent_of_scm_is_that_of_the_consistency_function(dtype):
    """Without the warm-up, g is cos(t) times the derivative of f = cos(t) x - sin(t) s F along the path: by
    differences."""
    x0, network, s = data(), Network(), 0.6
    (names,) = run(["sCM"], x0=x0, network=network, uncertainty=Uncertainty(), s=s, c=0.1, warmup=1.0)
    z, t, h = s * names["noised"].noise, names["noised"].t, 1e-5

    def f(t):
        cos, sin = rows(t.cos()), rows(t.sin())
        x = cos * x0 + sin * z
        return cos * x - sin * s * network(x / s, t)

    torch.testing.assert_close(names["g"], rows(t.cos()) * (f(t + h) - f(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)


def test_jit(dtype):
    x0, network, k = data(), Network(), 2.0
    (names,) = run(["JiT"], x0=x0, network=network, k=k)
    jit = names["jit"]
    # As drawn; and with times at which the clamp holds.
    late = jit.noise(x0, torch.linspace(0.01, 0.1, BATCH), names["noised"].noise)
    for noised, loss in ((names["noised"], names["loss"]), (late, jit.loss(network(late.x_t, late.model_time), late))):
        net, x, n, time = wide(network, x0, noised.noise, 1 - noised.t)
        z = rows(time) * x + (1 - rows(time)) * n
        below = rows((1 - time).clamp(min=0.05))
        expected = ((net(z, 1 - time) - z) / below - (x - z) / below).square().mean()
        check(loss, expected, (network, net), dtype=dtype)
    assert names["noised"].noise.std() == pytest.approx(k, rel=0.2)
    drawn = torch.logit(jit.noise(torch.zeros(10_000, 1), seed=0).t)
    assert drawn.mean() == pytest.approx(0.8, abs=0.04) and drawn.std() == pytest.approx(0.8, abs=0.04)


# ------------------------------------------------------------------------------------------ distillation and preference


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_dmd2(kind, dtype):
    generator, teacher, critic, z = Network(), Network(), Network(), data()
    process = fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()
    given = dict(generator=generator, teacher=teacher, critic=critic, z=z)
    seen = []
    teacher.register_forward_hook(lambda module, given, result: seen.append(given))
    (names,) = run(["DMD2"], objective=fastdiff.Objective(process, kind), **given)
    made, good, bad, z, x_t = wide(generator, teacher, critic, z, seen[0][0])
    told, x = seen[0][1], made(z)
    if kind == "flow":
        real, fake = (x_t - rows(told.double()) * net(x_t, told.double()) for net in (good, bad))
    else:
        kept = rows(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[told])
        real, fake = ((x_t - (1 - kept) ** 0.5 * net(x_t, told)) / kept**0.5 for net in (good, bad))
    gradient = ((fake - real) / rows(mean((x - real).abs()))).detach()
    expected = 0.5 * (x - (x - gradient).detach()).square().mean()
    check(names["loss"], expected, (generator, made), dtype=dtype)
    found = torch.autograd.grad(names["loss"], names["x"])[0]
    torch.testing.assert_close(found.double(), gradient / x.numel(), rtol=100 * TOLERANCE[dtype], atol=1e-7)
    if kind == "flow":
        x_t, v, t = flow(names["noised"], names["x"].detach())
        check(names["critic_loss"], (bad(x_t, t) - v).square().mean(), (critic, bad), dtype=dtype)


def test_diffusion_dpo(dtype):
    winner, loser, network, reference, b = data(), data(), Network(), Network(), 3.0
    given = dict(winner=winner, loser=loser, network=network, reference=reference, b=b)
    (names,) = run(["Diffusion DPO"], **given)
    assert torch.equal(names["better"].noise, names["worse"].noise)
    assert torch.equal(names["better"].t, names["worse"].t)
    (x_w, v_w, t), (x_l, v_l, _) = flow(names["better"], winner), flow(names["worse"], loser)
    net, ref = wide(network, reference)
    e_w, e_l, e_w_ref, e_l_ref = (mean((net(x, t) - v) ** 2) for net in (net, ref) for x, v in ((x_w, v_w), (x_l, v_l)))
    inside = -b / 2 * ((e_w - e_w_ref.detach()) - (e_l - e_l_ref.detach()))
    check(names["loss"], (1 + (-inside).exp()).log().mean(), (network, net), dtype=dtype)


def test_noise_that_belongs_to_a_sample(dtype):
    """The noise of each id is what the definition gives for it alone."""
    index, winner, loser = torch.tensor([5, 0, 2**40, 5, 1, 7, 3, 2]), data()[:4], data()[:4]
    how = {"x0": data(), "index": index, "run": 2, "epoch": 3, "winner": winner, "loser": loser, "seed": 9}
    first, second = (names["noised"] for names in run(["Noise that belongs to a sample"], **how))
    for noised, seed, ids in ((first, 2003, index.tolist()), (second, 9, [0, 1, 2, 3] * 2)):
        noise = np.concatenate([oracle.normal(seed, (1, *SHAPE), sample_offset=k) for k in ids])
        t = np.concatenate([oracle.uniform(seed, 1, stream=3, sample_offset=k) for k in ids])
        assert (noised.noise.float().numpy() == noise).all()
        np.testing.assert_allclose(noised.t.numpy(), t, rtol=1e-12)
    assert torch.equal(second.x0, torch.cat([winner, loser]))


def test_diffusion_nft(dtype):
    x0, network, old, b, reward = data(), Network(), Network(), 0.4, torch.rand(BATCH)
    (names,) = run(["DiffusionNFT"], x0=x0, network=network, old_network=old, b=b, reward=reward)
    net, before, r, x0 = wide(network, old, reward, x0)
    x, _, t = flow(names["noised"], x0)
    v, v_old = net(x, t), before(x, t).detach()
    errors = []
    for mixed in ((1 - b) * v_old + b * v, (1 + b) * v_old - b * v):
        difference = x - rows(t) * mixed - x0
        errors.append(mean(difference**2 / rows(mean(difference.abs()).detach())))
    expected = (r * errors[0] + (1 - r) * errors[1]).mean()
    check(names["loss"], expected, (network, net), dtype=dtype)


def test_awm(dtype):
    x0, network, advantage, clip = data(), Network(), torch.randn(BATCH), 0.1
    old = copy.deepcopy(network)
    with torch.no_grad():
        old.weight += 0.2
    (names,) = run(["AWM"], x0=x0, network=network, old_network=old, advantage=advantage, clip=clip)
    net, before, a = wide(network, old, advantage)
    x, v, t = flow(names["noised"], x0)
    ratio = (mean((before(x, t) - v) ** 2).detach() - mean((net(x, t) - v) ** 2)).exp()
    clipped = torch.where(ratio > 1 + clip, 1 + clip, torch.where(ratio < 1 - clip, 1 - clip, ratio))
    assert (ratio != clipped).any() and (ratio == clipped).any()
    check(names["loss"], -torch.minimum(ratio * a, clipped * a).mean(), (network, net), dtype=dtype)
