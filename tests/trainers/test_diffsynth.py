"""docs/trainers/diffsynth.md against the arithmetic of DiffSynth-Studio."""

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors

from fastdiff import ops

pytestmark = needs_pages
PAGE = "diffsynth.md"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1000, 400])
def test_diffsynth(steps, dtype):
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

    once, noising = (code for heading, code in blocks(PAGE) if heading == "x_t")
    names = dict(original_samples=latents, sigma=sigmas[index], noise=noise)
    exec(once + noising, names)
    pipe = options(scheduler=options(training_weight=lambda timestep: weights[index]))

    def recipe(m):
        given = dict(ops=ops, pipe=pipe, timestep=None, noise_pred=m, training_target=noise - latents)
        return {"x_t": names["sample"], "loss": run(PAGE, "The loss", given)["loss"]}

    compare(lines, recipe, prediction, latents=latents, noise=noise, sigma=sigmas[index], weight=weights[index])
