"""Runs on the CPU what Triton compiles the kernels to for an NVIDIA GPU: its PTX, all threads of a program in step.

    python tests/backends/ptx.py FILE    runs the kernels against the reference and writes what was found as JSON

It knows the instructions that these kernels consist of, and raises at any other. A branch is taken by all threads or by
none. Approximate instructions err at random, by as much as NVIDIA documents. What ptxas does after that is not seen,
nor are races: threads and programs come one after the other.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np
import torch
from asked import reference
from asked import triton as operations
from triton.backends.compiler import GPUTarget

from fastdiff import ops
from fastdiff.backends.triton import arguments as taken
from fastdiff.backends.triton import launch

THREADS = 128
TARGET = GPUTarget("cuda", 90, 32)
LANES = np.arange(THREADS)
_random = np.random.default_rng(0)


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.float32).view(np.uint32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """With one rounding: the product is exact in float64, the sum is rounded to odd there."""
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    pattern = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((np.abs(error) > 0) & (pattern % 2 == 0), pattern + towards, pattern).view(np.float64)


def to_bf16(values: np.ndarray) -> np.ndarray:
    pattern = values.view(np.uint32)
    rounded = (pattern.astype(np.uint64) + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def to_f16(pattern: np.ndarray) -> np.ndarray:
    return floats(pattern).astype(np.float16).view(np.uint16)


def _off(size: Any) -> np.ndarray:
    return size * _random.uniform(-1, 1, THREADS)


def _lg2(x: np.ndarray) -> np.ndarray:
    exact = np.log2(x.astype(np.float64))
    return exact + _off(np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(exact)))


FLOAT: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.fmax, "min": np.fmin,
    "neg": np.negative, "abs": np.abs, "fma": fma, "sqrt": lambda x: np.sqrt(x.astype(np.float64)), "lg2": _lg2,
    "sqrt.approx": lambda x: np.sqrt(x.astype(np.float64)) * (1 + _off(2.0**-23)),
    "rsqrt.approx": lambda x: 1 / np.sqrt(x.astype(np.float64)) * (1 + _off(2.0**-22.9)),
    "rcp": lambda x: 1 / x.astype(np.float64) * (1 + _off(2.0**-23)),
    "ex2": lambda x: np.exp2(x.astype(np.float64)) * (1 + _off(2.0**-22)),
    "sin": lambda x: np.sin(x.astype(np.float64)) + _off(2.0**-20.5),
    "cos": lambda x: np.cos(x.astype(np.float64)) + _off(2.0**-20.5),
}  # fmt: skip
INTEGER: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "xor": np.bitwise_xor, "and": np.bitwise_and,
    "or": np.bitwise_or, "not": np.invert, "neg": np.negative, "min": np.minimum, "max": np.maximum,
    "mad.lo": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << b.astype(a.dtype), "shr": lambda a, b: a >> b.astype(a.dtype),
    "div": lambda a, b: np.trunc(a / b).astype(a.dtype), "rem": lambda a, b: np.fmod(a, b),  # of 32 bits
    "prmt": lambda a, b, picks: _picked(a, b, picks),
    "bfe": lambda a, at, size: a << (32 - at - size) >> (32 - size),  # of 32 bits; a's sign is that of its top bit
}  # fmt: skip


def _picked(a: np.ndarray, b: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of a and b, each by a number of four bits."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for k in range(4):
        pick = picks >> np.uint32(4 * k) & np.uint32(15)
        assert (pick < 8).all(), "a byte's sign"
        result |= (both >> (8 * pick).astype(np.uint64) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * k)
    return result


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "neu": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "gtu": lambda a, b: ~(a <= b),
}  # fmt: skip
WIDTH = {"pred": bool, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.uint32} | {
    f"{kind}{size}": getattr(np, f"uint{size}") for kind in "us" for size in (8, 16, 32, 64)
}
SIGNED = {np.uint16: np.int16, np.uint32: np.int32, np.uint64: np.int64}
CONVERT = {
    "rn.f32.u32": lambda a: bits(a),
    "rn.f32.u16": lambda a: bits(a),
    "rn.f32.s32": lambda a: bits(a.view(np.int32)),
    "u32.u64": lambda a: a.astype(np.uint32),
    "u64.u32": lambda a: a.astype(np.uint64),
    "u32.u16": lambda a: a.astype(np.uint32),
    "u16.u32": lambda a: a.astype(np.uint16),
    "s64.s32": lambda a: a.view(np.int32).astype(np.int64).view(np.uint64),
    "f32.f16": lambda a: bits(a.view(np.float16)),
    "rn.f16.f32": lambda a: to_f16(a),
    "rn.f16x2.f32": lambda a, b: (to_f16(a).astype(np.uint32) << np.uint32(16)) | to_f16(b),
    "f32.bf16": lambda a: a.astype(np.uint32) << np.uint32(16),
    "rn.bf16.f32": lambda a: to_bf16(floats(a)),
    "rn.bf16x2.f32": lambda a, b: (to_bf16(floats(a)).astype(np.uint32) << np.uint32(16)) | to_bf16(floats(b)),
}


class Memory:
    """Tensors at addresses of their own, 2^36 apart; the program's shared memory lies at 0."""

    def __init__(self):
        self.buffers = [np.zeros(0, np.uint8)]

    def place(self, tensor: torch.Tensor) -> int:
        self.buffers.append(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy())
        return ((len(self.buffers) - 1) << 36) + tensor.storage_offset() * tensor.element_size()

    def at(self, address: int, size: int) -> np.ndarray:
        buffer, start = self.buffers[address >> 36], address % 2**36
        assert start + size <= len(buffer), "outside of the tensor"
        return buffer[start : start + size]


class Program:
    """The text of a kernel. ``run`` calls it for a grid, with the values of its parameters."""

    def __init__(self, ptx: str):
        head, body = re.sub(r"//.*", "", ptx[ptx.index(".entry") :]).split("\n{", 1)
        self.parameters = re.findall(r"\.param \.(\w+)[^,)]*?(\w+_param_\d+)", head)
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str | None, str, list[str]]] = []
        for line in body.splitlines():
            if label := re.fullmatch(r"\s*(\$\w+):\s*", line):
                self.labels[label[1]] = len(self.code)
                continue
            for statement in line.split(";"):
                # The braces of a block, not those of a vector.
                statement = re.sub(r"^\s*[{}]\s*(?=$|\.)", "", statement).strip()
                if statement and statement not in "{}" and not statement.startswith("."):
                    guard, name, rest = re.match(r"(@!?%p\d+)?\s*(\S+)\s*(.*)", statement).groups()
                    self.code.append((guard, name, re.findall(r"[{\[][^}\]]*[}\]]|[^\s,|]+(?:\|\S+(?=,))?", rest)))

    def run(self, grid: tuple[int, int], values: list[int], memory: Memory) -> None:
        parameters = dict(zip((name for _, name in self.parameters), values, strict=True))
        with np.errstate(all="ignore"):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    memory.buffers[0] = np.zeros(1 << 16, np.uint8)
                    Threads(parameters, memory, x, y).run(self)


class Threads:
    """A program's registers, and what its instructions do to them."""

    def __init__(self, parameters: dict[str, int], memory: Memory, x: int, y: int):
        self.parameters, self.memory = parameters, memory
        self.registers: dict[str, np.ndarray] = {"%tid.x": LANES.astype(np.uint32)}
        self.registers |= {f"%ctaid.{axis}": np.full(THREADS, k, np.uint32) for axis, k in (("x", x), ("y", y))}

    def get(self, operand: str, kind: Any) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        if operand == "global_smem":
            return np.zeros(THREADS, kind)
        if operand.startswith("%rs"):  # of a pair of which only one is there
            return np.full(THREADS, 0x7FC0, kind)
        value = int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)
        return np.full(THREADS, value % 2 ** (8 * np.dtype(kind).itemsize)).astype(kind)

    def run(self, program: Program) -> None:
        position = 0
        while position < len(program.code):
            guard, name, operands = program.code[position]
            position += 1
            active = np.ones(THREADS, bool)
            if guard:
                active = self.registers[guard.strip("@!")] ^ ("!" in guard)
            if name in ("ret", "bra", "bra.uni"):
                assert active.all() or not active.any(), "threads part"
                if active.any():
                    if name == "ret":
                        return
                    position = program.labels[operands[0]]
            elif not name.startswith(("bar.", "fence", "membar")):
                self.step(name.split("."), operands, active)

    def put(self, register: str, value: np.ndarray, active: np.ndarray) -> None:
        if register != "_":
            before = self.registers.get(register, value)
            self.registers[register] = np.where(active, value, before) if not active.all() else value

    def step(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        kind = WIDTH.get(name[-1])
        if name[0] == "prefetch":
            for address in self.addresses(operands[0])[active]:
                self.memory.at(int(address), 1)
            return None
        if name[0] in ("ld", "st", "atom"):
            return self.access(name, operands, active)
        if name[0] in ("ldmatrix", "stmatrix"):
            assert active.all() and "x4" in name and "trans" not in name
            return self.matrices(*(operands if name[0] == "ldmatrix" else operands[::-1]), name[0] == "ldmatrix")
        to, sources = operands[0], operands[1:]
        if name[0] == "mov" and "{" in to + sources[0]:
            return self.pair(kind, to, sources[0], active)
        if name[0] == "cvt":
            function = CONVERT[".".join(name[1:])]
            return self.put(to, function(*(self.get(s, WIDTH.get(name[-1], np.uint16)) for s in sources)), active)
        if name[0] == "selp":
            a, b = (self.get(s, kind) for s in sources[:2])
            return self.put(to, np.where(self.registers[sources[2]], a, b), active)
        if name[0] == "shfl":  # .sync.bfly or .sync.idx, in warps of 32
            lane = self.get(sources[1], np.uint32)
            source = LANES ^ lane if "bfly" in name else LANES // 32 * 32 + lane
            return self.put(to.split("|")[0], self.get(sources[0], kind)[source], active)
        values = [self.get(s, kind) for s in sources if s != "-1" or name[0] != "shfl"]
        if name[0] in ("mul", "mad") and name[1] in ("wide", "hi"):
            narrow, wide = (np.int32, np.int64) if name[-1][0] == "s" else (np.uint32, np.uint64)
            product = values[0].view(narrow).astype(wide) * values[1].view(narrow).astype(wide)
            result = product.view(np.uint64) if name[1] == "wide" else (product >> wide(32)).astype(np.uint32)
            return self.put(to, result + self.get(sources[2], np.uint64) if name[0] == "mad" else result, active)
        if name[0] == "mov":
            return self.put(to, values[0], active)
        if name[-1] == "f32":
            values = [floats(v) for v in values]
        elif name[-1][0] == "s":
            values = [v.view(SIGNED[kind]) for v in values]
        if name[0] == "setp":
            return self.put(to, COMPARE[name[1]](*values), active)
        if name[-1] == "f32":
            if "xorsign" in name:  # the smaller one in size, with the product's sign
                sign = (bits(values[0]) ^ bits(values[1])) & np.uint32(1 << 31)
                return self.put(to, bits(np.minimum(*map(np.abs, values))) | sign, active)
            approximate = f"{name[0]}.approx"
            function = FLOAT[approximate if "approx" in name and approximate in FLOAT else name[0]]
            return self.put(to, bits(function(*values)), active)
        function = INTEGER[f"{name[0]}.lo" if "lo" in name else name[0]]
        result = function(*values)
        self.put(to, result if kind is bool else result.view(kind), active)

    def pair(self, kind: Any, to: str, source: str, active: np.ndarray) -> None:
        half, size = (np.uint32, 32) if kind is np.uint64 else (np.uint16, 16)
        if "{" in source:
            low, high = (self.get(s, half).astype(kind) for s in re.findall(r"[%\w]+", source))
            return self.put(to, low | (high << kind(size)), active)
        whole = self.get(source, kind)
        low, high = re.findall(r"[%\w]+", to)
        self.put(low, whole.astype(half), active)
        self.put(high, (whole >> kind(size)).astype(half), active)

    def matrices(self, registers: str, place: str, loads: bool) -> None:
        """Four matrices of 8 rows of 16 bytes for each warp: a thread gives the address of a row, and a register has
        two elements of the row that is its thread's number over 4."""
        names, addresses = re.findall(r"[%\w]+", registers), self.addresses(place)
        found = np.zeros((4, THREADS), np.uint32) if loads else np.stack([self.registers[r] for r in names])
        for k in range(4):
            for row in range(0, THREADS, 4):  # the first of the four threads that have one
                giver = row // 32 * 32 + 8 * k + row % 32 // 4
                at = self.memory.at(int(addresses[giver]), 16).view(np.uint32)
                if loads:
                    found[k, row : row + 4] = at
                else:
                    at[:] = found[k, row : row + 4]
        if loads:
            self.registers |= dict(zip(names, found))

    def addresses(self, place: str) -> np.ndarray:
        base, _, more = place.strip("[] ").partition("+")
        return self.get(base.strip(), np.uint64).astype(np.int64) + int(more or 0)

    def access(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        kind, loads = WIDTH[name[-1]], name[0] != "st"
        if "param" in name:
            value = self.parameters[operands[1].strip("[] ")]
            return self.put(operands[0], np.full(THREADS, value).astype(kind), active)
        place, registers = (operands[1], operands[0]) if loads else operands
        address, registers = self.addresses(place), re.findall(r"[%\w]+", registers)
        size = np.dtype(kind).itemsize
        if loads:
            found = np.zeros((len(registers), THREADS), kind)
            stored = self.get(operands[2], kind) if name[0] == "atom" else None  # only additions
        else:
            found = np.stack([self.get(r, kind).astype(kind) for r in registers])
        for k in np.flatnonzero(active):
            at = self.memory.at(int(address[k]), size * len(registers)).view(kind)
            if loads:
                found[:, k] = at
                if stored is not None:
                    at += stored[k]
            else:
                at[:] = found[:, k]
        if loads:
            for register, value in zip(registers, found):
                self.put(register, value.astype(np.uint16) if size == 1 else value, active)


@contextmanager
def compiled() -> Iterator[None]:
    """In the block the Triton backend runs its compiled kernels, so, on CPU tensors."""

    def call(self, device, grid, arguments, constants):
        program = Program(self.compile(self.key(arguments, constants, None), TARGET).asm["ptx"])
        memory, values = Memory(), []
        for name, a in zip(self.runtime, arguments):
            if isinstance(a, torch.Tensor):
                values.append(memory.place(a))
            elif a is not None:
                values.append(int(bits(np.array([a]))[0]) if name in launch._FLOATS else int(a))
        program.run(grid, [*values, 0, 0], memory)  # and two that Triton adds

    before = launch.Kernel.__call__, taken.runs_on, launch.has_approximate_instructions
    launch.Kernel.__call__ = call
    taken.runs_on = launch.has_approximate_instructions = lambda device: True
    try:
        yield
    finally:
        launch.Kernel.__call__, taken.runs_on, launch.has_approximate_instructions = before


def found(case: str, name: str, got: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    largest = float((got.double() - want.double()).abs().max())
    return {
        "case": f"{case}: {name}", "name": name, "dtype": str(got.dtype), "largest": largest,
        "same": torch.equal(got, want), "relative": largest / float(want.double().abs().max()),
    }  # fmt: skip


def findings() -> Iterator[dict[str, Any]]:
    """For every kind of noise, dtype and layout: how far compiled kernels are from the reference, or that the bits are
    the same."""
    torch.manual_seed(0)
    layouts = [
        *(((2, 4, 32, 32), (2, 1, 1, 1)), ((2, 8), (2, 1)), ((1, 2, 3, 8, 13), (1, 1, 3, 1, 1))),
        *(((2, 3, 7, 5), (2, 1, 1, 1)), ((3, 5, 24), (3, 5, 1))),
    ]

    for dtype in (torch.bfloat16, torch.float32):
        for shape, rows in layouts:
            x0, m, given = (torch.randn(shape).to(dtype) for _ in range(3))
            alpha, sigma, p, q, weight = (torch.rand(rows) + 0.1 for _ in range(5))
            for kind, n in {"given": given, "exact": ops.Philox(99, 3), "fast": ops.Philox(99, 3, rng="fast")}.items():
                case = f"{kind} noise, {str(dtype)[6:]}, {'x'.join(map(str, shape))}"
                noised = x0, n, alpha, sigma, 0.0, None
                with compiled():
                    x_t, _ = operations.noise(*noised, False)
                    again, kept, target = operations.noise_and_target(*noised, True, p, q)
                want, wanted = reference.noise(*noised, True)
                yield found(case, "x_t", x_t, want)
                yield found(case, "x_t with its target", again, want)
                yield found(case, "target", target, reference.noise(x0, n, p, q, 0.0, None, False)[0])
                yield found(case, "noise", kept, wanted)
                for data in (x0, None):
                    how = n, None if data is None else p, q, None, weight, None, None, "mse", "none", "mean"
                    wanted = _gradients(reference.loss, m, data, how)
                    with compiled():
                        results = _gradients(operations.loss, m, data, how)
                    for name, got, want in zip(("loss", "gradient", "gradient of half"), results, wanted):
                        yield found(case + (", v" if data is not None else ", epsilon"), name, got, want)

    # The noise that a loss makes again: half the gradient of a sum of squares, for a prediction of 0.
    for shape, rows in layouts:
        zero, one, ids = torch.zeros(shape), torch.ones(rows), 5 - torch.arange(shape[0]) * 2**33
        for of, n in (("samples from 3", ops.Philox(99, 3)), ("sample ids", ops.Philox(99, ids))):
            with compiled():
                gradient = _gradients(
                    operations.loss, zero, None, (n, None, one, None, one, None, None, "mse", "none", "sum")
                )[1]
            yield found(
                f"exact noise, {of}, {'x'.join(map(str, shape))}",
                "noise of a loss",
                -0.5 * gradient,
                ops.materialize(n, shape, zero.device),
            )

    # The error functions, masks that are laid out otherwise than the data, and a sampler's step.
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape, rows, masked in (
            ((2, 4, 8, 16), (2, 1, 1, 1), (2, 1, 8, 16)),
            ((2, 3, 4, 6), (2, 1, 4, 1), (2, 1, 4, 6)),
            ((3, 5, 24), (3, 1, 1), (3, 5, 1)),
        ):
            x0, m, n = (torch.randn(shape).to(dtype) for _ in range(3))
            p, q, scale, weight, c = (torch.rand(rows) + 0.1 for _ in range(5))
            mask = torch.rand(masked) < 0.7
            for function in ("mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"):
                case = f"given noise, {function}, mask, {str(dtype)[6:]}, {'x'.join(map(str, shape))}"
                how = n, p, q, scale, weight, c, mask, function, "row", "mean"
                wanted = _gradients(reference.loss, m, x0, how)
                with compiled():
                    results = _gradients(operations.loss, m, x0, how)
                for name, got, want in zip(("loss", "gradient", "gradient of half"), results, wanted):
                    yield found(case, name, got, want)
            for bins in (False, True):
                case = (
                    f"exact noise, {'bins' if bins else 'divergences'}, {str(dtype)[6:]}, {'x'.join(map(str, shape))}"
                )
                how = _gaussian(rows, bins)
                wanted = _gradients(reference.gaussian_kl, torch.cat([m, n], 1), x0, how)
                with compiled():
                    results = _gradients(operations.gaussian_kl, torch.cat([m, n], 1), x0, how)
                for name, got, want in zip(("value", "gradient", "gradient of half"), results, wanted):
                    yield found(case, f"gaussian_kl's {name}", got, want)
            step = (x0, m, n, 2.5, torch.randn(18), 0.5, (n, m), ops.Philox(3, 1, 20), None, dtype, (True, True))
            with compiled():
                results = operations.step(*step)
            for got, want in zip(results, reference.step(*step)):
                yield found(f"exact noise, {str(dtype)[6:]}, {'x'.join(map(str, shape))}", "step", got, want)


def of_moments() -> Iterator[dict[str, Any]]:
    """The kernels of an autoencoder's moments: latents whose factors are numbers a sample and a channel, divergences
    of rows of each kind."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((2, 4, 8, 16), (2, 3, 7, 5), (3, 5, 24)):
            ones = (1,) * (len(shape) - 2)
            moments, given = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(dtype), torch.randn(shape).to(dtype)
            shift, scale = (torch.rand(1, shape[1], *ones) for _ in range(2))
            alpha, sigma, weight = (torch.rand(shape[0], 1, *ones) + 0.1 for _ in range(3))
            d_z, d_x_t = (torch.randn(shape).to(dtype) for _ in range(2))
            for kind, xi, n in (
                ("given", given, given.float()),
                ("exact", ops.Philox(99, 3, 7), ops.Philox(99, 3)),
                ("fast", ops.Philox(99, 3, 7, rng="fast"), ops.Philox(99, 3, rng="fast")),
                ("no", None, ops.Philox(99, 3)),
            ):
                case = f"{kind} noise, {str(dtype)[6:]}, {'x'.join(map(str, shape))}"
                arguments = moments, xi, shift, scale, n, alpha, sigma, -1.0, 1.5, dtype, True
                with compiled():
                    results = *operations.posterior(*arguments), operations.posterior_gradient(d_z, d_x_t, *arguments)
                wanted = *reference.posterior(*arguments), reference.posterior_gradient(d_z, d_x_t, *arguments)
                for name, got, want in zip(("z", "noised z", "its noise", "gradient of moments"), results, wanted):
                    yield found(case, name, got, want)
            for rows, reduction in ((weight, "mean"), (scale, "none"), (torch.rand(shape[:2] + ones), "sum")):
                case = f"{str(dtype)[6:]}, {'x'.join(map(str, shape))}, {reduction}"
                arguments = moments, rows, -1.0, 1.5, reduction
                upstream = torch.rand(rows.shape if reduction == "none" else ())
                with compiled():
                    results = operations.kl_normal(*arguments), operations.kl_normal_gradient(upstream, *arguments)
                wanted = reference.kl_normal(*arguments), reference.kl_normal_gradient(upstream, *arguments)
                for name, got, want in zip(("kl_normal", "gradient of kl_normal"), results, wanted):
                    yield found(case, name, got, want)


def _gaussian(rows: tuple[int, ...], bins: bool) -> tuple:
    """The other arguments of a hybrid loss. ``bins``: rows are of each kind."""
    p, q, scale, l_v, weight, simple_weight = (0.4 * torch.rand(rows) + 0.1 for _ in range(6))
    l_0, l_q = (2 * torch.rand(rows) - 1 for _ in range(2))
    widths = torch.tensor([-1.0, 0.2, 0.0, 1 / 255] * weight.numel())[: weight.numel()].view(rows) if bins else None
    return ops.Philox(99, 3), p, q, scale, l_0, l_v, l_q, widths, weight, simple_weight, False, "mean"


def _gradients(loss_of: Any, prediction: torch.Tensor, x0: torch.Tensor | None, how: tuple) -> list[torch.Tensor]:
    """The loss, its gradient as it was written ahead, and one for another upstream gradient."""
    leaf = prediction.clone().requires_grad_()
    loss = loss_of(leaf, x0, *how)
    gradients = [torch.autograd.grad(scaled, leaf, retain_graph=True)[0] for scaled in (loss, loss * 0.5)]
    return [loss.detach(), *gradients]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([*findings(), *of_moments()]))
