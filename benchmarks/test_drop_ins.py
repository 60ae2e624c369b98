"""What a training script computes around its network, as it writes it and with fastdiff in its place.

    python -m pytest benchmarks/test_drop_ins.py --benchmark-json=out.json
    python benchmarks/drop_ins_table.py out.json

"given": add_noise, target, SNR weights, loss and backward, with noise and timesteps given to both. "whole": noise and
timesteps are drawn too, the same numbers by both ("script", "fastdiff"), or made from a seed ("own noise").
"""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.integrations import training_scripts

diffusers = pytest.importorskip("diffusers")
from diffusers.training_utils import (  # noqa: E402
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sdxl(x0, draw):
    """The SDXL script with v-prediction and min-SNR weights."""
    scheduler = diffusers.DDPMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction")

    def script(prediction, noise=None, t=None):
        noise = torch.randn_like(x0) if noise is None else noise
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), device=x0.device) if t is None else t
        x_t = scheduler.add_noise(x0, noise, t)
        target = scheduler.get_velocity(x0, noise, t)
        snr = compute_snr(scheduler, t)
        weights = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0] / (snr + 1)
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none")
        loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
        loss.backward()
        return x_t, loss

    return script, training_scripts.text_to_image_sdxl(scheduler, snr_gamma=5.0, own_noise=draw == "own noise")


def sd3(x0, draw):
    """The SD3 script with its defaults: logit-normal timesteps, preconditioned outputs."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def script(prediction, noise=None, t=None):
        noise = torch.randn_like(x0) if noise is None else noise
        if t is None:
            u = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0, 1.29)
            t = (u * scheduler.config.num_train_timesteps).long()
        timesteps = scheduler.timesteps[t].to(x0.device)
        sigmas = scheduler.sigmas.to(device=x0.device, dtype=x0.dtype)
        schedule = scheduler.timesteps.to(x0.device)
        index = [(schedule == one).nonzero().item() for one in timesteps]
        sigmas = sigmas[index].flatten().reshape(-1, *(1,) * (x0.ndim - 1))
        x_t = (1.0 - sigmas) * x0 + sigmas * noise
        output = prediction * (-sigmas) + x_t
        weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas=sigmas)
        rows = (weighting.float() * (output.float() - x0.float()) ** 2).reshape(len(x0), -1)
        loss = torch.mean(rows, 1).mean()
        loss.backward()
        return x_t, loss

    return script, training_scripts.sd3(scheduler, own_noise=draw == "own noise")


CASES = {"SDXL v + min-SNR": sdxl, "SD3 preconditioned": sd3}


@pytest.mark.parametrize("implementation", ["script", "fastdiff", "own noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(4, 4, 128, 128), (32, 4, 128, 128)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("part", ["given", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_drop_in(benchmark, name, part, shape, dtype, implementation, device):
    if part == "given" and implementation == "own noise":
        pytest.skip("the noise is given")
    x0 = torch.randn(shape, device=device).to(dtype)
    prediction = torch.randn(shape, device=device).to(dtype).requires_grad_()
    script, fused = CASES[name](x0, implementation)
    given = (
        (torch.randn_like(x0), torch.randint(0, 1000, shape[:1], device=device)) if part == "given" else (None, None)
    )

    def run():
        prediction.grad = None
        if implementation == "script":
            script(prediction, *given)
        else:
            noised = fused.noise(x0, given[1], given[0])
            fused.loss(prediction, noised).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark.group = f"{name}, {part}, {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["implementation"] = implementation
    benchmark.pedantic(run, rounds=150 if shape[0] < 8 else 40, iterations=1, warmup_rounds=5)
