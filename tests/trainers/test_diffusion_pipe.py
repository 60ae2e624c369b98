"""docs/trainers/diffusion_pipe.md against the arithmetic of diffusion-pipe."""

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors

import fastdiff

pytestmark = needs_pages
PAGE = "diffusion_pipe.md"
CASES = {
    "mse": {},
    "huber": dict(huber_delta=0.3),
    "smooth l1": dict(smooth_l1_beta=0.4),
    "mse, mask": dict(mask=True),
    "huber, mask": dict(huber_delta=0.5, mask=True),
}


def error(config, m, target):
    e = m - target
    if "huber_delta" in config:
        delta = config["huber_delta"]
        return torch.where(e.abs() < delta, e**2 / 2, delta * (e.abs() - delta / 2))
    if "smooth_l1_beta" in config:
        beta = config["smooth_l1_beta"]
        return torch.where(e.abs() < beta, e**2 / (2 * beta), e.abs() - beta / 2)
    return e**2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 4, 8, 8), (6, 4, 3, 8, 8)], ids=["image", "video"])
@pytest.mark.parametrize("case", CASES)
def test_losses(case, shape, dtype):
    """Latents and targets are float32 here; the prediction is what the network makes."""
    config = dict(CASES[case])
    masked = config.pop("mask", False)
    latents, noise, prediction = tensors(torch.float32, shape)
    t = torch.rand(6)
    mask = (torch.rand(6, 1, *(1,) * (len(shape) - 4), 8, 8) > 0.3).half() if masked else torch.empty(0)

    def lines(m, single, latents, noise, t, mask):
        grid = t.view(-1, *(1,) * (latents.ndim - 1))
        x_t, target = (1 - grid) * latents + grid * noise, noise - latents
        loss = error(config, m.to(single), target)
        loss = loss * mask.to(single) if mask.numel() else loss
        return {"x_t": x_t, "target": target, "loss": loss.mean()}

    loading, losing = dict(latents=latents, noise=noise, t=t), dict(torch=torch, self=options(config=config))
    run(PAGE, "x_t and target of flows", loading)

    def recipe(m):
        found = run(PAGE, "The loss", losing | dict(output=m, label=(loading["target"], mask)))
        return {"x_t": loading["noisy_latents"], "target": loading["target"], "loss": found["loss"]}

    compare(lines, recipe, prediction.to(dtype), latents=latents, noise=noise, t=t, mask=mask)


def test_a_mask_that_divides_by_its_mean():
    """LTX-Video's."""
    _, target, prediction = tensors(torch.float32, (6, 4, 3, 8, 8))
    mask = torch.rand(6, 1, 1, 8, 8)

    def lines(m, single, target, mask):
        return {"loss": (((m - target) ** 2) * mask / mask.mean()).mean()}

    code = [code for heading, code in blocks(PAGE) if heading == "The loss"][1]
    code = code.replace("p=1.0, **how", 'p=1.0, mask_normalization="global", **how')
    assert "global" in code
    names = dict(torch=torch, ops=fastdiff.ops, self=options(config={}))

    def recipe(m):
        found = names | dict(output=m, label=(target, mask))
        exec(code, found)
        return {"loss": found["loss"]}

    compare(lines, recipe, prediction, target=target, mask=mask)


def test_flux_is_packed_as_there():
    """b c (h p) (w q) -> b (h w) (c p q), x_t and target."""
    latents, noise, _ = tensors(torch.float32)
    once = [code for heading, code in blocks(PAGE) if heading == "x_t and target of flows"][0]
    names = dict(x_1=latents, x_0=noise, t=torch.rand(6))
    exec(once, names)
    run(PAGE, "Flux", names)

    def packed(x):
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)

    t = names["t"].double().view(-1, 1, 1, 1)
    x_t = (1 - t) * latents.double() + t * noise.double()
    torch.testing.assert_close(names["x_t"].double(), packed(x_t), rtol=0, atol=2e-6)
    torch.testing.assert_close(names["target"].double(), packed(noise.double() - latents.double()), rtol=0, atol=2e-6)


SDXL = {
    "epsilon": {},
    "epsilon, min-SNR": dict(min_snr_gamma=5.0),
    "epsilon, debiased, mask": dict(debiased_estimation_loss=True, mask=True),
    "v, min-SNR": dict(v_pred=True, min_snr_gamma=5.0),
    "v, both, mask": dict(v_pred=True, min_snr_gamma=1.0, debiased_estimation_loss=False, mask=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SDXL)
def test_sdxl(case, dtype):
    diffusers = pytest.importorskip("diffusers")
    from fastdiff.integrations.diffusers import fuse, fused_calls

    given = dict(v_pred=False, min_snr_gamma=None, debiased_estimation_loss=None) | SDXL[case]
    masked = given.pop("mask", False)
    scheduler = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    snr = (scheduler.alphas_cumprod.sqrt() / (1 - scheduler.alphas_cumprod).sqrt()) ** 2  # before it is rescaled
    if given["v_pred"]:
        root = scheduler.alphas_cumprod.sqrt()
        kept = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        scheduler.alphas_cumprod = torch.cumprod(torch.cat([kept[:1], kept[1:] / kept[:-1]]), 0)
    latents, noise, prediction = tensors(torch.float32)
    timesteps = torch.tensor([0, 40, 333, 720, 998, 999])
    mask = (torch.rand(6, 1, 8, 8) > 0.3).half() if masked else torch.empty(0)

    def apply_snr_weight(loss, timesteps, noise_scheduler, gamma, v_prediction):
        assert noise_scheduler is scheduler
        at = snr[timesteps].to(loss.dtype)
        return loss * (at.clamp(max=gamma) / (at + 1 if v_prediction else at))

    def apply_debiased_estimation(loss, timesteps, noise_scheduler, v_prediction):
        at = snr[timesteps].to(loss.dtype).clamp(max=1000)
        return loss * (1 / (at + 1) if v_prediction else 1 / at.sqrt())

    def lines(m, single, latents, noise, mask):
        kept = scheduler.alphas_cumprod.to(single)
        a, s = ((part**0.5)[timesteps].view(-1, 1, 1, 1) for part in (kept, 1 - kept))
        x_t, target = a * latents + s * noise, a * noise - s * latents if given["v_pred"] else noise
        loss = (m.to(single) - target) ** 2
        loss = (loss * mask.to(single) if mask.numel() else loss).mean((1, 2, 3))
        if given["min_snr_gamma"] is not None:
            loss = apply_snr_weight(loss, timesteps, scheduler, given["min_snr_gamma"], given["v_pred"])
        if given["debiased_estimation_loss"] is not None:
            loss = apply_debiased_estimation(loss, timesteps, scheduler, given["v_pred"])
        return {"x_t": x_t, "target": target, "loss": loss.mean()}

    model = options(scheduler=scheduler, **given)
    names = dict(torch=torch, self=model, fuse=fuse, ops=fastdiff.ops, apply_snr_weight=apply_snr_weight)
    run(PAGE, "SDXL: once", names | dict(apply_debiased_estimation=apply_debiased_estimation))
    before = sum(fused_calls().values())
    x_t = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps) if given["v_pred"] else noise
    assert sum(fused_calls().values()) > before

    def recipe(m):
        found = run(PAGE, "SDXL: the loss", names | dict(output=(m, timesteps), label=(target, mask)))
        return {"x_t": x_t, "target": target, "loss": found["loss"]}

    compare(lines, recipe, prediction.to(dtype), latents=latents, noise=noise, mask=mask)
