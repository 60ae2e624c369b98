"""docs/trainers/sd_scripts.md against the arithmetic of sd-scripts."""

import math

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, compare, needs_pages, options, run, tensors

import fastdiff

diffusers = pytest.importorskip("diffusers")
pytestmark = needs_pages
PAGE = "sd_scripts.md"
DEFAULTS = dict(
    v_parameterization=False, zero_terminal_snr=False, min_snr_gamma=None, scale_v_pred_loss_like_noise_pred=False,
    v_pred_like_loss=None, debiased_estimation_loss=False, loss_type="l2", huber_schedule="snr", huber_c=0.1,
    huber_scale=1.0, masked_loss=False,
)  # fmt: skip


class Trainer:
    """The scheduler and the weights of NetworkTrainer."""

    def __init__(self, args):
        self.args = args
        self.scheduler = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
        kept = self.scheduler.alphas_cumprod
        self.snr = (kept.sqrt() / (1 - kept).sqrt()) ** 2  # before the schedule is rescaled
        if args.zero_terminal_snr:
            root = kept.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            kept = root**2
            betas = 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
            self.scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)

    def post_process_loss(self, loss, args, timesteps, noise_scheduler):
        assert args is self.args and noise_scheduler is self.scheduler
        snr = self.snr[timesteps].to(loss.dtype)
        capped = snr.clamp(max=1000)
        if args.min_snr_gamma:
            loss = loss * snr.clamp(max=args.min_snr_gamma) / (snr + 1 if args.v_parameterization else snr)
        if args.scale_v_pred_loss_like_noise_pred:
            loss = loss * (capped / (capped + 1))
        if args.v_pred_like_loss:
            loss = loss + loss / (capped / (capped + 1)) * args.v_pred_like_loss
        if args.debiased_estimation_loss:
            loss = loss * (1 / (capped + 1) if args.v_parameterization else 1 / capped.sqrt())
        return loss


def huber(args, prediction, target, c):
    error = prediction - target
    if args.loss_type == "l2":
        return error**2
    if args.loss_type == "l1":
        return error.abs()
    c = c.view(-1, *(1,) * (error.ndim - 1))
    root = torch.sqrt(error**2 + c**2) - c
    return 2 * c * root if args.loss_type == "huber" else 2 * root


def apply_masked_loss(loss, batch):
    if "conditioning_images" in batch:
        mask = batch["conditioning_images"].to(loss.dtype)[:, :1] / 2 + 0.5
    elif batch.get("alpha_masks") is not None:
        mask = batch["alpha_masks"].to(loss.dtype)[:, None]
    else:
        return loss
    return loss * F.interpolate(mask, loss.shape[2:], mode="area")


def reduced(loss, batch):
    loss = apply_masked_loss(loss, batch) if {"conditioning_images", "alpha_masks"} & set(batch) else loss
    return loss.mean((1, 2, 3)) * batch["loss_weights"]


CASES = {
    "epsilon": {},
    "v": dict(v_parameterization=True),
    "v, zero terminal SNR, min-SNR": dict(v_parameterization=True, zero_terminal_snr=True, min_snr_gamma=5.0),
    "v, zero terminal SNR, debiased": dict(
        v_parameterization=True, zero_terminal_snr=True, debiased_estimation_loss=True
    ),
    "min-SNR, alpha masks": dict(min_snr_gamma=5.0, mask="alpha_masks"),
    "debiased": dict(debiased_estimation_loss=True),
    "v like noise, and all of it": dict(
        v_parameterization=True, scale_v_pred_loss_like_noise_pred=True, v_pred_like_loss=0.3, min_snr_gamma=1.0
    ),
    "v-pred-like": dict(v_pred_like_loss=0.5),
    "l1, masked loss": dict(loss_type="l1", mask="conditioning_images", masked_loss=True),
    "huber, snr": dict(loss_type="huber"),
    "huber, exponential, v, zero terminal SNR": dict(
        loss_type="huber", huber_schedule="exponential", v_parameterization=True, zero_terminal_snr=True
    ),
    "huber, exponential, scaled": dict(loss_type="huber", huber_schedule="exponential", huber_scale=3.0),
    "smooth l1, constant": dict(loss_type="smooth_l1", huber_schedule="constant", huber_c=0.3, huber_scale=0.5),
    "smooth l1, snr, zero terminal SNR": dict(
        loss_type="smooth_l1", zero_terminal_snr=True, huber_c=0.05, huber_scale=7.0
    ),
    "input perturbation": dict(perturbation=0.1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_stable_diffusion(case, dtype):
    given = dict(CASES[case])
    mask, perturbation = given.pop("mask", None), given.pop("perturbation", 0.0)
    args = options(**DEFAULTS | given)
    trainer = Trainer(args)
    latents, noise, prediction = tensors(dtype)
    xi, timesteps = torch.randn_like(latents), torch.tensor([0, 1, 300, 620, 998, 999])
    batch = {"loss_weights": torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 0.25])}  # prior preservation
    if mask is not None:
        shape = (6, 64, 64) if mask == "alpha_masks" else (6, 3, 64, 64)
        batch[mask] = torch.rand(shape) if mask == "alpha_masks" else torch.rand(shape) * 2 - 1

    def lines(m, single, latents, noise, xi):
        kept = trainer.scheduler.alphas_cumprod.to(latents.dtype)
        a, s = ((part**0.5)[timesteps].view(-1, 1, 1, 1) for part in (kept, 1 - kept))
        x_t = a * latents + s * (noise + perturbation * xi if perturbation else noise)
        target = a * noise - s * latents if args.v_parameterization else noise
        c = torch.full((6,), args.huber_c * args.huber_scale, dtype=single)
        kept = trainer.scheduler.alphas_cumprod[timesteps].to(single)
        if args.huber_schedule == "exponential":
            c = torch.exp(math.log(args.huber_c) / 1000 * timesteps.to(single)) * args.huber_scale
        elif args.huber_schedule == "snr":
            c = (1 - args.huber_c) / (1 + ((1 - kept) / kept) ** 0.5) ** 2 + args.huber_c
        loss = reduced(huber(args, m.to(single), target.to(single), c), batch)
        return {"x_t": x_t, "loss": trainer.post_process_loss(loss, args, timesteps, trainer.scheduler).mean()}

    names = dict(torch=torch, self=trainer, args=args, device="cpu", noise_scheduler=trainer.scheduler)
    run(PAGE, "Stable Diffusion 1, 2 and XL: once", names)
    names |= dict(apply_masked_loss=apply_masked_loss, latents=latents, batch=batch, timesteps=timesteps, target=noise)

    def recipe(m):
        names["noise"] = noise + perturbation * xi if perturbation else noise
        run(PAGE, "Stable Diffusion 1, 2 and XL: x_t", names)
        found = run(PAGE, "The loss", dict(names, noise_pred=m))
        return {"x_t": found["noisy_latents"], "loss": found["loss"]}

    theirs, ours = compare(lines, recipe, prediction, latents=latents, noise=noise, xi=xi)
    if dtype == torch.float32:
        assert torch.equal(theirs["x_t"], ours["x_t"])


FLOWS = {
    "raw": {},
    "raw, smooth l1": dict(loss_type="smooth_l1", huber_schedule="exponential", huber_scale=2.0),
    "raw, alpha masks": dict(mask="alpha_masks"),
    "Lumina": dict(kind="lumina"),
    "additive": dict(kind="additive"),
    "sigma_scaled, none": dict(kind="sigma_scaled"),
    "sigma_scaled, sigma_sqrt": dict(kind="sigma_scaled", scheme="sigma_sqrt"),
    "sigma_scaled, cosmap": dict(kind="sigma_scaled", scheme="cosmap"),
    "sd3, none": dict(kind="sd3"),
    "sd3, sigma_sqrt": dict(kind="sd3", scheme="sigma_sqrt"),
    "sd3, cosmap": dict(kind="sd3", scheme="cosmap"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FLOWS)
def test_flows(case, dtype):
    given = dict(FLOWS[case])
    mask, kind, scheme = given.pop("mask", None), given.pop("kind", "raw"), given.pop("scheme", "none")
    args = options(**DEFAULTS | given)
    latents, noise, prediction = tensors(dtype)
    # As the trainer hands them to its formula: fractions for Flux; for SD3 whole steps, rounded to the network's dtype.
    sigmas = torch.tensor([0.02, 0.11, 0.37, 0.5, 0.83, 0.999])
    if kind == "sd3":
        sigmas = torch.tensor([1, 110, 371, 500, 833, 999]).to(dtype) / 1000
    sigmas, batch = sigmas.view(-1, 1, 1, 1), {"loss_weights": torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 0.25])}
    if mask is not None:
        batch[mask] = torch.rand(6, 64, 64)

    def lines(m, single, latents, noise, sigmas):
        x_t = ((1 - sigmas) * latents + sigmas * noise).to(latents.dtype)
        target, weights = noise - latents, 1.0
        if kind == "additive":
            m = m + x_t
        if kind == "lumina":
            target = latents - noise
        if kind in ("sd3", "sigma_scaled"):
            m, target = m * -sigmas + x_t, latents if kind == "sd3" else target
            if scheme == "sigma_sqrt":
                weights = (sigmas**-2.0).to(single)
            elif scheme == "cosmap":
                weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        c = torch.exp(math.log(args.huber_c) * sigmas.to(single)) * args.huber_scale
        loss = huber(args, m.to(single), target.to(single), c) * weights
        return {"x_t": x_t, "loss": reduced(loss, batch).mean()}

    scheduler = options()
    names = run(PAGE, "Flux, Chroma, SD3: once", dict(noise_scheduler=scheduler))
    # What the page says to change in that block.
    how = scheduler.loss.keywords
    if args.loss_type != "l2":
        how["loss"] = fastdiff.losses.PseudoHuber(
            args.huber_c, "normalized", args.huber_schedule, scale=args.huber_scale
        )
    if kind == "lumina":
        how["prediction"], prediction = "reversed_flow", -prediction
    if kind == "additive":
        how["prediction"] = names["ADDITIVE"]
    if kind == "sigma_scaled":
        how["prediction"] = names["SIGMA_SCALED"]
    if kind == "sd3":
        how |= dict(error_space="sample", weighting=None if scheme == "none" else scheme)
    if kind == "sigma_scaled" and scheme == "none":
        how["weighting"] = lambda levels: levels.sigma**2
    if kind == "sigma_scaled" and scheme == "cosmap":
        how["weighting"] = lambda levels: levels.sigma**2 * fastdiff.weighting.CosMap().formula(levels, None)
    names |= dict(torch=torch, args=args, apply_masked_loss=apply_masked_loss, latents=latents, batch=batch)
    names |= dict(sigmas=sigmas, noise=noise, target=noise, timesteps=sigmas.flatten())

    def recipe(m):
        found = run(PAGE, "The loss", run(PAGE, "Flux, Chroma, SD3: x_t", dict(names, noise_pred=m)))
        return {"x_t": found["noisy_model_input"], "loss": found["loss"]}

    compare(lines, recipe, prediction, latents=latents, noise=noise, sigmas=sigmas)
