"""docs/trainers/finetrainers.md against the arithmetic of finetrainers."""

import math

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, run, tensors

from fastdiff import ops

pytestmark = needs_pages
PAGE = "finetrainers.md"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("packed", [False, True], ids=["video", "tokens"])
def test_finetrainers(packed, scheme, dtype):
    """A weight a sample for video, a weight a token for packed latents, whose sigmas are expanded so."""
    shape = (6, 24, 8) if packed else (6, 4, 3, 8, 8)
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

    once, noising = (code for heading, code in blocks(PAGE) if heading == "x_t")
    names = dict(x0=latents, t=sigmas, n=noise)
    exec(once + noising, names)

    def recipe(m):
        given = dict(ops=ops, pred=m, target=noise - latents, weights=weights_of(sigmas))
        return {"x_t": names["x_t"], "loss": run(PAGE, "The loss", given)["loss"]}

    compare(lines, recipe, prediction, latents=latents, noise=noise, sigmas=sigmas)
