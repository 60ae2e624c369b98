"""An autoencoder's operations on a CPU beside eager PyTorch and torch.compile, at a million latents: all in turns.
Prints Markdown.

    python benchmarks/autoencoder_cpu.py > benchmarks/results/autoencoder_cpu.md
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.backends import choose
from fastdiff.bench import eager

SHAPE = (64, 4, 64, 64)
TURNS = 40
ALPHA_BAR = fastdiff.VariancePreserving().alpha_bar.float()
OBJECTIVE = fastdiff.Objective(fastdiff.VariancePreserving())
PLACED = {"shift": eager.LATENT_SHIFT, "scale": eager.LATENT_SCALE}
T = torch.randint(0, 1000, SHAPE[:1])


def ours_noised(moments: Tensor) -> tuple[Tensor, Tensor]:
    noised = fastdiff.autoencoder.noise_latents(OBJECTIVE, moments, T, **PLACED)
    return noised.x0, noised.x_t


def theirs_noised(latents: Callable) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    like = torch.empty(SHAPE)
    return lambda moments: latents(
        moments, torch.randn_like(like, dtype=moments.dtype), torch.randn_like(like, dtype=moments.dtype), T, ALPHA_BAR
    )


def with_gradient(call: Callable[[Tensor], tuple[Tensor, Tensor] | Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient by the moments, for upstream gradients that are at hand."""
    upstream: dict[torch.dtype, Tensor] = {}

    def run(moments: Tensor) -> Tensor:
        results = call(moments)
        if isinstance(results, Tensor):
            return torch.autograd.grad(results, moments)[0]
        if moments.dtype not in upstream:
            upstream[moments.dtype] = torch.randn(SHAPE).to(moments.dtype)
        d = upstream[moments.dtype]
        return torch.autograd.grad(results, moments, (d, d))[0]

    return run


def vae_loss(divergence: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The squared error and the divergence, as trainers write them: sums over a sample, averaged over the batch."""
    elements = SHAPE[1] * SHAPE[2] * SHAPE[3]

    def loss(decoded: Tensor, images: Tensor, moments: Tensor) -> Tensor:
        error = torch.nn.functional.mse_loss(decoded.float(), images.float(), reduction="sum") / len(decoded)
        return error + elements * divergence(moments)

    return loss


def of_loss(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], object]:
    """The loss of as many pixels as latents, and its gradient by what was decoded and by the moments."""
    pixels: dict[torch.dtype, list[Tensor]] = {}

    def run(moments: Tensor) -> object:
        if moments.dtype not in pixels:
            pixels[moments.dtype] = [torch.randn(SHAPE).to(moments.dtype) for _ in range(2)]
            pixels[moments.dtype][0].requires_grad_()
        decoded, images = pixels[moments.dtype]
        return torch.autograd.grad(loss(decoded, images, moments), (decoded, moments))

    return run


def without(call: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    def run(moments: Tensor) -> object:
        with torch.no_grad():
            return call(moments)

    return run


def calls() -> dict[str, tuple[Callable, Callable, Callable]]:
    """By name: ours, eager, compiled."""
    latents, divergence = (torch.compile(f, dynamic=False, fullgraph=True) for f in (eager.latents, eager.divergence))
    whole = vae_loss(eager.divergence)
    losses = fastdiff.AutoencoderLoss(), whole, torch.compile(whole, dynamic=False, fullgraph=True)
    noised = ours_noised, theirs_noised(eager.latents), theirs_noised(latents)
    return {
        "loss of an autoencoder with its gradient": tuple(map(of_loss, losses)),
        "latents and x_t, noise made": tuple(map(without, noised)),
        "the same with the gradient": tuple(map(with_gradient, noised)),
        "KL divergence": tuple(map(without, (ops.kl_normal, eager.divergence, divergence))),
        "the same with the gradient ": tuple(map(with_gradient, (ops.kl_normal, eager.divergence, divergence))),
    }


def seconds(call: Callable[[Tensor], object], moments: Tensor) -> float:
    start = time.perf_counter()
    call(moments)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(2)
    how = f"{platform.machine()}, 2 threads, PyTorch {torch.__version__}, {choose('cpu')} backend"
    print("# An autoencoder's operations on a CPU\n")
    print(f"`benchmarks/autoencoder_cpu.py`, {datetime.date.today()}: {how}; latents {SHAPE}.")
    print(f"Medians of {TURNS} turns, in milliseconds; in brackets, how many times as long as fastdiff's.\n")
    print("| operation | dtype | fastdiff | eager | torch.compile |\n|---|---|---|---|---|")
    for name, three in calls().items():
        for dtype in (torch.float32, torch.bfloat16):
            moments = torch.randn(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]).to(dtype).requires_grad_()
            for call in three:
                call(moments)
            rounds = [[seconds(call, moments) for call in three] for _ in range(TURNS)]
            ours, *others = (statistics.median(column) for column in zip(*rounds))
            cells = (f"{1e3 * other:.2f} ({other / ours:.1f})" for other in others)
            print(f"| {name.strip()} | {str(dtype).removeprefix('torch.')} | {1e3 * ours:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
