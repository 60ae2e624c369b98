"""docs/trainers/diffusers.md against the arithmetic of diffusers' training scripts."""

import math

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, tensors

diffusers = pytest.importorskip("diffusers")
pytestmark = needs_pages
PAGE, SEED = "diffusers.md", 11
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def wide(rows):
    return rows.view(-1, 1, 1, 1)


def table_of(scheduler, t, dtype):
    """(a, s) at t, in the dtype that the scheduler casts its table to."""
    kept = scheduler.alphas_cumprod.to(dtype)[t]
    return wide(kept**0.5), wide((1 - kept) ** 0.5)


def two_calls(heading):
    """The code of the two calls below a heading: before the network and after it."""
    return [code for below, code in blocks(PAGE) if below == heading][-2:]


def recipe_of(steps, names, t, noise):
    """``compare``'s recipe: a seeded step of the page's blocks, whose draws are ``t`` and ``noise``, to the bit."""

    def recipe(m):
        torch.manual_seed(SEED)
        found = dict(names)
        exec(steps[0], found)
        found |= {"model_pred": m, "model_output": m}
        exec(steps[1], found)
        noised = found["noised"]
        assert torch.equal(noised.t, t) and torch.equal(noised.noise, noise)
        return {"x_t": noised.x_t, "loss": found["loss"]}

    return recipe


def only_once(heading):
    """The first block below a heading, of those that have the calls below it too."""
    return next(code for below, code in blocks(PAGE) if below == heading)


VP = {
    "epsilon": dict(),
    "epsilon, min-SNR, offset": dict(snr_gamma=5.0, noise_offset=0.1),
    "v, min-SNR": dict(prediction_type="v_prediction", snr_gamma=5.0),
    "perturbation": dict(input_perturbation=0.1),
    "SDXL, v, min-SNR": dict(prediction_type="v_prediction", snr_gamma=5.0, sdxl=True),
    "SDXL, sample, min-SNR": dict(prediction_type="sample", snr_gamma=5.0, sdxl=True),
    "SDXL, offset": dict(noise_offset=0.1, sdxl=True),
    "dreambooth, min-SNR": dict(snr_gamma=5.0, offset_noise=True, dreambooth=True),
    "dreambooth, prior": dict(snr_gamma=5.0, prior=0.7, dreambooth=True),
    "dreambooth, v, prior": dict(scheduler="v_prediction", prior=0.7, dreambooth=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VP)
def test_variance_preserving(case, dtype):
    given = dict(prediction_type=None, snr_gamma=None, noise_offset=0.0, input_perturbation=0.0, offset_noise=False)
    given |= VP[case]
    scheduler = diffusers.DDPMScheduler(**STABLE_DIFFUSION, prediction_type=given.get("scheduler", "epsilon"))
    kind, prior = given["prediction_type"] or scheduler.config.prediction_type, given.get("prior")
    offset = 0.1 if given["offset_noise"] else given["noise_offset"]
    latents, _, _ = tensors(dtype)
    torch.manual_seed(SEED)
    noise = torch.randn_like(latents)
    if offset:
        noise = (noise + offset * torch.randn(6, 4, 1, 1)).to(dtype)
    xi = torch.randn_like(noise) if given["input_perturbation"] else torch.zeros_like(noise)
    t = torch.randint(0, 1000, (6,))
    prediction = (noise - 0.4 * latents + 0.3 * torch.randn_like(noise)).to(dtype)
    if kind == "sample":
        prediction = (prediction + latents).to(dtype)

    def lines(m, single, latents, noise, xi):
        (a, s), seen = table_of(scheduler, t, latents.dtype), noise + given["input_perturbation"] * xi
        x_t, target = a * latents + s * seen, noise
        if kind == "v_prediction":
            target = a * noise - s * latents
        if kind == "sample":
            m, target = m - noise, latents
        kept = scheduler.alphas_cumprod.to(single)[t]
        snr = kept / (1 - kept)
        errors = ((m.to(single) - target.to(single)) ** 2).flatten(1).mean(1)
        weights = torch.ones_like(errors)
        if given["snr_gamma"] is not None:
            weights = snr.clamp(max=5.0) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
        if prior is None:
            return {"x_t": x_t, "loss": (errors * weights).mean()}
        return {"x_t": x_t, "loss": (errors * weights)[:3].mean() + prior * errors[3:].mean()}

    args = options(**given, prior_loss_weight=prior, with_prior_preservation=prior is not None)
    names = dict(noise_scheduler=scheduler, args=args, latents=latents, torch=torch)
    plain = "train_text_to_image and its kin"
    exec(only_once("SDXL" if given.get("sdxl") else "train_dreambooth" if given.get("dreambooth") else plain), names)
    recipe = recipe_of(two_calls(plain), names, t, noise)
    theirs, ours = compare(lines, recipe, prediction, latents=latents, noise=noise, xi=xi)
    if dtype == torch.float32 and "perturbation" not in case:
        assert torch.equal(theirs["x_t"], ours["x_t"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_train_unconditional(kind, dtype):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type=kind)
    images, _, prediction = tensors(dtype)
    torch.manual_seed(SEED)
    noise, t = torch.randn_like(images), torch.randint(0, 1000, (6,))
    prediction = (images + 0.3 * prediction).to(dtype) if kind == "sample" else prediction

    def lines(m, single, images, noise):
        a, s = table_of(scheduler, t, images.dtype)
        kept = scheduler.alphas_cumprod.to(single)[t]
        if kind == "epsilon":
            loss = ((m.to(single) - noise.to(single)) ** 2).mean()
        else:
            loss = (wide(kept / (1 - kept)) * (m.to(single) - images.to(single)) ** 2).mean()
        return {"x_t": a * images + s * noise, "loss": loss}

    names = dict(noise_scheduler=scheduler, clean_images=images)
    exec(only_once("train_unconditional"), names)
    recipe = recipe_of(two_calls("train_unconditional"), names, t, noise)
    theirs, ours = compare(lines, recipe, prediction, images=images, noise=noise)
    if dtype == torch.float32:
        assert torch.equal(theirs["x_t"], ours["x_t"])


FLOWS = {
    "sd3, logit_normal": dict(weighting_scheme="logit_normal", precondition_outputs=1),
    "sd3, sigma_sqrt": dict(weighting_scheme="sigma_sqrt", precondition_outputs=1),
    "sd3, cosmap, plain": dict(weighting_scheme="cosmap", precondition_outputs=0),
    "sd3, cosmap, prior": dict(weighting_scheme="cosmap", precondition_outputs=1, prior=0.7),
    "flux, none": dict(weighting_scheme="none", flux=True),
    "flux, mode, prior": dict(weighting_scheme="mode", flux=True, prior=0.7),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FLOWS)
def test_flows(case, dtype):
    given = dict(FLOWS[case])
    scheme, prior, flux = given["weighting_scheme"], given.get("prior"), given.get("flux", False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, _, _ = tensors(dtype)
    torch.manual_seed(SEED)
    noise = torch.randn_like(latents)
    if scheme == "logit_normal":
        u = torch.normal(0.3, 1.1, (6,)).sigmoid()
    else:
        u = torch.rand((6,))
        u = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) if scheme == "mode" else u
    t = (u * 1000).long()
    prediction = (noise - 0.6 * latents + 0.3 * torch.randn_like(noise)).to(dtype)

    def lines(m, single, latents, noise):
        sigmas = wide(scheduler.sigmas.to(latents.dtype)[t])
        x_t, target, weights = (1.0 - sigmas) * latents + sigmas * noise, noise - latents, torch.ones_like(sigmas)
        if given.get("precondition_outputs"):
            m, target = m * -sigmas + x_t, latents
        if scheme == "sigma_sqrt":
            weights = (sigmas**-2.0).to(single)
        elif scheme == "cosmap":
            weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        errors = (weights.to(single) * (m.to(single) - target.to(single)) ** 2).flatten(1).mean(1)
        loss = errors.mean() if prior is None else errors[:3].mean() + prior * errors[3:].mean()
        return {"x_t": x_t, "loss": loss}

    args = options(weighting_scheme=scheme, logit_mean=0.3, logit_std=1.1, mode_scale=1.29)
    args.precondition_outputs = given.get("precondition_outputs", 0)
    args.prior_loss_weight, args.with_prior_preservation = prior, prior is not None
    names = dict(noise_scheduler_copy=scheduler, args=args, model_input=latents)
    once = only_once("SD3 and Flux")
    if flux:  # as the page says
        once = once.replace("training_scripts.sd3", "training_scripts.flux")
        once = once.replace("    precondition_outputs=bool(args.precondition_outputs),\n", "")
    exec(once, names)
    recipe = recipe_of(two_calls("SD3 and Flux"), names, t, noise)
    theirs, ours = compare(lines, recipe, prediction, latents=latents, noise=noise)
    if dtype == torch.float32:
        assert torch.equal(theirs["x_t"], ours["x_t"])
    torch.manual_seed(SEED)
    exec(two_calls("SD3 and Flux")[0], names)
    assert torch.equal(names["timesteps"], scheduler.timesteps[t] / (1000 if flux else 1))
