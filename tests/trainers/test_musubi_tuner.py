"""docs/trainers/musubi_tuner.md against the arithmetic of musubi-tuner."""

import math

import pytest
import torch
from common import compare, needs_pages, options, run, tensors

pytestmark = needs_pages
PAGE = "musubi_tuner.md"
VIDEO, IMAGE = (6, 4, 3, 8, 8), (6, 4, 8, 8)
GRID = torch.linspace(1, 0, 1001)  # the scheduler's sigmas; step k of 1000 has GRID[1000 - k]


def rows(value, like):
    return value.view(-1, *(1,) * (like.ndim - 1))


def weights_of(scheme, timesteps, dtype):
    """By the nearest timestep of the scheduler, [batch, 1, 1, 1, 1] whatever the latents have."""
    steps = (GRID[:-1] * 1000).to(timesteps.dtype)
    sigmas = GRID.to(dtype)[torch.stack([(steps - t).abs().argmin() for t in timesteps])].view(-1, 1, 1, 1, 1)
    return sigmas**-2.0 if scheme == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))


def trainer_lines(scheme, sampling, network, reverse=False):
    """As NetworkTrainer has it, the error in the dtype ``network``."""

    def lines(m, single, latents, noise, t):
        loss_in = torch.float64 if single == torch.float64 else network
        x_t = (1 - rows(t, latents)) * latents + rows(t, latents) * noise
        target = (latents - noise if reverse else noise - latents).to(loss_in)
        loss = (m.to(loss_in) - target) ** 2
        if scheme in ("sigma_sqrt", "cosmap"):
            loss = loss * weights_of(scheme, t * 1000 + (sampling != "sigma"), single)
        return {"x_t": x_t.to(latents.dtype), "loss": loss.mean()}

    return lines


def recipe_of(scheme, sampling, latents, noise, t, reverse=False):
    trainer = options(prediction="reversed_flow") if reverse else options()
    names = run(PAGE, "Once", {}) | dict(self=trainer, latents=latents, noise=noise, t=rows(t, latents))
    names["args"] = options(weighting_scheme=scheme, timestep_sampling=sampling)
    names["timesteps"] = t * 1000 + (sampling != "sigma")

    def recipe(m):
        found = run(PAGE, "The loss", run(PAGE, "x_t", names | {"output": options(pred=m)}))
        return {"x_t": found["noisy_model_input"], "loss": found["loss"]}

    return recipe


@pytest.mark.parametrize(
    "dtype, network",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "bfloat16", "full_bf16"],
)
@pytest.mark.parametrize(
    "scheme, sampling, shape, reverse",
    [
        ("none", "shift", VIDEO, False),
        ("none", "flux_shift", IMAGE, True),
        ("logit_normal", "sigma", IMAGE, False),
        ("sigma_sqrt", "sigma", VIDEO, False),
        ("cosmap", "sigma", VIDEO, False),
    ],
)
def test_losses(scheme, sampling, shape, reverse, dtype, network):
    latents, noise, prediction = tensors(dtype, shape)
    prediction = -prediction if reverse else prediction
    t = GRID[torch.tensor([999, 800, 643, 500, 77, 1])] if sampling == "sigma" else torch.rand(6)
    theirs, ours = compare(
        trainer_lines(scheme, sampling, network, reverse),
        recipe_of(scheme, sampling, latents, noise, t, reverse),
        prediction,
        latents=latents,
        noise=noise,
        t=t,
    )
    assert ours["loss"].dtype == torch.float32
    if network == torch.bfloat16:
        assert theirs["loss"].dtype == (torch.float32 if scheme in ("sigma_sqrt", "cosmap") else torch.bfloat16)


def test_what_differs_on_purpose():
    """Weights of images, and weights away from the scheduler's steps."""
    latents, noise, prediction = tensors(torch.float64, IMAGE)
    t = GRID[torch.tensor([999, 800, 643, 500, 77, 1])].double()
    error = ((prediction - (noise - latents)) ** 2).mean((1, 2, 3))
    given = dict(latents=latents, noise=noise, t=t)
    found = trainer_lines("cosmap", "sigma", torch.float64)(prediction, torch.float64, **given)["loss"]
    weights = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    torch.testing.assert_close(found, weights.mean() * error.mean(), rtol=1e-6, atol=0)
    ours = recipe_of("cosmap", "sigma", **given)(prediction)["loss"]
    torch.testing.assert_close(ours, (weights * error).mean(), rtol=1e-9, atol=0)
    assert abs(ours - found) > 1e-3

    t = torch.tensor([0.0051, 0.2, 0.3, 0.5, 0.7, 0.9])
    ours = recipe_of("sigma_sqrt", "shift", latents, noise, t)(prediction)["loss"]
    torch.testing.assert_close(ours, (t.double() ** -2 * error).mean(), rtol=1e-4, atol=0)  # of 1000 t + 1, less 1
    latents, noise, prediction = (x.unsqueeze(2) for x in (latents, noise, prediction))
    found = trainer_lines("sigma_sqrt", "shift", torch.float64)(prediction, torch.float64, latents, noise, t.double())
    assert found["loss"] < 0.9 * ours  # at 1000 t + 1 = 6.1, with the sigma of step 6
