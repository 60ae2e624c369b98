"""guided-diffusion, k-diffusion, EDM, SiT, flow_matching and torchcfm: against their formulas, written out here.

The stand-ins have the interfaces of those projects and compute in plain tensor expressions from float64 tables. 1e-5 of
the largest value is about 170 float32 roundings.
"""

import enum
import importlib.util
import types

import numpy as np
import pytest
import torch
from libraries import (
    COND_OT,
    COSINE,
    Denoiser,
    Diffusion,
    EpsDenoiser,
    Matcher,
    MeanType,
    ModelType,
    Network,
    Path,
    Respaced,
    Transport,
    VarType,
    WeightType,
    spread,
)
from torch import nn

import fastdiff
from fastdiff.integrations import edm, flow, guided_diffusion, k_diffusion
from fastdiff.integrations.losses_per_timestep import TimestepLosses
from fastdiff.tabulated import TabulatedVP


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


# --------------------------------------------------------------------------------------------------- guided-diffusion


GUIDED = [(m, v, loss) for m in MeanType.__members__ for v in VarType.__members__ for loss in ("MSE", "RESCALED_MSE")]


@pytest.mark.parametrize("cls", [Diffusion, Respaced])
@pytest.mark.parametrize("kinds", GUIDED, ids="-".join)
def test_guided_diffusion(cls, kinds):
    plain, fused = cls(*kinds), guided_diffusion.fuse(cls(*kinds))
    assert len(guided_diffusion.fused_methods(fused)) == 5, guided_diffusion.left_alone(fused)
    network, x = Network(kinds[1].startswith("LEARNED")), torch.rand(4, 2, 6, 6) * 2 - 1
    t = torch.tensor([0, 1, plain.num_timesteps // 2, plain.num_timesteps - 1])
    results = []
    for d in (plain, fused):
        torch.manual_seed(3)
        network.zero_grad()
        out = d.training_losses(network, x, t, model_kwargs={"shift": 0.1})
        out["loss"].mean().backward()
        found = {f"loss {k}": v.detach() for k, v in out.items()} | {"gradient": network.conv.weight.grad.clone()}
        with torch.no_grad():
            for clip in (True, False):
                how = {"clip_denoised": clip, "model_kwargs": {"shift": 0.1} if clip else None}
                found |= {f"p {clip} {k}": v for k, v in d.p_sample(network, x, t, **how).items()}
                found |= {f"moments {clip} {k}": v for k, v in d.p_mean_variance(network, x, t, **how).items()}
                found |= {f"ddim {clip} {k}": v for k, v in d.ddim_sample(network, x, t, eta=0.7, **how).items()}
            found["ddim 0"] = d.ddim_sample(network, x, t)["sample"]
            found["q"] = d.q_sample(x, t)
        results.append(found | {"draws": torch.rand(3)})
    assert results[0].keys() == results[1].keys()
    for name, theirs in results[0].items():
        # Without a clamp DDIM recombines x and x0 estimates a hundred times as large, which cancel in part.
        assert_close(results[1][name], theirs, 1e-4 if name.startswith("ddim False") else 1e-5)
    assert torch.equal(results[0]["q"], results[1]["q"]) and torch.equal(results[0]["draws"], results[1]["draws"])


def test_guided_diffusion_hands_over_what_it_does_not_compute():
    plain, fused = (
        Diffusion(loss="KL", var="LEARNED_RANGE"),
        guided_diffusion.fuse(Diffusion(loss="KL", var="LEARNED_RANGE")),
    )
    network, x, t = Network(True), torch.rand(2, 2, 4, 4), torch.tensor([1, 50])
    calls = [
        lambda d: d.training_losses(network, x, t)["loss"],
        lambda d: d.p_sample(network, x, t, cond_fn=lambda x, t: x)["sample"],
        lambda d: d.p_sample(network, x, t, denoised_fn=lambda x0: 0.5 * x0)["sample"],
        lambda d: d.p_mean_variance(network, x, t, denoised_fn=lambda x0: 0.5 * x0)["mean"],
        lambda d: d.ddim_sample(network, x, t, denoised_fn=lambda x0: 0.5 * x0)["sample"],
        lambda d: d.p_mean_variance(network, x, t)["mean"],  # with gradients
    ]
    for call in calls:
        results = []
        for d in (plain, fused):
            torch.manual_seed(0)
            results.append(call(d))
        assert_close(results[1], results[0])
        assert results[1].requires_grad
    with pytest.raises(ValueError, match="4 channels"):
        fused.p_sample(Network(False), x, t)
    assert type(guided_diffusion.unfuse(fused)) is Diffusion


def test_guided_diffusion_wrong_use():
    with pytest.raises(TypeError, match="sqrt_alphas_cumprod"):
        guided_diffusion.fuse(object())
    odd = Diffusion()
    odd.model_mean_type = enum.Enum("ModelMeanType", ["VELOCITY"]).VELOCITY
    fused = guided_diffusion.fuse(odd)
    assert guided_diffusion.fused_methods(fused) == ("q_sample",), "what is predicted is unknown"


def test_resampled_times_are_where_they_are_asked_for():
    resampler = guided_diffusion.LossSecondMomentResampler(10)
    assert {part.device.type for part in resampler.sample(4)} == {"cpu"}
    assert {part.device.type for part in resampler.sample(4, "meta")} == {"meta"}


def test_resampler_is_the_published_one():
    """Histories of 4 losses, the oldest forgotten, batches with repeated timesteps; then 0.1% uniform."""
    resampler = guided_diffusion.LossSecondMomentResampler(Diffusion(steps=6), history_per_term=4, uniform_prob=0.01)
    history, random = [[] for _ in range(6)], np.random.default_rng(0)
    for batch in range(12):
        ts, losses = random.integers(0, 6 if batch % 2 else 2, 20), random.random(20)
        resampler.update_with_local_losses(torch.from_numpy(ts), torch.from_numpy(losses))
        for t, value in zip(ts, losses):
            history[t] = (history[t] + [value])[-4:]
        if min(map(len, history)) < 4:
            np.testing.assert_array_equal(resampler.weights(), np.ones(6))
            continue
        expected = np.sqrt([np.mean(np.square(h)) for h in history])
        expected = expected / expected.sum() * 0.99 + 0.01 / 6
        np.testing.assert_allclose(resampler.weights(), expected, rtol=1e-12)
    p = expected / expected.sum()
    before = torch.random.get_rng_state()
    t, weights = resampler.sample(200_000, "cpu", generator=torch.Generator().manual_seed(0))
    u = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(t.numpy(), np.searchsorted(np.cumsum(p), u, side="right").clip(max=5))
    assert torch.equal(torch.random.get_rng_state(), before)
    counts = np.bincount(t.numpy(), minlength=6) / len(t)
    assert (abs(counts - p) < 5 * np.sqrt(p / len(t))).all()
    np.testing.assert_allclose(weights, 1 / (6 * p[t.numpy()]), rtol=1e-6)
    other = guided_diffusion.LossSecondMomentResampler(6, 4, 0.01)
    other.load_state_dict(resampler.state_dict())
    assert torch.equal(other.weights(), resampler.weights())
    with pytest.raises(ValueError, match="alike"):
        other.update_with_all_losses([1, 2], [0.5])
    with pytest.raises(ValueError, match="positive"):
        guided_diffusion.LossSecondMomentResampler(0)
    for uniform in (0, 1):
        least = guided_diffusion.LossSecondMomentResampler(1, history_per_term=1, uniform_prob=uniform)
        least.update_with_local_losses(torch.tensor([0]), torch.tensor([2.0]))
        assert least.weights().tolist() == [1.0]


# ----------------------------------------------------------------------------------------------- k-diffusion's losses


@pytest.mark.parametrize(("cls", "kind"), [(Denoiser, "edm"), (Denoiser, "v"), (EpsDenoiser, "eps")])
def test_k_diffusion_losses(cls, kind):
    plain, fused = cls(kind), k_diffusion.fuse(cls(kind))
    x, n = torch.randn(2, 4, 3, 4, 4)
    sigma = torch.tensor([0.05, 0.5, 2.0, 40.0])
    losses = [d.loss(x, n, sigma) for d in (plain, fused)]
    assert_close(losses[1], losses[0])
    for loss in losses:
        loss.mean().backward()
    assert_close(fused.inner_model.scale.grad, plain.inner_model.scale.grad)
    assert type(k_diffusion.unfuse(fused)) is cls


def test_k_diffusion_wrong_use():
    with pytest.raises(TypeError, match="frequency"):
        k_diffusion.fuse(Denoiser(scales=2))
    with pytest.raises(TypeError, match="get_scalings"):
        k_diffusion.fuse(nn.Linear(2, 2))

    class Simple(Denoiser):
        def loss(self, input, noise, sigma, **kwargs):
            return super().loss(input, noise, sigma, **kwargs) * 2

    with pytest.raises(TypeError, match="something else"):
        k_diffusion.fuse(Simple())


# ---------------------------------------------------------------------------------------------------------------- EDM


def edm_reference(kind, net, images, labels):
    shape = (len(images), 1, 1, 1)
    if kind == "vp":
        t = 1 + torch.rand(shape) * (1e-5 - 1)
        sigma = (torch.exp(0.5 * 19.9 * t**2 + 0.1 * t) - 1).sqrt()
    elif kind == "ve":
        sigma = 0.02 * (100 / 0.02) ** torch.rand(shape)
    else:
        mean, std = (-0.4, 1.0) if kind == "edm2" else (-1.2, 1.2)
        sigma = (torch.randn(shape) * std + mean).exp()
    weight = 1 / sigma**2 if kind in ("vp", "ve") else (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    noised = images + torch.randn_like(images) * sigma
    if kind != "edm2":
        return weight * (net(noised, sigma, labels, augment_labels=None) - images) ** 2
    denoised, u = net(noised, sigma, labels, return_logvar=True)
    return weight / u.exp() * (denoised - images) ** 2 + u


@pytest.mark.parametrize(
    ("kind", "make"), [("edm", edm.EDMLoss), ("vp", edm.VPLoss), ("ve", edm.VELoss), ("edm2", edm.EDM2Loss)]
)
def test_edm_losses(kind, make):
    """``loss.sum().mul(scaling).backward()`` as EDM's training loop writes it."""
    scale, u = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.3))

    def net(x, sigma, labels, augment_labels=None, return_logvar=False):
        denoised = scale * x / (1 + sigma) + labels
        return (denoised, u * sigma.log()) if return_logvar else denoised

    images, labels = torch.randn(6, 3, 8, 8), torch.tensor(0.1)
    found = []
    for loss in (lambda: edm_reference(kind, net, images, labels), lambda: make()(net, images, labels)):
        scale.grad = u.grad = None
        torch.manual_seed(1)
        value = loss()
        value.sum().mul(0.25).backward()
        found.append((value.flatten(1).sum(1).detach(), scale.grad, u.grad, torch.rand(1)))
    assert value.shape == (6, 1, 1, 1)
    # The VP sigma of the original is exp(...) - 1: at t near 0 it has lost digits that expm1 keeps.
    for ours, theirs in zip(found[1], found[0]):
        if theirs is not None:
            assert_close(ours, theirs, 1e-4 if kind == "vp" else 1e-5)


@pytest.mark.parametrize("make", [edm.EDMLoss, edm.VPLoss, edm.VELoss])
def test_edm_losses_of_an_empty_batch(make):
    loss = make()(lambda x, sigma, labels, **more: x, torch.empty(0, 3, 4, 4))
    assert len(loss) == 0 and loss.dtype == torch.float32


def test_edm_augmentation_and_wrong_use():
    seen = {}

    def net(x, sigma, labels, augment_labels=None):
        seen["labels"] = augment_labels
        return x

    edm.EDMLoss()(net, torch.randn(2, 3, 4, 4), augment_pipe=lambda images: (images.flip(-1), "angles"))
    assert seen["labels"] == "angles"
    with pytest.raises(TypeError, match="floating point"):
        edm.EDMLoss()(net, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="positive"):
        edm.EDMLoss(P_std=0)
    with pytest.raises(ValueError, match="sigma_min"):
        edm.VELoss(2.0, 1.0)


# ---------------------------------------------------------------------------------------------- flow-matching libraries


@pytest.mark.parametrize("rows", [COND_OT, COSINE], ids=["CondOT", "cosine"])
def test_affine_paths(rows):
    x_1, x_0, v = torch.randn(3, 5, 2, 4, 4)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    noised = flow.noise(Path(rows), x_1, x_0, t)
    r = {name: spread(value.double(), x_1) for name, value in vars(rows(t.double())).items()}
    x_t = r["alpha_t"] * x_1 + r["sigma_t"] * x_0
    dx_t = r["d_alpha_t"] * x_1 + r["d_sigma_t"] * x_0
    assert_close(noised.x_t, x_t.float())
    assert_close(noised.dx_t, dx_t.float())
    v.requires_grad_()
    loss = flow.loss(v, noised)
    loss.backward()
    assert_close(loss.detach(), ((v - dx_t) ** 2).mean().float().detach())
    assert_close(v.grad, (2 * (v - dx_t) / v.numel()).float().detach())
    assert flow.loss(v, noised, reduction="none").shape == (5,)


MATCHERS = [("plain", 0.0), ("plain", 0.1), ("target", 0.0), ("target", 0.1), ("bridge", 0.5), ("vp", 0.0), ("vp", 0.1)]


def check_matcher(matcher, x0, x1):
    torch.manual_seed(2)
    np.random.seed(2)
    t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
    torch.manual_seed(2)
    np.random.seed(2)
    noised = flow.noise(matcher, x1, x0)
    assert torch.equal(noised.t, t)
    assert_close(noised.x_t, xt)
    # The bridge's flow divides (xt - mu), a difference of rounded numbers, by sqrt(t (1 - t)).
    assert_close(noised.dx_t, ut, 1e-4)
    v = torch.randn_like(x1)
    assert_close(flow.loss(v, noised), ((v - ut) ** 2).mean(), 1e-5)


@pytest.mark.parametrize(("kind", "sigma"), MATCHERS)
def test_matchers(kind, sigma):
    check_matcher(Matcher(kind, sigma), *torch.randn(2, 6, 3, 4, 4))


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize(
    "name", ["Conditional", "TargetConditional", "ExactOptimalTransportConditional", "VariancePreservingConditional"]
)
def test_torchcfm_itself(name, sigma):
    pytest.importorskip("ot")
    torchcfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    check_matcher(getattr(torchcfm, f"{name}FlowMatcher")(sigma), *torch.randn(2, 6, 3, 4, 4))


class Sampled(Path):
    """A path that gives points of its own: affine, along great circles, or with a bend."""

    def __init__(self, scheduler, kind):
        super().__init__(scheduler)
        self.kind = kind

    def sample(self, x_0, x_1, t):
        r, k = {name: spread(value, x_1) for name, value in vars(self.scheduler(t)).items()}, spread(t, x_1)
        x_t = r["alpha_t"] * x_1 + r["sigma_t"] * x_0
        dx_t = r["d_alpha_t"] * x_1 + r["d_sigma_t"] * x_0
        if self.kind == "sphere":
            angle = torch.arccos((x_0 * x_1).sum(-1, keepdim=True).clamp(-1, 1))
            x_t = (torch.sin((1 - k) * angle) * x_0 + torch.sin(k * angle) * x_1) / torch.sin(angle)
            dx_t = angle * (torch.cos(k * angle) * x_1 - torch.cos((1 - k) * angle) * x_0) / torch.sin(angle)
        if self.kind == "bent":
            dx_t = dx_t + 0.01 * x_1
        return types.SimpleNamespace(x_t=x_t, dx_t=dx_t)


@pytest.mark.parametrize("rows", [COND_OT, COSINE], ids=["CondOT", "cosine"])
@pytest.mark.parametrize("shape", [(6, 3), (1, 5), (4, 2, 3)])
def test_paths_that_are_not_affine(rows, shape):
    """They have a scheduler too."""
    x_1, x_0 = (nn.functional.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    t = torch.linspace(0.1, 0.9, len(x_1))
    for kind in ("sphere", "bent"):
        for _ in range(2):
            with pytest.raises(TypeError, match="the path of Sampled is not affine in x_0 and x_1"):
                flow.noise(path := Sampled(rows, kind), x_1, x_0, t)
    path = Sampled(rows, "affine")
    for data in (x_1[:0], x_1, x_1.half()):
        noised = flow.noise(path, data, x_0[: len(data)].to(data.dtype), t[: len(data)].to(data.dtype))
        found = path.sample(x_0[: len(data)].double(), data.double(), noised.t.double())
        torch.testing.assert_close(
            noised.x_t.double(), found.x_t, rtol=0, atol=2e-3 if data.dtype == torch.half else 1e-6
        )


def test_flow_matching_itself():
    path = pytest.importorskip("flow_matching.path")
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    x_1, x_0 = torch.randn(2, 6, 3, 4, 4)
    t = torch.linspace(0.05, 0.95, 6)
    for scheduler in (schedulers.CondOTScheduler(), schedulers.CosineScheduler(), schedulers.VPScheduler()):
        sample = path.AffineProbPath(scheduler).sample(t=t, x_0=x_0, x_1=x_1)
        noised = flow.noise(path.AffineProbPath(scheduler), x_1, x_0, t)
        assert_close(noised.x_t, sample.x_t)
        assert_close(noised.dx_t, sample.dx_t)


def test_flow_wrong_use():
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match="neither"):
        flow.noise(object(), x)
    with pytest.raises(ValueError, match=r"t must be \[batch\]"):
        flow.noise(Path(COND_OT), x, t=torch.rand(3))
    with pytest.raises(ValueError, match="shape"):
        flow.noise(Path(COND_OT), x, torch.randn(4, 2))

    class Curved(Matcher):
        def compute_mu_t(self, x0, x1, t):
            return super().compute_mu_t(x0, x1, t) ** 2

    with pytest.raises(TypeError, match="not linear"):
        flow.noise(Curved("plain", 0.0), x)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("weight", list(WeightType.__members__))
@pytest.mark.parametrize("model", list(ModelType.__members__))
def test_sit_transport(model, weight, linear):
    plain, fused = Transport(model, weight, linear), flow.fuse(Transport(model, weight, linear))
    x, scale = torch.randn(8, 3, 4, 4), nn.Parameter(torch.tensor(0.7))
    found = []
    for transport in (plain, fused):
        torch.manual_seed(4)
        scale.grad = None
        terms = transport.training_losses(lambda x, t, shift: scale * x + shift, x, {"shift": 0.1})
        terms["loss"].mean().backward()
        found.append((terms["pred"].detach(), terms["loss"].detach(), scale.grad))
    for ours, theirs in zip(found[1], found[0]):
        assert_close(ours, theirs)
    assert type(flow.unfuse(fused)) is Transport
    with pytest.raises(TypeError, match="SiT"):
        flow.fuse(object())


@pytest.mark.parametrize("model", ["NOISE", "SCORE"])
def test_sit_weights_next_to_the_data(model):
    """cos(pi t / 2) of a float32 near 1 has lost digits, and weights divide by its square: here they are float64's."""
    t, (x0, x1) = torch.tensor([0.998, 0.9995, 0.99998]), torch.randn(2, 3, 3, 4, 4)

    def losses(fuse, dtype):
        transport = fuse(Transport(model, "LIKELIHOOD", False))
        transport.sample = lambda x: (t.to(dtype), x0.to(dtype), x)
        return transport.training_losses(lambda x, t: torch.sin(3 * x), x1.to(dtype))["loss"].double()

    exact = losses(lambda transport: transport, torch.float64)
    theirs, ours = losses(lambda transport: transport, torch.float32), losses(flow.fuse, torch.float32)
    off, off_theirs = (float(((found - exact) / exact).abs().max()) for found in (ours, theirs))
    assert off < 1e-6 < 1e-4 < off_theirs


def test_nothing_is_imported():
    """These modules know other packages by their interfaces alone."""
    modules = ("guided_diffusion", "k_diffusion.losses", "flow", "edm", "denoising_diffusion", "lightning", "objects")
    for name in (*(f"fastdiff.integrations.{module}" for module in modules), "fastdiff.from_scheduler"):
        source = importlib.util.find_spec(name).loader.get_source(name)
        imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
        allowed = {
            "__future__",
            "collections.abc",
            "dataclasses",
            "math",
            "numpy",
            "random",
            "torch",
            "typing",
            "weakref",
        }
        assert {n for n in imported if not n.startswith(".")} <= allowed, name


REFUSED = {
    "a share above 1": (
        lambda: guided_diffusion.LossSecondMomentResampler(10, uniform_prob=1.5),
        ValueError, r"uniform_prob must lie in \[0, 1\]"),
    "no buckets": (lambda: TimestepLosses(0), ValueError, "positive integer; got 0"),
    "half a bucket": (lambda: TimestepLosses(1.5), ValueError, "positive integer; got 1.5"),
    "losses that are a mean": (
        lambda: TimestepLosses().update(
            fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(torch.ones(2, 3)), torch.tensor(1.0)),
        ValueError, "reduction='none'"),
    "a logger of no kind": (lambda: TimestepLosses().log_to(object(), 1), TypeError, "no add_scalar"),
    "a schedule of two dimensions": (lambda: TabulatedVP(torch.ones(2, 2), [0.0]), ValueError, "must be 1-D"),
    "an empty schedule": (lambda: TabulatedVP([], []), ValueError, "at least one value"),
    "alpha and sigma of two lengths": (lambda: TabulatedVP([0.9, 0.8], [0.1]), ValueError, "equally long; got 2 and 1"),
    "an alpha that rises": (lambda: TabulatedVP([0.8, 0.9], [0.6, 0.4]), ValueError, "must not rise"),
    "a sigma above 1": (lambda: TabulatedVP([0.9, 0.8], [0.4, 1.2]), ValueError, r"must lie in \[0, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()
