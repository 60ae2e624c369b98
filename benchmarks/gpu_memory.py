"""Each kernel of the GPU backends in each of its ways, once, on small data, and whether the reference finds the same.
It is what compute-sanitizer watches; every tensor is an allocation of its own, so that the ends of each are seen.

    python benchmarks/gpu_memory.py --compile-only     first, without a GPU: all kernels, on all cores, into the cache
    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu_memory.py
    compute-sanitizer --tool initcheck --error-exitcode 9 python benchmarks/gpu_memory.py
    TRITON_INTERPRET=1 python benchmarks/gpu_memory.py --device cpu
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from asked import cuda, reference
from asked import triton as operations
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton_kernels import KERNELS

import fastdiff
from fastdiff import ops
from fastdiff.backends.triton import arguments as taken
from fastdiff.backends.triton import launch
from fastdiff.tensors import Gathered, as_tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EVEN, ODD, TILES, FRAMES = (2, 4, 8, 8), (3, 2, 33), (2, 1301), (2, 3, 4, 7)  # TILES: several, the last not full
FAST = 1e-3  # the largest difference of a fast normal from the exact one
# The reference, with the functions that only the Triton backend has: what is expected.
EXPECTED = SimpleNamespace(
    **{
        name: getattr(reference, name)
        for name in (
            *("noise", "noise_and_target", "loss", "gaussian_kl", "convert", "row_moments", "moments_gradient", "step"),
            *("posterior", "posterior_gradient", "kl_normal", "kl_normal_gradient"),
            *("normal", "uniform"),
        )
    },
    evaluate=lambda program, t, dtype: [row.to(dtype) for row in program.run(t)],
)


@dataclass(frozen=True)
class Case:
    """``call(backend, *arguments)`` gives tensors. ``near``: how far from the reference's they may be, relative to the
    largest, besides a rounding to their dtype; 0: no bit apart."""

    name: str
    call: Callable[..., Any]
    arguments: tuple
    near: float = 0.0
    backend: Any = operations


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from _noising()
    yield from _losses()
    yield from _moments()
    yield from _steps()
    yield from _generators()
    yield from _gaussians()
    yield from _latents()


def _generators() -> Iterator[Case]:
    def uniform(backend: Any, *given: Any) -> Any:
        return (backend.uniform(*given[:-1], given[-1].device),)

    def normal(backend: Any, *given: Any) -> Any:
        return (backend.normal(*given[:-1], device=given[-1].device),)

    like = torch.zeros(1)  # whose device is theirs
    for kind, seed in (("number", 5), ("tensor", torch.tensor([-5]))):
        yield Case(f"uniforms, seed a {kind}", uniform, (seed, 200, 1, 2**33, like))
        for shape in ((3, 33), (2, 1, 1300)):
            yield Case(f"normals {shape}, seed a {kind}", normal, (seed, shape, 3, 2**33, like))
    for dtype in (FP32, torch.float64):
        flow = fastdiff.Objective(fastdiff.RectifiedFlow(3.0), "flow", "cosmap")._coefficients.program()
        given = flow, torch.rand(200, dtype=dtype), FP32
        yield Case(f"rows of a flow, {dtype}", lambda backend, *given: backend.evaluate(*given), given)


def _noising() -> Iterator[Case]:
    def noise(backend: Any, *given: Any) -> Any:
        return backend.noise(*given)

    def target(backend: Any, *given: Any) -> Any:
        return backend.noise_and_target(*given)

    def backward(backend: Any, x0: Tensor, n: Tensor, *given: Any) -> Any:
        leaves = [x0.clone().requires_grad_(), n.clone().requires_grad_()]
        return torch.autograd.grad(backend.noise(*leaves, *given)[0].float().sum(), leaves)

    for (shape, rows), dtype in zip(
        [(EVEN, (2, 1, 1, 1)), (ODD, (3, 1, 1)), (TILES, (2, 1)), (FRAMES, (2, 1, 4, 1)), (ODD, (1, 1, 1))],
        [BF16, FP32, FP16, FP32, BF16],
    ):
        x0, given, (alpha, sigma, p, q) = data(shape, dtype), data(shape, dtype), _rows(4, rows)
        offset = 0.1 if len(shape) > 2 else 0.0
        exact, fast = (ops.Philox(7, 2**33, offset=offset, rng=rng) for rng in ("exact", "fast"))
        other = ops.Philox(torch.tensor([7]), 1, 2)
        for name, n, near in (("given", given, 0.0), ("exact", exact, 0.0), ("fast", fast, FAST)):
            where = f"{name} {tuple(shape)} rows {tuple(rows)}"
            yield Case(f"noising, {where}", noise, (x0, n, alpha, sigma, 0.0, None, False), near)
            yield Case(f"noising, kept, {where}", noise, (x0, n, alpha, sigma, 0.1, other, True), near)
            yield Case(f"with target, {where}", target, (x0, n, alpha, sigma, 0.0, None, False, p, q), near)
        yield Case(f"noising, perturbed {shape}", noise, (x0, exact, alpha, sigma, 0.1, given, False))
    index, table = torch.tensor([1, 9, 0]).view(3, 1, 1), torch.randn(9, 4)  # one is out of range
    alpha, sigma = Gathered(table[:, 1], index), Gathered(table[:, 3], index)
    x0, n = data(ODD, BF16), data(ODD, FP32)
    yield Case("noising, gathered", noise, (x0, n, alpha, sigma, 0.0, None, False))
    one = torch.tensor(3).view(1, 1, 1)
    yield Case("noising, one gathered", noise, (x0, n, *(Gathered(c, one) for c in table.t()[:2]), 0.0, None, False))
    alpha, sigma = _rows(2, (3, 1, 1))
    unaligned = data((199,), FP32)[1:].view(3, 2, 33)
    yield Case("noising, not aligned", noise, (unaligned, n, alpha, sigma, 0.0, None, False))
    yield Case("noising, backward", backward, (x0, n, alpha, sigma, 0.0, None, False))
    yield Case("convert", lambda backend, *given: (backend.convert(*given),), (x0, n, alpha, sigma))


def _losses() -> Iterator[Case]:
    def loss(backend: Any, upstreams: tuple, prediction: Tensor, *given: Any) -> Any:
        """With the gradients of the prediction and the weight for each upstream gradient."""
        found = []
        for upstream in upstreams:
            values = [prediction, *given]
            values[0], values[6] = (values[k].clone().requires_grad_() for k in (0, 6))
            result = backend.loss(*values)
            gradients = torch.autograd.grad(result, (values[0], values[6]), torch.full_like(result, upstream))
            found += [result.detach(), *gradients]
        return found

    def case(name, shape, rows, dtype, *, x0=True, n=None, mask=None, how=("mse", "none", "mean"), upstreams=(1.0,)):
        p, q, scale, weight, c = (row.abs() + 0.1 for row in _rows(5, rows))
        n = data(shape, dtype) if n is None else n
        where = data(shape, dtype) if x0 else None
        scale = None if how[0] == "mse" else scale
        arguments = upstreams, data(shape, dtype), where, n, p if x0 else None, q, scale, weight, c, mask, *how
        near = 1e-5 + (FAST if getattr(n, "rng", "") == "fast" else 0)
        return Case(f"loss, {name}, {' '.join(how)}", loss, arguments, near)

    even, odd = (EVEN, (2, 1, 1, 1)), (ODD, (3, 1, 1))
    for function in ("mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"):
        yield case("even", *even, BF16, how=(function, "none", "mean"))
    for x0, rng in itertools.product((True, False), ("given", "exact", "fast")):
        n = None if rng == "given" else ops.Philox(3, 1, offset=0.1, rng=rng)
        yield case(f"{rng}, x0 {x0}", *even, BF16, x0=x0, n=n)
        yield case(f"several tiles, {rng}", TILES, (2, 1), FP32, x0=x0, n=None if n is None else ops.Philox(3, rng=rng))
    # 0.25 is new, then what came last; for 0 nothing is written ahead.
    yield case("scaled", *even, BF16, upstreams=(1.0, 0.25, 0.25, 0.0, 1.0))
    for reduction in ("mean", "sum", "none"):
        yield case("float16", *odd, FP16, how=("mse", "none", reduction))
        yield case("one row", ODD, (1, 1, 1), FP32, how=("mse", "none", reduction))
    index, table = torch.tensor([1, 8, 0]).view(3, 1, 1), torch.randn(9, 4)
    columns = [Gathered(table[:, k], index) for k in range(2)]
    gathered = data(ODD, BF16), data(ODD, BF16), data(ODD, FP32), *columns, None, torch.rand(3, 1, 1), None, None
    yield Case("loss, gathered", loss, ((1.0,), *gathered, "mse", "none", "mean"), 1e-5)
    yield case("frames", FRAMES, (2, 1, 4, 1), BF16)
    yield case("a row an element", (70, 2), (70, 2), FP32)
    for normalization, reduction in [("none", "sum"), *itertools.product(("row", "global"), ("mean", "none"))]:
        how = "mse", normalization, reduction
        strided = (torch.rand(3, 1, 66) < 0.7)[..., ::2]
        yield case("strided mask", *odd, FP32, mask=strided, how=how)
        yield case("mask by sample", *even, BF16, mask=torch.rand(2, 1, 1, 1) + 0.1, how=how)
        yield case("mask, several tiles", TILES, (2, 1), FP32, mask=torch.rand(TILES), how=how)


def _gaussians() -> Iterator[Case]:
    def gaussian(backend: Any, output: Tensor, *given: Any) -> Any:
        """With the gradients of the network's output for two upstream gradients."""
        leaf = output.clone().requires_grad_()
        result = backend.gaussian_kl(leaf, *given)
        upstreams = torch.ones_like(result), torch.full_like(result, 0.25)
        return result.detach(), *(torch.autograd.grad(result, leaf, u, retain_graph=True)[0] for u in upstreams)

    for (shape, rows), learned, (bins, reduction) in itertools.product(
        ((EVEN, (2, 1, 1, 1)), (ODD, (3, 1, 1)), (TILES, (2, 1)), (FRAMES, (2, 1, 4, 1))),
        (True, False),
        ((True, "mean"), (False, "none")),
    ):
        dtype = FP32 if shape is TILES else BF16
        p, q, scale, weight, l_v, simple = (0.4 * row.abs() + 0.1 for row in _rows(6, rows))
        l_0, l_q = (row.clamp(-1, 1) for row in _rows(2, rows))
        widths = torch.tensor([-1.0, 0.2, 0.0, 1 / 255] * weight.numel())[: weight.numel()].view(rows) if bins else None
        output = data((shape[0], (1 + learned) * shape[1], *shape[2:]), dtype)
        n = ops.Philox(3, 1) if bins else data(shape, dtype)
        coefficients = p if bins else None, q, scale, l_0, l_v if learned else None, l_q, widths, weight, simple
        name = f"gaussian_kl, {tuple(shape)}{', learned' * learned}{', bins' * bins} {reduction}"
        yield Case(name, gaussian, (output, data(shape, dtype), n, *coefficients, not bins, reduction), 1e-5)


def _latents() -> Iterator[Case]:
    def latents(backend: Any, *given: Any) -> Any:
        return backend.posterior(*given)

    def gradient(backend: Any, *given: Any) -> Any:
        return (backend.posterior_gradient(*given),)

    def divergence(backend: Any, upstream: Tensor, *given: Any) -> Any:
        return backend.kl_normal(*given), backend.kl_normal_gradient(upstream, *given)

    for (shape, rows), dtype, kind in itertools.product(
        ((EVEN, (2, 1, 1, 1)), (ODD, (3, 1, 1)), (TILES, (2, 1)), (ODD, (3, 2, 1))),
        (BF16, FP32),
        ("given", "exact", "fast", "none"),
    ):
        moments = data((shape[0], 2 * shape[1], *shape[2:]), dtype)
        made = ops.Philox(3, 1, 7, 0.1 if len(shape) > 2 else 0.0, kind if kind == "fast" else "exact")
        xi = {"given": data(shape, dtype), "none": None}.get(kind, made)
        n = {"given": data(shape, FP32), "none": None}.get(kind, ops.Philox(3, 1, 0, 0.0, made.rng))
        shift, scale, alpha, sigma = _rows(4, rows)
        factors = (None, None) if n is None else (alpha, sigma)
        arguments = moments, xi, shift, scale, n, *factors, -30.0, 20.0, dtype, kind == "exact"
        where, near = f"{kind} {tuple(shape)} rows {tuple(rows)} {dtype}", 1e-5 + (FAST if kind == "fast" else 0)
        yield Case(f"latents, {where}", latents, arguments, near)
        d_z, d_x_t = data(shape, dtype), None if n is None else data(shape, dtype)
        yield Case(f"gradient of latents, {where}", gradient, (d_z, d_x_t, *arguments), near)
    for (shape, rows), reduction in itertools.product(
        ((EVEN, (2, 1, 1, 1)), (ODD, (3, 1, 1)), (TILES, (2, 1)), (ODD, (1, 2, 1)), (ODD, (3, 2, 1))),
        ("mean", "sum", "none"),
    ):
        moments = data((shape[0], 2 * shape[1], *shape[2:]), BF16 if reduction == "mean" else FP32)
        upstream, weight = data(rows if reduction == "none" else (), FP32), torch.rand(rows)
        name = f"kl_normal, {tuple(shape)} rows {tuple(rows)} {reduction}"
        yield Case(name, divergence, (upstream, moments, weight, -30.0, 20.0, reduction), 1e-5)


def _moments() -> Iterator[Case]:
    def sums(backend: Any, *given: Any) -> Any:
        return backend.row_moments(*given)

    def gradient(backend: Any, *given: Any) -> Any:
        return backend.moments_gradient(*given)

    for (shape, rows), dtype in zip(
        [(EVEN, (2, 1, 1, 1)), (ODD, (3, 1, 1)), (TILES, (2, 1)), (FRAMES, (2, 1, 4, 1)), (ODD, (1, 1, 1))],
        [BF16, FP32, FP16, FP32, BF16],
    ):
        a, b, upstream = data(shape, dtype), data(shape, dtype), tuple(_rows(8, rows))
        where = f"{tuple(shape)} rows {tuple(rows)}"
        of_one = (*(g if k in (0, 4, 6) else None for k, g in enumerate(upstream)),)
        yield Case(f"moments, {where}", sums, (a, b, rows, rows, FP32), 1e-5)
        yield Case(f"moments of one, {where}", sums, (a, None, rows, rows, FP32), 1e-5)
        yield Case(f"gradient of moments, {where}", gradient, (upstream, a, b, rows, rows, FP32, True, True))
        yield Case(f"gradient of moments of one, {where}", gradient, (of_one, a, None, rows, rows, FP32, True, False))


def _steps() -> Iterator[Case]:
    def step(backend: Any, *given: Any) -> Any:
        *given, copies = given
        x, seen = given[0], None
        if copies:
            seen = x.new_full((copies * x.shape[0], *x.shape[1:]), torch.nan)
        return *backend.step(*given, model_input=seen), seen

    backends = {"triton": operations} | ({"cuda": cuda} if cuda.available and torch.cuda.is_available() else {})
    for (name, backend), shape, dtype in itertools.product(backends.items(), (EVEN, ODD, TILES), (FP32, BF16, FP16)):
        x, m, uncond, z, v, *history = (data(shape, dtype) for _ in range(9))
        rows = data((shape[0], len(ops.COLUMNS)), FP32)
        scale = data((shape[0],) + (1,) * (len(shape) - 1), FP32)
        everything = (x, m, uncond, scale, rows, 0.5, tuple(history), z, v, dtype, (True, True), 2)
        made = (x, m, uncond, 2.5, rows[0], None, (), ops.Philox(3, 1, 20), None, dtype, (False, True), 1)
        least = (x, m, None, 1.0, rows[0], None, (), None, None, dtype, (False, False), 0)
        yield Case(f"step, {name}, everything {shape} {dtype}", step, everything, 1e-5, backend)
        yield Case(f"step, {name}, noise made {shape} {dtype}", step, made, 0.0, backend)
        yield Case(f"step, {name}, least {shape} {dtype}", step, least, 0.0, backend)


def data(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def _rows(number: int, shape: tuple[int, ...]) -> list[Tensor]:
    return [data(shape, FP32) for _ in range(number)]


def on(device: torch.device, value: Any, memory: dict[int, Tensor]) -> Any:
    """Arguments on a device, with their strides; what shares ``memory`` shares it there too."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in memory:
            whole = torch.empty(0, dtype=value.dtype).set_(storage)
            memory[storage.data_ptr()] = whole.to(device)
        return memory[storage.data_ptr()].as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, ops.Philox):
        return ops.Philox(on(device, value.seed, memory), value.sample_offset, value.stream, value.offset, value.rng)
    if isinstance(value, Gathered):
        return Gathered(*(on(device, part, memory) for part in value))
    return tuple(on(device, part, memory) for part in value) if isinstance(value, tuple) else value


def wrong(case: Case, device: torch.device) -> str:
    """How what is found on a device differs from the reference; empty where it does not."""
    plain = [as_tensor(a) if isinstance(a, Gathered) else a for a in case.arguments]
    results = case.call(case.backend, *on(device, case.arguments, {})), case.call(EXPECTED, *plain)
    found, expected = ([r for r in of if isinstance(r, Tensor)] for of in results)
    for k, (got, want) in enumerate(zip(found, expected)):
        got, exact = got.cpu().double(), want.double()
        if got.shape != exact.shape or not torch.equal(got.isnan(), exact.isnan()):
            return f"result {k}: another shape, or NaN elsewhere"
        off = (got - exact).abs().nan_to_num()
        size = exact.abs().nan_to_num()
        allowed = case.near * size.max() + (torch.finfo(want.dtype).eps * size if case.near else 0.0)
        if not bool((off <= allowed).all()):
            return f"result {k}: {float(off.max()):.3g} off"
    return "" if len(found) == len(expected) else "results are missing"


def variants(chosen: list[Case]) -> list[tuple[str, tuple]]:
    """(kernel, key) of all that the cases launch, on CPU tensors and without a launch."""
    found: dict[tuple[str, tuple], None] = {}

    def record(kernel: launch.Kernel, device: Any, grid: Any, arguments: tuple, constants: tuple) -> None:
        found[kernel.name, kernel.key(arguments, constants, None)] = None

    with (
        mock.patch.object(launch.Kernel, "__call__", record),
        mock.patch.object(taken, "runs_on", lambda device: True),
        mock.patch.object(launch, "has_approximate_instructions", lambda device: True),
    ):
        for case in chosen:
            case.call(operations, *case.arguments)
    return list(found)


def compile_one(kernel: str, key: tuple, architecture: int) -> None:
    KERNELS[kernel].compile(key, GPUTarget("cuda", architecture, 32))


def compile_all(chosen: list[Case], architecture: int) -> int:
    if launch.INTERPRETED:
        raise SystemExit("--compile-only compiles: unset TRITON_INTERPRET")
    wanted = variants(chosen)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, *variant, architecture) for variant in wanted]:
            done.result()
    print(f"{len(wanted)} kernels compiled for sm_{architecture}")
    return 0


def run(chosen: list[Case], device: torch.device) -> int:
    failed = 0
    for case in chosen:
        try:
            because = wrong(case, device)
        except Exception as error:
            because = f"{type(error).__name__}: {error}"
        failed += bool(because)
        print(f"FAILED  {case.name}: {because}" if because else f"ok      {case.name}", flush=True)
    print(f"{len(chosen)} cases, {failed} failed")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--architecture", type=int, default=90, help="of --compile-only")
    options = parser.parse_args(arguments)
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    chosen = [case for case in cases() if options.only in case.name]
    if not chosen:
        parser.error(f"no case is named {options.only!r}")
    return (
        compile_all(chosen, options.architecture) if options.compile_only else run(chosen, torch.device(options.device))
    )


if __name__ == "__main__":
    sys.exit(main())
