"""The training scripts of diffusers: their own arithmetic, written out here again around the library's schedulers,
against ``training_scripts``.

Each case is computed three times from the same latents and seed: with the script's lines in the latents' dtype, with
fastdiff, and in float64 from rows of coefficients taken straight from the scheduler's tables. Float32 bounds are
numbers of half-ulps of what is added up (``accuracy.assert_rounded``): fastdiff takes up to 8, a script 24.
"""

import math
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_rounded, to_numpy
from libraries import spread

import fastdiff
from fastdiff import from_scheduler
from fastdiff import prediction as kinds
from fastdiff.integrations import training_scripts as scripts

diffusers = pytest.importorskip("diffusers")
from diffusers import training_utils  # noqa: E402

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE, VIDEO = (6, 4, 8, 8), (4, 3, 4, 6, 6)
OURS, THEIRS = 8, 24


def ddpm(**options):
    return diffusers.DDPMScheduler(**STABLE_DIFFUSION | options)


def cogvideox_scheduler():
    return diffusers.CogVideoXDPMScheduler(
        **STABLE_DIFFUSION, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0
    )


def halves(*tensors):
    """((first halves), (second halves)) of a batch with prior preservation."""
    return zip(*(tensor.chunk(2) for tensor in tensors))


# --------------------------------------------------------- the lines of the scripts, each giving (x_t, t, n, xi, loss)


def lines_vp(scheduler, x0, m, *, gamma=None, form="paper", offset=0.0, perturbation=0.0, prior=None):
    kind = scheduler.config.prediction_type
    noise = torch.randn_like(x0)
    if offset:
        noise += offset * torch.randn((x0.shape[0], x0.shape[1], 1, 1))
    xi = torch.randn_like(noise) if perturbation else torch.zeros_like(noise)
    seen = noise + perturbation * xi if perturbation else noise
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),)).long()
    x_t = scheduler.add_noise(x0, seen, t)
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(x0, noise, t)
    else:  # SDXL's
        target, m = x0, m - noise

    def weights(t):
        if gamma is None:
            return None
        snr = training_utils.compute_snr(scheduler, t)
        clipped = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
        if kind == "sample":
            return clipped
        if kind == "epsilon":
            return clipped / snr
        if form == "shifted":
            return torch.stack([snr + 1, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0] / (snr + 1)
        return clipped / (snr + 1) if form == "paper" else clipped / snr + 1

    def mean(m, target, weights):
        if weights is None:
            return F.mse_loss(m.float(), target.float(), reduction="mean")
        loss = F.mse_loss(m.float(), target.float(), reduction="none")
        return (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()

    if prior is None:
        return x_t, t, noise, xi, mean(m, target, weights(t))
    (m, target, t_first), (m_prior, target_prior, _) = halves(m, target, t)
    return x_t, t, noise, xi, mean(m, target, weights(t_first)) + prior * mean(m_prior, target_prior, None)


def lines_unconditional(scheduler, x0, m):
    noise = torch.randn(x0.shape, dtype=x0.dtype)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),)).long()
    x_t = scheduler.add_noise(x0, noise, t)
    if scheduler.config.prediction_type == "epsilon":
        loss = F.mse_loss(m.float(), noise.float())
    else:
        abar = spread(scheduler.alphas_cumprod[t].float(), x0)
        loss = (abar / (1 - abar) * F.mse_loss(m.float(), x0.float(), reduction="none")).mean()
    return x_t, t, noise, torch.zeros_like(noise), loss


def lines_flow(scheduler, x0, m, *, scheme, precondition=False, prior=None):
    noise = torch.randn_like(x0)
    u = training_utils.compute_density_for_timestep_sampling(scheme, len(x0), 0.0, 1.0, 1.29)
    t = (u * scheduler.config.num_train_timesteps).long()
    sigmas = spread(scheduler.sigmas.to(x0.dtype)[t], x0)
    x_t = (1.0 - sigmas) * x0 + sigmas * noise
    weights = training_utils.compute_loss_weighting_for_sd3(scheme, sigmas=sigmas)
    target = x0 if precondition else noise - x0
    if precondition:
        m = m * (-sigmas) + x_t

    def mean(m, target, weights):
        rows = (weights.float() * (m.float() - target.float()) ** 2).reshape(len(target), -1)
        return torch.mean(rows, 1).mean()

    if prior is None:
        return x_t, t, noise, torch.zeros_like(noise), mean(m, target, weights)
    first, second = halves(m, target, weights)
    return x_t, t, noise, torch.zeros_like(noise), mean(*first) + prior * mean(*second)


def lines_edm_style(scheduler, x0, m):
    noise = torch.randn_like(x0)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
    timesteps = scheduler.timesteps[t]
    x_t = scheduler.add_noise(x0, noise, timesteps)
    sigmas = spread(scheduler.sigmas.to(x0.dtype)[t], x0)
    weights = torch.ones_like(sigmas)
    if "EDM" in type(scheduler).__name__:
        m = scheduler.precondition_outputs(x_t, m, sigmas)
    else:
        weights = (sigmas**-2.0).float()
        if scheduler.config.prediction_type == "epsilon":
            m = m * (-sigmas) + x_t
        else:
            m = m * (-sigmas / (sigmas**2 + 1) ** 0.5) + x_t / (sigmas**2 + 1)
    rows = (weights.float() * (m.float() - x0.float()) ** 2).reshape(len(x0), -1)
    return x_t, t, noise, torch.zeros_like(noise), torch.mean(rows, 1).mean()


def lines_cogvideox(scheduler, x0, m):
    noise = torch.randn_like(x0)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),)).long()
    x_t = scheduler.add_noise(x0, noise, t)
    x0_hat = scheduler.get_velocity(m, x_t, t)
    weights = spread(1 / (1 - scheduler.alphas_cumprod[t]), x0)
    loss = torch.mean((weights * (x0_hat - x0) ** 2).reshape(len(x0), -1), dim=1).mean()
    return x_t, t, noise, torch.zeros_like(noise), loss


# ------------------------------------------------- the same in float64: rows (alpha, sigma, p, q, k, weight) of a batch


def rows_vp(scheduler, t, *, gamma=None, form="paper", offset=0.0, perturbation=0.0, prior=None):
    abar = to_numpy(scheduler.alphas_cumprod)[t]
    alpha, sigma, snr, one = np.sqrt(abar), np.sqrt(1 - abar), abar / (1 - abar), np.ones_like(abar)
    kind = scheduler.config.prediction_type
    p, q = {"epsilon": (0 * one, one), "v_prediction": (-sigma, alpha), "sample": (one, one)}[kind]
    weight = one
    if gamma is not None:
        weight = np.minimum(snr, gamma)
        if kind == "epsilon":
            weight = weight / snr
        elif kind == "v_prediction":
            shifted = np.minimum(snr + 1, gamma) / (snr + 1)
            weight = {"paper": weight / (snr + 1), "plus_one": weight / snr + 1, "shifted": shifted}[form]
    if prior is not None:
        weight = np.where(np.arange(len(t)) < len(t) // 2, 2 * weight, 2 * prior)
    return alpha, sigma, p, q, one, weight


def rows_unconditional(scheduler, t):
    abar = to_numpy(scheduler.alphas_cumprod)[t]
    alpha, sigma, one = np.sqrt(abar), np.sqrt(1 - abar), np.ones_like(abar)
    if scheduler.config.prediction_type == "epsilon":
        return alpha, sigma, 0 * one, one, one, one
    return alpha, sigma, one, 0 * one, one, abar / (1 - abar)


def rows_flow(scheduler, t, *, scheme, precondition=False, prior=None):
    sigma = to_numpy(scheduler.sigmas)[t]
    one = np.ones_like(sigma)
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, one)
    if prior is not None:
        weight = weight * np.where(np.arange(len(t)) < len(t) // 2, 2, 2 * prior)
    return 1 - sigma, sigma, -one, one, -sigma if precondition else one, weight


def rows_edm_style(scheduler, t):
    sigma = to_numpy(scheduler.sigmas)[t]
    one = np.ones_like(sigma)
    if "EDM" in type(scheduler).__name__:
        d = scheduler.config.sigma_data
        sign = 1 if scheduler.config.prediction_type == "epsilon" else -1
        norm = np.sqrt(sigma**2 + d**2)
        return one, sigma, sign * sigma / (d * norm), -sign * d / norm, sign * sigma * d / norm, one
    if scheduler.config.prediction_type == "epsilon":
        return one, sigma, 0 * one, one, -sigma, sigma**-2
    norm = np.sqrt(sigma**2 + 1)
    return one, sigma, -sigma / norm, 1 / norm, -sigma / norm, sigma**-2


def rows_cogvideox(scheduler, t):
    abar = to_numpy(scheduler.alphas_cumprod)[t]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    return alpha, sigma, -sigma, alpha, -sigma, 1 / (1 - abar)


CASES = {}


def case(name, scheduler, lines, rows, ours, shape=SHAPE, **options):
    CASES[name] = scheduler, lines, rows, ours, shape, options


for _kind in ("epsilon", "v_prediction"):
    case(f"{_kind}", lambda k=_kind: ddpm(prediction_type=k), lines_vp, rows_vp, scripts.text_to_image)
    case(
        f"{_kind} min-SNR", lambda k=_kind: ddpm(prediction_type=k), lines_vp, rows_vp,
        lambda s: scripts.text_to_image(s, snr_gamma=5.0), gamma=5.0,
    )  # fmt: skip
    case(
        f"{_kind} offset and perturbation", lambda k=_kind: ddpm(prediction_type=k), lines_vp, rows_vp,
        lambda s: scripts.text_to_image(s, snr_gamma=5.0, noise_offset=0.1, input_perturbation=0.1),
        gamma=5.0, offset=0.1, perturbation=0.1,
    )  # fmt: skip
    case(
        f"dreambooth {_kind}", lambda k=_kind: ddpm(prediction_type=k), lines_vp, rows_vp,
        lambda s: scripts.dreambooth(s, snr_gamma=5.0, offset_noise=True, prior_loss_weight=0.7),
        gamma=5.0, offset=0.1, prior=0.7,
    )  # fmt: skip
    case(
        f"dreambooth SDXL {_kind}", lambda k=_kind: ddpm(prediction_type=k), lines_vp, rows_vp,
        lambda s: scripts.dreambooth_sdxl(s, snr_gamma=5.0), gamma=5.0, form="plus_one",
    )  # fmt: skip
    for _make in (diffusers.EDMEulerScheduler, diffusers.EulerDiscreteScheduler):
        _extra = {} if "EDM" in _make.__name__ else STABLE_DIFFUSION
        case(
            f"EDM style {_make.__name__} {_kind}", lambda m=_make, k=_kind, e=_extra: m(prediction_type=k, **e),
            lines_edm_style, rows_edm_style, lambda s: scripts.dreambooth_sdxl(s, edm_style=True),
        )  # fmt: skip
for _form in ("paper", "shifted"):
    case(
        f"SDXL v min-SNR {_form}", lambda: ddpm(prediction_type="v_prediction"), lines_vp, rows_vp,
        lambda s, f=_form: scripts.text_to_image_sdxl(s, snr_gamma=5.0, snr_form=f), gamma=5.0, form=_form,
    )  # fmt: skip
case(
    "SDXL sample", lambda: ddpm(prediction_type="sample"), lines_vp, rows_vp,
    lambda s: scripts.text_to_image_sdxl(s, snr_gamma=5.0), gamma=5.0,
)  # fmt: skip
case(
    "SDXL sample unweighted, offset", lambda: ddpm(prediction_type="sample"), lines_vp, rows_vp,
    lambda s: scripts.text_to_image_sdxl(s, noise_offset=0.05), offset=0.05,
)  # fmt: skip
for _kind in ("epsilon", "sample"):
    case(
        f"unconditional {_kind}", lambda k=_kind: diffusers.DDPMScheduler(prediction_type=k), lines_unconditional,
        rows_unconditional, scripts.unconditional,
    )  # fmt: skip
for _scheme in ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap"):
    case(
        f"SD3 {_scheme}", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), lines_flow, rows_flow,
        lambda s, c=_scheme: scripts.sd3(s, weighting_scheme=c), scheme=_scheme, precondition=True,
    )  # fmt: skip
case(
    "SD3 plain, prior", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), lines_flow, rows_flow,
    lambda s: scripts.sd3(s, weighting_scheme="cosmap", precondition_outputs=False, prior_loss_weight=0.5),
    scheme="cosmap", prior=0.5,
)  # fmt: skip
case(
    "Flux", lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), lines_flow, rows_flow,
    lambda s: scripts.flux(s), scheme="none",
)  # fmt: skip
case(
    "Flux prior", lambda: diffusers.FlowMatchEulerDiscreteScheduler(), lines_flow, rows_flow,
    lambda s: scripts.flux(s, weighting_scheme="mode", prior_loss_weight=1.0), scheme="mode", prior=1.0,
)  # fmt: skip
case("CogVideoX", cogvideox_scheduler, lines_cogvideox, rows_cogvideox, scripts.cogvideox, VIDEO)


def latents_and_output(shape, dtype):
    g = torch.Generator().manual_seed(3)
    x0, m = torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g).to(dtype)
    return x0, m.requires_grad_()


def three_ways(name, dtype, factor=1.0):
    """(theirs, ours, exact), each (x_t, loss, gradient of factor * loss); and the sizes of what was added up."""
    make, lines, rows, ours, shape, options = CASES[name]
    scheduler = make()
    x0, m = latents_and_output(shape, dtype)
    torch.manual_seed(11)
    x_t, t, n, xi, loss = lines(scheduler, x0, m, **options)
    (loss * factor).backward()
    theirs = x_t, loss.detach(), m.grad

    script = ours(make())
    x0, m = latents_and_output(shape, dtype)
    torch.manual_seed(11)
    noised = script.noise(x0)
    result = script.loss(m, noised)
    (result * factor).backward()
    assert torch.equal(noised.t, t) and torch.equal(noised.noise, n), "the draws are the script's"

    alpha, sigma, p, q, k, weight = (spread(row, x0) for row in rows(scheduler, t.numpy(), **options))
    x0, m64, n, xi = (to_numpy(value) for value in (x0, m, n, xi))
    x_exact = alpha * x0 + sigma * (n + options.get("perturbation", 0.0) * xi)
    error = k * (m64 - (p * x0 + q * n))
    exact = x_exact, np.mean(weight * error**2), factor * 2 * weight * k * error / error.size
    size = abs(k) * (abs(m64) + abs(p * x0) + abs(q * n))
    # A script that converts the output to x0 adds up x_t, the output and x0.
    script_size = size if np.all(abs(k) == 1) else size + abs(x_exact) + abs(x0)
    sizes = abs(alpha * x0) + abs(sigma) * (abs(n) + abs(xi)), (weight, k, size, script_size)
    return theirs, (noised.x_t, result.detach(), m.grad), exact, sizes, noised


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    """x_t has the script's bits; loss and gradient are its to rounding.

    (But for CogVideoX, whose schedule is float64 and rounded before 1 - alpha_bar is taken, which fastdiff does not.)
    """
    theirs, ours, exact, (noising, (weight, k, size, script_size)), noised = three_ways(name, torch.float32)
    if "perturbation" not in name and name != "CogVideoX":
        assert torch.equal(ours[0], theirs[0])
    assert_rounded(ours[0], exact[0], noising)
    for (_, loss, gradient), terms, operations in ((ours, size, OURS), (theirs, script_size, THEIRS)):
        assert_rounded(loss.float(), exact[1], 2 * np.mean(weight * terms**2), operations)
        assert_rounded(gradient, exact[2], 2 * weight * abs(k) * terms / terms.size, operations)
    assert ours[1].dtype == torch.float32 and noised.model_input.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name, dtype):
    """No farther from float64 than the script: x_t and gradient in the root mean square and at worst, the loss up to
    the roundings of float32 that both have. The loss is scaled as under float16 training."""
    theirs, ours, exact, (_, (weight, k, size, _)), _ = three_ways(name, dtype, factor=512.0)

    def errors(tensor, truth):
        off = to_numpy(tensor.double()) - truth
        return np.sqrt(np.mean(off**2)), abs(off).max()

    for which in (0, 2):
        for mine, other in zip(errors(ours[which], exact[which]), errors(theirs[which], exact[which])):
            assert math.isfinite(mine), which
            assert mine <= other * (1 + 1e-6) or not math.isfinite(other), (which, mine, other)
    slack = OURS * 2.0**-24 * 2 * np.mean(weight * size**2)
    mine, other = abs(float(ours[1]) - exact[1]), abs(float(theirs[1]) - exact[1])
    assert math.isfinite(mine) and (mine <= other + slack or not math.isfinite(other))
    assert ours[0].dtype == ours[2].dtype == dtype and ours[1].dtype == torch.float32


# --------------------------------------------------------------------------------------- what the network is given


def test_what_the_network_is_given():
    torch.manual_seed(0)
    x0 = torch.randn(SHAPE)
    noised = scripts.text_to_image(ddpm()).noise(x0)
    assert torch.equal(noised.model_input, noised.x_t) and torch.equal(noised.model_time, noised.t)

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    noised = scripts.sd3(flow).noise(x0)
    assert torch.equal(noised.model_time, flow.timesteps[noised.t])
    noised = scripts.flux(flow).noise(x0)
    np.testing.assert_allclose(to_numpy(noised.model_time), to_numpy(flow.timesteps[noised.t]) / 1000, rtol=2.0**-24)

    edm = diffusers.EDMEulerScheduler()
    noised = scripts.dreambooth_sdxl(edm, edm_style=True).noise(x0)
    sigma = spread(edm.sigmas[noised.t], x0)
    # c_in is rounded once, x_t once and the product once; upstream's c_in takes four roundings more.
    torch.testing.assert_close(
        noised.model_input, edm.precondition_inputs(noised.x_t, sigma), rtol=8 * 2.0**-24, atol=0
    )
    np.testing.assert_allclose(to_numpy(noised.model_time), to_numpy(edm.timesteps[noised.t]), rtol=2e-6, atol=2e-7)

    euler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION)
    noised = scripts.dreambooth_sdxl(euler, edm_style=True).noise(x0)
    sigma = spread(euler.sigmas[noised.t], x0)
    torch.testing.assert_close(noised.model_input, noised.x_t / ((sigma**2 + 1) ** 0.5), rtol=8 * 2.0**-24, atol=0)
    assert torch.equal(noised.model_time, euler.timesteps[noised.t])


def test_own_noise_needs_no_drawn_tensor_and_is_reproducible():
    script = scripts.text_to_image(ddpm(), snr_gamma=5.0, noise_offset=0.1, input_perturbation=0.1, own_noise=True)
    x0 = torch.randn(SHAPE)
    a, b = (script.noise(x0, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.x_t, b.x_t) and torch.equal(a.t, b.t)
    assert float(script.loss(a.noise, a)) < 1e-12, "the target is the noise without the perturbation"
    assert not torch.equal(a.x_t, script.noise(x0, generator=torch.Generator().manual_seed(6)).x_t)


def test_given_noise_and_timesteps_are_used_as_they_are():
    script = scripts.sd3(diffusers.FlowMatchEulerDiscreteScheduler())
    x0, n = torch.randn(2, *SHAPE)
    before = torch.random.get_rng_state()
    noised = script.noise(x0, torch.arange(6), n)
    assert torch.equal(torch.random.get_rng_state(), before), "nothing is drawn"
    assert noised.noise is n and noised.t.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(noised.x_t[0], n[0]), "index 0 is pure noise"


# ------------------------------------------------------------------------------------------ functions of training_utils


@pytest.mark.parametrize("zero", [False, True])
def test_compute_snr(zero):
    scheduler = ddpm(rescale_betas_zero_snr=zero)
    t = torch.tensor([[0, 1, 10], [500, 998, 999]])
    theirs = training_utils.compute_snr(scheduler, t)
    # Two roots, a quotient and a square in float32.
    torch.testing.assert_close(scripts.compute_snr(scheduler, t), theirs, rtol=8 * 2.0**-24, atol=0)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt"])
def test_density_draws_upstreams_numbers(scheme):
    arguments = (scheme, 1000, 0.3, 1.2, 1.29)
    torch.manual_seed(4)
    theirs = training_utils.compute_density_for_timestep_sampling(*arguments)
    state = torch.random.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(scripts.compute_density_for_timestep_sampling(*arguments), theirs.clamp(0, 1 - 2**-24))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_density_never_indexes_past_the_end():
    u = scripts.compute_density_for_timestep_sampling("logit_normal", 100, 40.0, 1.0)
    assert int((u * 1000).long().max()) == 999
    assert (
        int((training_utils.compute_density_for_timestep_sampling("logit_normal", 100, 40.0, 1.0) * 1000).max()) == 1000
    )


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weighting(scheme):
    sigmas = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    theirs = training_utils.compute_loss_weighting_for_sd3(scheme, sigmas=sigmas)
    torch.testing.assert_close(scripts.compute_loss_weighting_for_sd3(scheme, sigmas), theirs, rtol=0, atol=0)
    assert bool(scripts.compute_loss_weighting_for_sd3(scheme, sigmas.half()).isfinite().all())


# ---------------------------------------------------------------------------------------------------- from_scheduler


def test_objective_from_scheduler():
    objective = fastdiff.Objective.from_scheduler(ddpm(prediction_type="v_prediction"), snr_gamma=5.0)
    assert objective.prediction.name == "v_prediction" and objective.weighting == fastdiff.MinSNR(5.0)
    x0, n = torch.randn(2, *SHAPE)
    t = torch.tensor([0, 1, 10, 500, 998, 999])
    noised = objective.noise(x0, t, n)
    assert torch.equal(noised.x_t, ddpm().add_noise(x0, n, t)), "add_noise to the bit"
    velocity = ddpm().get_velocity(x0, n, t)
    torch.testing.assert_close(
        noised.target, velocity, rtol=0, atol=4 * 2.0**-24 * float(x0.abs().max() + n.abs().max())
    )

    other = fastdiff.Objective.from_scheduler(ddpm(), prediction="sample", loss="huber", weighting="snr")
    assert other.prediction.name == "sample" and other.loss_function.function == "smooth_l1"


@pytest.mark.parametrize(
    "make",
    [
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.DDIMScheduler,
        diffusers.LCMScheduler,
    ],
)
def test_samplers_of_variance_preserving_networks(make):
    objective = fastdiff.Objective.from_scheduler(make(**STABLE_DIFFUSION))
    np.testing.assert_allclose(
        to_numpy(objective.process.alpha_bar), to_numpy(ddpm().alphas_cumprod), rtol=1e-6, atol=0
    )


def test_flow_and_edm_schedulers():
    flow = fastdiff.Objective.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(flow.process, fastdiff.RectifiedFlow) and flow.process.shift == 3.0
    assert flow.prediction.name == "flow"
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert fastdiff.Objective.from_scheduler(dynamic).process.shift == 1.0
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert fastdiff.Objective.from_scheduler(unipc).process.shift == 5.0
    turned = fastdiff.Objective.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), prediction="reversed_flow")
    x0, n = torch.randn(2, *SHAPE)
    torch.testing.assert_close(turned.noise(x0, torch.full((6,), 0.3), n).target, x0 - n)
    for kind, sign in (("epsilon", 1), ("v_prediction", -1)):
        scheduler = diffusers.EDMEulerScheduler(prediction_type=kind, sigma_data=0.7)
        edm = fastdiff.Objective.from_scheduler(scheduler, weighting="edm")
        assert isinstance(edm.process, fastdiff.EDM) and edm.process.sigma_data == 0.7
        noised = edm.noise(torch.randn(SHAPE), torch.tensor(3.0))
        m = torch.randn(SHAPE)
        torch.testing.assert_close(
            edm.predict_x0(m, noised),
            scheduler.precondition_outputs(noised.x_t, m, torch.tensor(3.0)),
            rtol=2e-6, atol=2e-6,
        )  # fmt: skip
        assert sign * float((noised.target * (noised.x0 - 0.49 / 9.49 * noised.x_t)).sum()) > 0


def test_a_scheduler_that_inverts_its_sigmas():
    """Mochi's: its sigma is 0 at noise and 1 at data, and its steps add (sigma' - sigma) times the output, x0 - n."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, invert_sigmas=True)
    objective = fastdiff.Objective.from_scheduler(scheduler)
    assert objective.process.data_at == 1 and objective.prediction.name == "reversed_flow"
    x = start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    told, steps = [], 5

    def network(x, t):
        told.append(float(t[0]))
        return torch.tanh(x + t.view(-1, 1, 1, 1).to(x.dtype))

    # The scheduler's own grid ends before the data by its least sigma; give it the levels that FlowEuler visits.
    scheduler.set_timesteps(sigmas=(1 - np.arange(steps) / steps).tolist())
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double().expand(2) / 1000), t, x, return_dict=False)[0].double()
    theirs, told[:] = list(told), []
    ours = objective.sample(network, x.shape, "flow_euler", steps, x=start, progress=False, dtype=torch.float64)
    assert told == pytest.approx(theirs, abs=1e-6)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_is_finite_where_the_script_is_not():
    """epsilon, min-SNR, S = 0: the script's 0 / 0. The limit is 1."""
    scheduler = ddpm(rescale_betas_zero_snr=True)
    script = scripts.text_to_image(scheduler, snr_gamma=5.0)
    x0 = torch.randn(2, 4, 8, 8)
    noised = script.noise(x0, torch.tensor([999, 5]))
    m = torch.randn_like(x0, requires_grad=True)
    script.loss(m, noised).backward()
    assert bool(m.grad.isfinite().all())
    snr = training_utils.compute_snr(scheduler, noised.t)
    assert bool((snr.clamp(max=5.0) / snr).isnan().any()), "the pitfall is real"


def test_first_steps_in_bfloat16_are_noised():
    """Cast to bfloat16, as add_noise does, the schedule of the first two steps is 1."""
    x0, n, t = torch.zeros(2, 4, 4, 4).bfloat16(), torch.ones(2, 4, 4, 4).bfloat16(), torch.tensor([0, 1])
    assert not bool(ddpm().add_noise(x0, n, t).any())
    assert bool((scripts.text_to_image(ddpm()).noise(x0, t, n).x_t > 0).all())


@pytest.mark.parametrize("prior", [None, 0.7])
def test_the_gradient_along_with_the_loss(prior):
    """In the place of ``accelerator.backward(loss)``, which divides by the accumulation steps."""
    script = scripts.dreambooth(ddpm(prediction_type="v_prediction"), snr_gamma=5.0, prior_loss_weight=prior)
    noised = script.noise(torch.randn(4, 4, 8, 8))
    prediction = torch.randn(4, 4, 8, 8, requires_grad=True)
    expected = script.loss(prediction, noised)
    (expected / 2).backward()
    loss, gradient = script.loss_and_gradient(prediction, noised, scale=1 / 2)
    assert torch.equal(loss, expected) and torch.equal(gradient, prediction.grad)


# --------------------------------------------------------------------------------------------------------- wrong use


def test_wrong_use():
    flow, euler = diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EulerDiscreteScheduler()
    with pytest.raises(TypeError, match="alphas_cumprod"):
        scripts.text_to_image(flow)
    with pytest.raises(ValueError, match=r"epsilon or sample; the scheduler's is 'v_prediction', .* text_to_image"):
        scripts.unconditional(ddpm(prediction_type="v_prediction"))
    with pytest.raises(TypeError, match="flow-matching"):
        scripts.sd3(ddpm())
    with pytest.raises(TypeError, match="config"):
        fastdiff.Objective.from_scheduler(object())
    with pytest.raises(ValueError, match="not both"):
        fastdiff.Objective.from_scheduler(ddpm(), snr_gamma=5.0, weighting="snr")
    with pytest.raises(ValueError, match="min-SNR"):
        scripts.dreambooth_sdxl(euler, edm_style=True, snr_gamma=5.0)
    with pytest.raises(ValueError, match="weighting_scheme"):
        scripts.sd3(flow, weighting_scheme="cosine")
    with pytest.raises(ValueError, match="'flow', n - x0, or 'reversed_flow'.*got 'epsilon'"):
        fastdiff.Objective.from_scheduler(flow, prediction="epsilon")
    with pytest.raises(ValueError, match="unknown prediction"):
        scripts.text_to_image(ddpm(), prediction_type="noise")
    with pytest.raises(ValueError, match="form"):
        scripts.text_to_image(ddpm(), snr_gamma=5.0, snr_form="mine")
    with pytest.raises(ValueError, match="at least 0"):
        scripts.text_to_image(ddpm(), noise_offset=-0.1)
    with pytest.raises(ValueError, match="prior preservation"):
        script = scripts.dreambooth(ddpm(), prior_loss_weight=1.0)
        noised = script.noise(torch.randn(3, 4, 8, 8))
        script.loss(noised.noise, noised)
    with pytest.raises(ValueError, match="must lie in"):
        scripts.text_to_image(ddpm()).noise(torch.randn(2, 4, 8, 8), torch.tensor([5, 1000]))
    with pytest.raises(TypeError, match="floating point"):
        scripts.text_to_image(ddpm()).noise(torch.zeros(2, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="prior_loss_weight must be at least 0"):
        scripts.dreambooth(ddpm(), prior_loss_weight=-1.0)
    with pytest.raises(ValueError, match=r"latents must be \[batch, ...\]"):
        scripts.text_to_image(ddpm()).noise(torch.zeros(4))
    with pytest.raises(ValueError, match="epsilon or v_prediction; got 'sample'"):
        scripts.dreambooth_sdxl(diffusers.EulerDiscreteScheduler(prediction_type="sample"), edm_style=True)
    with pytest.raises(ValueError, match="mode needs mode_scale"):
        scripts.compute_density_for_timestep_sampling("mode", 4)
    with pytest.raises(ValueError, match="logit_mean"):
        scripts.compute_density_for_timestep_sampling("logit_normal", 4)
    with pytest.raises(ValueError, match="mode needs mode_scale, 1.29 for example"):
        scripts.compute_density_for_timestep_sampling("mode", 4)
    with pytest.raises(ValueError, match="prior_loss_weight must be at least 0, or None; got -1.0"):
        scripts.sd3(flow, prior_loss_weight=-1.0)
    with pytest.raises(ValueError, match=r"latents must be \[batch, ...\]; got shape \(4,\)"):
        scripts.text_to_image(ddpm()).noise(torch.randn(4))
    with pytest.raises(ValueError, match="prediction_type epsilon or v_prediction; got 'sample'"):
        scripts.dreambooth_sdxl(diffusers.EulerDiscreteScheduler(prediction_type="sample"), edm_style=True)
    with pytest.raises(ValueError, match="prediction_type epsilon or v_prediction; got 'sample'"):
        fastdiff.Objective.from_scheduler(diffusers.EDMEulerScheduler(), prediction="sample")
    with pytest.raises(TypeError, match="DDPMScheduler has no sigmas and timesteps"):
        scripts.dreambooth_sdxl(ddpm(), edm_style=True)
    with pytest.raises(TypeError, match="no alphas_cumprod: a scheduler such as DDPMScheduler is needed"):
        scripts.compute_snr(flow, torch.tensor([1]))
    with pytest.raises(TypeError, match="SimpleNamespace has neither alphas_cumprod, .* for example fastdiff.Variance"):
        fastdiff.Objective.from_scheduler(types.SimpleNamespace(config={}))


class Stub:
    """What a scheduler is known by: its config, and some of its attributes."""

    def __init__(self, config=(), **attributes):
        self.config = types.SimpleNamespace(**dict(config))
        vars(self).update(attributes)


BARS = torch.tensor([0.9, 0.5, 0.1])
SIGMAS = torch.tensor([1.0, 0.6, 0.2])
# What is known of a scheduler, and the process and the prediction of its network.
KNOWN = {
    "betas": (Stub(alphas_cumprod=BARS), "TabulatedVP(", "epsilon"),
    "betas, and a kind": (Stub({"prediction_type": "sample"}, alphas_cumprod=BARS), "TabulatedVP(", "sample"),
    "betas, and sigmas beside": (Stub({"shift": 3.0}, alphas_cumprod=BARS, sigmas=SIGMAS), "TabulatedVP(", "epsilon"),
    "sigma_data that preconditions nothing": (
        Stub({"sigma_data": 0.7}, alphas_cumprod=BARS), "TabulatedVP(", "epsilon"),
    "sigma_data": (
        Stub({"sigma_data": 0.7}, alphas_cumprod=BARS, precondition_outputs=0), "EDM(sigma_data=0.7)", "edm"),
    "sigma_data and v": (
        Stub({"sigma_data": 0.7, "prediction_type": "v_prediction"}, precondition_outputs=0),
        "EDM(sigma_data=0.7)", "negative_edm"),
    "flow sigmas": (
        Stub({"use_flow_sigmas": True, "flow_shift": 5.0}, alphas_cumprod=BARS), "RectifiedFlow(shift=5.0,", "flow"),
    "flow prediction": (
        Stub({"prediction_type": "flow_prediction"}, alphas_cumprod=BARS), "RectifiedFlow(shift=1.0,", "flow"),
    "a shift that was set": (Stub({"shift": 3.0}, sigmas=SIGMAS, shift=2.0), "RectifiedFlow(shift=2.0,", "flow"),
    "a shift for each image": (
        Stub({"shift": 3.0, "use_dynamic_shifting": True}, sigmas=SIGMAS, shift=3.0),
        "RectifiedFlow(shift=1.0,", "flow"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_scheduler_is_known_by(name):
    scheduler, process, prediction = KNOWN[name]
    assert repr(from_scheduler.process_of(scheduler)).startswith(process)
    assert kinds.get(from_scheduler.prediction_of(scheduler)).name == prediction


UNKNOWN = [
    (lambda: from_scheduler.process_of(Stub({"shift": 3.0})), TypeError, "Stub has neither alphas_cumprod"),
    (lambda: from_scheduler.process_of(Stub(sigmas=SIGMAS)), TypeError, "Stub has neither alphas_cumprod"),
    (lambda: from_scheduler.process_of(object()), TypeError, "a scheduler of diffusers is needed, with a config"),
    (lambda: from_scheduler.process_of(Stub), TypeError, r"scheduler is the class Stub: make one, such as Stub\(\)"),
    (lambda: from_scheduler.vp_process(Stub(alphas_cumprod=[0.9])), TypeError, "has no alphas_cumprod"),
    (
        lambda: from_scheduler.vp_process(Stub(alphas_cumprod=BARS.bfloat16())),
        ValueError,
        "is torch.bfloat16, in which",
    ),
    (lambda: from_scheduler.flow_table(Stub(alphas_cumprod=BARS)), TypeError, "a flow-matching scheduler such as"),
    (lambda: from_scheduler.training_table(Stub(sigmas=SIGMAS)), TypeError, "no sigmas and timesteps"),
    (lambda: from_scheduler.training_table(Stub(timesteps=SIGMAS)), TypeError, "no sigmas and timesteps"),
    (
        lambda: from_scheduler.training_table(Stub({"num_train_timesteps": 4}, sigmas=SIGMAS, timesteps=SIGMAS)),
        ValueError,
        "has 3 timesteps set for inference, not its 4 for training",
    ),
    (
        lambda: from_scheduler.training_table(
            Stub({"num_train_timesteps": 3}, sigmas=SIGMAS, timesteps=SIGMAS, num_inference_steps=3)
        ),
        ValueError,
        "set for inference",
    ),
    (lambda: from_scheduler.prediction_of(KNOWN["flow sigmas"][0], "epsilon"), ValueError, "predicts 'flow', n - x0"),
    (lambda: from_scheduler.prediction_of(KNOWN["sigma_data"][0], "sample"), ValueError, "epsilon or v_prediction"),
]


@pytest.mark.parametrize(("call", "error", "words"), UNKNOWN, ids=[words for *_, words in UNKNOWN])
def test_what_a_scheduler_is_not_known_by(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_tables_of_a_scheduler():
    """As many as it was trained with: what comes after (EDM's sigma of 0) is left out."""
    scheduler = Stub({"num_train_timesteps": 2, "shift": 1.0, "sigma_data": 0.7}, sigmas=SIGMAS, timesteps=SIGMAS * 10)
    t = torch.tensor([0, 1])
    flow = from_scheduler.flow_table(scheduler, 0.5)
    edm = from_scheduler.edm_table(scheduler)
    for process, told in ((flow, 0.5), (edm, 1.0)):
        levels = process.levels(t)
        torch.testing.assert_close(levels.sigma, SIGMAS[:2].double(), rtol=0, atol=0)
        torch.testing.assert_close(process.model_time(levels), SIGMAS[:2].mul(10).double() * told, rtol=0, atol=0)
        assert process.steps == 2
    assert flow.levels(t).alpha.tolist() == (1 - SIGMAS[:2].double()).tolist() and edm.levels(t).alpha.tolist() == [
        1,
        1,
    ]
    assert edm.sigma_data == 0.7
    del scheduler.config.sigma_data
    assert from_scheduler.edm_table(scheduler).sigma_data == 1.0
    assert from_scheduler.prediction_of(KNOWN["flow sigmas"][0], "flow") == "flow"
    assert kinds.get(from_scheduler.prediction_of(KNOWN["betas"][0], "v_prediction")).name == "v_prediction"
    vp = KNOWN["betas"][0]
    made = from_scheduler.vp_process(vp)
    assert from_scheduler.vp_process(vp) is made and made.alpha_bar.tolist() == pytest.approx(BARS.tolist(), rel=1e-6)


def test_a_scheduler_set_for_inference_is_refused():
    """get_sigmas would look up timesteps that are no longer there."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(28)
    with pytest.raises(ValueError, match="from_config"):
        scripts.sd3(flow)
    scripts.sd3(diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow.config))


def test_a_schedule_in_half_precision_is_refused():
    scheduler = ddpm()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.bfloat16()
    with pytest.raises(ValueError, match="float32"):
        scripts.text_to_image(scheduler)


def test_a_replaced_schedule_is_seen():
    scheduler = ddpm()
    before = scripts.compute_snr(scheduler, torch.tensor([500]))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert float(scripts.compute_snr(scheduler, torch.tensor([500]))) < float(before)


def test_importing_changes_nothing():
    """Schedulers have their own methods after an import, and no warning was raised by it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert diffusers.DDPMScheduler.add_noise.__module__.startswith("diffusers")
