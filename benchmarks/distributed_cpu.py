"""A training step without the network in 1 and in 2 processes, a core each: the same share of the data in each (weak
scaling). Prints Markdown, after half a minute.

    python benchmarks/distributed_cpu.py > benchmarks/results/distributed_cpu.md
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import fastdiff
from fastdiff.distributed import Part

SHARE = (32, 4, 64, 64)  # of each process
TURNS = 60


def ways(rank: int, ranks: int) -> dict[str, tuple[Part | None, dict]]:
    """How the whole is split, and the options of the loss."""
    batch, channels, height, width = SHARE
    samples = Part((batch * ranks, *SHARE[1:]), (batch * rank, 0, 0, 0), split=(0,))
    rows = Part((batch, channels, height * ranks, width), (0, 0, height * rank, 0), split=(2,))
    mask = {"mask": torch.ones(batch, 1, height, width), "mask_normalization": "row"}
    return {
        "each rank by itself": (None, {}),
        "samples": (samples, {}),
        "samples, means of masks": (samples, mask),
        "rows of pixels": (rows, {}),
        "rows of pixels, means of masks": (rows, mask),
    }


def step(part: Part | None, how: dict) -> Callable[[], None]:
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
    x0, prediction = torch.randn(SHARE), torch.randn(SHARE).requires_grad_()

    def run() -> None:
        noised = objective.noise(x0, seed=7, part=part)
        objective.loss(prediction, noised, **how).backward()

    return run


def measure(rank: int, ranks: int, folder: str) -> None:
    """The medians of one process, as JSON on its standard output."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{ranks}", ranks), rank=rank, world_size=ranks)
    steps = {name: step(*way) for name, way in ways(rank, ranks).items()}
    number = torch.zeros(1, dtype=torch.float64)
    steps["one all-reduce of a number"] = lambda: dist.all_reduce(number)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 5):
        for name, run in steps.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            if turn >= 5:
                times[name].append(time.perf_counter() - began)
    print(json.dumps({name: 1000 * statistics.median(found) for name, found in times.items()}))


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            started = [
                subprocess.Popen(
                    [sys.executable, __file__, str(rank), str(ranks), folder], stdout=subprocess.PIPE, text=True
                )
                for rank in range(ranks)
            ]
            found[ranks] = [json.loads(process.communicate()[0]) for process in started]
    where = f"{platform.machine()}, PyTorch {torch.__version__}, gloo, a core for each process"
    print("# A training step in one and in two processes\n")
    print(f"`benchmarks/{Path(__file__).name}`, {datetime.date.today()}: {where};")
    print(f"{SHARE} float32 in each,")
    print(
        f"v-prediction with min-SNR weights, seed to gradient. Medians of {TURNS} turns in milliseconds, of the "
        "slower rank.\n"
    )
    print("| split into | 1 process | 2 processes | efficiency |\n|---|---|---|---|")
    for name in found[1][0]:
        one, two = (max(of[name] for of in found[ranks]) for ranks in (1, 2))
        share = "" if "all-reduce" in name else f"{one / two:.2f}"
        print(f"| {name} | {one:.2f} | {two:.2f} | {share} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main()
