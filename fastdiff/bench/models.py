"""A real network between noising and loss: the share of a training step that the two take, before and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import BenchError, eager, peers
from .cases import DTYPES, Case, Operands, operands
from .measuring import MIN_ROUNDS, Spread, Timer, summary
from .progress import Progress

MODELS = ("unet-small", "dit-b")
KIND = "v_prediction"
MAX_ROUNDS = 40
# What is left of a step is a few hundredths of it at most: a ratio that varies by more says nothing.
WIDEST_OF_STEPS = 0.05


def share(
    name: str, device: torch.device, dtype: str, seconds: float, progress: Progress, batch: int | None = None
) -> dict[str, Any]:
    """Train ``name`` for some steps with the eager lines and with fastdiff, taking turns, and time the noising and loss
    of each alone. Raises BenchError for an unknown model or one whose package is missing.

    Returns plain values: for "before" (eager) and "after" (fastdiff) the time of a step (noise, network, loss,
    backward, AdamW), that of noising, loss and its gradient alone, and their quotient.
    """
    progress.say(f"{name} between noising and loss")
    network, shape = _build(name, device, DTYPES[dtype])
    if batch is not None:
        shape = (batch, *shape[1:])
    case = Case("training step", KIND, dtype, shape)
    timer, o = Timer(device), operands(shape, dtype, device)
    parts: dict[str, Callable[[], Any]] = {
        "before": _training_step(network, o, _eager(device)),
        "after": _training_step(network, o, _fastdiff()),
    }
    for label, peer in (("before", "eager"), ("after", "fastdiff")):
        call = peers.build(peer, case, device)
        parts[f"{label} objective"] = lambda call=call: call(o)
    for call in parts.values():
        call()
    samples: dict[str, list[float]] = {label: [] for label in parts}
    started = time.perf_counter()
    while len(samples["before"]) < MIN_ROUNDS or (
        time.perf_counter() - started < seconds and len(samples["before"]) < MAX_ROUNDS
    ):
        labels = list(parts) if len(samples["before"]) % 2 else list(parts)[::-1]
        for label in labels:
            repeats = 5 if "objective" in label else 1
            samples[label].append(timer.seconds([parts[label]] * repeats))
    ratio = summary([b / a for b, a in zip(samples["before"], samples["after"])])
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "shape": list(shape),
        "dtype": dtype,
        "optimizer": "AdamW",
        **{
            label: _part(summary(samples[label]), summary(samples[f"{label} objective"]), shape[0])
            for label in ("before", "after")
        },
        "ratio": {**_values(ratio), "steady": ratio.steady and ratio.width <= WIDEST_OF_STEPS},
    }


def _part(step: Spread, objective: Spread, batch: int) -> dict[str, Any]:
    return {
        "seconds": _values(step),
        "objective_seconds": _values(objective),
        "share": objective.median / step.median,
        "images_per_second": batch / step.median,
    }


def _values(found: Spread) -> dict[str, Any]:
    return {"median": found.median, "p20": found.p20, "p80": found.p80, "rounds": found.rounds}


def _training_step(network: Callable[[Tensor, Tensor], Tensor], o: Operands, objective: Callable) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(network, o.x0).backward()
        optimizer.step()

    return step


def _eager(device: torch.device) -> Callable:
    import fastdiff

    alpha_bar = fastdiff.VariancePreserving().alpha_bar.to(device, torch.float32)

    def objective(network: Callable, x0: Tensor) -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, x0.shape[:1], device=x0.device)
        return eager.loss_v(network(eager.noising_ddpm(x0, noise, t, alpha_bar), t), x0, noise, t, alpha_bar)

    return objective


def _fastdiff() -> Callable:
    import fastdiff

    made = fastdiff.Objective(fastdiff.VariancePreserving(), KIND, fastdiff.MinSNR(eager.SNR_GAMMA))

    def objective(network: Callable, x0: Tensor) -> Tensor:
        noised = made.noise(x0)
        return made.loss(network(noised.x_t, noised.t), noised)

    return objective


def _build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    large = device.type != "cpu"
    if name == "unet-small":
        from fastdiff.demo.unet import UNet

        unet = UNet(channels=3, size=32, classes=10, time_scale=1.0, width=64 if large else 32)
        return _WithLabels(unet, 10).to(device, dtype), (256 if large else 32, 3, 32, 32)
    if name == "dit-b":
        try:
            from diffusers import DiTTransformer2DModel
        except (ImportError, RuntimeError) as error:
            raise BenchError(f"--model dit-b needs diffusers ({error}): pip install diffusers") from error
        dit = DiTTransformer2DModel(
            num_attention_heads=12, attention_head_dim=64, num_layers=12, sample_size=32, patch_size=2, in_channels=4
        )
        return _Diffusers(dit).to(device, dtype), (64 if large else 4, 4, 32, 32)
    raise BenchError(f"unknown model {name!r}: use one of {', '.join(MODELS)}, none.")


class _WithLabels(nn.Module):
    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, t % self.classes)


class _Diffusers(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, timestep=t, class_labels=t, return_dict=False)[0]
