"""What a call costs the host on a GPU: microseconds of noise, loss, backward and a sampler step, launched by C++ and by
Python, beside the CPU's own calls. Prints Markdown.

No GPU is needed or used: tensors of 256 numbers lie on the CPU, and a stand-in for the driver (tests/bench/stand_in)
takes the launches, of kernels compiled for sm_90, and does nothing. A real driver takes longer, and tensors are made in
another time on a GPU: there use ``benchmarks/gpu_numbers.py``. The CPU's own calls compute, too.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
import torch

import fastdiff
from fastdiff.backends.triton import fast, trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "bench" / "stand_in"))
import device as stand_in  # noqa: E402

COMMAND = "python benchmarks/gpu_host.py > benchmarks/results/gpu_host_cpu.md"
SHAPE = (1, 4, 8, 8)
OBJECTIVES = {
    "VP, v, min-SNR": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0)),
    "SD3": lambda: fastdiff.Objective(
        fastdiff.RectifiedFlow(3.0), "flow", "cosmap", timesteps="logit_normal", error_space="sample"
    ),
    "EDM": lambda: fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
}
WAYS = {"C++": "triton", "Python": "triton", "CPU": "native"}  # the backend of each
SAMPLER, AT = fastdiff.samplers.DDIM(), 4  # the step that is repeated

Call = Callable[[], object]


class Calls:
    """The calls of an objective in one of the ways. Each is a function that makes it ``count`` times and returns
    (seconds of this thread on a CPU, seconds on the clock)."""

    def __init__(self, objective: fastdiff.Objective, count: int):
        self.x0, self.prediction = torch.zeros(SHAPE), torch.zeros(SHAPE).requires_grad_()
        self.objective, self.count = objective, count
        self.noised = objective.noise(self.x0)
        self.functions = {
            "noise": lambda: self._repeated(lambda: objective.noise(self.x0)),
            "loss": lambda: self._repeated(lambda: objective.loss(self.prediction, self.noised)),
            "backward": self._backward,
            "training step": lambda: self._repeated(self._step),
            "loss_and_gradient": lambda: self._repeated(self._both),
            "noise + loss_and_gradient": lambda: self._repeated(self._step_of_both),
            "prediction.backward": self._backward_of_prediction,
            "sampler step": self._sampler_step(),
        }

    def _repeated(self, call: Call) -> tuple[float, float]:
        self.prediction.grad = None
        numbers = range(self.count)
        on_cpu, start = time.thread_time(), time.perf_counter()
        for _ in numbers:
            call()
        return time.thread_time() - on_cpu, time.perf_counter() - start

    def _each(self, calls: list[Call]) -> tuple[float, float]:
        prediction = self.prediction
        on_cpu, start = time.thread_time(), time.perf_counter()
        for call in calls:
            prediction.grad = None
            call()
        return time.thread_time() - on_cpu, time.perf_counter() - start

    def _backward(self) -> tuple[float, float]:
        return self._each([self.objective.loss(self.prediction, self.noised).backward for _ in range(self.count)])

    def _backward_of_prediction(self) -> tuple[float, float]:
        gradient = torch.zeros(SHAPE)
        return self._each([lambda: self.prediction.backward(gradient)] * self.count)

    def _step(self) -> None:
        self.prediction.grad = None
        self.objective.loss(self.prediction, self.objective.noise(self.x0)).backward()

    def _both(self) -> object:
        return self.objective.loss_and_gradient(self.prediction, self.noised, 0.5)

    def _step_of_both(self) -> object:
        return self.objective.loss_and_gradient(self.prediction, self.objective.noise(self.x0), 0.5)

    def _sampler_step(self) -> Callable[[], tuple[float, float]]:
        made = []
        backend = type(fastdiff.ops.dispatch.get(self.x0.device))
        prepare = backend.trajectory
        with mock.patch.object(backend, "trajectory", lambda *how: made.append(prepare(*how)) or made[-1]):
            self.objective.sample(lambda x, t: self.x0, SHAPE, SAMPLER, 2 * AT, progress=False, seed=1)
        (run,) = made
        return lambda: self._repeated(lambda: run.step(AT, self.x0, False, None, 1))


def by_python(objective: fastdiff.Objective) -> contextlib.AbstractContextManager:
    """Has Python launch the kernels of an objective, for good, and those of a run that is begun in the block."""
    for of_noise in (False, True):
        fast._kept(objective._program(of_noise)).declined = "they are launched by Python, to compare"
    return mock.patch.object(trajectory, "native_because", lambda: "launched by Python, to compare")


def prepared(way: str, make: Callable[[], fastdiff.Objective], count: int) -> Calls:
    """The calls of an objective in a way, each made as often as it takes to be as it goes on."""
    objective = make()
    with fastdiff.use_backend(WAYS[way]), by_python(objective) if way == "Python" else contextlib.nullcontext():
        calls = Calls(objective, count)
        for _ in range(3):
            for function in calls.functions.values():
                function()
    because = fast.declined(objective._program())
    if way == "C++" and because:
        raise SystemExit(f"C++ does not launch the kernels of {objective!r}: {because}.")
    return calls


def measured(names: list[str], rounds: int, count: int) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(microseconds on the CPU, on the clock) by objective, call and way: medians of rounds, in which all take
    turns."""
    calls = {(name, way): prepared(way, OBJECTIVES[name], count) for name in names for way in WAYS}
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for call in next(iter(calls.values())).functions:
            for (name, way), of in calls.items():
                with fastdiff.use_backend(WAYS[way]):
                    found.setdefault((name, call, way), []).append(of.functions[call]())
    return {
        key: tuple(1e6 * statistics.median(seconds) / count for seconds in zip(*turns)) for key, turns in found.items()
    }


def load() -> str:
    return ", ".join(f"{average:.1f}" for average in os.getloadavg())


def report(names: list[str], rounds: int, count: int) -> None:
    before = load()
    found = measured(names, rounds, count)
    print("# What a call costs the host on a GPU\n")
    print(f"`{COMMAND}`, {datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores,")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}. Load average before and after: {before};")
    print(f"{load()}.\n")
    print(f"Microseconds that a call takes a thread on a CPU, in brackets on the clock: medians of {rounds} rounds of")
    print(
        f"{count} calls, in which all of these take turns. Launches do nothing; the CPU's own calls compute, on the 256"
    )
    print(
        "numbers that all have. A training step is noise, loss and backward. prediction.backward takes the gradient of"
    )
    print("loss_and_gradient: it is PyTorch's alone.")
    for name in names:
        print(f"\n## {name}\n\n| call | launched by C++ | launched by Python | the CPU's own |\n|---|---|---|---|")
        for call in dict.fromkeys(key[1] for key in found):
            cells = ("{:.1f} ({:.1f})".format(*found[name, call, way]) for way in WAYS)
            print(f"| {call} | {' | '.join(cells)} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=COMMAND, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="how many turns each call has (30)")
    parser.add_argument("--calls", type=int, default=200, help="how many calls a turn is (200)")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME", help="all"
    )
    given = parser.parse_args(arguments)
    if torch.cuda.is_available():
        parser.error("there is a GPU: benchmarks/gpu_numbers.py measures what its host takes.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stand_in.put_in_place(stand_in.Device(stand_in.driver(Path(folder))))
        stand_in.take_for_a_gpu()
        report(given.objectives, given.rounds, given.calls)


if __name__ == "__main__":
    main()
