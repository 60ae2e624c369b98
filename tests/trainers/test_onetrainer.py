"""docs/trainers/onetrainer.md against the arithmetic of OneTrainer."""

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, compare, needs_pages, options, run, tensors

import fastdiff

pytestmark = needs_pages
PAGE = "onetrainer.md"
NONE = dict(mse_strength=0.0, mae_strength=0.0, log_cosh_strength=0.0, huber_strength=0.0, huber_delta=1.0)
NONE |= dict(unmasked_weight=0.1, normalize_masked_area_loss=False, masked_prior_preservation_weight=0.0)
CASES = {
    "mse": dict(mse_strength=1.0),
    "mae and mse": dict(mse_strength=0.5, mae_strength=2.0),
    "log-cosh": dict(log_cosh_strength=1.0),
    "huber": dict(huber_strength=0.7, huber_delta=0.3),
    "all": dict(mse_strength=1.0, mae_strength=1.0, log_cosh_strength=1.0, huber_strength=1.0),
}
MASKS = ["unmasked", "masked", "normalised", "prior"]


def errors(config, predicted, target, single):
    """(strength, error of each element) of the kinds that have one. Each casts the prediction for itself, so that in
    half precision the gradients are rounded one by one before they are added."""
    for name in ("mse", "mae", "log_cosh", "huber"):
        strength = getattr(config, f"{name}_strength")
        if strength == 0:
            continue
        e, delta = predicted.to(single) - target.to(single), config.huber_delta
        if name == "mse":
            yield strength, e**2
        elif name == "mae":
            yield strength, e.abs()
        elif name == "log_cosh":
            yield strength, e + F.softplus(-2 * e) - torch.log(torch.full_like(e, 2.0))
        else:
            yield strength, torch.where(e.abs() < delta, e**2 / 2, delta * (e.abs() - delta / 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_losses(case, masks, dtype):
    config = options(**NONE | CASES[case])
    config.normalize_masked_area_loss = masks in ("normalised", "prior")
    config.masked_prior_preservation_weight = 0.6 if masks == "prior" else 0.0
    latents, target, prediction = tensors(dtype)
    prior_target = (target + 0.2 * torch.randn_like(target)).to(dtype)
    batch, data = {"latent_mask": (torch.rand(6, 1, 8, 8) > 0.4).float()}, {"target": target}
    if masks == "prior":
        data["prior_target"] = prior_target
    weights = torch.tensor([1.0, 0.2, 0.5, 1.0, 2.0, 0.7])  # of timesteps and concepts

    def lines(m, single, target, prior_target, mask, weights):
        clamped, losses = mask.clamp(config.unmasked_weight, 1), 0
        for strength, error in errors(config, m, target, single):
            if masks != "unmasked":
                error = error * clamped
                if config.normalize_masked_area_loss:
                    error = error / clamped.mean((1, 2, 3), keepdim=True)
            losses = losses + error.mean((1, 2, 3)) * strength
        if masks == "prior":
            for strength, error in errors(config, m, prior_target, single):
                error = error * (1 - clamped) * config.masked_prior_preservation_weight
                losses = losses + (error / (1 - clamped).mean((1, 2, 3), keepdim=True)).mean((1, 2, 3)) * strength
        return {"loss": (losses * weights).mean()}

    names = run(PAGE, "Once", {}) | dict(batch=batch, config=config)

    def recipe(m):
        heading = "Training without masks" if masks == "unmasked" else "Masked training"
        losses = run(PAGE, heading, names | {"data": data | {"predicted": m}})["losses"]
        assert losses.shape == (6,) and losses.dtype == torch.float32
        losses = losses * 1  # the trainer's loss scale, after which it multiplies in place
        losses *= weights
        return {"loss": losses.mean()}

    given = dict(target=target, prior_target=prior_target, mask=batch["latent_mask"], weights=weights)
    compare(lines, recipe, prediction, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["x_t of diffusion models", "x_t of flows"])
def test_noising(kind, dtype):
    """And the trainer keeps what it made for its first batch."""
    latents, noise, prediction = tensors(dtype)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    timestep = torch.tensor([0, 3, 250, 600, 998, 999])

    def lines(m, single, latents, noise, betas):
        if kind == "x_t of flows":
            sigma = ((timestep + 1) / torch.tensor(1000, dtype=single)).view(-1, 1, 1, 1)
            alpha = 1 - sigma
        else:
            kept = torch.cumprod(1 - betas, 0)[timestep].view(-1, 1, 1, 1)
            alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        x_t = (latents.to(single) * alpha + noise.to(single) * sigma).to(latents.dtype)
        return {"x_t": x_t, "loss": (m.to(single) - x_t.to(single)).square().mean()}

    trainer = options()
    names = dict(self=trainer, betas=betas, timestep=timestep, timesteps=torch.arange(1000))
    names |= dict(scaled_latent_image=latents, latent_noise=noise, fastdiff=fastdiff)

    def recipe(m):
        x_t = run(PAGE, kind, names)["noisy"]
        return {"x_t": x_t, "loss": (m.float() - x_t.float()).square().mean()}

    compare(lines, recipe, prediction, latents=latents, noise=noise, betas=betas)
    if kind == "x_t of flows":
        assert torch.equal(names["sigmas"].flatten(), (timestep + 1) / 1000) and names["sigmas"].ndim == 4
    else:
        made = trainer.process
        recipe(prediction)
        assert trainer.process is made


def test_an_empty_mask_is_left_out():
    config = options(**NONE | {"mse_strength": 1.0, "normalize_masked_area_loss": True, "unmasked_weight": 0.0})
    _, target, prediction = tensors(torch.float32)
    mask = torch.rand(6, 1, 8, 8)
    mask[2] = 0
    names = run(PAGE, "Once", {}) | dict(batch={"latent_mask": mask}, config=config)
    losses = run(PAGE, "Masked training", names | {"data": {"predicted": prediction, "target": target}})["losses"]
    assert losses[2] == 0 and losses.isfinite().all() and (losses > 0).sum() == 5
