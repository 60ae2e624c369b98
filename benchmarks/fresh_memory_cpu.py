"""What new memory costs a training step on a CPU: time and page faults of a step in the steady state, of fastdiff,
eager PyTorch and torch.compile, under each way of the C library to keep what is freed. Prints Markdown.

Each is a process of its own, since what one keeps changes what the C library does for another, and a C library reads
its settings when it starts. They step in turns. ``--preload`` adds allocators that take the C library's place.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.backends import choose
from fastdiff.bench import eager

COMMAND = "python benchmarks/fresh_memory_cpu.py > benchmarks/results/fresh_memory_cpu.md"
SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS, LEAST_TURNS, MOST_TURNS, PAUSE = 1.5, 5, 30, 0.005  # of a size and dtype; before each step
STEPS, OF_STEPS = 10_000, 1 << 18  # after which memory is looked at
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
OBJECTIVE = fastdiff.Objective(fastdiff.VariancePreserving("scaled_linear"), "v_prediction", fastdiff.MinSNR(5.0))
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

Step = Callable[[Tensor, Tensor], None]


# ---- one process


def fused(x0: Tensor, prediction: Tensor) -> None:
    noised = OBJECTIVE.noise(x0)
    OBJECTIVE.loss(prediction, noised).backward()
    prediction.grad = None


def plain(noising: Callable[..., Tensor], loss_v: Callable[..., Tensor]) -> Step:
    def step(x0: Tensor, prediction: Tensor) -> None:
        t, noise = torch.randint(1000, (len(x0),)), torch.randn_like(x0)
        x_t = noising(x0, noise, t, ALPHA_BAR)  # held while the network would run
        loss_v(prediction, x0, noise, t, ALPHA_BAR).backward()
        del x_t
        prediction.grad = None

    return step


def step_of(who: str) -> Step:
    if who == "fastdiff":
        return fused
    functions = eager.noising_ddpm, eager.loss_v
    return plain(*(functions if who == "eager" else (torch.compile(f, dynamic=True) for f in functions)))


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Bytes that the process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def serve(who: str, threads: int) -> None:
    """Do what is read, and print an answer a line: "make" operands of a dtype and size, and step a few times; "step",
    which answers with seconds and page faults; "grow", with by how many bytes the process grew in many steps."""
    torch.set_num_threads(threads)
    step = step_of(who)
    operands: tuple[Tensor, ...] = ()
    for line in sys.stdin:
        what, *given = line.split()
        answer: Any = None
        if what == "make":
            x0 = torch.randn(int(given[1]) >> 14, 4, 64, 64).to(DTYPES[given[0]])
            operands = x0, torch.randn_like(x0).requires_grad_()
            for _ in range(3):
                step(*operands)
        elif what == "step":
            before, start = faults(), time.perf_counter()
            step(*operands)
            answer = time.perf_counter() - start, faults() - before
        else:
            before = resident()
            for _ in range(STEPS):
                step(*operands)
            answer = resident() - before
        print(json.dumps(answer), flush=True)


# ---- all of them


class Child:
    """A process that serves."""

    def __init__(self, who: str, threads: int, settings: dict[str, str]):
        command = [sys.executable, __file__, "--serve", who, str(threads)]
        environment = {**os.environ, **settings}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *line: object) -> Any:
        print(*line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def measured(names: list[str], threads: int, settings: dict[str, str]) -> list[list[str]]:
    """A row of the table for each dtype and size."""
    children = [Child(who, threads, settings) for who in names]
    rows = []
    for dtype in DTYPES:
        for elements in SIZES:
            for child in children:
                child.ask("make", dtype, elements)
            turns: list[list[tuple[float, int]]] = []
            end = time.perf_counter() + SECONDS
            while len(turns) < LEAST_TURNS or (time.perf_counter() < end and len(turns) < MOST_TURNS):
                turns.append([])
                for child in children:
                    time.sleep(PAUSE)  # until the threads of the one before sleep
                    turns[-1].append(child.ask("step"))
            row = [f"{threads}, {dtype}, 2^{elements.bit_length() - 1}"]
            for k in range(len(names)):
                seconds, pages = (statistics.median(turn[k][which] for turn in turns) for which in (0, 1))
                ratio = statistics.median(turn[k][0] / turn[0][0] for turn in turns)
                row.append(f"{1e3 * seconds:.2f} ms{f' ({ratio:.1f})' if k else ''}, {pages:.0f}")
            rows.append(row)
    for child in children:
        child.end()
    return rows


def growth() -> int:
    child = Child("fastdiff", 1, {})
    child.ask("make", "float32", OF_STEPS)
    bytes_grown = child.ask("grow")
    child.end()
    return bytes_grown


def load() -> str:
    return ", ".join(f"{average:.1f}" for average in os.getloadavg())


def report(all_threads: list[int], preload: list[str], compiled: bool) -> None:
    before, start = load(), time.perf_counter()
    ways = {"The C library as it is": {}, "The C library keeps what is freed": KEPT_HEAP}
    ways.update({f"{Path(library).name} in its place": {"LD_PRELOAD": library} for library in preload})
    tables = {}
    for way, settings in ways.items():
        names = ["fastdiff", "eager"] + ["torch.compile"] * (compiled and not settings)
        tables[way] = names, [row for threads in all_threads for row in measured(names, threads, settings)]
    grown = growth()
    print("# New memory in a training step on a CPU\n")
    print(f"`{COMMAND}`, {datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores,")
    print(f"PyTorch {torch.__version__}, {' '.join(platform.libc_ver())}, {choose('cpu')} backend.")
    print(f"Load average before and after: {before}; {load()}. Took {time.perf_counter() - start:.0f} s.\n")
    print(
        "t, noise, x_t, v-prediction loss with min-SNR weights, gradient. Medians of the time of a step in the steady"
    )
    print("state, each in a process of its own, in turns; in brackets, the median of the ratios to fastdiff's time in")
    print("the same turn; then the page faults of a step. torch.compile with shapes that may change, the noise drawn")
    print("outside of its graphs.\n")
    print(f"In {STEPS} steps of {OF_STEPS} elements in float32 a process grew by {grown / 2**20:.1f} MiB.")
    for way, (names, rows) in tables.items():
        print(f"\n## {way}\n")
        for row in (["threads, dtype, elements", *names], ["---"] * (1 + len(names)), *rows):
            print(f"| {' | '.join(row)} |")
    settings = " ".join(f"{name}={value}" for name, value in KEPT_HEAP.items())
    print(f"\nThe C library, glibc, keeps what is freed with `{settings}`.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=COMMAND, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="how many a step has (1 2)")
    parser.add_argument("--preload", nargs="*", default=[], metavar="LIBRARY", help="paths, as of libtcmalloc.so")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--serve", nargs=2, metavar=("WHO", "THREADS"), help="be one of the processes")
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve[0], int(given.serve[1]))
    else:
        report(given.threads, given.preload, not given.no_compile)


if __name__ == "__main__":
    main()
