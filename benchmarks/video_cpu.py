"""Videos on a CPU, one thread: noise, loss and gradient with a time for each sample, frame or token, beside eager
PyTorch, all in turns. Prints Markdown.

    python benchmarks/video_cpu.py > benchmarks/results/video_cpu.md
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable

import torch
from memory import keep_freed_memory
from torch import Tensor

from fastdiff import video
from fastdiff.backends import choose
from fastdiff.bench.measuring import Timer, summary

TURNS = 21
SHAPES = ((1, 16, 33, 60, 90), (1, 16, 21, 90, 160))  # latents of 129 frames of 480 x 720, and of 81 of 720 x 1280
TIMER = Timer(torch.device("cpu"))


def tokens_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[B, L, D] of the same elements, in patches of (1, 2, 2)."""
    batch, channels, frames, height, width = shape
    return batch, frames * height * width // 4, 4 * channels


def ours(per: str, x0: Tensor, prediction: Tensor) -> Callable[[], object]:
    objective = video.RFLoss(per=per, timesteps="logit_normal", shift="wan" if x0.ndim == 5 else 3.0)

    def step() -> object:
        noised = objective.noise(x0)
        return noised.x_t, torch.autograd.grad(objective.loss(prediction, noised), prediction)

    return step


def eager(per: str, x0: Tensor, prediction: Tensor) -> Callable[[], object]:
    """As trainers write it: sigma in the dtype of the data, the loss in float32."""
    count = {"sample": (), "frame": (1, *x0.shape[2:3]), "token": x0.shape[1:2]}[per]
    shape = (len(x0), *count, *(1,) * (x0.ndim - 1 - len(count)))
    shift = video.RFLoss(shift="wan").shift_of(x0.shape) if x0.ndim == 5 else 3.0

    def step() -> object:
        t = torch.sigmoid(torch.randn(shape))
        sigma = (shift * t / (1 + (shift - 1) * t)).to(x0.dtype)
        noise = torch.randn_like(x0)
        x_t = (1 - sigma) * x0 + sigma * noise
        loss = torch.nn.functional.mse_loss(prediction.float(), (noise - x0).float())
        return x_t, torch.autograd.grad(loss, prediction)

    return step


def measured(cases: list[tuple[str, Tensor, Tensor]]) -> list[list[float]]:
    """Seconds in each turn: of ours for every case, then of eager PyTorch."""
    calls = [make(*case) for make in (ours, eager) for case in cases]
    turns = []
    for _ in range(TURNS + 1):
        calls[0]()  # finds memory and caches as the others of ours do
        turns.append([TIMER.seconds([call]) for call in calls])
    return turns[1:]


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    how = f"{platform.machine()}, 1 thread, PyTorch {torch.__version__}, {choose('cpu')} backend"
    print("# Videos on a CPU\n")
    print(f"`benchmarks/video_cpu.py`, {datetime.date.today()}: {how}. Noise (made), loss and gradient of a flow.")
    print("Freed memory is kept.")
    print(f"Medians of {TURNS} turns, in milliseconds; for eager, in brackets, how many times as long as fastdiff's.")
    print("Ratio: how many times as long as with a time for each sample, the median over the turns.\n")
    print("| data | a time for each | dtype | fastdiff | ratio | eager |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            cases = []
            for of, pers in ((shape, ("sample", "frame")), (tokens_of(shape), ("sample", "token"))):
                x0, prediction = torch.randn(of).to(dtype), torch.randn(of).to(dtype).requires_grad_()
                cases += [(per, x0, prediction) for per in pers]
            turns = measured(cases)
            medians = [summary(column).median for column in zip(*turns)]
            for k, (per, x0, _) in enumerate(cases):
                mine, theirs = medians[k], medians[k + len(cases)]
                ratio = f"{summary([turn[k] / turn[k - 1] for turn in turns]).median:.2f}" if k % 2 else ""
                cells = "x".join(map(str, x0.shape)), per, str(dtype).removeprefix("torch."), f"{1e3 * mine:.2f}", ratio
                print(f"| {' | '.join(cells)} | {1e3 * theirs:.1f} ({theirs / mine:.1f}) |")


if __name__ == "__main__":
    main()
