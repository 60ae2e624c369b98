"""docs/trainers/stable_audio_tools.md, finetrainers.md and diffsynth.md against the arithmetic of these trainers."""

import math

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors

from fastdiff import ops

pytestmark = needs_pages


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_stable_audio_tools(objective, masked, dtype):
    page = "stable_audio_tools.md"
    data, noise, prediction = tensors(dtype, (6, 8, 32))
    t = torch.tensor([0.01, 0.2, 0.4, 0.66, 0.9, 0.999])
    padding = torch.arange(32) < torch.tensor([32, 3, 17, 30, 12, 9])[:, None]

    def lines(m, single, data, noise, t):
        alphas, sigmas = (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)) if objective == "v" else (1 - t, t)
        alphas, sigmas = alphas[:, None, None], sigmas[:, None, None]
        x_t = (data * alphas + noise * sigmas).to(data.dtype)
        target = noise * alphas - data * sigmas if objective == "v" else noise - data
        loss = (m - target) ** 2
        return {"x_t": x_t, "loss": (loss[padding[:, None].repeat(1, 8, 1)] if masked else loss).mean()}

    wrapper = options(diffusion_objective=objective)
    run(page, "Once", dict(self=wrapper))
    drawing = options(randn_like=lambda like: noise)
    names = dict(self=wrapper, torch=drawing, diffusion_input=data, t=t, padding_masks=padding, use_padding_mask=masked)

    def recipe(m):
        found = run(page, "The loss", run(page, "x_t", names | {"output": m}))
        assert found["losses"]["mse_loss"] is found["loss"]
        return {"x_t": found["noised_inputs"], "loss": found["loss"]}

    compare(lines, recipe, prediction, data=data, noise=noise, t=t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("packed", [False, True], ids=["video", "tokens"])
def test_finetrainers(packed, scheme, dtype):
    """A weight a sample for video, a weight a token for packed latents, whose sigmas are expanded so."""
    page, shape = "finetrainers.md", (6, 24, 8) if packed else (6, 4, 3, 8, 8)
    latents, noise, prediction = tensors(dtype, shape)
    sigmas = torch.tensor([0.02, 0.25, 0.5, 0.61, 0.9, 0.999]).view(-1, *(1,) * (len(shape) - 1))
    if packed:  # and a first frame with less noise
        sigmas = sigmas * torch.cat([torch.full((8,), 0.3), torch.ones(16)])[:, None]

    def weights_of(sigmas):
        if scheme == "sigma_sqrt":
            return sigmas**-2.0
        if scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        return torch.ones_like(sigmas)

    def lines(m, single, latents, noise, sigmas):
        x_t, target = ((1 - sigmas) * latents + sigmas * noise).to(latents.dtype), noise - latents
        loss = weights_of(sigmas).to(single) * (m.to(single) - target.to(single)) ** 2
        return {"x_t": x_t, "loss": loss.flatten(1).mean(1).mean()}

    once, noising = (code for heading, code in blocks(page) if heading == "x_t")
    names = dict(x0=latents, t=sigmas, n=noise)
    exec(once + noising, names)

    def recipe(m):
        given = dict(ops=ops, pred=m, target=noise - latents, weights=weights_of(sigmas))
        return {"x_t": names["x_t"], "loss": run(page, "The loss", given)["loss"]}

    compare(lines, recipe, prediction, latents=latents, noise=noise, sigmas=sigmas)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1000, 400])
def test_diffsynth(steps, dtype):
    page = "diffsynth.md"
    latents, noise, prediction = tensors(dtype, (1, 4, 3, 8, 8))
    sigmas = torch.linspace(1, 0, steps + 1)[:-1]
    sigmas, index = 5 * sigmas / (1 + 4 * sigmas), steps // 3
    y = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    weights = (y - y.min()) * (1000 / (y - y.min()).sum())
    if steps != 1000:
        weights = weights * (steps / 1000)
        weights = weights + weights[1]

    def lines(m, single, latents, noise, sigma, weight):
        x_t = (1 - sigma) * latents + sigma * noise
        return {"x_t": x_t, "loss": ((m.to(single) - (noise - latents).to(single)) ** 2).mean() * weight}

    once, noising = (code for heading, code in blocks(page) if heading == "x_t")
    names = dict(original_samples=latents, sigma=sigmas[index], noise=noise)
    exec(once + noising, names)
    pipe = options(scheduler=options(training_weight=lambda timestep: weights[index]))

    def recipe(m):
        given = dict(ops=ops, pipe=pipe, timestep=None, noise_pred=m, training_target=noise - latents)
        return {"x_t": names["sample"], "loss": run(page, "The loss", given)["loss"]}

    compare(lines, recipe, prediction, latents=latents, noise=noise, sigma=sigmas[index], weight=weights[index])
