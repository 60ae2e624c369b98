"""Latent diffusion and the loss of an autoencoder: what ``noise_latents`` draws, and the terms of ``AutoencoderLoss``
against their papers."""

import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from asked import triton
from torch import nn

import fastdiff
from fastdiff import AutoencoderLoss, ops
from fastdiff.autoencoder import latents, noise_latents
from fastdiff.ops.posterior import CLAMP
from fastdiff.philox import Stream

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
OBJECTIVES = {
    "v with weights": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr"),
    "SD3": lambda: fastdiff.Objective(
        fastdiff.RectifiedFlow(3.0), "flow", "cosmap", timesteps="logit_normal", error_space="sample"
    ),
    "EDM": lambda: fastdiff.Objective(fastdiff.EDM(), "edm"),
    "offset noise": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", noise_offset=0.1),
    "offsets of another dimension": lambda: fastdiff.Objective(
        fastdiff.VariancePreserving(), "epsilon", noise_offset=0.1, noise_offset_dim=2
    ),
    "input perturbation": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", input_perturbation=0.1),
}
HOW = {"shift": 0.1159, "scale": 0.3611}  # Flux's


def moments_of(*shape, dtype=torch.float32):
    return (2 * torch.randn(shape[0], 2 * shape[1], *shape[2:])).to(dtype)


def sampled(moments, seed, offset=0, **how):
    return ops.posterior(moments, ops.Philox(seed, offset, Stream.POSTERIOR), **(HOW | how)).z


@pytest.fixture(params=["reference", "native", "triton"])
def any_backend(request):
    found = {status.name: status for status in fastdiff.backends.status()}[request.param]
    if not found.available:
        pytest.skip(found.reason)
    with fastdiff.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("kept", [True, False, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_noised_latents_are_what_two_calls_give(any_backend, name, dtype, kept):
    """The latents of the seed's own stream, then ``objective.noise`` with that seed: bit for bit."""
    objective = OBJECTIVES[name]()
    moments, where = moments_of(4, 2, 6, 5, dtype=dtype), {"seed": torch.tensor([11]), "sample_offset": 3}
    noised = noise_latents(objective, moments, keep_noise=kept, **HOW, **where)
    z = sampled(moments, 11, 3)
    expected = objective.noise(z, keep_noise=kept, **where)
    assert type(noised) is fastdiff.Noised and noised.objective is objective
    assert_same(noised.x0, z)
    for attribute in ("x_t", "t", "noise", "alpha", "sigma", "weight", "target", "model_input", "model_time"):
        found, wanted = getattr(noised, attribute), getattr(expected, attribute)
        assert found.dtype == wanted.dtype
        assert_same(found, wanted)
    assert type(noised.noise_source) is type(expected.noise_source)
    prediction = torch.randn_like(noised.x_t)
    assert_same(objective.loss(prediction, noised), objective.loss(prediction, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_moments", [torch.float32, torch.float64])
def test_latents_of_another_dtype(dtype, of_moments):
    objective, moments = OBJECTIVES["SD3"](), moments_of(3, 2, 7, dtype=of_moments)
    noised = noise_latents(objective, moments, seed=5, dtype=dtype, **HOW)
    z = sampled(moments, 5, dtype=dtype)
    expected = objective.noise(z, seed=5)
    assert noised.x0.dtype == noised.x_t.dtype == dtype
    for found, wanted in ((noised.x0, z), (noised.x_t, expected.x_t), (noised.noise, expected.noise)):
        assert_same(found, wanted)
    assert noised.alpha.dtype == expected.alpha.dtype


def test_times_and_means_that_are_given():
    objective, moments = OBJECTIVES["v with weights"](), moments_of(3, 2, 4, 4)
    t, scale = torch.tensor([3, 500, 999]), torch.tensor([0.5, 2.0])
    noised = noise_latents(objective, moments, t, seed=1, sample=False, scale=scale, clamp=(-1.0, 1.0))
    assert torch.equal(noised.t, t)
    assert_same(noised.x0, moments[:, :2] * scale.view(1, 2, 1, 1))
    assert_same(noised.x_t, objective.noise(noised.x0, t, seed=1).x_t)
    clamped = noise_latents(objective, moments, t, seed=1, clamp=(-1.0, 1.0))
    assert_same(clamped.x0, sampled(moments, 1, clamp=(-1.0, 1.0), shift=0.0, scale=1.0))


def test_latents_alone_are_those_that_are_noised():
    objective, moments = OBJECTIVES["SD3"](), moments_of(3, 2, 7)
    where = {"seed": torch.tensor([4]), "sample_offset": 9, "dtype": torch.bfloat16, **HOW}
    z = latents(moments, **where)
    assert_same(z, noise_latents(objective, moments, **where).x0)
    assert_same(z, sampled(moments, 4, 9, dtype=torch.bfloat16))
    assert_same(
        latents(moments, clamp=(-1.0, 1.0), seed=4), latents(moments, clamp=(-1.0, 1.0), seed=torch.tensor([4]))
    )
    g, state = torch.Generator().manual_seed(3), torch.get_rng_state()
    assert_same(latents(moments, sample=False, generator=g, **HOW), (moments[:, :2] - 0.1159) * 0.3611)
    assert torch.equal(g.get_state(), torch.Generator().manual_seed(3).get_state())  # nothing is drawn
    drawn = latents(moments, generator=g)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(drawn, latents(moments, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="a generator or a seed, not both"):
        latents(moments, generator=g, seed=1)
    with pytest.raises(ValueError, match="as many channels of log-variances"):
        latents(moments[:, :3])


def test_shift_and_scale_may_be_lists():
    """As the configurations of some autoencoders have them."""
    moments, shift, scale = moments_of(2, 3, 4, 4), [0.1, -0.2, 0.3], [1.5, 0.5, 2.0]
    found = latents(moments, shift=shift, scale=scale, seed=1)
    assert_same(found, latents(moments, shift=torch.tensor(shift), scale=torch.tensor(scale), seed=1))
    with pytest.raises(TypeError, match=r"scale\[1\] must be a number"):
        latents(moments, scale=[1.0, "2", 3.0], seed=1)
    with pytest.raises(ValueError, match="the latents 3 channels"):
        latents(moments, shift=[1.0, 2.0], seed=1)


@pytest.mark.parametrize("name", ["SD3", "offset noise", "input perturbation"])
def test_latents_go_with_the_id(any_backend, name):
    """In any batch; samples of one id share all three noises."""
    objective, moments = OBJECTIVES[name](), moments_of(8, 2, 3, 5)
    whole, order = noise_latents(objective, moments, seed=3, **HOW), torch.tensor([6, 0, 7, 0])
    part = noise_latents(objective, moments[order], seed=3, ids=order, **HOW)
    for attribute in ("x0", "x_t", "t", "noise"):
        assert_same(getattr(part, attribute), getattr(whole, attribute)[order])
    assert_same(latents(moments[order], seed=3, ids=order, **HOW), whole.x0[order])
    remade = noise_latents(objective, moments[order], seed=3, ids=order, keep_noise=False, **HOW)
    prediction = torch.randn_like(part.x0)
    assert_same(objective.loss(prediction, remade), objective.loss(prediction, part))


def test_a_generator_is_drawn_from_once():
    objective, moments = OBJECTIVES["EDM"](), moments_of(3, 2, 4)
    g, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    noised = noise_latents(objective, moments, generator=g)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=same)
    assert torch.equal(g.get_state(), same.get_state())
    assert_same(noised.x_t, noise_latents(objective, moments, seed=seed).x_t)
    torch.manual_seed(3)
    assert_same(noise_latents(objective, moments).x_t, noised.x_t)


def test_the_gradient_of_the_moments():
    """Through x_t, and through the target that is made of the latents."""
    objective = OBJECTIVES["v with weights"]()
    moments = moments_of(3, 2, 4, dtype=torch.float64).requires_grad_()
    t = torch.tensor([3, 500, 999])

    def loss(moments):
        noised = noise_latents(objective, moments, t, seed=1, **HOW)
        return objective.loss(noised.x_t.sin(), noised)

    assert torch.autograd.gradcheck(loss, moments)


def test_a_compiled_step_has_the_eager_bits():
    objective = OBJECTIVES["v with weights"]()

    def step(moments, seed):
        noised = noise_latents(objective, moments, seed=seed, **HOW)
        return noised.x0, noised.x_t, noised.t, objective.loss(noised.x_t * 0.5, noised)

    torch._dynamo.reset()
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    for k in range(2):
        given = moments_of(3, 2, 4, 4), torch.tensor([k])
        for found, expected in zip(whole(*given), step(*given)):
            assert torch.equal(found, expected)


def test_on_a_gpu_latents_take_as_many_launches_as_noising():
    if triton.no_device_because():
        pytest.skip(triton.no_device_because())
    from fastdiff.backends.triton.launch import launches

    objective, moments = OBJECTIVES["v with weights"](), moments_of(3, 2, 4, 4)
    with fastdiff.use_backend("triton"):
        with launches() as of_noise:
            objective.noise(moments[:, :2].contiguous(), seed=1)
        with launches() as launched:
            noise_latents(objective, moments, seed=1)
    assert launched == [*of_noise[:-1], "posterior"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"objective": fastdiff.EDM()}, TypeError, "objective must be a fastdiff.Objective"),
        ({"moments": torch.zeros(2, 3, 4)}, ValueError, "as many channels of log-variances"),
        ({"generator": torch.Generator()}, ValueError, "a generator or a seed, not both"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"rng": "slow"}, ValueError, "rng must be"),
        ({"sample_offset": 0.5}, TypeError, "sample_offset must be a whole number"),
        ({"t": torch.tensor([1000, 0])}, ValueError, "1000"),
        ({"scale": torch.ones(3)}, ValueError, "scale has shape"),
        ({"clamp": (1.0, 0.0)}, ValueError, "in this order"),
    ],
)
def test_errors_of_noised_latents(change, error, words):
    good = {"objective": OBJECTIVES["v with weights"](), "moments": torch.zeros(2, 4, 4), "seed": 1}
    noise_latents(**good)
    with pytest.raises(error, match=words):
        noise_latents(**(good | change))


class Distribution:
    """As diffusers' DiagonalGaussianDistribution."""

    def __init__(self, parameters):
        self.parameters = parameters


class Encoded:
    """As diffusers' AutoencoderKLOutput."""

    def __init__(self, parameters):
        self.latent_dist = Distribution(parameters)


def test_an_encoding_that_is_no_tensor_is_told_where_its_moments_are():
    for given, words in (
        (Encoded(torch.zeros(1, 2, 2)), r"moments\.latent_dist\.parameters"),
        (Distribution(torch.zeros(1, 2, 2)), r"moments\.parameters"),
    ):
        with pytest.raises(TypeError, match=f"got {type(given).__name__}: its moments are {words}"):
            ops.kl_normal(given)


# ------------------------------------------------------------------------------------------------------------- the loss


def batch(dtype=torch.float32):
    """decoded, images, moments"""
    decoded, images = (torch.randn(3, 1, 5, 4).to(dtype) for _ in range(2))
    return decoded, images, moments_of(3, 2, 3, 2, dtype=dtype)


def true_parts(decoded, images, moments, reconstruction="mse", beta=1.0, free_bits=0.0, s=0.0, reduction="sum"):
    e = oracle.ld(to_numpy(decoded)) - to_numpy(images)
    error = {
        "mse": lambda: e**2,
        "l1": lambda: np.abs(e),
        "huber": lambda: oracle.loss_huber(e, 1.0),
        "likelihood": lambda: (e**2 * np.exp(-oracle.ld(s)) + s + np.log(2 * np.arccos(oracle.ld(-1)))) / 2,
        "laplace": lambda: np.abs(e) * np.exp(-oracle.ld(s)) + s + np.log(oracle.ld(2)),
    }[reconstruction]()
    kl = oracle.normal_divergence(to_numpy(moments), CLAMP)
    if free_bits:  # of each channel, summed over its positions and averaged over the batch
        channels = kl.sum((2, 3)).mean(0)
        divergence = np.maximum(channels, free_bits).sum()
    else:
        divergence = kl.sum((1, 2, 3)).mean()
    if reduction == "mean":
        return error.mean(), beta * divergence / kl[0].size
    return error.sum((1, 2, 3)).mean(), beta * divergence


SETTINGS = [
    {},
    {"reconstruction": "l1", "beta": 0.5},
    {"reconstruction": "huber", "reduction": "mean", "beta": 3.0},
    {"reconstruction": "likelihood", "s": -1.5},
    {"reconstruction": "likelihood", "s": 0.5, "reduction": "mean"},
    {"reconstruction": "laplace", "s": -0.75, "beta": 1e-6},
    {"free_bits": 4.0},
    {"free_bits": 1e3, "beta": 2.0},
    {"free_bits": 7.0, "reduction": "mean", "reconstruction": "l1"},
]


def loss_of(s=0.0, **settings):
    return AutoencoderLoss(**settings, **({"log_variance": s} if s else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_terms(any_backend, settings, dtype):
    given = batch(dtype)
    of = loss_of(**settings).to(torch.float64 if dtype == torch.float64 else torch.float32)
    parts, expected = of.parts(*given), true_parts(*given, **settings)
    for found, want in zip(parts, expected):
        assert found.shape == () and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        size = abs(want) + (20 * abs(settings.get("s", 0)) + 20 if "s" in settings else 0)
        assert_rounded(found, want, size, operations=64 if dtype == torch.float64 else 16)
    assert_same(of(*given), parts.reconstruction + parts.divergence)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_of_the_loss(any_backend, settings):
    """By what was decoded, the images, the moments and the learned log-variance: by differences, in float64."""
    decoded, images, moments = (t.double().requires_grad_() for t in batch(torch.float64))
    of = loss_of(**settings).double()
    names = [name for name, _ in of.named_parameters()]
    assert names == (["log_variance"] if "s" in settings else [])

    def call(*given):
        return torch.func.functional_call(of, dict(zip(names, given[3:])), given[:3])

    assert torch.autograd.gradcheck(call, (decoded, images, moments, *of.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_those_of_float64(any_backend, settings, dtype):
    """The kernels' own, rounded once."""
    decoded, images, moments = batch(dtype)
    results = []
    for wide in (dtype, torch.float64):
        leaves = [leaf.detach().to(wide, copy=True).requires_grad_() for leaf in (decoded, moments)]
        of = loss_of(**settings).to(torch.float64 if wide == torch.float64 else torch.float32)
        of(leaves[0], images.to(wide), leaves[1]).backward()
        results.append([*(leaf.grad for leaf in leaves), *(p.grad for p in of.parameters())])
    for found, want in zip(*results):
        eps = 2.0**-20 if found.dtype == torch.float32 else 2.0**-8
        torch.testing.assert_close(found.double(), want, rtol=eps, atol=eps * 1e-2 * float(want.abs().max()))


def test_the_learned_variance_is_that_of_the_error():
    """Where the gradient is 0: s = ln mean e^2 (Rybkin et al. 2021), and ln mean abs(e) of a Laplace density."""
    decoded, images, moments = batch()
    e = decoded - images
    for name, s in (("likelihood", e.square().mean().log()), ("laplace", e.abs().mean().log())):
        of = AutoencoderLoss(name, log_variance=float(s))
        of(decoded, images, moments).backward()
        assert abs(float(of.log_variance.grad)) < 1e-4
        kept = AutoencoderLoss(name, log_variance=float(s), learn=False)
        assert not list(kept.parameters()) and "log_variance" in kept.state_dict()
        assert_same(kept(decoded, images, moments), of(decoded, images, moments).detach())


def test_the_likelihood_is_a_density():
    """Of one pixel it is -ln of what torch.distributions has."""
    decoded, images, moments = torch.zeros(7, 1), torch.linspace(-2, 2, 7)[:, None], torch.zeros(7, 2)
    for name, s, of in (
        ("likelihood", -0.4, torch.distributions.Normal(0.0, math.exp(-0.2))),
        ("laplace", -0.4, torch.distributions.Laplace(0.0, math.exp(-0.4))),
    ):
        found = AutoencoderLoss(name, log_variance=s)(decoded, images, moments)
        torch.testing.assert_close(found, -of.log_prob(images).mean())


def test_channels_with_free_bits_are_not_pushed():
    """Those whose divergence, averaged over the batch, is below lambda have no gradient; the others their own."""
    moments = torch.zeros(4, 4, 3, 3)
    moments[:, 0] = 0.1  # 0.045 nats a sample
    moments[:, 1] = torch.tensor([0.0, 0.0, 0.0, 4.0]).view(4, 1, 1)  # 18 in the mean
    moments.requires_grad_()
    decoded = images = torch.zeros(4, 1)
    of = AutoencoderLoss(free_bits=2.0, beta=0.5)
    parts = of.parts(decoded, images, moments)
    assert parts.divergence.item() == pytest.approx(0.5 * (2 + 18))
    parts.divergence.backward()
    assert not moments.grad[:, [0, 2]].any()
    torch.testing.assert_close(moments.grad[:, 1], 0.5 / 4 * moments.detach()[:, 1])


def test_annealing():
    of, given = AutoencoderLoss(beta=0.0), batch()
    whole = AutoencoderLoss().parts(*given).divergence
    assert of.parts(*given).divergence == 0
    of.beta = 0.25
    torch.testing.assert_close(of.parts(*given).divergence, whole / 4)
    moments = torch.full((3, 4, 3, 2), math.nan, requires_grad=True)
    assert AutoencoderLoss(beta=0.0).parts(*given[:2], moments).divergence == 0


def test_the_loss_compiles():
    of = AutoencoderLoss("likelihood")
    network = nn.Conv2d(1, 1, 3, padding=1)

    def step(decoded, images, moments):
        return of(network(decoded), images, moments)

    torch._dynamo.reset()
    whole, given = torch.compile(step, fullgraph=True, backend="aot_eager"), batch()
    results = []
    for call in (step, whole):
        of.zero_grad()
        moments = given[2].clone().requires_grad_()
        loss = call(*given[:2], moments)
        loss.backward()
        results.append((loss.detach(), moments.grad, of.log_variance.grad.clone()))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("learned", [True, False])
def test_passes_over_the_data(learned):
    """On a GPU a launch for each term; backward compares one number for the reconstruction, and makes the gradient of
    the moments."""
    if triton.no_device_because():
        pytest.skip(triton.no_device_because())
    from fastdiff.backends.triton.launch import launches

    decoded, images, moments = batch()
    of = AutoencoderLoss("likelihood" if learned else "mse")
    with fastdiff.use_backend("triton"), launches() as launched:
        loss = of(decoded.requires_grad_(), images, moments.requires_grad_())
        assert launched == ["loss", "kl_normal"]
        loss.backward()
    assert sorted(launched[2:]) == ["kl_normal", "loss"]


def test_on_a_cpu_the_gradients_are_written_with_the_loss(monkeypatch):
    from fastdiff.backends import native

    if native.backend.unavailable_because:
        pytest.skip(native.backend.unavailable_because)
    from fastdiff import _C

    calls = []
    for module in (native.loss, native.kl_normal):

        class Counting:
            def __getattr__(self, name):
                calls.append(name)
                return getattr(_C, name)

        monkeypatch.setattr(module, "_C", Counting())
    decoded, images, moments = batch()
    with fastdiff.use_backend("native"):
        loss = AutoencoderLoss("likelihood")(decoded.requires_grad_(), images, moments.requires_grad_())
        loss.backward()
    assert calls == ["loss", "kl_normal"]
    assert decoded.grad is not None and moments.grad is not None


def test_zero_size():
    of = AutoencoderLoss()
    decoded, moments = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    loss = of(decoded, torch.zeros(0, 3), moments)
    assert loss.isnan()  # a mean over nothing
    loss.backward()
    assert decoded.grad.shape == (0, 3) and moments.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"reconstruction": "bce"}, ValueError, "mse, l1, huber, likelihood, laplace"),
        ({"reduction": "none"}, ValueError, "reduction must be sum"),
        ({"beta": "1"}, TypeError, "beta must be a number"),
        ({"free_bits": -1.0}, ValueError, "free_bits must be at least 0"),
        ({"free_bits": math.nan}, ValueError, "free_bits must be at least 0"),
        ({"log_variance": 1.0}, ValueError, "'mse' has none"),
        ({"clamp": (3.0, 1.0)}, ValueError, "in this order"),
    ],
)
def test_errors_of_settings(settings, error, words):
    with pytest.raises(error, match=words):
        AutoencoderLoss(**settings)


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        (0, "x", TypeError, "decoded must be a tensor"),
        (1, torch.zeros(3, 1, 5, 4, dtype=torch.uint8), TypeError, "images must be floating point"),
        (1, torch.zeros(3, 1, 5, 5), ValueError, "images has shape .*, but decoded"),
        (2, torch.zeros(3, 3, 3, 2), ValueError, "as many channels of log-variances"),
        (2, torch.zeros(2, 4, 3, 2), ValueError, "moments of 2 samples .* and 3 decoded"),
        (2, torch.zeros(3, 4, 3, 2, device="meta"), ValueError, "on meta and 3 decoded ones on cpu"),
    ],
)
def test_errors_of_tensors(place, value, error, words):
    given = list(batch())
    AutoencoderLoss()(*given)
    given[place] = value
    with pytest.raises(error, match=words):
        AutoencoderLoss()(*given)


def test_what_is_shown():
    assert repr(AutoencoderLoss("l1", 0.5)) == "AutoencoderLoss('l1', beta=0.5, free_bits=0.0, reduction='sum')"
