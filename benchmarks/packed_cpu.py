"""A training step without its network on packed sequences, beside a batch of one length, padding to the longest, and
eager PyTorch on the packed layout: a million tokens' numbers on a CPU, all in turns. Prints Markdown.

    python benchmarks/packed_cpu.py > benchmarks/results/packed_cpu.md
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from functools import partial

import torch
from memory import keep_freed_memory
from torch import Tensor

import fastdiff
from fastdiff.backends import choose
from fastdiff.bench import eager
from fastdiff.bench.measuring import Timer, summary

LENGTHS = [2048, 2500, 3100, 3700, 4300, 4900, 5452, 6000]
TOKEN, TURNS, ROTATED = 64, 60, 3
OBJECTIVE = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps="logit_normal")
TIMER = Timer(torch.device("cpu"))


def batches(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Data and predictions that are used in turns, so that a step does not find its own in the cache."""
    made = [torch.randn(2, *shape).to(dtype).unbind() for _ in range(ROTATED)]
    return [(x0, prediction.clone().requires_grad_()) for x0, prediction in made]


def step(x0: Tensor, prediction: Tensor, of_loss: dict, **of_noise: object) -> Tensor:
    noised = OBJECTIVE.noise(x0, **of_noise)
    return torch.autograd.grad(OBJECTIVE.loss(prediction, noised, **of_loss), prediction)[0]


def eager_step(x0: Tensor, prediction: Tensor) -> Tensor:
    lengths = torch.tensor(LENGTHS)
    t = torch.sigmoid(torch.randn(len(LENGTHS))).repeat_interleave(lengths)
    noise = torch.randn_like(x0)
    x_t = eager.noising_flow(x0, noise, t)
    loss = torch.nn.functional.mse_loss(prediction.float(), (noise - x0).float())
    del x_t
    return torch.autograd.grad(loss, prediction)[0]


def ways(dtype: torch.dtype) -> dict[str, Callable[[int], Tensor]]:
    """By name, what is done with the k-th operands; the first is what the others are compared with."""
    tokens, longest = sum(LENGTHS), max(LENGTHS)
    mask = torch.arange(longest) < torch.tensor(LENGTHS).unsqueeze(1)
    of_padding = {"mask": mask, "mask_normalization": "global"}
    packed = batches((tokens, TOKEN), dtype)
    equal = batches((len(LENGTHS), tokens // len(LENGTHS), TOKEN), dtype)
    padded = batches((len(LENGTHS), longest, TOKEN), dtype)
    return {
        "packed": lambda k: step(*packed[k], {}, lengths=LENGTHS),
        "packed, mean over sequences": lambda k: step(*packed[k], {"mask_normalization": "row"}, lengths=LENGTHS),
        "a batch of one length": lambda k: step(*equal[k], {}),
        "padded to the longest": lambda k: step(*padded[k], of_padding),
        "eager, packed": lambda k: eager_step(*packed[k]),
    }


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    how = f"{platform.machine()}, 1 thread, PyTorch {torch.__version__}, {choose('cpu')} backend"
    print("# Packed sequences on a CPU\n")
    print(f"`benchmarks/packed_cpu.py`, {datetime.date.today()}: {how}.")
    print(
        f"{len(LENGTHS)} sequences of {min(LENGTHS)} to {max(LENGTHS)} tokens of {TOKEN} numbers: t, noise, x_t, flow"
    )
    print(
        f"loss, gradient. Medians of {TURNS} turns, in milliseconds; in brackets, the median of the ratios to packed.\n"
    )
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        calls = ways(dtype)
        for call in calls.values():
            call(0)
        turns = []
        for turn in range(TURNS):
            calls["packed"](turn % ROTATED)  # finds memory and caches as the next do
            turns.append([TIMER.seconds([partial(call, turn % ROTATED)]) for call in calls.values()])
        found[dtype] = [
            (summary(column).median, summary([own / turn[0] for own, turn in zip(column, turns)]).median)
            for column in zip(*turns)
        ]
    print("| | float32 | bfloat16 |\n|---|---|---|")
    for name, *cells in zip(calls, *found.values()):
        print(f"| {name} | {' | '.join(f'{1e3 * seconds:.2f} ({ratio:.2f})' for seconds, ratio in cells)} |")


if __name__ == "__main__":
    main()
