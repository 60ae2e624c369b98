"""Whole sampling loops: fastdiff.sample, diffusers' scheduler, and (DDPM, DDIM) plain lines of PyTorch; for 1000 steps
of DDPM denoising-diffusion-pytorch too, where it is installed.

    python -m pytest benchmarks/test_sampling_loops.py --benchmark-json=out.json

With a network that does nothing the time is what sampling costs outside the network: setting up and stepping. One
network is real: a small conditional 1-D U-Net for a robot's actions. On the GPU where there is one, and there with
``cuda_graph=True`` too, capturing included.
"""

import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch
from torch import nn

import fastdiff

VP = fastdiff.VariancePreserving()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOOPS = {  # name: (scheduler, shape, steps)
    "ddpm latents": ("ddpm", (1, 4, 64, 64), 1000),
    "ddim latents": ("ddim", (1, 4, 64, 64), 50),
    "dpmpp_2m latents": ("dpmpp_2m", (1, 4, 64, 64), 20),
    "dpmpp_2m latents, 50": ("dpmpp_2m", (1, 4, 64, 64), 50),
    "unipc latents": ("unipc", (1, 4, 64, 64), 20),
    "unipc latents, 50": ("unipc", (1, 4, 64, 64), 50),
    "euler latents": ("euler", (1, 4, 64, 64), 50),
    "ddpm pixels": ("ddpm", (16, 3, 256, 256), 20),
    "ddim pixels": ("ddim", (16, 3, 256, 256), 20),
    "dpmpp_2m pixels": ("dpmpp_2m", (16, 3, 256, 256), 20),
    "unipc pixels": ("unipc", (16, 3, 256, 256), 10),
    "ddpm actions": ("ddpm", (1, 16, 7), 100),
}
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


class Block(nn.Module):
    """Two convolutions over time, with the condition added in between."""

    def __init__(self, inward, outward, width):
        super().__init__()
        self.first, self.second = nn.Conv1d(inward, outward, 5, padding=2), nn.Conv1d(outward, outward, 5, padding=2)
        self.condition = nn.Linear(width, outward)
        self.skip = nn.Conv1d(inward, outward, 1)

    def forward(self, x, c):
        y = nn.functional.mish(self.first(x)) + self.condition(c)[..., None]
        return nn.functional.mish(self.second(y)) + self.skip(x)


class ActionUNet(nn.Module):
    """[batch, 16, 7] actions, a time and an observation of 32 numbers: the shape of a diffusion policy, small."""

    def __init__(self, width=64):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.Mish(), nn.Linear(width, width))
        self.observation = nn.Linear(32, width)
        self.down, self.middle = Block(7, width, width), Block(width, 2 * width, width)
        self.up, self.out = Block(3 * width, width, width), nn.Conv1d(width, 7, 1)

    def forward(self, x, t, observation):
        c = self.time(t.float()[:, None] / 1000) + self.observation(observation)
        a = self.down(x.mT, c)
        b = self.middle(nn.functional.avg_pool1d(a, 2), c)
        b = nn.functional.interpolate(b, scale_factor=2)
        return self.out(self.up(torch.cat([a, b], 1), c)).mT


def upstream(kind, shape, steps, model):
    x0, diffusers = torch.randn(shape, device=DEVICE), pytest.importorskip("diffusers")

    def loop():
        scheduler = getattr(diffusers, SCHEDULERS[kind])()
        scheduler.set_timesteps(steps, device=DEVICE)
        x = x0
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
        return x

    return loop


def eager(kind, shape, steps, model):
    """The lines of a tutorial: coefficients on the CPU as tensors, one operation after another."""
    x0, abar = torch.randn(shape, device=DEVICE), VP.alpha_bar.float().to(DEVICE)

    def loop():
        x = x0
        times = torch.linspace(999, 0, steps, device=DEVICE).long()
        for k, t in enumerate(times):
            m = model(x, t.expand(len(x)))
            a, b = abar[t], abar[times[k + 1]] if k + 1 < steps else torch.ones((), device=DEVICE)
            estimate = ((x - (1 - a).sqrt() * m) / a.sqrt()).clamp(-1, 1)
            if kind == "ddim":
                x = b.sqrt() * estimate + (1 - b).sqrt() * m
                continue
            beta = 1 - a / b
            x = b.sqrt() * beta / (1 - a) * estimate + (a / b).sqrt() * (1 - b) / (1 - a) * x
            if k + 1 < steps:
                x = x + ((1 - b) / (1 - a) * beta).sqrt() * torch.randn_like(x)
        return x

    return loop


def ours(kind, shape, steps, model, **how):
    x = torch.randn(shape, device=DEVICE)
    return lambda: fastdiff.sample(model, shape, VP, kind, steps, "epsilon", seed=1, x=x, progress=False, **how)


def graphed(kind, shape, steps, model):
    if DEVICE.type != "cuda":
        pytest.skip("a CUDA graph needs a CUDA device")
    return ours(kind, shape, steps, model, cuda_graph=True)


def denoising_diffusion(kind, shape, steps, model):
    """denoising-diffusion-pytorch's loop, without its progress bar. Its loading of images is not needed: torchvision is
    replaced by a stub where it is not there."""
    names = ("torchvision", "torchvision.transforms", "torchvision.utils")
    stubs = {} if importlib.util.find_spec("torchvision") else {name: types.ModuleType(name) for name in names}
    if stubs:
        stubs["torchvision"].transforms, stubs["torchvision"].utils = (stubs[name] for name in names[1:])
    with mock.patch.dict(sys.modules, stubs):
        package = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch", exc_type=ImportError)
    package.tqdm = lambda iterable, **_: iterable

    class Network(nn.Module):
        channels = out_dim = shape[1]
        self_condition = random_or_learned_sinusoidal_cond = False

        def forward(self, x, t, x_self_cond=None):
            return model(x, t)

    diffusion = package.GaussianDiffusion(
        Network(), image_size=shape[-1], timesteps=steps, beta_schedule="linear", objective="pred_noise"
    ).to(DEVICE)
    return lambda: diffusion.p_sample_loop(shape)


MAKERS = {
    "fastdiff": ours,
    "fastdiff, graph": graphed,
    "diffusers": upstream,
    "denoising-diffusion-pytorch": denoising_diffusion,
    "eager": eager,
}


@torch.no_grad()
def measure(benchmark, name, loop, implementation, steps):
    benchmark.group, benchmark.extra_info["implementation"] = name, implementation
    benchmark.extra_info |= {"steps": steps, "device": DEVICE.type}

    def whole():
        loop()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=21 if steps < 1000 else 9, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("implementation", list(MAKERS))
@pytest.mark.parametrize("name", list(LOOPS))
def test_loop_outside_the_network(benchmark, name, implementation):
    kind, shape, steps = LOOPS[name]
    if implementation == "eager" and kind not in ("ddpm", "ddim"):
        pytest.skip("plain lines for DDPM and DDIM alone")
    if implementation == "denoising-diffusion-pytorch" and (kind != "ddpm" or steps < 1000):
        pytest.skip("its DDPM has every step")
    out = torch.randn(shape, device=DEVICE)
    loop = MAKERS[implementation](kind, shape, steps, lambda x, t: out)
    measure(benchmark, f"{name} {'x'.join(map(str, shape))}", loop, implementation, steps)


@pytest.mark.parametrize("implementation", ["fastdiff", "fastdiff, graph", "diffusers", "eager"])
def test_robot_policy(benchmark, implementation):
    torch.manual_seed(0)
    network, observation = ActionUNet().eval().to(DEVICE), torch.randn(1, 32, device=DEVICE)
    loop = MAKERS[implementation]("ddpm", (1, 16, 7), 100, lambda x, t: network(x, t, observation))
    measure(benchmark, "robot policy, U-Net and all 1x16x7", loop, implementation, 100)


@pytest.mark.parametrize("batch", [16, 24, 32])
def test_copy(benchmark, batch):
    """The ceiling: bytes a second of a copy, both ways counted. A copy of 16 goes through as much memory as a step of
    16 without a history and noise (x, which is written over, and the network's output), of 24 and 32 as with a history
    of one and of two."""
    source = torch.randn(batch, 3, 256, 256, device=DEVICE)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group, benchmark.extra_info["implementation"] = f"copy of {batch}", "copy"
    benchmark.extra_info["bytes"] = 2 * source.numel() * source.element_size()
    benchmark.pedantic(copy, rounds=51, iterations=1, warmup_rounds=2)
