"""Fifty steps of training as programs train, with their own lines of the loss, written here again, and with fastdiff:
the same seed gives the same losses to 1e-6 at every step, and the same draws. ``benchmarks/real_programs.py`` does the
same with the programs themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from libraries import Diffusion, Transport, spread
from torch import nn

from fastdiff.integrations import edm, flow, guided_diffusion, training_scripts

STEPS, SHAPE = 50, (4, 2, 8, 8)


class Network(nn.Module):
    """Convolutions that are told time and class; a class is dropped at random, as for classifier-free guidance."""

    def __init__(self, outputs=2):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, outputs, 3, padding=1)
        self.time, self.classes = nn.Linear(1, 8), nn.Embedding(4, 8)

    def forward(self, x, t, y):
        dropped = torch.where(torch.rand(y.shape) < 0.1, 3, y)
        told = self.time(torch.log1p(t.float()).reshape(-1, 1)) + self.classes(dropped)
        return self.last(torch.tanh(self.first(x) + told[:, :, None, None]))


class Denoiser(nn.Module):
    """EDM's D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4). Karras et al. 2022, equation 7; sigma_data 0.5."""

    def __init__(self):
        super().__init__()
        self.inner = Network()

    def forward(self, x, sigma, labels, augment_labels=None):
        norm = (sigma**2 + 0.25) ** 0.5
        return 0.25 / norm**2 * x + 0.5 * sigma / norm * self.inner(x / norm, (sigma.log() / 4).exp(), labels)


def of_diffusion(fuse):
    """DiT's loop: a learned variance, whose bound is added to the error of the noise."""
    diffusion = fuse(Diffusion("EPSILON", "LEARNED_RANGE", "MSE", steps=1000))

    def loss(network, x, y):
        t = torch.randint(0, diffusion.num_timesteps, (len(x),))
        return diffusion.training_losses(network, x, t, {"y": y})["loss"].mean()

    return loss


def of_transport(fuse, *kinds):
    transport = fuse(Transport(*kinds))
    return lambda network, x, y: transport.training_losses(network, x, {"y": y})["loss"].mean()


def edm_lines(network, images, labels):
    sigma = (torch.randn(len(images), 1, 1, 1) * 1.2 - 1.2).exp()
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    denoised = network(images + sigma * torch.randn_like(images), sigma, labels)
    return (weight * (denoised - images) ** 2).sum().mul(1 / len(images))


def edm_fused(network, images, labels):
    return edm.EDMLoss()(net=network, images=images, labels=labels).sum().mul(1 / len(images))


def scheduler(kind, **options):
    return pytest.importorskip("diffusers").DDPMScheduler(prediction_type=kind, **options)


def unconditional_lines(kind):
    table = scheduler(kind)

    def loss(network, images, y):
        noise = torch.randn(images.shape, dtype=images.dtype)
        t = torch.randint(0, 1000, (len(images),)).long()
        output = network(table.add_noise(images, noise, t), t, y)
        if kind == "epsilon":
            return F.mse_loss(output.float(), noise.float())
        snr = spread(table.alphas_cumprod[t] / (1 - table.alphas_cumprod[t]), images)
        return (snr * F.mse_loss(output.float(), images.float(), reduction="none")).mean()

    return loss


def text_to_image_lines(gamma=5.0, offset=0.1):
    """train_text_to_image with v-prediction, min-SNR weights and offset noise."""
    table = scheduler("v_prediction", beta_schedule="scaled_linear")

    def loss(network, latents, y):
        noise = torch.randn_like(latents)
        noise += offset * torch.randn(*latents.shape[:2], 1, 1)
        t = torch.randint(0, 1000, (len(latents),)).long()
        output = network(table.add_noise(latents, noise, t), t, y)
        snr = table.alphas_cumprod[t] / (1 - table.alphas_cumprod[t])
        rows = F.mse_loss(output.float(), table.get_velocity(latents, noise, t).float(), reduction="none")
        return (rows.mean(dim=[1, 2, 3]) * snr.clamp(max=gamma) / (snr + 1)).mean()

    return loss


def of_script(script):
    def loss(network, latents, y):
        noised = script.noise(latents)
        return script.loss(network(noised.model_input, noised.model_time, y), noised)

    return loss


def text_to_image_fused(gamma=5.0, offset=0.1):
    table = scheduler("v_prediction", beta_schedule="scaled_linear")
    return of_script(training_scripts.text_to_image(table, snr_gamma=gamma, noise_offset=offset))


def train(network, loss, dtype=torch.float32):
    """The losses of fifty steps, float64 [50]; the generator's next number stands behind them. In bfloat16 the latents
    are of that dtype and the network runs under autocast, as accelerate does it."""
    torch.manual_seed(7)
    network = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        y = torch.randint(0, 3, SHAPE[:1])
        x = (torch.randn(SHAPE[0], 2, 1, 1) + 0.3 * torch.randn(SHAPE)).clamp(-1, 1).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            value = loss(network, x, y)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(value.detach())
    return torch.stack([*losses, torch.rand(())]).double()


def kept(thing):
    return thing


PROGRAMS = {  # the network, the program's lines and fastdiff's
    "DiT": (lambda: Network(4), lambda: of_diffusion(kept), lambda: of_diffusion(guided_diffusion.fuse)),
    "EDM": (Denoiser, lambda: edm_lines, lambda: edm_fused),
    "text_to_image": (Network, text_to_image_lines, text_to_image_fused),
}
for _kinds in (("VELOCITY", "NONE", False), ("SCORE", "LIKELIHOOD", True)):  # the path by angles, and the straight one
    PROGRAMS[f"SiT {_kinds[0]}"] = (
        Network, lambda k=_kinds: of_transport(kept, *k), lambda k=_kinds: of_transport(flow.fuse, *k),
    )  # fmt: skip
for _kind in ("epsilon", "sample"):
    PROGRAMS[f"unconditional {_kind}"] = (
        Network, lambda k=_kind: unconditional_lines(k),
        lambda k=_kind: of_script(training_scripts.unconditional(scheduler(k))),
    )  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_losses_of_fifty_steps(name):
    make, lines, fused = PROGRAMS[name]
    network = make()
    theirs, ours = train(network, lines()), train(network, fused())
    assert theirs[-1] == ours[-1], "the same draws"
    off = ((ours - theirs) / theirs).abs()
    assert float(off.max()) <= 1e-6, (int(off.argmax()), float(off.max()))
    assert float(theirs[-11:-1].mean()) < 0.9 * float(theirs[:10].mean()), "it trains"


def test_another_weight_is_seen():
    """What the comparison is worth: gamma 4 instead of 5, or an offset of 0.11, is seen at 1e-3 and more."""
    network = Network()
    theirs = train(network, text_to_image_lines())
    for options in ({"gamma": 4.0}, {"offset": 0.11}):
        ours = train(network, text_to_image_fused(**options))
        assert float(((ours - theirs) / theirs).abs().max()) > 1e-3, options


@pytest.mark.parametrize("name", ["text_to_image", "unconditional epsilon", "unconditional sample"])
def test_in_bfloat16_no_farther_than_the_program_is_from_float32(name):
    """Under autocast, latents in bfloat16. A tenth is left for chance: what is rounded otherwise goes apart."""
    make, lines, fused = PROGRAMS[name]
    network = make()
    single, theirs, ours = (
        train(network, loss, dtype) for loss, dtype in
        ((lines(), torch.float32), (lines(), torch.bfloat16), (fused(), torch.bfloat16))
    )  # fmt: skip
    assert theirs[-1] == ours[-1], "the same draws"
    far, far_theirs = (float(((losses - single) / single).square().mean().sqrt()) for losses in (ours, theirs))
    assert 0 < far <= 1.1 * far_theirs, (far, far_theirs)
