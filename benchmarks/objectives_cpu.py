"""What noising, the loss and its backward cost the host for objectives whose coefficients are formulas of t, beside
DDPM's, whose coefficients are a table: one latent, all objectives in turns. Prints Markdown.

    python benchmarks/objectives_cpu.py > benchmarks/results/objectives_cpu.md
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable

import torch

import fastdiff
from fastdiff.backends import choose

SHAPE = (1, 4, 32, 32)
TURNS, CALLS = 400, 20


def of_time(levels: fastdiff.process.Levels) -> torch.Tensor:
    return 1 / (1 + levels.t)


def objectives() -> dict[str, fastdiff.Objective]:
    """By name; the first is the one that the others are compared with."""
    flow = fastdiff.RectifiedFlow(3.0)
    sd3 = {"timesteps": "logit_normal", "error_space": "sample"}
    return {
        "DDPM, epsilon": fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon"),
        "flow": fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"),
        "SD3, cosmap": fastdiff.Objective(flow, "flow", "cosmap", **sd3),
        "SD3, sigma_sqrt": fastdiff.Objective(flow, "flow", "sigma_sqrt", **sd3),
        "EDM": fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
        "VPSDE, v, likelihood": fastdiff.Objective(fastdiff.VPSDE(), "v_prediction", "likelihood"),
        "VPSDE, epsilon, a function": fastdiff.Objective(
            fastdiff.VPSDE(), "epsilon", lambda levels: 1 / (1 + levels.t)
        ),
    }


def seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(*arguments)
    return (time.perf_counter() - start) / CALLS


def backward(objective: fastdiff.Objective, prediction: torch.Tensor, noised: fastdiff.Noised) -> None:
    objective.loss(prediction, noised).backward()


def measured() -> dict[str, tuple[float, float, float]]:
    """Medians of seconds: noising with t drawn, the loss alone, the loss and its backward."""
    x0, prediction = torch.randn(SHAPE), torch.randn(SHAPE)
    leaf = prediction.clone().requires_grad_()
    chosen = objectives()
    noised = {name: objective.noise(x0) for name, objective in chosen.items()}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for _ in range(TURNS):
        for name, objective in chosen.items():
            batch = noised[name]
            found[name].append(
                (
                    seconds(objective.noise, x0),
                    seconds(objective.loss, prediction, batch),
                    seconds(backward, objective, leaf, batch),
                )
            )
    return {name: tuple(statistics.median(column) for column in zip(*rows)) for name, rows in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    found = measured()
    first = next(iter(found.values()))
    how = f"{platform.machine()}, 1 thread, PyTorch {torch.__version__}, {choose('cpu')} backend"
    print("# Objectives of continuous time on a CPU\n")
    print(f"`benchmarks/objectives_cpu.py`, {datetime.date.today()}: {how}; {SHAPE}, float32.")
    print(f"Medians of {TURNS} turns of {CALLS} calls, in microseconds; in brackets, over DDPM's.\n")
    print("| objective | noise, t drawn | loss | loss and backward |\n|---|---|---|---|")
    for name, times in found.items():
        cells = (f"{1e6 * seconds:.1f} ({seconds / base:.2f})" for seconds, base in zip(times, first))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
