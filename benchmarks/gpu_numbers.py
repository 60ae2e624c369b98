"""What ``gpu_check.sh`` measures on a CUDA GPU. Each command appends its records to the file FASTDIFF_RECORDS names.

    python benchmarks/gpu_numbers.py doctor     the machine, as ``fastdiff doctor`` shows it
    python benchmarks/gpu_numbers.py compile    compiles the kernels of the others, in parallel, into Triton's cache
    python benchmarks/gpu_numbers.py smoke      whether the kernels give the reference's numbers
    python benchmarks/gpu_numbers.py kernels    times of single kernels, and of a copy
    python benchmarks/gpu_numbers.py steps      training steps against eager PyTorch and torch.compile
    python benchmarks/gpu_numbers.py counters   hardware counters of four kernels, by ncu

Times are the GPU's: a burst of calls is queued behind a sleeping kernel that outlasts the queuing, so the host takes no
part in them. Operands and results go round in sets that are three times the L2 cache together.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_records
import torch
import triton
from asked import cuda, reference
from asked import triton as operations
from roofline import GPU, gpu_of, share_of_copy
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton_compiled import machine_code
from triton_kernels import KERNELS

import fastdiff
from fastdiff import doctor, ops, philox
from fastdiff.backends.layout import TOKENS, empty_in_order
from fastdiff.backends.triton import launch
from fastdiff.backends.triton.programs import coefficients
from fastdiff.bench import peers
from fastdiff.bench.cases import Case, operands
from fastdiff.bench.measuring import Timer, cache_bytes, summary
from fastdiff.tensors import Gathered

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EXPONENTS = (26, 24, 22, 20)
SKIPPED = 77  # the exit status of what cannot be done here
BATCH, CHANNELS = 64, 4
ROWS = BATCH, 1, 1, 1
BURSTS = 5
BURST_SECONDS, WARM_UP_SECONDS = 2e-3, 0.3
MOST_SETS = 64
Call = Callable[[], Any]


# ---- kernels: what is measured


# Tensors of the data's dtype and size that each reads and writes at the least. Moments, and a network's output with a
# learned variance, are two; gradients are written in the same pass.
FURTHER = {
    "noising images": 1,
    "noising into tokens": 2,
    "loss of tokens": 3,
    "masked loss": 3,
    "hybrid loss": 4,
    "latents and noising": 4,
    "divergence": 4,
    "moments": 2,
}


@dataclass(frozen=True)
class Measurement:
    """One kernel at one size of 2^``exponent`` elements.

    Attributes:
        operation: "copy", "noising", "loss" (with its gradient, written in the same pass), "convert", "step",
            "step in CUDA", or one of ``FURTHER``.
        kind: "epsilon", "v", "flow" of noising and loss. A flow has a row a sample, the others rows of a table.
        noise: "exact", "fast" or "given"; "" where there is none.
    """

    operation: str
    kind: str
    noise: str
    dtype: str
    exponent: int

    @property
    def name(self) -> str:
        """As in triton_compiled.py."""
        return ", ".join(word for word in (f"{self.operation} {self.kind}".strip(), self.noise, self.dtype) if word)

    @property
    def shape(self) -> tuple[int, ...]:
        """Square images, or as near as powers of 2 come."""
        rest = self.exponent - (BATCH * CHANNELS).bit_length() + 1
        return BATCH, CHANNELS, 1 << rest // 2, 1 << (rest + 1) // 2

    @property
    def elements(self) -> int:
        return 1 << self.exponent

    @property
    def element_bytes(self) -> int:
        """Bytes that must move for an element: every input read once, every result written once."""
        tensors = {"copy": 2, "noising": 2, "loss": 2 + (self.kind in ("v", "flow")), "convert": 3} | FURTHER
        images = self.operation == "noising images"  # a byte each
        return (tensors.get(self.operation, 3) + (self.noise == "given")) * DTYPES[self.dtype].itemsize + images


def measurements(exponents: Sequence[int]) -> list[Measurement]:
    """All of them, those that tell most first."""
    kinds = [
        *(("noising", "", rng) for rng in ("exact", "fast", "given")),
        *(("loss", kind, rng) for kind in ("v", "epsilon", "flow") for rng in ("exact", "fast", "given")),
        *(("noising", "flow", rng) for rng in ("exact", "fast", "given")),
        *(("step", "", rng) for rng in ("exact", "given")),
        *(
            (("step in CUDA", "", rng) for rng in ("exact", "given"))
            if cuda.available and DEVICE.type == "cuda"
            else ()
        ),
        ("convert", "", ""),
    ]
    found = [Measurement("copy", "", "", dtype, exponent) for exponent in exponents for dtype in ("fp32", "bf16")]
    rest = [
        Measurement(*kind, dtype, exponent) for exponent in exponents for dtype in ("bf16", "fp32") for kind in kinds
    ]
    noised = [name for name in FURTHER if name not in ("divergence", "moments")]
    rest += [
        Measurement(name, "", "exact" if name in noised else "", "bf16", exponent)
        for exponent in sorted(exponents)[-2:]
        for name in FURTHER
    ]

    def tier(m: Measurement) -> int:
        large = m.exponent in sorted(exponents)[-2:]
        return 2 * (not large) + (m.dtype != "bf16" or m.noise == "given")

    return found + sorted(rest, key=tier)


def calls(m: Measurement, sets: int, filled: bool = True) -> list[Call]:
    """The same call on each of so many sets of operands."""
    return [_call(m, seed, filled) for seed in range(sets)]


def _call(m: Measurement, seed: int, filled: bool) -> Call:
    dtype = DTYPES[m.dtype]

    def data() -> torch.Tensor:
        return (torch.randn if filled else torch.empty)(m.shape, device=DEVICE, dtype=dtype)

    def table(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=DEVICE) + 0.1

    x = data()
    if m.operation == "copy":
        return lambda: torch.empty_like(x).copy_(x)
    if m.kind == "flow":
        rows: list[Any] = [table(*ROWS) for _ in range(3)]
    else:
        index = torch.randint(0, 1000, ROWS, device=DEVICE)
        rows = [Gathered(column, index) for column in table(1000, 8).unbind(1)[:3]]
    n: Any = None
    if m.noise == "given":
        n = data()
    elif m.noise:
        n = ops.Philox(torch.tensor([seed], device=DEVICE), rng=m.noise)
    if m.operation == "noising":
        return lambda: operations.noise(x, n, *rows[:2], 0.0, None, False)[0]
    if m.operation in FURTHER:
        return _further(m.operation, x, n, rows)
    y = data()
    if m.operation == "convert":
        return lambda: operations.convert(y, x, *rows[:2])
    if m.operation.startswith("step"):
        row = peers.sampling_plan("v_prediction").table[peers.STEP].float().to(DEVICE)
        backend = operations if m.operation == "step" else cuda
        return lambda: backend.step(x, y, None, 1.0, row, 1.0, (), n, None, dtype, (False, False))[0]
    p, q, weight = rows
    y.requires_grad_()
    x0, p = (None, None) if m.kind == "epsilon" else (x, p)
    return lambda: operations.loss(y, x0, n, p, q, None, weight, None, None, "mse", "none", "mean")


def _further(operation: str, x: torch.Tensor, n: Any, rows: list[Any]) -> Call:
    """``x`` [B, C, H, W], also cut into the patches of tokens, [B, C, h, 2, w, 2]; rows of a table."""
    b, c, h, w = x.shape
    order, wide = TOKENS["c p q"], torch.cat([x, -x.square()], 1)
    p, q, weight = rows
    if operation == "noising images":
        images = ((x.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
        return lambda: operations.noise(images, n, p, q, 0.0, None, False, x.dtype)[0]
    if operation == "moments":
        one = (b, 1, 1, 1)
        other = -x
        return lambda: operations.row_moments(x, other, one, one, torch.float32)
    if operation == "latents and noising":
        one, xi = torch.ones(1, 1, 1, 1, device=x.device), ops.Philox(n.seed, 0, 7)
        how = wide, xi, one, one, n, p, q, -30.0, 20.0, x.dtype, False
        return lambda: operations.posterior(*how)[:2]
    wide.requires_grad_()
    if operation == "divergence":
        even = torch.ones(b, 1, 1, 1, device=x.device)
        return lambda: operations.kl_normal(wide, even, -30.0, 20.0, "mean")
    if operation == "hybrid loss":
        scale, least, most = (torch.full((b, 1, 1, 1), value, device=x.device) for value in (1.0, -2.0, 1.0))
        how = None, n, None, q, scale, least, most, least, None, scale, weight, True, "mean"
        return lambda: operations.gaussian_kl(wide, *how)
    data = x if operation == "masked loss" else x.view(b, c, h // 2, 2, w // 2, 2)
    rows = [Gathered(row.column, row.index.view(b, *(1,) * (data.ndim - 1))) for row in rows]
    if operation == "noising into tokens":
        return lambda: operations.noise(data, n, *rows[:2], 0.0, None, False, None, order)[0]
    mask = None
    if operation == "masked loss":
        prediction, mask = torch.randn_like(x).requires_grad_(), torch.rand(b, 1, h, w, device=x.device) < 0.5
    else:
        prediction = empty_in_order(tuple(data.shape), order, x.dtype, x.device).normal_().requires_grad_()
    how = data, n, *rows[:2], None, rows[2], None, mask, "mse", "none", "mean"
    return lambda: operations.loss(prediction, *how)


# ---- what is launched, and what it compiles to


@contextlib.contextmanager
def launched(run: bool = True) -> Iterator[list[tuple[launch.Kernel, tuple]]]:
    """Collects (kernel, key) of every launch in the block; where ``run`` is false, none happens."""
    found: list[tuple[launch.Kernel, tuple]] = []
    before = launch.Kernel.__call__

    def call(self, device, grid, arguments, constants, *more, **options):
        key = self.key(arguments, constants, None)
        found.append((self, key))
        if philox.draws_on_host() and (captured := self.of_capture(key)) is not None:
            found.append((self, captured))  # which is loaded along
        if run:
            return before(self, device, grid, arguments, constants, *more, **options)
        if self is coefficients and arguments[1] is not None:
            arguments[1].zero_()  # times, which are looked up
        return None

    launch.Kernel.__call__ = call
    try:
        yield found
    finally:
        launch.Kernel.__call__ = before


def name_of(kernel: launch.Kernel, key: tuple) -> str:
    """A short name for what is compiled."""
    return f"{kernel.name}-{hashlib.sha1(repr(key[:3]).encode()).hexdigest()[:10]}"


def needed(exponents: Sequence[int]) -> tuple[dict[str, tuple[str, tuple]], list[str]]:
    """(name -> (kernel's name, key) of all that the other commands launch, in that order; what could not be called)"""
    errors = []

    def call(name: str, what: Call) -> None:
        try:
            what()
        except Exception as error:
            errors.append(f"{name}: {_line(error)}")

    with launched(run=False) as found:
        for _, check in smoke_checks():
            with contextlib.suppress(Exception):  # nothing was computed, so nothing is right
                check()
        for m in measurements(exponents):
            call(m.name, lambda: calls(m, 1, filled=False)[0]())  # noqa: B023, it is called at once
        for case in step_cases(exponents):
            call(case.name, lambda: _step("fastdiff", case, 1)[0]())  # noqa: B023
            call(f"sampler step {case.name}", lambda: _sampler_step(case, 0)())  # noqa: B023
    return {name_of(kernel, key): (kernel.name, key) for kernel, key in found}, errors


def _compiled(task: tuple[str, tuple[str, tuple], GPUTarget]) -> dict[str, Any]:
    """Compiles one kernel, and its launcher."""
    name, (kernel_name, key), target = task
    kernel, start = KERNELS[kernel_name], time.perf_counter()
    try:
        compiled = kernel.compile(key, target)
        CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:
        return {"name": name, "error": _line(error)}
    found = {"name": name, "seconds": time.perf_counter() - start}
    constants = dict(zip(kernel.constants, key[2]))
    elements = constants.get("R", 1) * constants.get("C", constants.get("BLOCK", 1))
    with contextlib.suppress(Exception):  # no disassembler
        code = machine_code(compiled)
        threads = 32 * kernel.options(key[2])["num_warps"]
        found["instructions"] = code["instructions"] / (elements / threads)
        found |= {name: code[name] for name in ("registers", "spills", "wide_loads", "wide_stores")}
    return found


def compile_all(exponents: Sequence[int], processes: int) -> bool:
    """Every kernel that the other commands launch, each in one of several processes."""
    # They are forked before this one initialises CUDA, and never do so themselves.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        tasks, errors = needed(exponents)
        target = triton.runtime.driver.active.get_current_target()
        for found in pool.imap_unordered(_compiled, [(*task, target) for task in tasks.items()]):
            gpu_records.append("compiled", **found)
            if "error" in found:
                errors.append(f"{found['name']}: {found['error']}")
    print(*errors, f"{len(tasks)} kernels, {len(errors)} failed", sep="\n")
    return not errors


@contextlib.contextmanager
def compilations(command: str) -> Iterator[None]:
    """Records how many kernels and launchers had to be compiled in the block: 0 where ``compile`` was there before."""
    counts = {"kernels": 0, "launchers": 0}
    build, knobs = triton.runtime.build._build, triton.knobs.compilation
    before = knobs.listener

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["kernels"] += not cache_hit

    def counted(*arguments: Any, **options: Any) -> Any:
        counts["launchers"] += 1
        return build(*arguments, **options)

    knobs.listener, triton.runtime.build._build = listener, counted
    try:
        yield
    finally:
        knobs.listener, triton.runtime.build._build = before, build
        gpu_records.append("compilations", command=command, **counts)


# ---- smoke: right numbers

NORMALS = 4, 2**18


def smoke_checks() -> list[tuple[str, Call]]:
    """(name, what raises where a kernel gives other numbers than the reference on the CPU)"""
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    found: list[tuple[str, Call]] = [("exact noise has the bits of the CPU", _check_noise)]
    found += [
        (f"loss and gradient, {dtype}, {layout}", lambda d=DTYPES[dtype], f=layouts[layout]: _check_loss(d, f))
        for dtype in DTYPES
        for layout in layouts
    ]
    return [*found, ("sampler step", _check_step), ("graph of a training step", _check_graph)]


def _check_noise() -> None:
    got = operations.normal(5, NORMALS, 3, 7, device=DEVICE)
    _same(got, reference.normal(5, NORMALS, 3, 7))


def _check_loss(dtype: torch.dtype, layout: torch.memory_format) -> None:
    shape, cpu = (4, 4, 32, 32), torch.Generator().manual_seed(1)
    x0, prediction = (torch.randn(shape, generator=cpu).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    p, q, weight = (torch.rand(4, 1, 1, 1, generator=cpu) + 0.1 for _ in range(3))

    def run(backend: Any, device: Any, dtype: torch.dtype, rows_dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = prediction.detach().clone().to(device, dtype).requires_grad_()
        rows = [row.to(device, rows_dtype) for row in (p, q, weight)]
        how = rows[0], rows[1], None, rows[2], None, None, "mse", "none", "mean"
        loss = backend.loss(leaf, x0.to(device, dtype), ops.Philox(9, 2), *how)
        loss.backward()
        return [loss.detach().cpu(), leaf.grad.cpu()]

    got = run(operations, DEVICE, dtype, torch.float32)
    with fastdiff.use_backend("reference"):
        want, exact = run(reference, "cpu", dtype, torch.float32), run(reference, "cpu", torch.float64, torch.float64)
    for g, w, e in zip(got, want, exact):
        _as_good(g, w, e)


def _check_step() -> None:
    cpu = torch.Generator().manual_seed(2)
    x, m = (torch.randn(4, 4, 32, 32, generator=cpu) for _ in range(2))
    row = peers.sampling_plan("v_prediction").table[peers.STEP].float()
    how = {"clip": 1.0, "noise": ops.Philox(3, stream=20), "return_entry": False}
    got = ops.step(x.to(DEVICE), m.to(DEVICE), row.to(DEVICE), **how)
    with fastdiff.use_backend("reference"):
        want, exact = ops.step(x, m, row, **how), ops.step(x.double(), m.double(), row.double(), **how)
    for g, w, e in zip(got[:2], want[:2], exact[:2]):
        _as_good(g.cpu(), w, e)


def _check_graph() -> None:
    """Replayed it gives the numbers of the same step taken eagerly, and others the next time."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", weighting=fastdiff.MinSNR(5.0))
    x0 = torch.randn(8, 4, 32, 32, device=DEVICE)
    network = torch.rand(4, 1, 1, device=DEVICE).requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        network.grad = None
        noised = objective.noise(x0, keep_noise=False)
        loss = objective.loss(network * noised.x_t, noised)
        loss.backward()
        return loss.detach(), noised.x_t, network.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.cuda.manual_seed(11)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append([value.clone() for value in captured])
    assert not torch.equal(seen[0][1], seen[1][1]), "two replays have the same noise"
    torch.cuda.manual_seed(11)
    for values in seen:
        for got, want in zip(values, step()):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def _same(got: torch.Tensor, want: torch.Tensor) -> None:
    differ = int((got.cpu() != want).sum())
    assert not differ, f"{differ} of {want.numel()} elements differ"


def _as_good(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    """Within twice the reference's own largest relative error, plus one ulp, as in the tests."""
    assert got.dtype == want.dtype and got.shape == want.shape
    info, exact = torch.finfo(got.dtype), exact.double()
    size = exact.abs().clamp(min=info.tiny)
    error, reference_error = (float(((t.double() - exact).abs() / size).max()) for t in (got, want))
    assert error <= 2 * reference_error + info.eps, f"error {error:.3g}, the reference's {reference_error:.3g}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN in the block, so that what nobody wrote is not taken for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def smoke() -> bool:
    passed = True
    with compilations("smoke"), poisoned():
        for name, check in smoke_checks():
            error = ""
            try:
                check()
            except Exception as caught:
                error, passed = _line(caught), False
            gpu_records.append("smoke", name=name, passed=not error, line=error)
            print(f"{'passed' if not error else 'FAILED'}  {name}  {error}")
    return passed


# ---- times


class Bursts:
    """Times of calls that are queued behind a sleeping kernel, so that the GPU has them all before it begins."""

    def __init__(self) -> None:
        self._timer = Timer(DEVICE)
        begun, x = time.perf_counter(), torch.empty(2**24, dtype=torch.uint8, device=DEVICE)
        while time.perf_counter() - begun < WARM_UP_SECONDS:  # until the clocks are up
            x.copy_(x.flip(0))
            self._timer.synchronize()

    def measure(self, made: Sequence[Call], expected: float, bursts: int = BURSTS, most: int = 50) -> dict[str, Any]:
        """``expected``: seconds of a call on the GPU, about; ``most``: calls in a burst, of which all launches must fit
        in the queue of a stream, which has about a thousand. What the calls return is kept for a round, so that results
        do not go to the same memory each time."""
        kept: list[Any] = [call() for call in made]

        def call(k: int) -> None:
            kept[k] = made[k]()

        host = self._timer.host_seconds(partial(call, 0))
        count = int(min(most, max(5, BURST_SECONDS / max(expected, 1e-6))))
        burst, found = [partial(call, k % len(made)) for k in range(count)], []
        gc.disable()
        try:
            for _ in range(bursts):
                seconds = self._timer.seconds(burst, host)
                if self._timer.queued:
                    found.append(seconds)
            wall = summary([self._timer.seconds(burst) for _ in range(3)])
        finally:
            gc.enable()
        values = {"calls": count, "sets": len(made), "host_us": 1e6 * host, "wall_us": 1e6 * wall.median}
        if not found:
            return values | {"gpu_us": None, "how": "not measured: it could not be launched ahead of the GPU"}
        spread = summary(found)
        return values | {
            **{"gpu_us": 1e6 * spread.median, "p20_us": 1e6 * spread.p20, "p80_us": 1e6 * spread.p80},
            **{"bursts": spread.rounds, "how": "GPU, queued behind a sleep"},
        }


def sets_for(call_bytes: int) -> int:
    """Sets of operands that are three times the cache together, and two at the least."""
    return max(2, min(MOST_SETS, -(-3 * cache_bytes(DEVICE) // call_bytes)))


def kernels(exponents: Sequence[int]) -> bool:
    bursts, passed = Bursts(), True
    known = {record["name"]: record for record in _records("compiled")}
    gpu = gpu_of(torch.cuda.get_device_name(DEVICE))
    with compilations("kernels"):
        for m in measurements(exponents):
            moved = m.elements * m.element_bytes
            values = {"name": m.name, "elements": m.elements, "bytes": moved}
            try:
                sets = sets_for(moved)
                made = calls(m, sets)
                with launched() as found:
                    made[0]()
                values |= bursts.measure(made, moved / 3e12)
                values["cache"] = "rotated past it" if sets * moved >= 3 * cache_bytes(DEVICE) else "part of it in L2"
                values["launches"] = [kernel.name for kernel, _ in found]
                code = known.get(name_of(*found[0]), {}) if len(found) == 1 else {}
                values |= {"instructions": code.get("instructions"), "predicted": _predicted(code, m, gpu)}
                del made
            except Exception as error:
                values["error"], passed = _line(error), False
            gpu_records.append("kernel", **values)
            print(json.dumps(values))
    gpu_records.append("clocks", after="kernels", nvidia_smi=_nvidia_smi())
    return passed


def _predicted(code: dict[str, Any], m: Measurement, gpu: GPU | None) -> float | None:
    """The share of the copy ceiling that the roofline gives; None without the kernel's code or for another GPU."""
    if gpu is None or "instructions" not in code:
        return None
    return share_of_copy(code["instructions"], m.element_bytes, gpu, code["registers"])


def _records(kind: str) -> list[dict[str, Any]]:
    name = os.environ.get("FASTDIFF_RECORDS")
    return [r for r in gpu_records.load(Path(name)) if r["record"] == kind] if name else []


# ---- whole training steps


def step_cases(exponents: Sequence[int]) -> list[Case]:
    """Those that tell most first: of the second largest size, of the smallest, and of one sample."""
    sizes = sorted(exponents)
    shapes = [Measurement("copy", "", "", "bf16", exponent).shape for exponent in (sizes[-2:][0], sizes[0])]
    kinds = ("v_prediction", "epsilon", "flow")
    return [
        Case("training step", kind, "bf16", shape)
        for shape in dict.fromkeys((*shapes, (1, 4, 32, 32)))
        for kind in kinds
    ]


def _step(peer: str, case: Case, sets: int) -> list[Call]:
    """The same step on each of so many sets of operands."""
    call = peers.build(peer, case, DEVICE)
    return [partial(call, operands(case.shape, case.dtype, DEVICE, seed)) for seed in range(sets)]


def _sampler_step(case: Case, seed: int) -> Call:
    """The same step again and again of a run, as ``fastdiff.sample`` makes it, with noise."""
    made, middle = operands(case.shape, case.dtype, DEVICE, seed), 5
    table = peers.sampling_plan("v_prediction").table
    run = ops.trajectory(made.x0, table, clip=1.0, philox=ops.Philox(seed), reuse=True)
    return lambda: run.step(middle, made.prediction, False, philox.Stream.STEP + middle, 1)


def steps(exponents: Sequence[int], compile_seconds: float) -> bool:
    """``compile_seconds``: torch.compile begins no further step after so many seconds of this command."""
    begun, bursts, passed = time.perf_counter(), Bursts(), True
    cases, made = step_cases(exponents), {}

    def measure(case: Case, peer: str) -> bool:
        values = {"peer": peer, "kind": case.kind, "dtype": case.dtype, "shape": case.shape, "elements": case.elements}
        try:
            ready = _step(peer, case, min(8, sets_for(5 * case.tensor_bytes)))
            values |= bursts.measure(ready, 5 * case.tensor_bytes / 1e12, most=10)
            made[case, peer] = ready[0]
        except Exception as error:
            values["error"] = _line(error)
        gpu_records.append("step", **values)
        print(json.dumps(values))
        return "error" not in values

    with compilations("steps"):
        for case in cases:
            for peer in ("fastdiff", "eager"):
                passed &= measure(case, peer)
        for case in dict.fromkeys((cases[0], cases[-1])):  # large data, and one sample
            made_of = {"kind": case.kind, "dtype": case.dtype, "shape": case.shape, "elements": case.elements}
            count = min(8, sets_for(3 * case.tensor_bytes))
            ready = [_sampler_step(case, seed) for seed in range(count)]
            values = made_of | bursts.measure(ready, 3 * case.tensor_bytes / 1e12, most=10)
            gpu_records.append("sampler step", **values)
            print(json.dumps(values))
    with peers.many_graphs():
        for case in cases:
            if time.perf_counter() - begun < compile_seconds:
                passed &= measure(case, "compile")
    for (case, peer), call in made.items():
        if case.shape == cases[0].shape:
            gpu_records.append("launches", peer=peer, kind=case.kind, shape=case.shape, launches=_launches(call))
    return passed


def _launches(call: Call) -> int | None:
    """How many kernels a call runs on the GPU, those of PyTorch too, by its profiler; None where it sees none."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize(DEVICE)
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    except Exception as error:
        print(f"no launches counted: {_line(error)}")
        return None
    return len(events) or None


# ---- hardware counters

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "InstructionStats")
METRICS = (
    *("gpu__time_duration.sum", "smsp__inst_executed.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler", "not supported")


def counted(exponents: Sequence[int]) -> list[Measurement]:
    kinds = (("noising", "", "exact"), ("noising", "", "fast"), ("loss", "v", "exact"), ("loss", "epsilon", "exact"))
    return [Measurement(*kind, "bf16", sorted(exponents)[-2:][0]) for kind in kinds]


def once(exponents: Sequence[int]) -> bool:
    """One launch each of what is counted."""
    for m in counted(exponents):
        calls(m, 1)[0]()
    torch.cuda.synchronize(DEVICE)
    return True


def counters(exponents: Sequence[int]) -> int:
    """Run ``once`` under ncu, with the GPU's clocks as they are."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            "ncu",
            "--clock-control",
            "none",
            "--csv",
            "--page",
            "raw",
            "--print-units",
            "base",
            "--log-file",
            str(log),
        ]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--metrics", ",".join(METRICS)]
        command += ["--kernel-name", "regex:^(affine|loss)$", sys.executable, str(Path(__file__).resolve()), "once"]
        done = subprocess.run([*command, "--exponents", *map(str, exponents)], capture_output=True, text=True)
        said = log.read_text(errors="replace") if log.exists() else ""
    print(done.stdout, done.stderr, said, sep="\n")
    rows = parsed(said)
    for m, row in zip(counted(exponents), rows):
        gpu_records.append("counters", name=m.name, elements=m.elements, bytes=m.elements * m.element_bytes, **row)
    if not rows and any(word in said + done.stdout + done.stderr for word in REFUSED):
        print("ncu may not read the counters here")
        return SKIPPED
    return 0 if len(rows) == len(counted(exponents)) else 1


def parsed(said: str) -> list[dict[str, Any]]:
    """What ncu's raw page has, a row a launch: {"kernel", "metrics": name -> [value, unit]}."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    names, units, *rows = csv.reader(lines)
    found = []
    for row in rows:
        metrics = {}
        for name, unit, value in zip(names, units, row):
            with contextlib.suppress(ValueError):
                if "__" in name:
                    metrics[name] = [float(value.replace(",", "")), unit]
        found.append({"kernel": dict(zip(names, row)).get("Kernel Name", ""), "metrics": metrics})
    return found


# ---- the machine


def machine() -> bool:
    doctor.show(as_json=False)
    print(f"fastdiff is {fastdiff.__file__}")
    available = torch.cuda.is_available()
    values: dict[str, Any] = {"doctor": doctor.report(), "fastdiff": fastdiff.__file__}
    if available:
        properties = torch.cuda.get_device_properties(DEVICE)
        names = ("name", "multi_processor_count", "L2_cache_size", "total_memory", "clock_rate", "memory_clock_rate")
        values["device"] = {name: getattr(properties, name, None) for name in names}
        values["triton"] = triton.__version__
        values["nvidia_smi"] = _nvidia_smi()
    else:
        print("there is no CUDA device")
    gpu_records.append("machine", **values)
    return available


def _nvidia_smi() -> str | None:
    """Driver, clocks, power and temperature as they are now, with the names of the columns."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["doctor", "compile", "smoke", "kernels", "steps", "counters", "once"])
    parser.add_argument("--exponents", type=int, nargs="+", default=EXPONENTS, help="sizes, as powers of 2")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--compile-seconds", type=float, default=45.0)
    options = parser.parse_args(arguments)
    if options.command == "counters":
        return counters(options.exponents)
    passed = {
        "doctor": machine,
        "compile": lambda: compile_all(options.exponents, options.processes),
        "smoke": smoke,
        "kernels": lambda: kernels(options.exponents),
        "steps": lambda: steps(options.exponents, options.compile_seconds),
        "once": lambda: once(options.exponents),
    }[options.command]()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
