"""docs/trainers/stable_audio_tools.md against the arithmetic of stable-audio-tools."""

import math

import pytest
import torch
from common import DTYPES, compare, needs_pages, options, run, tensors

pytestmark = needs_pages
PAGE = "stable_audio_tools.md"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_stable_audio_tools(objective, masked, dtype):
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
    run(PAGE, "Once", dict(self=wrapper))
    drawing = options(randn_like=lambda like: noise)
    names = dict(self=wrapper, torch=drawing, diffusion_input=data, t=t, padding_masks=padding, use_padding_mask=masked)

    def recipe(m):
        found = run(PAGE, "The loss", run(PAGE, "x_t", names | {"output": m}))
        assert found["losses"]["mse_loss"] is found["loss"]
        return {"x_t": found["noised_inputs"], "loss": found["loss"]}

    compare(lines, recipe, prediction, data=data, noise=noise, t=t)
